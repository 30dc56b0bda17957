"""The state of a training run and what it computes: batches, optimizer steps, held-out bits, saves."""

from __future__ import annotations

import io
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sessa_deploy.checkpoint import load_checkpoint, save_checkpoint
from sessa_deploy.config import SessaConfig
from sessa_deploy.contract import SAMPLE_FILE
from sessa_deploy.data import Batches, Corpus
from sessa_deploy.distributed import states, wrap
from sessa_deploy.distributed.group import ALONE, Group
from sessa_deploy.errors import UserError
from sessa_deploy.files import write_whole
from sessa_deploy.model import SessaLM
from sessa_deploy.runtime.tokenizer import Tokenizer
from sessa_deploy.train_graph import Graphed
from sessa_deploy.train_log import LOG_FILE, PLOT_FILE, REPORT_FILE, Row, read_log, write_log, write_plot, write_report
from sessa_deploy.train_measure import Windows, autocast, held_out_bits, require_memory, told_of_memory
from sessa_deploy.train_options import TrainOptions
from sessa_deploy.train_sample import held_out_sample, sample_card

RESUME_FILE, RESUME_DIR, CHECKPOINT_DIR, BEST_DIR = "resume.pt", "resume", "checkpoint", "checkpoint-best"
RUN_FILES = (CHECKPOINT_DIR, BEST_DIR, RESUME_FILE, RESUME_DIR, LOG_FILE, PLOT_FILE, REPORT_FILE)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW groups: matrices decay; biases, norms and gamma's parameters do not."""
    parameters = list(model.parameters())
    matrices = [p for p in parameters if p.dim() >= 2 and min(p.shape) > 1]
    others = [p for p in parameters if not (p.dim() >= 2 and min(p.shape) > 1)]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


class Run:
    """The state of a training run: model, optimizer, step, log. origin: what the report says of the checkpoint it began with, None for none.

    group: the processes that share its steps; all of them hold a Run and make the same calls. values: the weights to begin with, by the names of
    the model's state dict, None for random ones; a sharded run looks at process 0's.
    """

    def __init__(
        self, options: TrainOptions, config: SessaConfig, tokenizer: Tokenizer, corpus: Corpus, origin: dict[str, Any] | None = None, group: Group = ALONE,
        values: dict[str, Tensor] | None = None,
    ) -> None:
        self.options, self.config, self.tokenizer, self.corpus, self.origin, self.group = options, config, tokenizer, corpus, origin, group
        self.share = options.share(group.size)
        self.device = options.device_of(group.local, group.local_size)
        self.graphed = self._graphed() if options.cuda_graph else None
        self.folder = Path(options.out)
        self.batches = Batches(corpus.train, options.context, options.batch_size, options.seed)
        sharded = options.shard and group.many
        require_memory(options, config, self.device, group.size if sharded else 1)
        with torch.random.fork_rng(devices=[]), told_of_memory():
            torch.manual_seed(options.seed)
            self.stepped = self._sharded(values) if sharded else self._whole(values)
        on_gpu = self.device.type == "cuda"
        rate = torch.zeros((), device=self.device) if self.graphed else options.lr  # a graph reads it where it is
        self.optimizer = torch.optim.AdamW(wrap.unmixed(parameter_groups(self.model, options.weight_decay)), lr=rate, betas=(options.beta1, options.beta2),
                                           fused=on_gpu, capturable=on_gpu and self.graphed is not None)
        self.train_tokens = Windows(corpus.train, self.device)
        self.held_tokens = Windows(corpus.held_out, self.device)
        self.step, self.seconds = 0, 0.0
        self.saved_step: int | None = None  # where --resume would go on
        self.unsaved = True
        self.rows: list[Row] = []
        self.best: tuple[float, int] | None = None  # held-out bits and the step of checkpoint-best/

    @property
    def model(self) -> SessaLM:
        """The model, its parameters under their plain names; those of a sharded run are DTensors."""
        return self.stepped.model  # type: ignore[return-value]

    def _whole(self, values: dict[str, Tensor] | None) -> wrap.Stepped:
        model = SessaLM(self.config).to(self.device)
        if values is not None:
            model.load_state_dict(values)
        wrap.change_layers(model, self.options.compile, self.options.activation_checkpointing)
        return wrap.replicated(model, self.group)

    def _sharded(self, values: dict[str, Tensor] | None) -> wrap.Stepped:
        if values is None and self.group.chief:  # the weights that one process alone would begin with
            values = SessaLM(self.config).state_dict()
        with torch.device("meta"):
            model = SessaLM(self.config)
        wrap.change_layers(model, self.options.compile, self.options.activation_checkpointing)
        stepped = wrap.sharded(model, self.group, self.device)
        wrap.fill(model, self.group, values)
        return stepped

    def where(self) -> str:
        """What the run is trained on, for people."""
        kind = "a GPU" if self.device.type == "cuda" else "the CPU"
        return f"{self.group.size} processes, each on {kind}" if self.group.many else str(self.device)

    def note(self) -> str | None:
        """What somebody should hear of how the run is shared; None for nothing."""
        if self.options.shard and not self.group.many:
            return "note: one process alone has nothing to shard over; for more of them: torchrun --nproc-per-node N -m sessa_deploy train ..."
        return None

    def _graphed(self) -> Graphed:
        fix = "leave --cuda-graph out"
        if self.device.type != "cuda":
            raise UserError("a CUDA graph needs a GPU", got=f"--device {self.options.device}, which is the CPU here", fix=fix)
        if self.group.many:
            raise UserError("a step that several processes share is not captured", got=f"--cuda-graph and {self.group.size} processes", fix=fix)
        return Graphed(self._step, self.device)

    def windows(self, number: int) -> Tensor:
        """Tokens (B,context + 1) of micro-batch `number`, counted over all processes: inputs, and behind each its target."""
        starts = torch.from_numpy(self.batches.starts(number)).to(self.device)
        return self.train_tokens[starts[:, None] + torch.arange(self.options.context + 1, device=self.device)]

    def optimize(self, lr: float) -> tuple[Tensor, Tensor]:
        """One optimizer step; (loss in nats per token of this process's windows, gradient norm before clipping), still on the device."""
        for group in self.optimizer.param_groups:
            if self.graphed:
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        parts = self.share.accumulate
        # the windows of a step are the same however many processes share them
        windows = [self.windows((self.step * parts + part) * self.group.size + self.group.rank) for part in range(parts)]
        return (self.graphed or self._step)(windows)

    def _step(self, windows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        parts = len(windows)
        for part, window in enumerate(windows):
            inputs, targets = window[:, :-1], window[:, 1:]
            with self.stepped.part(last=part == parts - 1):
                loss = self.stepped.loss(inputs, targets, autocast(self.device, self.options.precision, cache=not self.stepped.sharded)) / parts
                loss.backward()
            total += loss.detach()
        norm = self.stepped.clip(self.options.grad_clip)
        self.optimizer.step()
        return total, norm

    def evaluate(self) -> float:
        """Held-out bits per byte of the weights as they are."""
        with self.stepped.measured():
            return held_out_bits(self.model, self.held_tokens, self.corpus.held_out_bytes, self.options.context, self.options.batch_size,
                                 self.options.precision, stride=self.options.context, group=self.group)

    def keep_best(self, bits: float) -> None:
        """Write checkpoint-best/ if the weights as they are, with these held-out bits, are the best so far. Raises UserError where it cannot be written."""
        if self.best is None or bits < self.best[0]:
            self._told_where_to_go_on(lambda: self._save_checkpoint(BEST_DIR))
            self.best = bits, self.step

    def save(self) -> None:
        """Write the state, the log and the checkpoint. Raises UserError where they cannot be written; what was saved before stays."""
        self._told_where_to_go_on(self._save)

    def _save(self) -> None:
        self.group.on_chief(lambda: write_log(self.folder, self.rows))
        plain = {"options": self.options.to_dict(), "config": self.config.to_dict(), "step": self.step, "seconds": self.seconds,
                 "tokenizer": self.tokenizer.to_json(), "corpus": self.corpus.fingerprint(), "origin": self.origin, "processes": self.group.size}
        if self.group.many:
            states.save(self.folder / RESUME_DIR, self.group, states.tensors(self.model, self.optimizer), plain)
            self.group.on_chief(lambda: (self.folder / RESUME_FILE).unlink(missing_ok=True))
        else:
            data = io.BytesIO()
            torch.save({**plain, "model": self.model.state_dict(), "optimizer": self._plain_optimizer(), "torch_rng": torch.get_rng_state()}, data)
            write_whole(self.folder / RESUME_FILE, data.getvalue(), "--out", "the run")
            shutil.rmtree(self.folder / RESUME_DIR, ignore_errors=True)
        self.saved_step = self.step
        self._save_checkpoint(CHECKPOINT_DIR)
        self.unsaved = False

    def _plain_optimizer(self) -> dict[str, Any]:
        """The optimizer's state as a run without a graph has it."""
        state: dict[str, Any] = self.optimizer.state_dict()
        for group in state["param_groups"]:
            group.update(lr=float(group["lr"]), capturable=False)
        return state

    def _save_checkpoint(self, name: str) -> None:
        model = self._gathered() if self.stepped.sharded else self.model
        self.group.on_chief(lambda: self._write_checkpoint(model, self.folder / name))

    def _write_checkpoint(self, model: SessaLM, folder: Path) -> None:
        save_checkpoint(model, folder, dtype=self.options.store, tokenizer=self.tokenizer.to_json(), card=self._card())
        if self.options.keep_sample:
            write_whole(folder / SAMPLE_FILE, held_out_sample(self.corpus, self.tokenizer), "--out", "the sample")

    def _gathered(self) -> SessaLM:
        """A sharded run's model whole, on the CPU, in process 0; without values in the others."""
        found = wrap.gathered(self.model, keep=self.group.chief)
        with torch.device("meta"):
            model = SessaLM(self.config)
        if found:
            if self.config.tie_word_embeddings:
                found["lm_head.weight"] = found["embedding.weight"]
            model.load_state_dict(found, assign=True)
        return model

    def _told_where_to_go_on(self, work: Any) -> None:
        try:
            work()
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
        name, windows = self.origin["checkpoint"], self.share.windows
        return (f"# Continued from {name}\n\nThe run began with the weights of `{name}` (SHA-256 of its tensors in float32: "
                f"`{self.origin['weights_sha256']}`) and a fresh optimizer, and trained {self.step} steps of {windows} windows of {self.options.context} "
                f"tokens on {self.corpus.train_bytes:,} bytes of text. Vocabulary, special tokens and shape are that checkpoint's.\n"
                + (f"\n{kept}" if kept else ""))

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what `save` wrote, by whichever number of processes. Raises UserError when the text has changed or the state does not fit the model."""
        if state["corpus"] != self.corpus.fingerprint():
            raise UserError("the training text is not the one this run began with", got=self.options.data, fix="give the same --data, or start a new run")
        step = int(state["step"])
        if "folder" in state:
            values = states.tensors(self.model, self.optimizer)
            states.load(self.folder / RESUME_DIR, self.group, state["folder"], values)
            states.set_moments(self.model, self.optimizer, values, step)
        elif self.stepped.sharded:
            self._deal_out(state, step)
        else:
            self.model.load_state_dict(state["model"])
            for saved, own in zip(state["optimizer"]["param_groups"], self.optimizer.param_groups, strict=True):
                saved.update({name: own[name] for name in ("lr", "capturable", "fused")})  # how it steps is this run's affair
            self.optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["torch_rng"].cpu())
        self.step, self.seconds = step, float(state["seconds"])
        self.saved_step = self.step
        self.rows = [row for row in read_log(self.folder) if row.step <= self.step]
        self.best = min(((row.held_out, row.step) for row in self.rows if row.held_out is not None), default=None)

    @torch.no_grad()
    def _deal_out(self, state: dict[str, Any], step: int) -> None:
        """Take a whole state, as one process saves it, into a sharded model."""
        like = dict(self.model.named_parameters())
        names = {id(p): name for name, p in like.items()}
        ordered = [names[id(p)] for group in parameter_groups(self.model, 0.0) for p in group["params"]]  # as one process numbers them
        for name, parameter in like.items():
            parameter.copy_(wrap.placed(state["model"][name], parameter))
        moments = {f"{moment}.{name}": wrap.placed(x, like[name]) for i, name in enumerate(ordered)
                   for moment, x in state["optimizer"]["state"].get(i, {}).items() if moment != "step"}
        states.set_moments(self.model, self.optimizer, moments, step)

    def finish(self) -> dict[str, Any]:
        """Measure what was stored, write report.json and loss.png, return the report; {} in other processes than number 0."""
        with told_of_memory():
            if self.stepped.sharded:  # one process alone may not hold what was stored: the weights as they are, before they were rounded to `store`
                with self.stepped.measured():
                    bits = held_out_bits(self.model, self.held_tokens, self.corpus.held_out_bytes, self.options.context, self.options.batch_size,
                                         group=self.group)
            else:
                stored = load_checkpoint(self.folder / CHECKPOINT_DIR, device=self.device)
                bits = held_out_bits(stored, self.held_tokens, self.corpus.held_out_bytes, self.options.context, self.options.batch_size, group=self.group)
        return self.group.on_chief(lambda: self._report(bits)) or {}

    def _report(self, bits: float) -> dict[str, Any]:
        report = {
            "steps": self.step, "tokens": self.rows[-1].tokens if self.rows else 0, "seconds": round(self.seconds, 1),
            "parameters": sum(p.numel() for p in self.model.parameters()), "train_loss": self.rows[-1].loss if self.rows else None,
            "held_out_bits_per_byte": bits, "xz_9_bits_per_byte": self.corpus.xz_bits_per_byte, "train_bytes": self.corpus.train_bytes,
            "held_out_bytes": self.corpus.held_out_bytes, "train_files": len(self.corpus.train_files), "held_out_files": list(self.corpus.held_out_files),
            "best": None if self.best is None else {"step": self.best[1], "held_out_bits_per_byte": self.best[0]},
            "skipped_files": list(self.corpus.skipped), "torch": torch.__version__, "processes": self.group.size, "global_batch": self.share.windows,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu", "options": self.options.to_dict(),
            "init_from": self.origin,
        }
        write_report(self.folder, report)
        write_plot(self.folder, self.rows, self.corpus.train_bytes / len(self.corpus.train), self.corpus.xz_bits_per_byte, bits)
        return report
