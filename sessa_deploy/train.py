"""A plain training loop: AdamW, warm-up and cosine, one process, one device; a resumed run continues the loss curve bit for bit (on a CPU).

A run's folder: checkpoint/ (what `export` takes), resume.pt (weights, optimizer, step), log.csv, loss.png and report.json, each replaced whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sessa_deploy.checkpoint import load_checkpoint, save_checkpoint
from sessa_deploy.config import SessaConfig
from sessa_deploy.data import Batches, Corpus, load_corpus
from sessa_deploy.errors import UserError, need
from sessa_deploy.model import SessaLM
from sessa_deploy.runtime.tokenizer import Tokenizer, byte_level_tokenizer
from sessa_deploy.train_log import Row, read_log, write_log, write_plot, write_report, write_whole

RESUME_FILE, CHECKPOINT_DIR = "resume.pt", "checkpoint"
FLUSH_EVERY = 10  # steps between two looks at the device's losses


@dataclass(frozen=True)
class TrainOptions:
    """One run. data: folder of text; out: the run's folder. steps: optimizer steps of the whole schedule. batch_size: windows a micro-batch;
    accumulate: micro-batches a step; context: tokens a window. lr: peak; warmup: steps, None for 2% (at most 500); the cosine ends at 0.
    max_seconds: end of the schedule by the clock, should it come before `steps` (such a run is not reproducible). held_out: fraction of files.
    precision: "bf16" (autocast) or "fp32"; "auto" is bf16 on a GPU. store: storage type of the checkpoint. Raises UserError out of range.
    """

    data: str
    out: str
    steps: int = 2000
    batch_size: int = 16
    accumulate: int = 1
    context: int = 256
    lr: float = 2e-3
    warmup: int | None = None
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0
    seed: int = 0
    held_out: float = 0.05
    extensions: tuple[str, ...] = ()
    tokenizer: str | None = None
    device: str = "auto"
    precision: str = "auto"
    store: str = "fp32"
    eval_every: int = 500
    save_every: int = 500
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "context", "eval_every", "save_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is out of range", got=getattr(self, name), allowed="an integer >= 1")
        for name in ("lr", "grad_clip", "max_seconds"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise UserError(f"{name} is out of range", got=value, allowed="a number > 0")
        for name, allowed in (("precision", ("auto", "fp32", "bf16")), ("store", ("fp32", "fp16", "bf16"))):
            if getattr(self, name) not in allowed:
                raise UserError(f"{name} is unknown", got=getattr(self, name), allowed=", ".join(allowed))
        if self.seed < 0:
            raise UserError("seed is out of range", got=self.seed, allowed="an integer >= 0")

    @property
    def warmup_steps(self) -> int:
        """Steps of linear warm-up."""
        return min(500, max(1, self.steps // 50)) if self.warmup is None else self.warmup

    @property
    def torch_device(self) -> torch.device:
        """The device to train on: "auto" is the GPU where there is one."""
        name = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        try:
            device = torch.device(name)
        except RuntimeError:
            raise UserError("no such device", got=name, allowed="auto, cpu, cuda") from None
        if device.type == "cuda" and not torch.cuda.is_available():
            raise UserError("no CUDA GPU", got=name, fix="train with --device cpu, or run: sessa-deploy doctor")
        return device


def learning_rate(options: TrainOptions, step: int, progress: float) -> float:
    """Learning rate of step `step` (from 0) when `progress` in 0..1 of the schedule is behind: linear warm-up times a cosine to zero."""
    return options.lr * min(1.0, (step + 1) / options.warmup_steps) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def parameter_groups(model: SessaLM, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW groups: matrices decay; biases, norms and gamma's parameters do not."""
    parameters = list(model.parameters())
    matrices = [p for p in parameters if p.dim() >= 2 and min(p.shape) > 1]
    others = [p for p in parameters if not (p.dim() >= 2 and min(p.shape) > 1)]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """The precision's context: bf16 autocast, or none."""
    bf16 = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, dtype=torch.bfloat16) if bf16 else contextlib.nullcontext()


@torch.no_grad()
def held_out_bits(
    model: SessaLM, tokens: Tensor, text_bytes: int, context: int, batch_size: int, precision: str = "fp32", stride: int | None = None
) -> float:
    """Bits per byte of held-out text: the whole negative log-likelihood of tokens (N,) after the first, over the bytes of the text.

    Windows of `context` tokens advance by `stride` (default context // 2); only what is new in a window counts, so every token is
    predicted once, and from at least context - stride tokens wherever there are as many.
    """
    stride = max(1, stride or context // 2)
    device = next(model.parameters()).device
    last = len(tokens) - 1  # targets are tokens[1:]
    starts = [0, *range(stride, max(1, last - context + stride), stride)] if last > context else [0]
    total = torch.zeros((), dtype=torch.float64, device=device)
    tokens = tokens.to(device)
    for first in range(0, len(starts), batch_size):
        begin = torch.tensor(starts[first : first + batch_size], device=device)[:, None]
        at = begin + torch.arange(context, device=device)
        fresh = (at >= torch.where(begin > 0, begin + context - stride, 0)) & (at < last)
        at = at.clamp(max=last - 1)
        with autocast(device, precision):
            logits = model(tokens[at].long())
        loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[at + 1].long().flatten(), reduction="none")
        total += torch.where(fresh.flatten(), loss.double(), 0.0).sum()
    return float(total) / math.log(2.0) / text_bytes


class Run:
    """The state of a training run: model, optimizer, step, log."""

    def __init__(self, options: TrainOptions, config: SessaConfig, tokenizer: Tokenizer, corpus: Corpus) -> None:
        self.options, self.config, self.tokenizer, self.corpus = options, config, tokenizer, corpus
        self.device = options.torch_device
        self.folder = Path(options.out)
        self.batches = Batches(corpus.train, options.context, options.batch_size, options.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            self.model = SessaLM(config).to(self.device)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, options.weight_decay), lr=options.lr, betas=(options.beta1, options.beta2),
                                           fused=self.device.type == "cuda")
        self.train_tokens = torch.from_numpy(corpus.train).to(self.device)
        self.held_tokens = torch.from_numpy(corpus.held_out).to(self.device)
        self.step, self.seconds = 0, 0.0
        self.rows: list[Row] = []

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets (B,context) of micro-batch `number`."""
        starts = torch.from_numpy(self.batches.starts(number)).to(self.device)
        window = self.train_tokens[starts[:, None] + torch.arange(self.options.context + 1, device=self.device)].long()
        return window[:, :-1], window[:, 1:]

    def optimize(self, lr: float) -> tuple[Tensor, Tensor]:
        """One optimizer step; (loss in nats per token, gradient norm before clipping), still on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for part in range(self.options.accumulate):
            inputs, targets = self.batch(self.step * self.options.accumulate + part)
            with autocast(self.device, self.options.precision):
                logits = self.model(inputs)
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten()) / self.options.accumulate
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.options.grad_clip)
        self.optimizer.step()
        return total, norm

    def evaluate(self) -> float:
        """Held-out bits per byte of the weights as they are."""
        self.model.eval()
        bits = held_out_bits(self.model, self.held_tokens, self.corpus.held_out_bytes, self.options.context, self.options.batch_size,
                             self.options.precision, stride=self.options.context)
        self.model.train()
        return bits

    def save(self) -> None:
        """Write resume.pt, the log and the checkpoint."""
        state = {"options": dataclasses.asdict(self.options), "config": self.config.to_dict(), "step": self.step, "seconds": self.seconds,
                 "tokenizer": self.tokenizer.to_json(), "corpus": self.corpus.fingerprint(), "model": self.model.state_dict(),
                 "optimizer": self.optimizer.state_dict(), "torch_rng": torch.get_rng_state()}
        data = io.BytesIO()
        torch.save(state, data)
        write_log(self.folder, self.rows)
        write_whole(self.folder / RESUME_FILE, data.getvalue())
        save_checkpoint(self.model, self.folder / CHECKPOINT_DIR, dtype=self.options.store, tokenizer=self.tokenizer.to_json())

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what `save` wrote. Raises UserError when the text has changed."""
        if state["corpus"] != self.corpus.fingerprint():
            raise UserError("the training text is not the one this run began with", got=self.options.data, fix="give the same --data, or start a new run")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["torch_rng"].cpu())
        self.step, self.seconds = state["step"], state["seconds"]
        self.rows = [row for row in read_log(self.folder) if row.step <= self.step]

    def finish(self) -> dict[str, Any]:
        """Measure what was stored, write report.json and loss.png, return the report."""
        stored = load_checkpoint(self.folder / CHECKPOINT_DIR, device=self.device)
        bits = held_out_bits(stored, self.held_tokens, self.corpus.held_out_bytes, self.options.context, self.options.batch_size)
        report = {
            "steps": self.step, "tokens": self.rows[-1].tokens if self.rows else 0, "seconds": round(self.seconds, 1),
            "parameters": sum(p.numel() for p in self.model.parameters()), "train_loss": self.rows[-1].loss if self.rows else None,
            "held_out_bits_per_byte": bits, "xz_9_bits_per_byte": self.corpus.xz_bits_per_byte, "train_bytes": self.corpus.train_bytes,
            "held_out_bytes": self.corpus.held_out_bytes, "train_files": len(self.corpus.train_files), "held_out_files": list(self.corpus.held_out_files),
            "skipped_files": list(self.corpus.skipped), "torch": torch.__version__,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu", "options": dataclasses.asdict(self.options),
        }
        write_report(self.folder, report)
        write_plot(self.folder, self.rows, self.corpus.train_bytes / len(self.corpus.train), self.corpus.xz_bits_per_byte, bits)
        return report


def start(options: TrainOptions, **shape: Any) -> Run:
    """A new run. shape: SessaConfig's fields but vocab_size, max_context and the special tokens, which the tokenizer and the context give.

    Raises UserError if `out` already holds a run, or on anything the options, the text or the shape get wrong.
    """
    need("safetensors", "matplotlib")  # what the end of the run writes with
    out = Path(options.out)
    if (out / RESUME_FILE).exists():
        raise UserError("the run's folder already holds a run", got=out, fix="continue it with --resume, or name another --out")
    options.torch_device  # noqa: B018 - refuses an absent device before the text is read
    tokenizer = Tokenizer(options.tokenizer) if options.tokenizer else Tokenizer.from_json(byte_level_tokenizer())
    corpus = load_corpus(options.data, tokenizer, options.held_out, options.extensions)
    config = SessaConfig(vocab_size=tokenizer.vocab_size, max_context=options.context, bos_token_id=corpus.separator, eos_token_id=corpus.separator, **shape)
    run = Run(options, config, tokenizer, corpus)
    out.mkdir(parents=True, exist_ok=True)
    return run


def resume(out: str | Path, **changes: Any) -> Run:
    """A run continued from its folder. changes: options that do not alter the loss curve's past (data's place, device, save_every, max_seconds, ...).

    Raises UserError if there is no run, if resume.pt is damaged, or if the text has changed.
    """
    need("safetensors", "matplotlib")
    path = Path(out) / RESUME_FILE
    if not path.is_file():
        raise UserError("there is no run to resume", got=path, allowed="a folder that train wrote", fix="leave --resume out to start one")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved = {**state["options"], "extensions": tuple(state["options"]["extensions"]), "out": str(out)}
    except Exception as error:  # a damaged file may raise anything
        raise UserError(f"{path} cannot be read", got=f"{type(error).__name__}: {str(error)[:120]}", fix="start a new run") from None
    options = TrainOptions(**{**saved, **changes})
    tokenizer = Tokenizer.from_json(state["tokenizer"])
    corpus = load_corpus(options.data, tokenizer, options.held_out, options.extensions)
    run = Run(options, SessaConfig.from_dict(state["config"], source=str(path)), tokenizer, corpus)
    run.restore(state)
    return run


def train(run: Run, stop_at: int | None = None, on_row: Callable[[Row, float], None] | None = None) -> dict[str, Any]:
    """Train until the schedule's end, or until step `stop_at` (the schedule stays that of options.steps); returns the report.

    on_row(row, progress 0..1) is called for every logged step. Ctrl-C ends the step at hand, saves the run and raises KeyboardInterrupt. Raises
    UserError when the loss stops being finite; what was saved before stays.
    """
    options = run.options
    pending: list[tuple[int, Tensor, Tensor, float, float, float | None]] = []
    end = options.steps if stop_at is None else min(stop_at, options.steps)
    clock = time.perf_counter() - run.seconds

    def flush() -> None:
        losses = torch.stack([x for p in pending for x in p[1:3]]).double().tolist() if pending else []
        for i, (step, _, _, lr, progress, held) in enumerate(pending):
            loss, norm = losses[2 * i], losses[2 * i + 1]
            if not math.isfinite(loss):
                raise UserError("training diverged", got=f"loss {loss} at step {step}", fix="a smaller --lr or a longer --warmup")
            row = Row(step, loss, lr, norm, step * options.accumulate * options.batch_size * options.context, held, round(run.seconds, 3))
            run.rows.append(row)
            if on_row is not None:
                on_row(row, progress)
        pending.clear()

    run.model.train()
    with _interruptible() as interrupted:
        while run.step < end and not interrupted:
            progress = max(run.step / options.steps, run.seconds / options.max_seconds if options.max_seconds else 0.0)
            if progress >= 1.0:
                break
            lr = learning_rate(options, run.step, progress)
            loss, norm = run.optimize(lr)
            run.step += 1
            held = run.evaluate() if run.step % options.eval_every == 0 else None
            pending.append((run.step, loss, norm, lr, progress, held))
            saving = run.step % options.save_every == 0
            if saving or len(pending) >= FLUSH_EVERY:
                flush()  # waits for the device
            run.seconds = time.perf_counter() - clock
            if saving:
                run.save()
        flush()
        run.save()
    if interrupted:
        raise KeyboardInterrupt
    return run.finish()


@contextlib.contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM fill the yielded list instead of striking amid a step; only the main thread can be asked so."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {number: signal.signal(number, lambda n, _: caught.append(n)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
