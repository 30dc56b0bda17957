"""Drive a case through a graph or a session and collect canonical tensors. numpy only, so it runs where an engine runs.

Modes, so that each half of deployment is proven: "graph" calls the stateless function with caches that this module owns, "session" calls
an implementation that owns its caches and appends to them itself, "greedy" lets that implementation pick the tokens too.
Canonical tensors of a case: logits (N,V) float32 or float64 (not in mode greedy), token (N,) int64 and layer.{i}.{field} (R, row...), see cases.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from sessa_deploy.config import SessaConfig
from sessa_deploy.contract import INPUT_IDS, LOGITS, NEW_LENGTH, PAST_LENGTH, cache_entries, cache_row_shape, new_name, past_name
from sessa_deploy.errors import SessaError, UserError
from sessa_deploy.export.parity.cases import POISON, Case

Tensors = dict[str, np.ndarray]
GraphStep = Callable[[Tensors], Tensors]
"""Feeds by graph input name -> outputs by graph output name, as numpy arrays (bfloat16 as float32)."""


class SessionRunner(Protocol):
    """An implementation that owns its caches: a runtime backend, or the torch model with SessaCache."""

    def begin(self, batch: int, capacity: int, poison: bool) -> None:
        """Empty caches for `batch` sequences of `capacity` tokens; with poison their rows hold NaN before anything is written."""

    def step(self, input_ids: np.ndarray, new_length: np.ndarray) -> np.ndarray:
        """Feed input_ids (B,T), of which new_length (B,) count; returns logits (B,V)."""

    def step_all(self, input_ids: np.ndarray, new_length: np.ndarray) -> np.ndarray:
        """Like `step`; returns logits (B,T,V). Called for cases with all logits."""

    def rows(self, sequence: int) -> dict[str, np.ndarray]:
        """The cached rows of one sequence by graph name past.{i}.{field}, at least as many as it has tokens; empty if they cannot be read."""


@dataclass
class Engine:
    """An engine as parity drives it: the stateless graph, the session that owns its caches, or both; and the versions it ran with.

    eager: the same session without what it records and replays (a CUDA graph). max_batch: sequences it takes at once; larger cases are run one sequence
    after the other.
    """

    graph: GraphStep | None
    session: SessionRunner | None
    versions: dict[str, str]
    eager: SessionRunner | None = None
    max_batch: int | None = None


def layer_name(layer: int, field: str) -> str:
    """Name of a canonical per-layer tensor."""
    return f"layer.{layer}.{field}"


def poison_rows(store: np.ndarray) -> None:
    """Overwrite a cache (B,P,...) with NaN and infinities, row by row."""
    for i in range(store.shape[1]):
        store[:, i] = POISON[i % len(POISON)]


def drive_graph(step: GraphStep, case: Case, config: SessaConfig, storage: np.dtype) -> tuple[Tensors, int]:
    """Run a case through the stateless graph. Returns (canonical tensors, count of nonzero elements in rows that must be zero).

    storage: numpy dtype of the past handed in.
    """
    entries = list(cache_entries(config.n_layers))
    batch, total = case.batch, int(case.lengths.max())
    room = max(total, case.capacity or 0)
    caches: Tensors = {}
    for i, field in entries:
        store = np.zeros((batch, room, *cache_row_shape(field, config.d_model, config.kv_heads, config.head_dim)), dtype=storage)
        if case.poison:
            poison_rows(store)
        caches[past_name(i, field)] = store
    length = np.zeros(batch, dtype=np.int32)
    pieces: dict[str, list[list[np.ndarray]]] = {layer_name(i, f): [[] for _ in range(batch)] for i, f in entries}
    logits, dirty = [], 0
    for item in case.steps:
        extent = int(length.max()) if case.capacity is None else case.capacity
        feeds = {INPUT_IDS: item.input_ids, PAST_LENGTH: length.copy(), NEW_LENGTH: item.new_length}
        feeds.update({name: np.ascontiguousarray(store[:, :extent]) for name, store in caches.items()})
        out = step(feeds)
        for b in range(batch):
            count = int(item.new_length[b])
            if count:
                row = np.asarray(out[LOGITS][b])
                if case.all_logits:
                    logits += list(row[:count])
                else:
                    logits.append(row[count - 1] if row.ndim == 2 else row)  # a graph exported with all logits
            for i, field in entries:
                new = out[new_name(i, field)]
                caches[past_name(i, field)][b, length[b] : length[b] + count] = new[b, :count]
                pieces[layer_name(i, field)][b].append(np.array(new[b, :count]))
                dirty += int(np.count_nonzero(new[b, count:]))  # NaN counts as nonzero
        length += item.new_length
    tensors = {name: np.concatenate([part for sequence in parts for part in sequence]) for name, parts in pieces.items()}
    tensors[LOGITS] = np.stack(logits)
    tensors["token"] = np.argmax(tensors[LOGITS], axis=-1)
    return tensors, dirty


def drive_session(runner: SessionRunner, case: Case, config: SessaConfig, greedy: bool = False, max_batch: int | None = None) -> Tensors:
    """Run a case through an implementation that owns its caches; per-layer tensors are read back from them, where they can be read.

    greedy: take each token from the runner's own `step_greedy` (a device may pick it); then there are no logits. max_batch: sequences the
    runner takes at once.
    """
    batch, lengths = case.batch, case.lengths
    if max_batch is not None and max_batch < batch:
        return _drive_apart(runner, case, config, greedy)
    longest = int(lengths.max())
    runner.begin(batch, min(max(longest, case.capacity or 0), max(longest, config.max_context)), case.poison)
    found, tokens = [], []
    for item in case.steps:
        live = np.flatnonzero(item.new_length)
        if greedy:
            try:
                chosen = runner.step_greedy(item.input_ids, item.new_length)  # type: ignore[attr-defined]
            except UserError:
                raise
            except SessaError:  # it refuses to pick from logits that are not finite: no token, which the judge counts as a wrong one
                chosen = np.full(batch, -1)
            tokens += [int(x) for x in chosen[live]]
            continue
        if case.all_logits:
            every = runner.step_all(item.input_ids, item.new_length)
            rows = [np.array(every[b, t]) for b in live for t in range(item.new_length[b])]
        else:
            logits = runner.step(item.input_ids, item.new_length)
            rows = [np.array(logits[b]) for b in live]
        found += rows
        tokens += [int(np.argmax(row)) for row in rows]
    tensors: Tensors = {"token": np.array(tokens, dtype=np.int64)}
    if not greedy:
        tensors[LOGITS] = np.stack(found)
    cached = [runner.rows(b) for b in range(batch)]
    for i, field in cache_entries(config.n_layers):
        if past_name(i, field) in cached[0]:
            tensors[layer_name(i, field)] = np.concatenate([np.asarray(rows[past_name(i, field)][:n]) for rows, n in zip(cached, lengths, strict=True)])
    return tensors


def _drive_apart(runner: SessionRunner, case: Case, config: SessaConfig, greedy: bool) -> Tensors:
    """The case one sequence after the other, put together again as if they had run side by side."""
    parts = [(b, drive_session(runner, case.alone(b), config, greedy)) for b, n in enumerate(case.lengths) if n > 0]
    per_layer = [name for name in parts[0][1] if name not in (LOGITS, "token")]
    tensors = {name: np.concatenate([part[name] for _, part in parts]) for name in per_layer}
    rows = case.logit_rows()
    if greedy:  # a token a step, whatever logits there are
        rows = rows[case.last_rows()]
    for name in (n for n in (LOGITS, "token") if n in parts[0][1]):
        merged = np.empty((len(rows), *parts[0][1][name].shape[1:]), dtype=parts[0][1][name].dtype)
        for b, part in parts:
            merged[rows[:, 1] == b] = part[name]
        tensors[name] = merged
    return tensors
