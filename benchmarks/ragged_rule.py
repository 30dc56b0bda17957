"""Forms of a batch's products against float64, under the 2x rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sessa_deploy.config import SessaConfig
from sessa_deploy.kernels.engine import layer


def products(config: SessaConfig, device: str, rows: int) -> Iterator[tuple[str, Callable[[], Tensor], Tensor, Tensor]]:
    """(which, the kernel's, float64's, float32's rounded once), with an outlier and a row of zeros among the inputs."""
    d, g = config.d_model, torch.Generator(device).manual_seed(rows)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=g, device=device)).half()

    x, s, h, w, b = random(rows, d), random(rows, d), random(rows, 2 * d), random(2 * d, d, scale=d**-0.5), random(2 * d)
    x[0, 3], x[1] = 1e4, 0.0
    add = torch.randn(rows, d, generator=g, device=device)
    gated = (s.float() * h[:, d:].float()).half()

    def both(compute: Callable[[torch.dtype], Tensor], kind: torch.dtype = torch.float16) -> tuple[Tensor, Tensor]:
        return compute(torch.float64), compute(torch.float32).to(kind)

    yield "out", lambda: layer.out_add(x, w[:d], b[:d], add), *both(lambda t: (x.to(t) @ w[:d].to(t).T + b[:d].to(t)).half().to(t) + add.to(t))
    yield "tail", lambda: layer.tail(s, h, w[:d], b[:d], x), *both(lambda t: x.to(t) + gated.to(t) @ w[:d].to(t).T + b[:d].to(t))
    yield "logits", lambda: layer.linear(x, w, None), *both(lambda t: x.to(t) @ w.to(t).T, torch.float32)
    a, five = h[:, :d], random(5 * d, d, scale=d**-0.5)
    biases = b[:d], b[d:], b[:d], b
    cos, sin = (torch.randn(rows, d // config.n_heads // 2, generator=g, device=device) for _ in range(2))
    gain = torch.randn(d, generator=g, device=device) * d**-0.5, torch.zeros(1, device=device)
    k_b = both(lambda t: torch.cat([a.to(t) @ five[2 * d : 3 * d].to(t).T + b[:d].to(t), a.to(t) @ five[4 * d :].to(t).T + b[d:].to(t)], 1))

    def project() -> Tensor:
        made = layer.project_gain(h, five, biases, cos, sin, *gain, 1.0)
        return torch.cat([made.v, made.k_b], 1)

    yield "project", project, *k_b
    unit = torch.ones(d, device=device).half(), torch.zeros(d, device=device).half()
    normal = layer.norm(x, *unit, 1e-5)

    def entered(t: torch.dtype) -> Tensor:
        y = normal.to(t) @ w.to(t).T + b.to(t)
        return torch.cat([torch.nn.functional.gelu(y[:, :d], approximate="none"), y[:, d:]], 1)

    yield "enter", lambda: layer.norm_enter(x, *unit, 1e-5, w, b), *both(entered)


def over_rule(config: SessaConfig, device: str, trials: list[tuple[str, str, Any]], choose: Callable[[Any], None]) -> str:
    """What to say of forms (product, name, change) at 32, 17 and 50 rows: the largest share of what the 2x rule allows, and which are over it."""
    worst: list[tuple[float, str]] = []
    for rows in (32, 17, 50):
        cases = list(products(config, device, rows))
        for kind, name, change in trials:
            choose(change)
            for which, call, exact, plain in cases:
                if which != kind:
                    continue
                err, ref = (call().double() - exact).abs(), (plain.double() - exact).abs()
                floor = torch.finfo(plain.dtype).eps * float(exact.abs().max())
                shares = float(err.max()) / (2 * float(ref.max()) + floor), float(err.square().mean().sqrt()) / (2 * float(ref.square().mean().sqrt()) + floor)
                worst.append((max(shares), f"{name} at {rows}"))
    choose({})
    worst.sort(reverse=True)
    bad = [name for share, name in worst if not share <= 1]
    return f"2x rule, {len(worst)} products: at most {worst[0][0]:.2f} of its limit ({worst[0][1]}); over 1: {bad or 'none'}"
