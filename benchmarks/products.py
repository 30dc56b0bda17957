"""A matrix product of the layer with its tensors, weights in as many copies as leave the cache: what bench_products.py and tune_layer.py time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

import torch
import triton
from gpu import capture, event_ms
from torch import Tensor

from sessa_deploy.contract import WEIGHT_FORMATS
from sessa_deploy.kernels.engine import layer, layer_many
from sessa_deploy.kernels.launch.jit import address, launcher, pinned, weights_name
from sessa_deploy.kernels.launch.limits import MANY_PROGRAMS

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
FORMATS = {"": "", **{name: weights_name(getattr(torch, f.torch)) for name, f in WEIGHT_FORMATS.items()}}  # format -> as the tables call it
COLD = 192 << 20  # bytes of weights that no cache holds
EPS = 1e-5
Options = dict[str, Any]


def quantise(weight: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """(8-bit values, float32 scales of the rows) of weight (columns, depth), symmetric; format: of contract.WEIGHT_FORMATS."""
    form = WEIGHT_FORMATS[format]
    scale = weight.float().abs().amax(1) / form.largest
    steps = weight.float() / scale[:, None]
    return (steps.round() if format == "int8" else steps).to(getattr(torch, form.torch)), scale


class Case:
    """One kernel on (rows, width); weights: "" of the storage type, or a format of contract.WEIGHT_FORMATS. widened: they are, before it runs."""

    def __init__(
        self, kernel: str, rows: int, width: int, vocabulary: int, dtype: torch.dtype, weights: str = "", cold: bool = True, widened: bool = False
    ) -> None:
        self.many = kernel.endswith("_many")
        kernel = kernel.removesuffix("_many")
        self.kernel, self.rows, self.width, self.dtype = kernel, rows, width, dtype
        times = {"layer_enter": 2, "layer_norm_enter": 2, "layer_project_gain": 5, "layer_widen": 5}
        self.columns = times.get(kernel, 1) * width if kernel != "layer_logits" else vocabulary

        def make(*shape: int, kind: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape, device="cuda", dtype=torch.float32).mul_(0.1).to(kind)

        float32 = torch.float32
        self.x, self.h, self.bias = make(rows, width), make(rows, 2 * width), make(self.columns)
        first = make(self.columns, width)
        one, self.scale = quantise(first, weights) if weights else (first, first)
        self.name = weights_name(one.dtype)
        self.copies = max(2, -(-COLD // (one.numel() * one.itemsize))) if cold else 2
        self.weights = [one, *(one.clone() for _ in range(self.copies - 1))]
        self.widened = widened
        self.wide = torch.empty(self.columns if widened or kernel == "layer_widen" else 1, width, device="cuda", dtype=dtype)
        self.out = make(rows, self.columns, kind=float32 if kernel == "layer_logits" else dtype)
        self.cos, self.sin, self.add = make(rows, 32, kind=float32), make(rows, 32, kind=float32), make(rows, width, kind=float32)
        self.gated = self.x * self.h[:, width:]
        self.parts, self.gains, self.gamma = [make(rows, width) for _ in range(5)], make(width, kind=float32), make(rows, kind=float32)

    @property
    def bytes(self) -> int:
        """Of the weights, scales included."""
        scales = self.scale.numel() * self.scale.itemsize if self.name else 0
        return self.weights[0].numel() * self.weights[0].itemsize + scales

    def arguments(self, w: Tensor) -> tuple[Any, ...]:
        x, h, bias, out, scale = self.x, self.h, self.bias, self.out, self.scale
        sizes = (self.rows, self.width)
        match self.kernel:
            case "layer_widen":
                return w, self.wide, w.numel()
            case "layer_linear":
                return x, w, scale, bias, out, *sizes, self.columns
            case "layer_out":
                return x, w, scale, bias, self.add, out, *sizes
            case "layer_enter":
                return x, w, scale, bias, out, *sizes
            case "layer_norm_enter":
                return x, self.bias, self.bias[self.width :], w, scale, bias, out, self.width, EPS
            case "layer_logits":
                return x, w, scale, out, *sizes, self.columns
            case "layer_tail" if self.many:  # of what layer_gate has made; what it takes is not counted
                return self.gated, w, scale, bias, x, out, *sizes
            case "layer_tail":
                return x, h, w, scale, bias, x, out, *sizes
        biases = [bias[i * self.width :] for i in (0, 1, 2, 3)]
        return h, w, scale, *biases, self.cos, self.sin, self.gains, self.gains, *self.parts, self.gamma, *sizes, self.width, 8, 0.999

    def grid(self, tiles: Options, held: int) -> tuple[int, ...]:
        """held: programs that the device holds at once."""
        if self.kernel == "layer_widen":
            return (triton.cdiv(self.columns * self.width, tiles["BLOCK"]),)
        tall = triton.cdiv(self.rows, tiles.get("BM", 1))
        projects = self.kernel == "layer_project_gain"
        across = 5 * triton.cdiv(self.width, tiles["BN"]) if projects else triton.cdiv(self.columns, tiles["BN"])
        if self.many:
            return (min(tall * across, held, MANY_PROGRAMS),)
        return ((layer.gamma_programs(self.rows, tiles["BM"]) if projects else 0) + tall * across,)

    def calls(self, options: Options) -> list[Callable[[], None]]:
        """A launch for each copy of the weights."""
        call = launcher(_function(self.kernel + "_many" * self.many), self.x.device, self.dtype, options, "" if self.widened else self.name)
        grid = self.grid(options, call.resident)

        def product(w: Tensor) -> None:
            call(grid, *(address(a) if isinstance(a, Tensor) else a for a in self.arguments(w)))

        if not self.widened:
            return [lambda w=w: product(w) for w in self.weights]  # type: ignore[misc]
        tiles = pinned(("layer_widen",), self.x.device, self.dtype, "any", 0, self.name)["layer_widen"]
        widen, count = launcher(layer.layer_widen, self.x.device, self.dtype, tiles, self.name), self.columns * self.width

        def both(w: Tensor) -> None:
            widen((triton.cdiv(count, tiles["BLOCK"]),), address(w), address(self.wide), count)
            product(self.wide)

        return [lambda w=w: both(w) for w in self.weights]  # type: ignore[misc]

    def time(self, options: Options | None, repeats: int = 7) -> float:
        """Microseconds a launch, in a graph of a launch for each copy; options None: torch.mm."""
        steps = [lambda w=w: torch.mm(self.x, w.t()) for w in self.weights] if options is None else self.calls(options)
        return 1e3 * sorted(event_ms(capture(steps, steps[:2]).replay, repeats))[repeats // 2] / len(steps)

    def error(self, options: Options) -> tuple[float, float]:
        """(the kernel's error against float64 with the weights as they are, that of float32 rounded once), each of the largest value."""
        self.calls(options)[0]()
        weight = self.weights[0].float() * (self.scale[:, None] if self.name else 1.0)
        wanted, plain = (self._truth(weight, kind) for kind in (torch.float64, torch.float32))
        found = torch.cat(self.parts[2:], 1) if self.kernel == "layer_project_gain" else self.out
        most = wanted.abs().max()
        return float((found.double() - wanted).abs().max() / most), float((plain.to(found.dtype).double() - wanted).abs().max() / most)

    def _truth(self, weight: Tensor, kind: torch.dtype) -> Tensor:
        """What the kernel computes, in `kind`; of the projections v, q_b and k_b, which are not turned."""
        x, bias, width = self.x.to(kind), self.bias.to(kind), self.width
        if self.kernel == "layer_norm_enter":
            normal = torch.nn.functional.layer_norm(x, (width,), bias[:width], bias[width:], EPS)
            x = normal.to(self.dtype).to(kind)
        if self.kernel == "layer_tail":
            x = (x * self.h[:, width:].to(kind)).to(self.dtype).to(kind)
        if self.kernel == "layer_project_gain":
            return self.h[:, :width].to(kind) @ weight[2 * width :].to(kind).T + bias[2 * width :]
        y = x @ weight.to(kind).T + (0.0 if self.kernel == "layer_logits" else bias)
        if self.kernel in ("layer_enter", "layer_norm_enter"):
            return torch.cat([torch.nn.functional.gelu(y[:, :width].to(self.dtype).to(kind)), y[:, width:]], 1)
        if self.kernel == "layer_out":
            return y.to(self.dtype).to(kind) + self.add.to(kind)
        return y + self.x.to(kind) if self.kernel == "layer_tail" else y


def _function(kernel: str) -> Any:
    return getattr(layer_many if kernel.endswith("_many") else layer, kernel)


Job = tuple[str, torch.dtype, str, Options]  # kernel, storage type, `jit.weights_name`, options


def _compile(job: Job) -> str:
    kernel, dtype, weights, options = job
    try:
        launcher(_function(kernel), torch.device("cuda", 0), dtype, options, weights)
    except Exception as error:
        return f"{kernel}{weights} {options}: {type(error).__name__}: {error}"[:200]
    return ""


def compile_all(jobs: Sequence[Job], processes: int = 12) -> dict[int, str]:
    """Compiles them side by side into Triton's cache; index of a job -> why it cannot be had."""
    try:
        with ProcessPoolExecutor(min(processes, max(1, len(jobs))), mp_context=get_context("spawn")) as pool:
            return {i: why for i, why in enumerate(pool.map(_compile, jobs)) if why}
    except BrokenProcessPool as error:
        print(f"not compiled ahead: {error}", flush=True)
        return {}
