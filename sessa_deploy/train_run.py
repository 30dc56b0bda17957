"""The state of a training run and what it computes: batches, optimizer steps, held-out bits, saves."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sessa_deploy.checkpoint import expected_shapes, load_checkpoint, save_checkpoint
from sessa_deploy.config import SessaConfig
from sessa_deploy.contract import SAMPLE_FILE
from sessa_deploy.data import Batches, Corpus
from sessa_deploy.errors import UserError
from sessa_deploy.files import write_whole
from sessa_deploy.model import SessaLM
from sessa_deploy.runtime.tokenizer import Tokenizer
from sessa_deploy.train_log import LOG_FILE, PLOT_FILE, REPORT_FILE, Row, read_log, write_log, write_plot, write_report
from sessa_deploy.train_options import TrainOptions
from sessa_deploy.train_sample import held_out_sample, sample_card

RESUME_FILE, CHECKPOINT_DIR = "resume.pt", "checkpoint"
RUN_FILES = (CHECKPOINT_DIR, RESUME_FILE, LOG_FILE, PLOT_FILE, REPORT_FILE)
_LESS_MEMORY = "a smaller model, or a smaller --batch-size (with --accumulate) or --context"
_STATE_BYTES = 16  # of each parameter: float32 weight, gradient and AdamW's two moments


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


def require_memory(options: TrainOptions, config: SessaConfig, device: torch.device) -> None:
    """UserError if what a run cannot do without exceeds the memory of its device: weights, gradients, moments, and what a micro-batch leaves of each layer."""
    one = expected_shapes(dataclasses.replace(config, n_layers=1))
    layer = sum(math.prod(shape) for name, shape in one.items() if name.startswith("layers."))
    parameters = sum(math.prod(shape) for name, shape in one.items()) + (config.n_layers - 1) * layer
    tokens = options.batch_size * options.context
    need = _STATE_BYTES * parameters + tokens * (4 * config.vocab_size + 2 * config.d_model * config.n_layers)
    have = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > have:
        raise UserError("the run does not fit into memory", got=f"{parameters:,} parameters and micro-batches of {tokens:,} tokens: {_giga(need)} at least",
                        allowed=f"{_giga(have)}", fix=_LESS_MEMORY)


def _giga(count: int) -> str:
    return f"{min(count, 10**30) / 1e9:,.1f} GB"


@contextlib.contextmanager
def told_of_memory() -> Iterator[None]:
    """Turns a failed allocation, of whichever device, into one UserError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "DefaultCPUAllocator" not in text:
            raise
        raise UserError("out of memory", got=text[:120] or type(error).__name__, fix=_LESS_MEMORY) from None


class Run:
    """The state of a training run: model, optimizer, step, log. origin: what the report says of the checkpoint it began with, None for none."""

    def __init__(self, options: TrainOptions, config: SessaConfig, tokenizer: Tokenizer, corpus: Corpus, origin: dict[str, Any] | None = None) -> None:
        self.options, self.config, self.tokenizer, self.corpus, self.origin = options, config, tokenizer, corpus, origin
        self.device = options.torch_device
        self.folder = Path(options.out)
        self.batches = Batches(corpus.train, options.context, options.batch_size, options.seed)
        require_memory(options, config, self.device)
        with torch.random.fork_rng(devices=[]), told_of_memory():
            torch.manual_seed(options.seed)
            self.model = SessaLM(config).to(self.device)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, options.weight_decay), lr=options.lr, betas=(options.beta1, options.beta2),
                                           fused=self.device.type == "cuda")
        self.train_tokens = torch.from_numpy(corpus.train).to(self.device)
        self.held_tokens = torch.from_numpy(corpus.held_out).to(self.device)
        self.step, self.seconds = 0, 0.0
        self.saved_step: int | None = None  # where --resume would go on
        self.unsaved = True
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
        """Write resume.pt, the log and the checkpoint. Raises UserError where they cannot be written; what was saved before stays."""
        state = {"options": self.options.to_dict(), "config": self.config.to_dict(), "step": self.step, "seconds": self.seconds,
                 "tokenizer": self.tokenizer.to_json(), "corpus": self.corpus.fingerprint(), "origin": self.origin, "model": self.model.state_dict(),
                 "optimizer": self.optimizer.state_dict(), "torch_rng": torch.get_rng_state()}
        data = io.BytesIO()
        torch.save(state, data)
        try:
            write_log(self.folder, self.rows)
            write_whole(self.folder / RESUME_FILE, data.getvalue(), "--out", "the run")
            self.saved_step = self.step
            save_checkpoint(self.model, self.folder / CHECKPOINT_DIR, dtype=self.options.store, tokenizer=self.tokenizer.to_json(), card=self._card())
            if self.options.keep_sample:
                write_whole(self.folder / CHECKPOINT_DIR / SAMPLE_FILE, held_out_sample(self.corpus, self.tokenizer), "--out", "the sample")
            self.unsaved = False
        except UserError as error:
            if self.saved_step is None:
                raise
            again = f"sessa-deploy train --resume --out {shlex.quote(str(self.folder))}"
            raise UserError(error.what, error.got, error.allowed, f"{error.fix}; the run goes on from step {self.saved_step} with: {again}") from None

    def _card(self) -> str | None:
        """MODEL_CARD.md of a model that began as another one, or that keeps a sample; another one has its report alone."""
        kept = sample_card(self.corpus, Path(self.options.data).name, self.options.data_licence) if self.options.keep_sample else None
        if self.origin is None:
            return kept and f"# Trained by sessa-deploy\n\n{kept}"
        name, windows = self.origin["checkpoint"], self.options.batch_size * self.options.accumulate
        return (f"# Continued from {name}\n\nThe run began with the weights of `{name}` (SHA-256 of its tensors in float32: "
                f"`{self.origin['weights_sha256']}`) and a fresh optimizer, and trained {self.step} steps of {windows} windows of {self.options.context} "
                f"tokens on {self.corpus.train_bytes:,} bytes of text. Vocabulary, special tokens and shape are that checkpoint's.\n"
                + (f"\n{kept}" if kept else ""))

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what `save` wrote. Raises UserError when the text has changed or the state does not fit the model."""
        if state["corpus"] != self.corpus.fingerprint():
            raise UserError("the training text is not the one this run began with", got=self.options.data, fix="give the same --data, or start a new run")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["torch_rng"].cpu())
        self.step, self.seconds = int(state["step"]), float(state["seconds"])
        self.saved_step = self.step
        self.rows = [row for row in read_log(self.folder) if row.step <= self.step]

    def finish(self) -> dict[str, Any]:
        """Measure what was stored, write report.json and loss.png, return the report."""
        with told_of_memory():
            stored = load_checkpoint(self.folder / CHECKPOINT_DIR, device=self.device)
            bits = held_out_bits(stored, self.held_tokens, self.corpus.held_out_bytes, self.options.context, self.options.batch_size)
        report = {
            "steps": self.step, "tokens": self.rows[-1].tokens if self.rows else 0, "seconds": round(self.seconds, 1),
            "parameters": sum(p.numel() for p in self.model.parameters()), "train_loss": self.rows[-1].loss if self.rows else None,
            "held_out_bits_per_byte": bits, "xz_9_bits_per_byte": self.corpus.xz_bits_per_byte, "train_bytes": self.corpus.train_bytes,
            "held_out_bytes": self.corpus.held_out_bytes, "train_files": len(self.corpus.train_files), "held_out_files": list(self.corpus.held_out_files),
            "skipped_files": list(self.corpus.skipped), "torch": torch.__version__,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu", "options": self.options.to_dict(),
            "init_from": self.origin,
        }
        write_report(self.folder, report)
        write_plot(self.folder, self.rows, self.corpus.train_bytes / len(self.corpus.train), self.corpus.xz_bits_per_byte, bits)
        return report
