"""A whole Sessa layer beside the official layer on a GPU: forward and training step, time and peak memory.

    python benchmarks/bench_layer.py [--dtype bf16] [--graph] [--profile [--peerless]]

--profile prints what our layer launches: kernels by device time and operators by host time, per call.
The peer is the official package `sessa` where it is importable (its repository on PYTHONPATH); otherwise the official algorithm
in eager PyTorch with the same parameters, and the table says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import machine, write
from gpu import capture, event_ms, peak_bytes
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from sessa_deploy import SessaLayer

SHAPES = ((8, 2048, 768, 12), (1, 8192, 1024, 8))  # B, T, D, heads


class EagerLayer(nn.Module):
    """The official algorithm around our layer's parameters: T x T scores, masked softmax, one float32 triangular solve."""

    def __init__(self, layer: SessaLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer, mixer = self.layer, self.layer.mixer
        batch, tokens, width = x.shape
        a, g = layer.W_in(layer.ln(x)).chunk(2, -1)
        a = F.gelu(a)
        q, k, v = (proj(a).view(batch, tokens, -1, mixer.head_dim) for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
        theta = torch.arange(tokens, device=x.device)[:, None] * 10000.0 ** (-torch.arange(0, mixer.head_dim, 2, device=x.device) / mixer.head_dim)
        cos, sin = theta.cos()[None, :, None].to(x.dtype), theta.sin()[None, :, None].to(x.dtype)

        def turn(z: Tensor) -> Tensor:
            even, odd = z[..., 0::2], z[..., 1::2]
            return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)

        future = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).triu(1)
        scores = torch.einsum("bthd,bshd->bhts", turn(q), turn(k)) * mixer.head_dim**-0.5
        f = torch.einsum("bhts,bshd->bthd", torch.softmax(scores.masked_fill(future, -torch.inf), -1), v).reshape(batch, tokens, width)
        f = mixer.out_proj(f)
        q_b, k_b = mixer.proj_fb(a).chunk(2, -1)
        mask = torch.ones_like(future).triu(0)
        alpha = torch.softmax((torch.einsum("btd,bsd->bts", q_b, k_b) * width**-0.5).masked_fill(mask, -1e30), -1).masked_fill(mask, 0.0)
        gamma = mixer.gamma_max * torch.tanh(mixer.gamma_bias + F.linear(a, mixer.gamma_ctx.weight.to(a.dtype)))
        s = torch.linalg.solve_triangular(-(gamma * alpha).float(), f.float(), upper=False, unitriangular=True).to(x.dtype)
        return x + layer.W_out(s * g)


def peer(layer: SessaLayer, heads: int) -> tuple[str, nn.Module]:
    """(name, module) of what we compare with, holding the same weights as `layer`."""
    dtype = layer.W_in.weight.dtype
    if importlib.util.find_spec("sessa") is None:
        return "official algorithm, eager", EagerLayer(layer)
    from sessa import SessaLayer as Official  # type: ignore[import-not-found]

    official = Official(D=layer.mixer.d_model, n_heads=heads)
    official.load_state_dict(layer.state_dict(), strict=False)
    return "official layer", official.to("cuda", dtype)


def measure(call: Callable[[], object], repeats: int = 20) -> tuple[float, float]:
    """(median ms by CUDA events, peak GiB above what was allocated before)."""
    for _ in range(5):
        call()
    times: list[float] = []
    peak = peak_bytes(lambda: times.extend(event_ms(call, repeats)))
    return sorted(times)[repeats // 2], peak / 2**30


def gradient_distance(ours: nn.Module, theirs: nn.Module, step: Callable[[nn.Module], None]) -> float | None:
    """||ours - theirs|| / ||theirs|| over the gradients of all parameters that both have; None where they share none (the eager stand-in)."""
    for layer in (ours, theirs):
        step(layer)
    wanted = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    pairs = [(p.grad.float().flatten(), wanted[name].float().flatten()) for name, p in ours.named_parameters() if p.grad is not None and name in wanted]
    if not pairs:
        return None
    a, b = (torch.cat(x) for x in zip(*pairs, strict=True))
    return float((a - b).norm() / b.norm())


def host_ms(call: Callable[[], object], repeats: int = 10) -> float:
    """Median ms until the call returns, the device being idle before it: what the launches alone cost the host."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - begin))
    torch.cuda.synchronize()
    return sorted(times)[repeats // 2]


def graphed(call: Callable[[], object]) -> Callable[[], object] | None:
    """The call as a CUDA graph's replay, which costs the host next to nothing; None where it cannot be captured."""
    try:
        return capture([call], [call] * 3).replay
    except RuntimeError as error:
        print(f"not captured: {str(error).splitlines()[0]}")
        return None


def profile(title: str, call: Callable[[], object], top: int = 20, repeats: int = 5) -> None:
    """Print a table of the call's kernels by device time and of its operators by host time, each per call."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    host = host_ms(call)
    with record(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    events = trace.key_averages()
    kernels = [e for e in events if e.device_type == DeviceType.CUDA]
    operators = [e for e in events if e.device_type == DeviceType.CPU]
    device = sum(e.self_device_time_total for e in kernels) / repeats / 1e3
    print(f"{title}: kernels {device:.3f} ms in {sum(e.count for e in kernels) / repeats:.0f} launches, host {host:.3f} ms without the profiler")
    for e in sorted(kernels, key=lambda e: -e.self_device_time_total)[:top]:
        print(f"  {e.self_device_time_total / repeats:9.1f} us  {e.count / repeats:5.1f} x  {e.key[:90]}")
    print("  operators by their own host time, under the profiler")
    for e in sorted(operators, key=lambda e: -e.self_cpu_time_total)[: top // 2]:
        print(f"  {e.self_cpu_time_total / repeats:9.1f} us  {e.count / repeats:5.1f} x  {e.key[:90]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16")
    parser.add_argument("--profile", action="store_true", help="also print a breakdown of our layer, kernel by kernel")
    parser.add_argument("--graph", action="store_true", help="also time the training step of both as CUDA graphs")
    parser.add_argument("--top", type=int, default=20, help="kernels a breakdown names")
    parser.add_argument("--peerless", action="store_true", help="leave the peer out (nothing is written then)")
    arguments = parser.parse_args()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[arguments.dtype]
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA GPU; none was found")
    rows: list[dict[str, Any]] = []
    table = Table(title=f"one layer, {dtype}, {machine()['gpu']}, torch {torch.__version__}")
    for column in ("(B,T,D)", "what", "peer", "peer ms", "ours ms", "times faster", "peer GiB", "ours GiB", "ours host ms", "distance of y, gradients"):
        table.add_column(column, justify="right")
    for batch, tokens, width, heads in SHAPES:
        torch.manual_seed(0)
        ours = SessaLayer(width, heads).to("cuda", dtype)
        ours.mixer.gamma_bias.data = ours.mixer.gamma_bias.data.float()
        ours.mixer.gamma_ctx.float()
        x = torch.randn(batch, tokens, width, device="cuda", dtype=dtype)
        grad = torch.randn_like(x)

        def forward(layer: nn.Module, x: Tensor = x) -> None:
            with torch.no_grad():
                layer(x)

        def train(layer: nn.Module, x: Tensor = x, grad: Tensor = grad) -> None:
            layer.zero_grad(set_to_none=True)
            layer(x.detach().requires_grad_()).backward(grad)

        if arguments.profile:
            for what, step in (("forward", forward), ("forward+backward", train)):
                ours_ms, ours_gib = measure(lambda s=step, m=ours: s(m))
                profile(f"{(batch, tokens, width)} {what} {ours_ms:.3f} ms, {ours_gib:.2f} GiB", lambda s=step, m=ours: s(m), arguments.top)
        if arguments.peerless:
            continue
        name, theirs = peer(ours, heads)
        with torch.no_grad():
            distance = float((ours(x).float() - theirs(x).float()).norm() / theirs(x).float().norm())
        grad_distance = gradient_distance(ours, theirs, train)
        cases = [("forward", forward, False), ("forward+backward", train, False)] + [("forward+backward, CUDA graph", train, True)] * arguments.graph
        for what, step, replayed in cases:
            calls = [lambda s=step, m=m: s(m) for m in (theirs, ours)]
            # what cannot be captured is timed as it is
            calls = [(graphed(call) or call) if replayed else call for call in calls]
            theirs_ms, theirs_gib, ours_ms, ours_gib = (figure for call in calls for figure in measure(call))
            host = host_ms(calls[1])
            if replayed:  # a graph's memory is not allocated when it is replayed
                theirs_gib = ours_gib = None
            rows.append({"shape": (batch, tokens, width), "what": what, "peer": name, "peer_ms": theirs_ms, "ours_ms": ours_ms,
                         "ours_host_ms": host, "speedup": theirs_ms / ours_ms, "peer_gib": theirs_gib, "ours_gib": ours_gib, "relative_distance": distance,
                         "relative_gradient_distance": grad_distance})
            shown = [f"{distance:.1e}", "-" if grad_distance is None else f"{grad_distance:.1e}"]
            table.add_row(str((batch, tokens, width)), what, name, f"{theirs_ms:.2f}", f"{ours_ms:.2f}", f"{theirs_ms / ours_ms:.1f}",
                          *("-" if gib is None else f"{gib:.2f}" for gib in (theirs_gib, ours_gib)), f"{host:.2f}", ", ".join(shown))
    if arguments.peerless:
        return
    Console(width=160).print(table)
    print(write("layer", rows))


if __name__ == "__main__":
    main()
