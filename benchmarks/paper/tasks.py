"""The three tasks behind one interface: batches that are functions of (seed, step), validation and test points, yardsticks."""

from __future__ import annotations

import hashlib
import itertools
import math
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import bayes
import mqar
import numpy as np
import soup
import torch
import torch.nn.functional as F
from batches import Batch
from torch import Tensor, nn

from sessa_deploy import UserError
from sessa_deploy.data import Batches, Corpus, load_corpus
from sessa_deploy.runtime.tokenizer import Tokenizer, byte_level_tokenizer
from sessa_deploy.train_run import held_out_bits

TASKS = ("mqar", "symbolsoup", "language")  # the order of work
Scores = dict[str, float]


class Task:
    """vocabulary: rows of the embedding. length: of a training batch, padded. batch_size, steps: defaults. answers: the tokens a model may choose among, None
    for all. points: what is tested, by name; higher is better where `better` says so of `metric`."""

    name: str
    title: str
    metric = "accuracy"
    better = "higher"
    vocabulary: int
    length: int
    batch_size: int
    steps: int
    answers: slice | None = None
    points: tuple[str, ...]

    def training_batch(self, seed: int, step: int) -> Batch:
        """Batch `step` of a run with this seed, at its own length."""
        raise NotImplementedError

    def padded_batch(self, seed: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """(tokens, at, labels) of it, padded on the right to `length`: one shape for the whole run."""
        batch = self.training_batch(seed, step)
        room = self.length - batch.tokens.shape[1]
        tokens = np.pad(batch.tokens, ((0, 0), (0, room))) if room else batch.tokens
        return torch.from_numpy(tokens), torch.from_numpy(batch.at), torch.from_numpy(batch.labels)

    def validate(self, model: nn.Module) -> Scores:
        """loss and the metric on examples that neither training nor the test sees."""
        raise NotImplementedError

    def test(self, model: nn.Module) -> dict[str, Scores]:
        """The scores of every point."""
        raise NotImplementedError

    def yardsticks(self) -> dict[str, dict[str, float]]:
        """point -> {what a reader knows: its score}, the ceiling last."""
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """What the report says of the data."""
        return {}


@torch.no_grad()
def score(model: nn.Module, batches: Iterator[Batch] | Sequence[Batch], answers: slice | None = None) -> Scores:
    """loss (nats an answer) and accuracy of a model in float32, and `lags` where the batches have them: {lag: accuracy} by eighths of their range."""
    device = next(model.parameters()).device
    model.eval()
    losses, right, lags = [], [], []
    for batch in batches:
        tokens, at, labels = (torch.from_numpy(np.ascontiguousarray(x)).to(device) for x in (batch.tokens, batch.at, batch.labels))
        logits = asked(model(tokens), at)
        losses.append(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").double().cpu())
        chosen = logits.argmax(-1) if answers is None else logits[..., answers].argmax(-1) + answers.start
        right.append((chosen == labels).flatten().cpu())
        if batch.lags is not None:
            lags.append(batch.lags.ravel())
    model.train()
    correct = torch.cat(right).double()
    found: dict[str, Any] = {"loss": float(torch.cat(losses).mean()), "accuracy": float(correct.mean())}
    if lags:
        found["lags"] = _by_lag(np.concatenate(lags), correct.numpy())
    return found


def _by_lag(lags: np.ndarray, right: np.ndarray) -> dict[str, float]:
    edges = np.unique(np.linspace(lags.min(), lags.max() + 1, 9).astype(int))
    groups = [(int((low + high - 1) // 2), right[(lags >= low) & (lags < high)]) for low, high in itertools.pairwise(edges)]
    return {str(middle): float(x.mean()) for middle, x in groups if len(x)}


def asked(logits: Tensor, at: Tensor) -> Tensor:
    """(B,K,V): the logits at the positions at (B,K) of logits (B,T,V)."""
    return torch.gather(logits, 1, at[..., None].expand(-1, -1, logits.shape[-1]))


class Mqar(Task):
    """Diffuse MQAR, tested at 1, 2 and 4 times the largest training lag, and nearer."""

    name, title = "mqar", "Diffuse MQAR"
    vocabulary = mqar.PADDED
    batch_size, steps = 128, 8000

    def __init__(self, key: int = 3, examples: int = 2000, spec: mqar.Spec | None = None) -> None:
        self.spec, self.examples = spec or mqar.Spec(key=key), examples
        self.length = self.spec.tokens(self.spec.gaps[1])
        self.points = tuple(f"G {gap}" for gap in self.spec.test_gaps)

    def training_batch(self, seed: int, step: int) -> Batch:
        return mqar.training_batch(self.spec, seed, step, self.batch_size)

    def _chunks(self, gap: int, count: int, split: int) -> Iterator[Batch]:
        """Examples of one gap in parts that a small GPU takes, the same whatever the parts."""
        whole = mqar.test_batch(self.spec, gap, count, split=split)
        part = max(1, min(250, 60000 // whole.tokens.shape[1]))
        for i in range(0, count, part):
            at = slice(i, i + part)
            yield Batch(whole.tokens[at], whole.at[at], whole.labels[at], None if whole.lags is None else whole.lags[at])

    def validate(self, model: nn.Module) -> Scores:
        found = [score(model, self._chunks(gap, max(8, self.examples // 4), 2)) for gap in self.spec.gaps]
        return {key: float(np.mean([x[key] for x in found])) for key in ("loss", "accuracy")}

    def test(self, model: nn.Module) -> dict[str, Scores]:
        return {f"G {gap}": score(model, self._chunks(gap, self.examples, 1)) for gap in self.spec.test_gaps}

    def yardsticks(self) -> dict[str, dict[str, float]]:
        return {f"G {gap}": mqar.ladder(self.spec, gap) for gap in self.spec.test_gaps}

    def facts(self) -> dict[str, Any]:
        lags = {f"G {gap}": mqar.test_batch(self.spec, gap, 200).lags for gap in self.spec.test_gaps}
        return {"spec": vars(self.spec), "lags": {name: [int(x.min()), int(x.max())] for name, x in lags.items() if x is not None},
                "test examples": self.examples}


class SymbolSoup(Task):
    """SymbolSoup at the published lengths: trained on the stream, tested on the published split."""

    name, title = "symbolsoup", "SymbolSoup"
    vocabulary, length = soup.PADDED, soup.MAX_TOKENS
    batch_size, steps = 64, 5000
    answers = slice(soup.FIRST_LABEL, soup.FIRST_LABEL + soup.CLASSES)
    points = ("test",)

    def __init__(self, examples: int = 2000) -> None:
        self.examples = examples

    @cached_property
    def _splits(self) -> dict[str, list[tuple[list[int], int]]]:
        found = soup.official()
        sums = soup.checksums(found)
        wrong = sorted(name for name in soup.SHA256 if sums[name] != soup.SHA256[name])
        if wrong:
            raise UserError("SymbolSoup's data did not come out as published", got=f"another SHA-256 of {', '.join(wrong)}", allowed="the published sums")
        return {split: [(soup.encode(text), c) for text, c in found[split][: self.examples]] for split in ("val", "test")}

    def training_batch(self, seed: int, step: int) -> Batch:
        return soup.stream_batch(seed, step, self.batch_size)

    def _score(self, model: nn.Module, split: str) -> Scores:
        rows = sorted(self._splits[split], key=lambda row: len(row[0]))
        return score(model, (soup.as_batch(rows[i : i + 100]) for i in range(0, len(rows), 100)), self.answers)

    def validate(self, model: nn.Module) -> Scores:
        return self._score(model, "val")

    def test(self, model: nn.Module) -> dict[str, Scores]:
        return {"test": self._score(model, "test")}

    def yardsticks(self) -> dict[str, dict[str, float]]:
        return {"test": dict(bayes.YARDSTICKS)}

    def facts(self) -> dict[str, Any]:
        return {"tokens": [soup.MIN_TOKENS, soup.MAX_TOKENS], "training": "stream", "test": "official, SHA-256 verified", "test examples": self.examples}


@lru_cache(maxsize=2)
def standard_library(folder: str) -> Corpus:
    """The bytes of a Python's standard library: its .py files, what was installed into it left out."""
    return load_corpus(folder, Tokenizer.from_json(byte_level_tokenizer()), held_out=0.08, extensions=("py",), without=Path(folder) / "site-packages")


class Language(Task):
    """Next-byte prediction in windows of 256 on the standard library of the Python at hand; half of the held-out bytes choose rates, half are the test."""

    name, title = "language", "short-context language model"
    metric, better = "bits", "lower"
    vocabulary, length = 257, 256
    batch_size, steps = 64, 4000
    points = ("held out",)

    def __init__(self, folder: str | None = None, length: int = 256) -> None:
        self.folder, self.length = folder or sysconfig.get_paths()["stdlib"], length

    @cached_property
    def corpus(self) -> Corpus:
        return standard_library(self.folder)

    @cached_property
    def _windows(self) -> Callable[[int], Batches]:
        return lru_cache(maxsize=4)(lambda seed: Batches(self.corpus.train, self.length, self.batch_size, seed))

    def training_batch(self, seed: int, step: int) -> Batch:
        starts = self._windows(seed).starts(step)
        window = self.corpus.train[starts[:, None] + np.arange(self.length + 1)].astype(np.int64)
        at = np.broadcast_to(np.arange(self.length), (self.batch_size, self.length))
        return Batch(window[:, :-1].copy(), at.copy(), window[:, 1:].copy())

    def _bits(self, model: nn.Module, half: int) -> Scores:
        tokens = self.corpus.held_out
        part = tokens[: len(tokens) // 2] if half == 0 else tokens[len(tokens) // 2 :]
        model.eval()
        bits = held_out_bits(model, torch.from_numpy(part), len(part) - 1, self.length, 64)  # type: ignore[arg-type]
        model.train()
        return {"bits": bits, "loss": bits * math.log(2.0)}

    def validate(self, model: nn.Module) -> Scores:
        return self._bits(model, 0)

    def test(self, model: nn.Module) -> dict[str, Scores]:
        return {"held out": self._bits(model, 1)}

    def yardsticks(self) -> dict[str, dict[str, float]]:
        found = {"a byte at random": 8.0}
        if self.corpus.xz_bits_per_byte is not None:
            found["xz -9 on the held-out files"] = self.corpus.xz_bits_per_byte
        return {"held out": found}

    def facts(self) -> dict[str, Any]:
        digest = hashlib.sha256(self.corpus.train.tobytes()).hexdigest()
        return {"text": "the standard library of this Python, *.py", "training bytes": self.corpus.train_bytes, "held-out bytes": self.corpus.held_out_bytes,
                "files": len(self.corpus.train_files), "sha256 of the training tokens": digest}


def make(name: str, key: int = 3, examples: int = 2000) -> Task:
    """A task by name."""
    return Mqar(key, examples) if name == "mqar" else SymbolSoup(examples) if name == "symbolsoup" else Language()
