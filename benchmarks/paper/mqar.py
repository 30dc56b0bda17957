"""Diffuse MQAR: recall of values behind keys of several symbols, among distractors that share prefixes, at a controlled lag.

    BOS  (k_1..k_m v) x N  SEP  (k'_1..k'_m v') x G  ASK  (k_1..k_m) x Q

The label v is asked for at the last symbol of each query key; lag = its position - that of the stored v. The form is the paper's (arXiv 2604.18580, 5.1),
every size is ours, since the paper gives none. `ladder` is what a model scores that knows a part of the task only: accuracy means recall above it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from batches import Batch, Ints

BOS, SEP, ASK = (80, 81, 82)
VOCABULARY, PADDED = 84, 96


@dataclass(frozen=True)
class Spec:
    """Sizes. alphabet A, key length m, values V, stored pairs N in families of `family` that share the first m - 1 symbols, queries Q <= N, prefix: the
    chance that a distractor keeps the first symbols of a stored key. Training draws G in gaps, one a batch; tests have test_gaps."""

    alphabet: int = 16
    key: int = 3
    values: int = 64
    pairs: int = 8
    family: int = 2
    queries: int = 8
    prefix: float = 0.75
    gaps: tuple[int, int] = (8, 32)
    test_gaps: tuple[int, ...] = (32, 77, 168)

    def __post_init__(self) -> None:
        if self.alphabet + self.values > BOS or self.pairs % self.family or self.queries > self.pairs or self.key < 2:
            raise ValueError(f"sizes that do not fit: {self}")

    def tokens(self, gap: int) -> int:
        """T of an example with a noise group of `gap` pairs."""
        return 3 + (self.key + 1) * (self.pairs + gap) + self.key * self.queries


@dataclass(frozen=True)
class Examples:
    """Keys and values as integers: keys, values (B,N) as stored, noise_keys, noise_values (B,G), queries (B,Q): which stored pair each asks for."""

    keys: Ints
    values: Ints
    noise_keys: Ints
    noise_values: Ints
    queries: Ints


def _distinct(rng: np.random.Generator, rows: tuple[int, ...], count: int, below: int) -> Ints:
    """(*rows, count) distinct integers below `below` along the last axis, in random order."""
    return np.argsort(rng.random((*rows, below), dtype=np.float32), axis=-1)[..., :count].astype(np.int64)


def draw(spec: Spec, rng: np.random.Generator, batch: int, gap: int) -> Examples:
    """`batch` examples with `gap` distractors each."""
    size, m = spec.alphabet, spec.key
    prefixes = _distinct(rng, (batch,), spec.pairs // spec.family, size ** (m - 1))
    last = _distinct(rng, (batch, spec.pairs // spec.family), spec.family, size)
    keys = np.take_along_axis((prefixes[..., None] * size + last).reshape(batch, -1), _distinct(rng, (batch,), spec.pairs, spec.pairs), axis=1)
    values = _distinct(rng, (batch,), spec.pairs, spec.values)
    source = np.take_along_axis(keys, rng.integers(0, spec.pairs, (batch, gap)), axis=1)
    keep = np.where(rng.random((batch, gap)) < spec.prefix, rng.integers(1, m, (batch, gap)), 0)
    low = size ** (m - keep)
    noise = source // low * low + rng.integers(0, low)
    while (taken := (noise[..., None] == keys[:, None]).any(-1)).any():
        noise[taken] = (source // low * low)[taken] + rng.integers(0, low[taken])
    return Examples(keys, values, noise, rng.integers(0, spec.values, (batch, gap)), _distinct(rng, (batch,), spec.queries, spec.pairs))


def symbols(spec: Spec, keys: Ints) -> Ints:
    """(..., m): integers spelt in base A."""
    return keys[..., None] // spec.alphabet ** np.arange(spec.key - 1, -1, -1) % spec.alphabet


def spell(spec: Spec, found: Examples) -> Batch:
    """Examples as tokens."""
    batch, gap = found.noise_keys.shape
    m, first = spec.key, spec.alphabet

    def pairs(keys: Ints, values: Ints) -> Ints:
        return np.concatenate([symbols(spec, keys), first + values[..., None]], axis=-1).reshape(batch, -1)

    def mark(token: int) -> Ints:
        return np.full((batch, 1), token)

    asked = np.take_along_axis(found.keys, found.queries, axis=1)
    tokens = np.concatenate([mark(BOS), pairs(found.keys, found.values), mark(SEP), pairs(found.noise_keys, found.noise_values), mark(ASK),
                             symbols(spec, asked).reshape(batch, -1)], axis=1)
    begin = 3 + (m + 1) * (spec.pairs + gap)
    at = np.broadcast_to(begin + m * np.arange(spec.queries) + m - 1, (batch, spec.queries))
    labels = first + np.take_along_axis(found.values, found.queries, axis=1)
    stored = 1 + (m + 1) * found.queries + m
    return Batch(tokens, np.ascontiguousarray(at), labels, at - stored)


def training_batch(spec: Spec, seed: int, step: int, batch: int) -> Batch:
    """Batch number `step` of a run: a function of (seed, step), the same bytes everywhere."""
    rng = np.random.default_rng([seed, step, 0])
    gap = int(rng.integers(spec.gaps[0], spec.gaps[1] + 1))
    return spell(spec, draw(spec, rng, batch, gap))


def test_batch(spec: Spec, gap: int, batch: int, seed: int = 0, split: int = 1) -> Batch:
    """Examples of one lag that no training run sees. split 1: test, 2: validation."""
    return spell(spec, draw(spec, np.random.default_rng([seed, gap, split, 7]), batch, gap))


test_batch.__test__ = False  # type: ignore[attr-defined]


def ladder(spec: Spec, gap: int, examples: int = 2000, seed: int = 0) -> dict[str, float]:
    """Accuracy, by simulation, of models that know only part of the task; each draws uniformly from the pairs that its rule leaves."""
    found = draw(spec, np.random.default_rng([seed, gap, 3]), examples, gap)
    keys = np.concatenate([found.keys, found.noise_keys], axis=1)
    values = np.concatenate([found.values, found.noise_values], axis=1)
    asked, answer = (np.take_along_axis(x, found.queries, axis=1) for x in (found.keys, found.values))
    right = values[:, None, :] == answer[..., None]  # (B,Q,N+G)
    spelt, wanted = symbols(spec, keys)[:, None], symbols(spec, asked)[:, :, None]
    same = spelt == wanted  # (B,Q,N+G,m)
    stored = np.arange(keys.shape[1]) < spec.pairs

    def uniform(match: np.ndarray) -> float:
        return float(((match & right).sum(-1) / match.sum(-1)).mean())

    def recent(match: np.ndarray) -> float:
        last = match.shape[-1] - 1 - np.argmax(match[..., ::-1], axis=-1)
        return float(np.take_along_axis(right, last[..., None], axis=-1).mean())

    rules = {"chance": 1 / spec.values, "any stored value": 1 / spec.pairs}
    for count in range(1, spec.key):
        match = same[..., :count].all(-1)
        name = f"first {count} symbol{'s' * (count > 1)}"
        rules |= {f"{name}, uniform over matches": uniform(match), f"{name}, stored pairs only": uniform(match & stored), f"{name}, most recent": recent(match)}
    return rules | {"last symbol, uniform over matches": uniform(same[..., -1]), "whole key": uniform(same.all(-1))}
