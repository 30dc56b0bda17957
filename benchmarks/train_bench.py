"""Training of whole models on a GPU: tokens/s and MFU of Sessa beside a Llama of equal size and the official layers, eager and compiled; weak scaling.

    python benchmarks/train_bench.py --total 235                                        every point, one GPU, one run
    python benchmarks/train_bench.py --sizes 125M --contexts 2048 --models sessa,llama  some of them
    torchrun --nproc-per-node 2 benchmarks/train_bench.py                               one GPU, then all of them, the same work for each

A step is that of `sessa-deploy train`: float32 weights under bf16 autocast, cross entropy, clipping, fused AdamW. Llama is that of transformers with SDPA,
3/4 as many layers of 4/3 the parameters. Modes: eager; compiled, by torch.compile, one layer for all of them and the head with the loss, in both models
alike (--whole: each model as one graph, which takes minutes to compile); graphed, the eager step captured as a CUDA graph, which costs the host nothing.
The official layers are the package `sessa` (its repository on PYTHONPATH) between the same embedding and head; they train eagerly.

Points run in a process of their own, which is ended when a point takes longer than --limit seconds; the next ones get a new process.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from common import machine, write
from random_bundle import SIZES, VOCABULARY
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from sessa_deploy import SessaConfig, SessaLM
from sessa_deploy.distributed import wrap
from sessa_deploy.distributed.group import ALONE, Group
from sessa_deploy.kernels.training.loss import mean_nats
from sessa_deploy.train import autocast, joined, parameter_groups

TOKENS = 16384  # of a micro-batch
PATIENCE = 3.0  # seconds after which the median of fewer steps will do
PEAKS = {"H100": 989.4e12, "H200": 989.4e12, "B200": 2250e12, "A100": 312e12, "4090": 165.2e12}  # bf16 with float32 sums, dense, by the vendor's sheet
FORMULA = "MFU = (6 N + 6 a L D T) tokens/s / peak;  N: parameters without the embedding, a: attentions a layer (Sessa 2, Llama 1), half of T x T counted"


@dataclass(frozen=True)
class Point:
    """A model to train: its name, size, context and mode."""

    model: str
    size: str
    context: int
    mode: str


class Peer(nn.Module):
    """A model that gives rows (B,T,D) and a head, trained as ours is."""

    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body, self.lm_head = body, head

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        return self.nats(self.body(ids), targets)

    def nats(self, x: Tensor, targets: Tensor) -> Tensor:
        """Mean nats of targets (B,T)."""
        return mean_nats(self.lm_head(x), targets)


class Llama(nn.Module):
    """A transformers model as one that gives rows alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        rows: Tensor = self.model(input_ids=ids, use_cache=False).last_hidden_state
        return rows


class Official(nn.Module):
    """The official layers behind an embedding, and the last norm."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        from sessa import SessaLayer  # type: ignore[import-not-found]

        self.embedding, self.norm = nn.Embedding(VOCABULARY, width), nn.LayerNorm(width)
        self.layers = nn.ModuleList(SessaLayer(D=width, n_heads=heads) for _ in range(layers))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)  # type: ignore[no-any-return]


def built(point: Point, device: torch.device, scale: int = 1, whole: bool = False) -> tuple[nn.Module, float]:
    """(model on the device, FLOPs of a token in a training step), compiled where the point says so. scale: divides width and depth, to rehearse."""
    width, layers, heads = SIZES[point.size]
    width, layers, heads = width // scale, max(1, layers // scale), max(1, heads // scale)
    attentions, compiled = 2, point.mode == "compiled"
    with device:
        if point.model == "llama":
            from transformers import LlamaConfig, LlamaModel  # type: ignore[import-not-found]

            layers, attentions = max(1, layers * 3 // 4), 1
            body = LlamaModel(LlamaConfig(  # type: ignore[call-arg]
                hidden_size=width, intermediate_size=-(-8 * width // 48) * 16, num_hidden_layers=layers, num_attention_heads=heads,
                num_key_value_heads=heads, vocab_size=VOCABULARY, max_position_embeddings=point.context, attn_implementation="sdpa"))
            model: nn.Module = Peer(Llama(body), nn.Linear(width, VOCABULARY, bias=False))
            repeated: Any = body.layers
        elif point.model == "official":
            model, repeated = Peer(Official(width, layers, heads), nn.Linear(width, VOCABULARY, bias=False)), ()
        else:
            model, repeated = SessaLM(SessaConfig(d_model=width, n_layers=layers, n_heads=heads, vocab_size=VOCABULARY)), ()
    parameters = sum(p.numel() for p in model.parameters()) - VOCABULARY * width
    if compiled and whole:
        model.compile()
    elif compiled and point.model == "sessa":
        wrap.change_layers(model, True, False)
    elif compiled:
        for layer in repeated:
            layer.compile()
        object.__setattr__(model, "nats", torch.compile(model.nats))  # type: ignore[arg-type]
    return model, 6.0 * parameters + 6.0 * attentions * layers * width * point.context


class Trained:
    """A model in training on random tokens, stepped as `sessa-deploy train` steps it."""

    def __init__(self, point: Point, group: Group, device: torch.device, scale: int = 1, whole: bool = False) -> None:
        torch.manual_seed(0)
        model, self.flops = built(point, device, scale, whole)
        self.parameters = sum(p.numel() for p in model.parameters())
        self.stepped = wrap.replicated(model, group)
        graphed = point.mode == "graphed"
        self.optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-4, fused=device.type == "cuda", capturable=graphed and device.type == "cuda")
        tokens = TOKENS // scale // scale
        self.tokens, self.device = tokens, device
        ids = torch.randint(0, VOCABULARY, (max(1, tokens // point.context), min(point.context, tokens) + 1), device=device)
        self.inputs, self.targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        self.step: Callable[[], object] = self.captured() if graphed and device.type == "cuda" else self.plain

    def plain(self) -> None:
        """One optimizer step."""
        self.optimizer.zero_grad(set_to_none=True)
        self.stepped.loss(self.inputs, self.targets, autocast(self.device, "bf16")).backward()
        self.stepped.clip(1.0)
        self.optimizer.step()

    def captured(self) -> Callable[[], object]:
        """`plain` as a CUDA graph's replay."""
        from gpu import capture

        graph = capture([self.plain], [self.plain] * 2)
        return graph.replay


def rate(trained: Trained, steps: int, say: Callable[[str], object] = print) -> dict[str, float]:
    """tokens_per_s of this process by the median step, peak_gib, and first_step_s, which is mostly what there was to compile."""
    cuda = trained.device.type == "cuda"
    wait: Callable[[], object] = torch.cuda.synchronize if cuda else lambda: None
    begin = time.perf_counter()
    trained.step()
    wait()
    first = time.perf_counter() - begin
    say(f"its first step took {first:.1f} s; timing")
    trained.step()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < max(1, steps // 2) and (len(times) < 2 or time.perf_counter() - begin < PATIENCE):
        wait()
        start = time.perf_counter()
        trained.step()
        trained.step()  # two at a time: the host runs ahead of the device, as it does in a run
        wait()
        times.append((time.perf_counter() - start) / 2)
    memory = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    return {"tokens_per_s": trained.tokens / statistics.median(times), "peak_gib": memory, "first_step_s": first}


def points(arguments: argparse.Namespace) -> Iterator[Point]:
    """Those that were asked for: the ones that take no time to compile first, the peer that takes the longest steps last."""
    official = [m for m in arguments.models if m == "official"]
    for models in ([m for m in arguments.models if m != "official"], official):
        for mode in arguments.modes:
            for size in arguments.sizes:
                for context in arguments.contexts:
                    for model in models:
                        if mode == "eager" or model == "sessa" or (mode == "compiled" and model == "llama"):
                            yield Point(model, size, context, mode)


def lacks(model: str) -> str | None:
    """What is missing to build a model."""
    package = {"llama": "transformers", "official": "sessa"}.get(model)
    return None if package is None or importlib.util.find_spec(package) is not None else f"the package {package} is not importable"


def work(connection: Connection, device: torch.device, scale: int, steps: int, whole: bool) -> None:
    """A process's life: points come in, stages (text) and rows (a dictionary) go out."""
    os.setsid()  # so that what it starts to compile ends with it
    while True:
        point: Point = connection.recv()
        row: dict[str, Any] = {"missing": None}
        try:
            connection.send("making the first step")
            trained = Trained(point, ALONE, device, scale, whole)
            row |= {"parameters": trained.parameters, "flops": trained.flops, **rate(trained, steps, connection.send)}
        except torch.OutOfMemoryError:
            row["missing"] = "out of memory"
        except Exception as error:  # the point fails, the table does not
            row["missing"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        trained = None  # type: ignore[assignment]
        torch._dynamo.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        connection.send(row)


class Worker:
    """A process that times points, started at the first one and again after one that was ended."""

    def __init__(self, *settings: Any) -> None:
        self.settings = settings
        self.process: multiprocessing.process.BaseProcess | None = None
        self.connection: Connection

    def time(self, point: Point, limit: float) -> dict[str, Any]:
        """The point's row; one that says where it was if it took longer than `limit` seconds."""
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.connection, theirs = context.Pipe()
            self.process = context.Process(target=work, args=(theirs, *self.settings), daemon=False)
            self.process.start()
            theirs.close()
        self.connection.send(point)
        end, stage = time.perf_counter() + limit, "starting a process"
        try:
            while self.connection.poll(max(0.0, end - time.perf_counter())):
                said = self.connection.recv()
                if isinstance(said, dict):
                    if said["missing"] not in (None, "out of memory"):  # an error of the device stays with its process
                        self.end()
                    return said
                stage = said
            why = f"ended after {limit:.0f} s: {stage}"
        except (EOFError, ConnectionError):
            why = f"its process died: {stage}"
        self.end()
        return {"missing": why}

    def end(self) -> None:
        """End the process and what it started."""
        if self.process is not None:
            try:
                os.killpg(self.process.pid or 0, signal.SIGKILL)
            except ProcessLookupError:
                self.process.kill()
            self.process.join()
            self.process = None


def compare(arguments: argparse.Namespace, device: torch.device, peak: float) -> None:
    """Every point on one GPU, and how Sessa stands to Llama."""
    rows: list[dict[str, Any]] = []
    begin = time.perf_counter()
    worker = Worker(device, arguments.scale, arguments.steps, arguments.whole)
    try:
        for point in points(arguments):
            left = arguments.total - (time.perf_counter() - begin) if arguments.total else arguments.limit
            why = lacks(point.model) or (f"left out after {arguments.total:.0f} s" if left < 5 else None)
            started = time.perf_counter()
            row: dict[str, Any] = {"missing": why} if why else worker.time(point, min(left, arguments.limit))
            row |= {"model": point.model, "size": point.size, "context": point.context, "mode": point.mode, "seconds": time.perf_counter() - started}
            rows.append(row)
            if row["missing"] is None:
                row["mfu"] = row["tokens_per_s"] * row.pop("flops") / peak
            figures = "" if row["missing"] else f"{row['tokens_per_s']:,.0f} tokens/s, first step {row['first_step_s']:.1f} s, in all {row['seconds']:.1f} s"
            print(f"{time.perf_counter() - begin:5.0f} s  {point.model} {point.size} {point.context} {point.mode}: {row['missing'] or figures}", flush=True)
    finally:
        worker.end()
    found = {(r["model"], r["size"], r["context"], r["mode"]): r.get("tokens_per_s") for r in rows}
    table = Table(title=f"training, {TOKENS:,} tokens a step, bf16, {machine()['gpu']}, torch {torch.__version__}")
    for column in ("model", "size", "parameters", "context", "mode", "tokens/s", "MFU", "peak GiB", "first step s", "Sessa / it"):
        table.add_column(column, justify="right")
    for r in rows:
        if r["missing"]:
            table.add_row(r["model"], r["size"], "", str(r["context"]), r["mode"], r["missing"])
            continue
        ours = found.get(("sessa", r["size"], r["context"], r["mode"]))
        r["sessa_times_faster"] = None if ours is None or r["model"] == "sessa" else ours / r["tokens_per_s"]
        table.add_row(r["model"], r["size"], f"{r['parameters'] / 1e6:.0f}M", str(r["context"]), r["mode"], f"{r['tokens_per_s']:,.0f}", f"{r['mfu']:.1%}",
                      f"{r['peak_gib']:.1f}", f"{r['first_step_s']:.1f}", "" if r["sessa_times_faster"] is None else f"{r['sessa_times_faster']:.2f}")
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
        if point.model != "sessa" or point.mode == "graphed":
            continue
        speeds = []
        for who in (ALONE, group):
            speed = rate(Trained(point, who, device, arguments.scale), arguments.steps, lambda stage: None)["tokens_per_s"]
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
    allowed = {"sizes": ("125M", "350M"), "contexts": ("2048", "8192"), "models": ("sessa", "llama", "official"), "modes": ("eager", "graphed", "compiled")}
    for name, words in allowed.items():
        parser.add_argument(f"--{name}", default=",".join(words), help=f"some of {','.join(words)}" if name != "contexts" else "any lengths")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a point")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds that a point may take, a new process and compilation included")
    parser.add_argument("--total", type=float, default=0.0, help="seconds for all points; 0 for no end")
    parser.add_argument("--whole", action="store_true", help="compile each model as one graph")
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
