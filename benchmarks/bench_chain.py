"""A decode step as an engine runs it, from the plugin's kernels alone in one CUDA graph: no TensorRT is needed to see what a kernel costs or a change gives.

    python benchmarks/bench_chain.py [--layers 24] [--points decode small ragged batch prompt chunk] [--plain] [--separate] [--json FILE]

Prints milliseconds a step (replays one by one, and back to back), the share of the bandwidth floor (weights and valid cache rows once, at the bandwidth of
a long copy), and what each kernel takes by PyTorch's profiler (of kernels that start early it counts their waiting too: --plain tells). float16, random
weights; lengths stand still, nothing is appended. See compare.py for engines.

Points prompt and chunk are a prefill of 8192 tokens, and of 2048 behind 7000; all kernels one after the other, where the plugin has a second stream.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gpu import capture, copy_bandwidth, graph_ms
from products import quantise
from torch import Tensor

from sessa_deploy.config import SessaConfig
from sessa_deploy.contract import CACHE_FIELDS, WEIGHT_FORMATS, cache_row_shape
from sessa_deploy.kernels.causal import step as causal
from sessa_deploy.kernels.causal.prefill import prefill
from sessa_deploy.kernels.engine import layer, mixer
from sessa_deploy.kernels.feedback import step as feedback
from sessa_deploy.kernels.feedback.forward import forward as feedback_forward
from sessa_deploy.runtime import traffic

HALF = torch.float16
# name -> capacity, cached tokens of each sequence: those of compare.py after half of the steps it takes before it rewinds
POINTS: dict[str, tuple[int, list[int]]] = {
    "decode": (32768, [4128]), "small": (256, [160]), "ragged": (8192, [4128] + [160] * 31), "batch": (8192, [4128] * 32), "short": (1024, [160] * 32),
}  # fmt: skip
PREFILLS = {"prompt": (8192, 0), "chunk": (2048, 7000)}  # new tokens, cached tokens
CAPACITY = 32768  # of their caches


class Chain:
    """Weights of every layer and the head; weights: a format of contract.WEIGHT_FORMATS, "" for 16 bits."""

    def __init__(self, config: SessaConfig, device: str = "cuda", separate: bool = False, weights: str = "") -> None:
        self.config, self.device, d = config, device, config.d_model
        self.separate = separate  # attentions and output projection as kernels of their own

        def random(*shape: int, scale: float = 1.0, kind: torch.dtype = HALF) -> Tensor:
            return (scale * torch.randn(shape, device=self.device)).to(kind)

        self.random, self.limbs = random, torch.rand(4, config.head_dim // 2, device=self.device) / 64
        scale = d**-0.5
        self.layers: list[Any] = [
            {"norm": (random(d), random(d)), "enter": (random(2 * d, d, scale=scale), random(2 * d)), "project": random(5 * d, d, scale=scale),
             "biases": (random(d), random(d), random(d), random(2 * d)), "gamma": (random(d, kind=torch.float32, scale=scale),
             random(1, kind=torch.float32)), "out": (random(d, d, scale=scale), random(d)), "tail": (random(d, d, scale=scale), random(d))}
            for _ in range(config.n_layers)
        ]  # fmt: skip
        self.last, self.head = (random(d), random(d)), random(config.vocab_size, d, scale=scale)
        self.head_scale: Tensor | None = None
        if weights:
            self.head, self.head_scale = quantise(self.head, weights)
            for w in self.layers:
                w["project"], w["project_scale"] = quantise(w["project"], weights)
                for name in ("enter", "out", "tail"):
                    matrix, w[f"{name}_scale"] = quantise(w[name][0], weights)
                    w[name] = (matrix, w[name][1])

    def step(self, x: Tensor, length: Tensor, caches: list[list[Tensor]], early: int = 0) -> Tensor:
        """Logits of one token a sequence, x (B,D). early: rows of a batch for which kernels may start before their predecessors end; 0: none does."""
        config, rows = self.config, x.shape[0]
        heads = (rows, 1, config.n_heads, config.head_dim)
        cos, sin = (t.view(rows, -1) for t in layer.rotary(length, self.limbs, 1, early))
        for w, (k_f, v_f, k_b, s_b) in zip(self.layers, caches, strict=True):
            h = layer.norm_enter(x, *w["norm"], config.layer_norm_eps, *w["enter"], early, scale=w.get("enter_scale"))
            project = h, w["project"], w["biases"], cos, sin, *w["gamma"], config.gamma_max, early
            q, k, v, q_b, k_new, gamma = layer.project_gain(*project, scale=w.get("project_scale"))
            if self.separate:
                o = causal.step(q.view(heads), k.view(heads), v.view(heads), k_f, v_f, length, early)
                f = layer.linear(o.view(x.shape), *w["out"], early, scale=w.get("out_scale"))
                s = feedback.step(q_b[:, None], k_new[:, None], gamma[:, None], f[:, None], k_b, s_b, length, early)
            else:
                q, k, v = (t.view(rows, config.n_heads, config.head_dim) for t in (q, k, v))
                s = mixer.step(q, k, v, k_f, v_f, *w["out"], q_b, gamma, k_b, s_b, length, early, scale=w.get("out_scale"), behind=True)
            x = layer.tail(s.view(x.shape), h, *w["tail"], x, early, scale=w.get("tail_scale"))
        return layer.linear(layer.norm(x, *self.last, config.layer_norm_eps, early), self.head, None, early, self.head_scale)

    def chunk(self, x: Tensor, length: Tensor, caches: list[list[Tensor]]) -> Tensor:
        """Logits behind the last of T new tokens of each sequence, x (B T,D), as a prefill takes them: T beyond a step of several rows."""
        config, rows, batch = self.config, x.shape[0], length.shape[0]
        tokens = rows // batch
        cos, sin = (t.view(rows, -1) for t in layer.rotary(length, self.limbs, tokens))
        for w, (k_f, v_f, k_b, s_b) in zip(self.layers, caches, strict=True):
            h = layer.norm_enter(x, *w["norm"], config.layer_norm_eps, *w["enter"])
            q, k, v, q_b, k_new, gamma = layer.project_gain(h, w["project"], w["biases"], cos, sin, *w["gamma"], config.gamma_max)
            q, k, v = (t.view(batch, tokens, config.n_heads, config.head_dim) for t in (q, k, v))
            o = prefill(q, k, v, k_f, v_f, length)
            f = layer.linear(o.view(x.shape), *w["out"])
            q_b, k_new, f = (t.view(batch, tokens, -1) for t in (q_b, k_new, f))
            s, _, _ = feedback_forward(q_b, k_new, gamma.view(batch, tokens), f, k_b, s_b, length, need_lse=False)
            x = layer.tail(s.view(x.shape), h, *w["tail"], x)
        last = x.view(batch, tokens, -1)[:, -1].contiguous()
        return layer.linear(layer.norm(last, *self.last, config.layer_norm_eps), self.head, None)

    def caches(self, capacity: int, lengths: list[int]) -> list[list[Tensor]]:
        """k_f, v_f, k_b, s of every layer, random up to each length."""
        config = self.config
        shapes = [cache_row_shape(field, config.d_model, config.kv_heads, config.head_dim) for field in CACHE_FIELDS]
        made = []
        for _ in range(config.n_layers):
            four = [torch.empty(len(lengths), capacity, *row, device=self.device, dtype=HALF) for row in shapes]
            for cache in four:
                for b, rows in enumerate(lengths):
                    cache[b, :rows].normal_()
            made.append(four)
        return made


def kernels(graph: Any) -> dict[str, tuple[float, int]]:
    """Kernel -> (median microseconds, launches a step)."""
    from torch.profiler import ProfilerActivity, profile

    repeats, found = 3, dict[str, list[float]]()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(repeats):
            graph.replay()
        torch.cuda.synchronize()
    for event in profiled.events() or ():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found.setdefault(event.name, []).append(event.device_time)
    return {name: (statistics.median(times), len(times) // repeats) for name, times in sorted(found.items(), key=lambda item: -sum(item[1]))}


def measure(chain: Chain, name: str, copy: float, plain: bool) -> dict[str, Any]:
    """The figures of one point. copy: GB/s. plain: no kernel starts early; else as in the plugin."""
    capacity, lengths = POINTS[name]
    early = 0 if plain else len(lengths)
    caches = chain.caches(capacity, lengths)
    x, length = chain.random(len(lengths), chain.config.d_model), torch.tensor(lengths, dtype=torch.int32, device=chain.device)
    graph = capture([lambda: chain.step(x, length, caches, early)])
    single = graph_ms(graph, 42)
    begun = time.perf_counter()
    for _ in range(40):
        graph.replay()
    torch.cuda.synchronize()
    close = 1e3 * (time.perf_counter() - begun) / 40
    floor = traffic.step_bytes(chain.config, "fp16", [float(n) for n in lengths]) / copy / 1e6
    return {"point": name, "ms": single, "back_to_back_ms": close, "floor_ms": floor, "early": early, "kernels": kernels(graph)}


def measure_prefill(chain: Chain, name: str) -> dict[str, Any]:
    """The figures of one of PREFILLS. Every layer has the same caches, which no kernel writes."""
    tokens, cached = PREFILLS[name]
    layers, chain.config = chain.config, replace(chain.config, n_layers=1)
    caches, chain.config = chain.caches(CAPACITY, [cached]) * layers.n_layers, layers
    x, length = chain.random(tokens, chain.config.d_model), torch.tensor([cached], dtype=torch.int32, device=chain.device)
    graph = capture([lambda: chain.chunk(x, length, caches)])
    return {"point": name, "ms": graph_ms(graph, 8), "kernels": kernels(graph)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", nargs="+", choices=[*POINTS, *PREFILLS], default=list(POINTS))
    for name, value in (("--width", 1024), ("--layers", 24), ("--heads", 16), ("--vocabulary", 50304)):
        parser.add_argument(name, type=int, default=value)
    parser.add_argument("--weights", default="", choices=tuple(WEIGHT_FORMATS), help="of 8 bits in place of 16")
    parser.add_argument("--plain", action="store_true", help="let no kernel start early")
    parser.add_argument("--separate", action="store_true", help="attentions and output projection as kernels of their own, as where there is no SessaMixer")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    config = SessaConfig(d_model=args.width, n_layers=args.layers, n_heads=args.heads, vocab_size=args.vocabulary)
    chain, results, copy = Chain(config, separate=args.separate, weights=args.weights), [], copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy bandwidth {copy:.0f} GB/s", flush=True)
    for name in args.points:
        row = measure_prefill(chain, name) if name in PREFILLS else measure(chain, name, copy, args.plain)
        results.append(row)
        times = f"{row['ms']:.3f} ms"
        if name in POINTS:
            times += f", back to back {row['back_to_back_ms']:.3f}, floor {row['floor_ms']:.3f} ({row['floor_ms'] / row['back_to_back_ms']:.0%})"
        print(f"{name:7} {times}", flush=True)
        print("        " + "; ".join(f"{kernel} {us:.1f} us x{count}" for kernel, (us, count) in row["kernels"].items()), flush=True)
        torch.cuda.empty_cache()
    if args.json:
        about = {"gpu": torch.cuda.get_device_name(), "copy_gbs": copy, "config": config.to_dict()}
        args.json.write_text(json.dumps({**about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
