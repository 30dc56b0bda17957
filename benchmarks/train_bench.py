"""Training of whole models on a GPU: tokens/s and MFU of Sessa beside a Llama of equal size and the official layers, eager and compiled; weak scaling.

    python benchmarks/train_bench.py                                                    every point, one GPU, one run
    python benchmarks/train_bench.py --sizes 125M --contexts 2048 --models sessa,llama  some of them
    torchrun --nproc-per-node 2 benchmarks/train_bench.py                               one GPU, then all of them, the same work for each

A step is that of `sessa-deploy train`: float32 weights under bf16 autocast, cross entropy, clipping, fused AdamW. Llama is that of transformers with SDPA,
3/4 as many layers of 4/3 the parameters; compiled, it is torch.compile of the model and its loss, as ours is. The official layers are the package `sessa`
(its repository on PYTHONPATH) between the same embedding and head; they train eagerly.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from common import machine, write
from peers import Logits
from random_bundle import SIZES, VOCABULARY
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from sessa_deploy import SessaConfig, SessaLM
from sessa_deploy.distributed import wrap
from sessa_deploy.distributed.group import ALONE, Group
from sessa_deploy.train import autocast, joined, parameter_groups

TOKENS = 16384  # of a micro-batch
PEAKS = {"H100": 989.4e12, "H200": 989.4e12, "B200": 2250e12, "A100": 312e12, "4090": 165.2e12}  # bf16 with float32 sums, dense, by the vendor's sheet
FORMULA = "MFU = (6 N + 6 a L D T) tokens/s / peak;  N: parameters without the embedding, a: attentions a layer (Sessa 2, Llama 1), half of T x T counted"


@dataclass(frozen=True)
class Point:
    """A model to train: its name, size, context and whether it is compiled."""

    model: str
    size: str
    context: int
    compiled: bool

    @property
    def mode(self) -> str:
        """For the table."""
        return "compiled" if self.compiled else "eager"


class Official(nn.Module):
    """The official layers between an embedding and a head."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        from sessa import SessaLayer  # type: ignore[import-not-found]

        self.embedding, self.norm, self.lm_head = nn.Embedding(VOCABULARY, width), nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)
        self.layers = nn.ModuleList(SessaLayer(D=width, n_heads=heads) for _ in range(layers))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x)).float()  # type: ignore[no-any-return]


def built(point: Point, scale: int = 1) -> tuple[nn.Module, float]:
    """(model on the CPU, FLOPs of a token in a training step). scale: divides width and depth, to rehearse."""
    width, layers, heads = SIZES[point.size]
    width, layers, heads = width // scale, max(1, layers // scale), max(1, heads // scale)
    attentions = 2
    if point.model == "llama":
        from transformers import LlamaConfig, LlamaForCausalLM  # type: ignore[import-not-found]

        layers, attentions = max(1, layers * 3 // 4), 1
        model: nn.Module = Logits(LlamaForCausalLM(LlamaConfig(
            hidden_size=width, intermediate_size=-(-8 * width // 48) * 16, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads,
            vocab_size=VOCABULARY, max_position_embeddings=point.context, tie_word_embeddings=False, attn_implementation="sdpa")))
    elif point.model == "official":
        model = Official(width, layers, heads)
    else:
        model = SessaLM(SessaConfig(d_model=width, n_layers=layers, n_heads=heads, vocab_size=VOCABULARY))
    parameters = sum(p.numel() for p in model.parameters()) - VOCABULARY * width
    return model, 6.0 * parameters + 6.0 * attentions * layers * width * point.context


class Trained:
    """A model in training on random tokens, stepped as `sessa-deploy train` steps it."""

    def __init__(self, point: Point, group: Group, device: torch.device, scale: int = 1) -> None:
        torch.manual_seed(0)
        model, self.flops = built(point, scale)
        self.parameters = sum(p.numel() for p in model.parameters())
        self.stepped = wrap.replicated(model.to(device), group)
        if point.compiled:
            self.stepped.compile()
        self.optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-4, fused=device.type == "cuda")
        tokens = TOKENS // scale // scale
        self.tokens, self.device = tokens, device
        ids = torch.randint(0, VOCABULARY, (max(1, tokens // point.context), min(point.context, tokens) + 1), device=device)
        self.inputs, self.targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def step(self) -> None:
        """One optimizer step."""
        self.optimizer.zero_grad(set_to_none=True)
        self.stepped.loss(self.inputs, self.targets, autocast(self.device, "bf16")).backward()
        self.stepped.clip(1.0)
        self.optimizer.step()


def rate(trained: Trained, steps: int) -> tuple[float, float]:
    """(tokens/s of this process by the median step, peak memory in GiB). Steps are timed one by one, the device waited for."""
    cuda = trained.device.type == "cuda"
    wait: Callable[[], object] = torch.cuda.synchronize if cuda else lambda: None
    for _ in range(3):
        trained.step()
    times = []
    for _ in range(max(1, steps // 2)):  # two at a time: the host runs ahead of the device, as it does in a run
        wait()
        begin = time.perf_counter()
        trained.step()
        trained.step()
        wait()
        times.append((time.perf_counter() - begin) / 2)
    return trained.tokens / statistics.median(times), torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0


def points(arguments: argparse.Namespace) -> Iterator[Point]:
    """Those that were asked for: the eager ones first, since they take no time to compile."""
    for mode in arguments.modes:
        for size in arguments.sizes:
            for context in arguments.contexts:
                for model in arguments.models:
                    if not (model == "official" and mode == "compiled"):
                        yield Point(model, size, context, mode == "compiled")


def lacks(model: str) -> str | None:
    """What is missing to build a model."""
    package = {"llama": "transformers", "official": "sessa"}.get(model)
    return None if package is None or importlib.util.find_spec(package) is not None else f"the package {package} is not importable"


def compare(arguments: argparse.Namespace, device: torch.device, peak: float) -> None:
    """Every point on one GPU, and how Sessa stands to Llama."""
    rows: list[dict[str, Any]] = []
    begin = time.perf_counter()
    for point in points(arguments):
        row: dict[str, Any] = {"model": point.model, "size": point.size, "context": point.context, "mode": point.mode}
        rows.append(row)
        why = lacks(point.model)
        if why is None and arguments.limit and time.perf_counter() - begin > arguments.limit:
            why = f"left out after {arguments.limit:.0f} s"
        if why is None:
            try:
                trained = Trained(point, ALONE, device, arguments.scale)
                speed, memory = rate(trained, arguments.steps)
                row |= {"parameters": trained.parameters, "tokens_per_s": speed, "mfu": speed * trained.flops / peak, "peak_gib": memory}
            except torch.OutOfMemoryError:
                why = "out of memory"
            trained = None  # type: ignore[assignment]
        row["missing"] = why
        print(f"{point.model} {point.size} {point.context} {point.mode}: {why or format(row['tokens_per_s'], ',.0f') + ' tokens/s'}", flush=True)
        torch._dynamo.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    found = {(r["model"], r["size"], r["context"], r["mode"]): r.get("tokens_per_s") for r in rows}
    table = Table(title=f"training, {TOKENS:,} tokens a step, bf16, {machine()['gpu']}, torch {torch.__version__}")
    for column in ("model", "size", "parameters", "context", "mode", "tokens/s", "MFU", "peak GiB", "Sessa / it"):
        table.add_column(column, justify="right")
    for r in rows:
        if r["missing"]:
            table.add_row(r["model"], r["size"], "", str(r["context"]), r["mode"], r["missing"])
            continue
        ours = found.get(("sessa", r["size"], r["context"], r["mode"]))
        r["sessa_times_faster"] = None if ours is None or r["model"] == "sessa" else ours / r["tokens_per_s"]
        table.add_row(r["model"], r["size"], f"{r['parameters'] / 1e6:.0f}M", str(r["context"]), r["mode"], f"{r['tokens_per_s']:,.0f}", f"{r['mfu']:.1%}",
                      f"{r['peak_gib']:.1f}", "" if r["sessa_times_faster"] is None else f"{r['sessa_times_faster']:.2f}")
    Console(width=160).print(table)
    print(f"{FORMULA};  peak {peak / 1e12:,.1f} TFLOP/s")
    for size in arguments.sizes:  # each at its best
        for context in arguments.contexts:
            best = {m: max(found.get((m, size, context, mode)) or 0.0 for mode in arguments.modes) for m in ("sessa", "llama")}
            if all(best.values()):
                print(f"{size} at {context}: Sessa {best['sessa'] / best['llama']:.2f} times the tokens of Llama, each at its best")
    if arguments.scale == 1:
        print(write("train", rows))


def scale_out(arguments: argparse.Namespace, group: Group, device: torch.device) -> None:
    """Weak scaling: what each process does alone, all at once but without a word between them, and what they do together."""
    rows: list[dict[str, Any]] = []
    for point in points(arguments):
        if point.model != "sessa":
            continue
        speeds = []
        for who in (ALONE, group):
            speed, _ = rate(Trained(point, who, device, arguments.scale), arguments.steps)
            slowest = torch.tensor([speed])
            torch.distributed.all_reduce(slowest, torch.distributed.ReduceOp.MIN)
            speeds.append(float(slowest))
            torch._dynamo.reset()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        rows.append({"size": point.size, "context": point.context, "mode": point.mode, "processes": group.size, "alone_tokens_per_s": speeds[0],
                     "together_tokens_per_s": speeds[1] * group.size, "efficiency": speeds[1] / speeds[0]})
    if not group.chief:
        return
    table = Table(title=f"weak scaling, {TOKENS:,} tokens a step and process, bf16, {group.size} x {machine()['gpu']}, torch {torch.__version__}")
    for column in ("size", "context", "mode", "1 process", f"{group.size} processes", "efficiency"):
        table.add_column(column, justify="right")
    for r in rows:
        table.add_row(r["size"], str(r["context"]), r["mode"], f"{r['alone_tokens_per_s']:,.0f}", f"{r['together_tokens_per_s']:,.0f}",
                      f"{r['efficiency']:.1%}")
    Console(width=160).print(table)
    if arguments.scale == 1:
        print(write("train_scaling", rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    allowed = {"sizes": tuple(SIZES), "contexts": ("2048", "8192"), "models": ("sessa", "llama", "official"), "modes": ("eager", "compiled")}
    for name, words in allowed.items():
        parser.add_argument(f"--{name}", default=",".join(words), help=f"some of {','.join(words)}" if name != "contexts" else "any lengths")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a point")
    parser.add_argument("--limit", type=float, default=0.0, help="seconds after which no further point begins; 0 for none")
    parser.add_argument("--peak", type=float, help="TFLOP/s of this GPU in bf16, where it is not known")
    parser.add_argument("--scale", type=int, default=1, help="divide width, depth and tokens, to rehearse on a CPU")
    arguments = parser.parse_args()
    for name in allowed:
        setattr(arguments, name, getattr(arguments, name).split(","))
    arguments.contexts = [int(x) for x in arguments.contexts]
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu" and arguments.scale == 1:
        raise SystemExit("this benchmark needs a CUDA GPU; none was found (--scale 16 rehearses it)")
    known = [peak for name, peak in PEAKS.items() if name in (machine()["gpu"] or "")]
    peak = arguments.peak * 1e12 if arguments.peak else known[0] if known else float("nan")
    with joined() as group:
        if group.many:
            scale_out(arguments, group, device)
        else:
            compare(arguments, device, peak)


if __name__ == "__main__":
    main()
