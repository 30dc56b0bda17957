"""What a session asks of whatever runs the graph: one step over ragged rows, with the caches owned by the backend."""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from sessa_deploy.checks import as_integer, integer, outside_vocabulary
from sessa_deploy.config import SessaConfig
from sessa_deploy.contract import STEP_ROWS
from sessa_deploy.errors import UserError
from sessa_deploy.runtime.begun import Beginning, Begun, IntArray
from sessa_deploy.runtime.sampling import finite_tokens, most_likely_tokens


class Backend(Beginning):
    """B sequences ("rows") of at most `capacity` cached tokens each.

    length: (B,) int32, tokens cached of each row. bytes_moved: bytes of cache rows that were copied since the start, appending included.
    best_chunk, turn_chunk: tokens a prefill step takes at best, and beside sequences that decode, which longer ones hold up; the lesser of the two holds.
    all_logits: whether the graph gives the logits of every new row (`export --all-logits`); else it gives each sequence's last.
    packed_weights: whether matrices in 8 bits stay so in memory; else they are made wide as the graph is opened.
    draft_cost: what a step of several rows of one sequence takes beyond one of a single row, and what each row more adds, as shares of the latter.
    most_rows: of a step that verifies a draft.
    A subclass runs the graph in `_forward` (and `_pick`, `_forward_all`) and appends; lengths, checks and resets are here, so that no backend differs in them.
    """

    name = "none"
    all_logits = False
    packed_weights = False
    most_rows = STEP_ROWS
    turn_chunk = 512
    draft_cost = (0.2, 0.05)  # the demo at 300 tokens on two cores: 1.2 for 2 rows, 1.3 for 4, 1.4 for 8, 1.65 for 16
    best_chunk = 256  # on a CPU the demo's 4096 tokens take 3.3 s in chunks of 64 to 256, 4.3 s of 512, 14.6 s at once

    def __init__(self, config: SessaConfig, batch: int = 1, capacity: int | None = None) -> None:
        capacity = config.max_context if capacity is None else capacity
        batch, capacity = integer("max_batch", batch, 1), integer("capacity", capacity, 1)
        self.config, self.batch, self.capacity = config, batch, capacity
        self.length: NDArray[np.int32] = np.zeros(batch, dtype=np.int32)
        self._resting: NDArray[np.int32] = np.zeros(batch, dtype=np.int32)  # tokens of sequences that rest, whose length is 0
        self.bytes_moved = 0
        self._begun: deque[Begun] = deque()
        self._picked: NDArray[np.int64] | None = None

    def step(self, input_ids: IntArray, new_length: IntArray) -> NDArray[np.float32]:
        """Feed the first new_length[b] of input_ids[b] (B,T) to each row; logits (B,V) float32 after its last new token.

        new_length: (B,) in 0..T; a row with 0 stands still and its logits are unspecified. Raises UserError, with nothing changed, when a
        row has no room left, an id is outside the vocabulary or a shape is wrong.
        """
        ids, new = self._checked(input_ids, new_length)
        logits = self._forward(ids, new)
        self.length += new
        return logits

    def step_all(self, input_ids: IntArray, new_length: IntArray) -> NDArray[np.float32]:
        """Like `step`, with the logits (B,T,V) float32 after every new token, T = max(new_length); rows from new_length[b] on are unspecified.

        A graph without all logits is fed one token a step.
        """
        ids, new = self._checked(input_ids, new_length)
        if self.all_logits:
            logits = self._forward_all(ids, new)
            self.length += new
            return logits
        logits, before = np.zeros((*ids.shape, self.config.vocab_size), np.float32), self.length.copy()
        try:
            for t in range(ids.shape[1]):
                live = (new > t).astype(np.int32)
                logits[:, t] = self._forward(np.ascontiguousarray(ids[:, t : t + 1]), live)
                self.length += live
        except BaseException:
            self.length[:] = before
            raise
        return logits

    def step_greedy(self, input_ids: IntArray, new_length: IntArray) -> NDArray[np.int64]:
        """Like `step`, returning the most likely token (B,) alone; a backend on a device may find it there.

        Raises NotFinite, a SessaError, with the lengths unchanged, on logits that are NaN or Inf.
        """
        ids, new = self._checked(input_ids, new_length)
        picked = finite_tokens(self._pick(ids, new), new)
        self.length += new
        return picked

    def step_some(self, input_ids: IntArray, new_length: IntArray, rows: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Like `step`, returning the most likely token (B,) of each row, -1 where its logits are NaN or Inf, and logits (len(rows),V) of `rows` alone."""
        ids, new = self._checked(input_ids, new_length)
        found = self._some(ids, new, [self._row(row) for row in rows])
        self.length += new
        return found

    def step_row(self, row: int, ids: IntArray) -> NDArray[np.float32]:
        """Feed ids (T,) to one sequence alone, while the others stand still and cost nothing; logits (V,) float32 after the last of them.

        The way a prompt's chunk runs beside sequences that decode. Raises UserError as `step` does, with nothing changed.
        """
        row, fed = self._checked_row(row, ids)
        logits = self._forward_row(row, fed)
        self.length[row] += len(fed)
        return logits

    def step_row_all(self, row: int, ids: IntArray) -> NDArray[np.float32]:
        """Like `step_row`, with the logits (T,V) float32 after every one of ids (T,). A graph without all logits is fed one token a step."""
        row, fed = self._checked_row(row, ids)
        if self.all_logits:
            logits = self._forward_row_all(row, fed)
            self.length[row] += len(fed)
            return logits
        logits, before = np.empty((len(fed), self.config.vocab_size), np.float32), int(self.length[row])
        try:
            for t in range(len(fed)):
                logits[t] = self._forward_row(row, fed[t : t + 1])
                self.length[row] += 1
        except BaseException:
            self.length[row] = before
            raise
        return logits

    def step_row_picks(self, row: int, ids: IntArray) -> NDArray[np.int64]:
        """Like `step_row_all`, returning the most likely token after every one of ids (T,) alone, -1 where the logits there are NaN or Inf."""
        if not self.all_logits:
            return most_likely_tokens(self.step_row_all(row, ids))
        row, fed = self._checked_row(row, ids)
        picked = self._pick_row_all(row, fed)
        self.length[row] += len(fed)
        return picked

    def expect_rows(self, rows: int) -> None:
        """Be told that steps of 2 to `rows` rows will come again and again, to verify drafts. It decides `draft_rows`, `draft_cost` and `most_rows`."""

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Make sequence `target` hold the first `length` tokens of sequence `source`, which may rest, and forget what it held.

        Raises UserError if source holds fewer.
        """
        source, target, held = self._row(source), self._row(target), as_integer(length)
        if held is None or not 0 <= held <= self.held(source):
            raise UserError("a sequence cannot be copied so far", got=repr(length), allowed=f"0..{self.held(source)}")
        self.call_off(target)
        if source != target and held:
            self._resting[target] = self.length[target] = 0
            self._copy_row(source, target, held)
        self.length[target], self._resting[target] = held, 0

    def reset(self, rows: Iterable[int] | None = None) -> None:
        """Forget the tokens of `rows`, of every row by default."""
        for row in range(self.batch) if rows is None else rows:
            self.length[self._row(row)] = self._resting[row] = 0
            self.call_off(row)

    def rest(self, row: int) -> None:
        """Keep a sequence's cache, but let it cost nothing: its length is 0 until `wake`. Feeding it or copying to it forgets what it held."""
        row = self._row(row)
        self.call_off(row)
        self._resting[row], self.length[row] = self.held(row), 0

    def wake(self, row: int, length: int) -> None:
        """Go on behind the first `length` tokens that a sequence holds, resting or not. Raises UserError if it holds fewer."""
        row, kept = self._row(row), as_integer(length)
        if kept is None or not 0 <= kept <= self.held(row):
            raise UserError("a sequence cannot be taken up there", got=repr(length), allowed=f"0..{self.held(row)}")
        self.call_off(row)
        self.length[row], self._resting[row] = kept, 0

    def held(self, row: int) -> int:
        """Tokens whose cache rows a sequence has, resting or not."""
        row = self._row(row)
        return int(max(self.length[row], self._resting[row]))

    def rewind(self, row: int, length: int) -> None:
        """Forget all but the first `length` tokens of a row. Raises UserError if it holds fewer."""
        row, held = self._row(row), as_integer(length)
        if held is None or not 0 <= held <= int(self.length[row]):
            raise UserError("a sequence cannot be rewound to there", got=repr(length), allowed=f"0..{int(self.length[row])}")
        self.call_off(row)
        self.length[row] = held

    def room(self, row: int) -> int:
        """Tokens that still fit into a row."""
        return self.capacity - int(self.length[self._row(row)])

    def kept(self) -> NDArray[np.int32]:
        """(B,) cache rows of each sequence that must survive, those of resting ones too."""
        kept: NDArray[np.int32] = np.maximum(self.length, self._resting)
        return kept

    def _row(self, row: object) -> int:
        return integer("the sequence", row, 0, self.batch - 1)

    def device_bytes(self) -> int:
        """Device memory in use, all processes' together; 0 on a CPU."""
        return 0

    @abstractmethod
    def _forward(self, ids: NDArray[np.int64], new: NDArray[np.int32]) -> NDArray[np.float32]:
        """Run ids (B,T) whose first new[b] count, with max(new) == T >= 1, append the new rows at `length`; logits (B,V)."""

    def _forward_all(self, ids: NDArray[np.int64], new: NDArray[np.int32]) -> NDArray[np.float32]:
        """Like `_forward`; logits (B,T,V). Only called where `all_logits` is true."""
        raise NotImplementedError

    def _forward_row(self, row: int, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Run ids (T,), T >= 1, through one sequence and append its new rows at `length[row]`; logits (V,) after the last.

        Here by a step of the whole batch in which the others have no new token; a backend that can compute one sequence alone does.
        """
        return self._forward(*self._alone(row, ids))[row]

    def _forward_row_all(self, row: int, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Like `_forward_row`; logits (T,V). Only called where `all_logits` is true."""
        return self._forward_all(*self._alone(row, ids))[row]

    def _pick_row_all(self, row: int, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Like `_forward_row_all`; the most likely tokens (T,), -1 where the largest logit is not finite. Only called where `all_logits` is true."""
        return most_likely_tokens(self._forward_row_all(row, ids))

    @property
    def copies_rows(self) -> bool:
        """Whether `copy_row` works here."""
        return type(self)._copy_row is not Backend._copy_row

    def _copy_row(self, source: int, target: int, length: int) -> None:
        """Lay the first `length` cached rows of sequence `source` over those of another, `target`; length >= 1. Lengths are the caller's."""
        raise NotImplementedError

    def _alone(self, row: int, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """ids (B,T) and new_length (B,) of a step in which one sequence takes ids (T,) and the others nothing."""
        whole, new = np.zeros((self.batch, len(ids)), np.int64), np.zeros(self.batch, np.int32)
        whole[row], new[row] = ids, len(ids)
        return whole, new

    def _pick(self, ids: NDArray[np.int64], new: NDArray[np.int32]) -> NDArray[np.int64]:
        """Like `_forward`; the most likely tokens (B,), -1 where a row's largest logit is not finite."""
        return most_likely_tokens(self._forward(ids, new))

    def _some(self, ids: NDArray[np.int64], new: NDArray[np.int32], rows: list[int]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Like `_forward`; what `_pick` gives, and logits (len(rows),V)."""
        logits = self._forward(ids, new)
        return most_likely_tokens(logits), logits[rows]

    @abstractmethod
    def cached(self, row: int) -> dict[str, NDArray[np.generic]]:
        """Copies of a row's cache by graph name (`past.{i}.k_f`): (length, Hkv, d) for k_f and v_f, (length, D) for k_b and s."""

    @abstractmethod
    def poison(self) -> None:
        """Fill every cache row at or beyond its sequence's tokens (`kept`) with NaN. What comes out must not change: tests and `validate` rely on it."""

    def close(self) -> None:
        """Let go of what the backend holds."""
        return

    def _checked(self, input_ids: IntArray, new_length: IntArray) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        # A decode step waits for this: few passes over small arrays, most of them Python's own.
        ids, new = np.asarray(input_ids), np.asarray(new_length)
        if ids.ndim != 2 or len(ids) != self.batch or ids.dtype.kind not in "iu":
            raise UserError("input_ids has the wrong shape", got=f"{ids.shape} {ids.dtype}", allowed=f"({self.batch},T) integers")
        counts = new.tolist()
        if new.shape != (self.batch,) or new.dtype.kind not in "iu" or min(counts) < 0 or max(counts) > ids.shape[1]:
            raise UserError("new_length is wrong", got=counts, allowed=f"{self.batch} integers in 0..{ids.shape[1]}")
        tokens = max(counts)
        if tokens == 0:
            raise UserError("a step without a new token", got=f"new_length {counts}", allowed="at least one token")
        wanted = self.length + new
        if wanted.max() > self.capacity:
            row = int(wanted.argmax())
            raise self._full(row, counts[row])
        fed: NDArray[np.int64] = np.ascontiguousarray(ids[:, :tokens], dtype=np.int64)
        if min(counts) < tokens:
            fed = np.where(np.arange(tokens) < new[:, None], fed, 0)
        if fed.view(np.uint64).max() >= self.config.vocab_size:  # a negative one is large there
            raise outside_vocabulary(ids[:, :tokens][fed.view(np.uint64) >= self.config.vocab_size][0], self.config.vocab_size)
        if self._resting.any():
            self._resting[new > 0] = 0
        self.call_off()
        return fed, new.astype(np.int32, copy=False)

    def _checked_row(self, row: int, input_ids: IntArray) -> tuple[int, NDArray[np.int64]]:
        row, ids = self._row(row), np.asarray(input_ids)
        if ids.ndim != 1 or not len(ids) or ids.dtype.kind not in "iu":
            raise UserError("the ids of one sequence have the wrong shape", got=f"{ids.shape} {ids.dtype}", allowed="(T,) integers, T >= 1")
        if int(self.length[row]) + len(ids) > self.capacity:
            raise self._full(row, len(ids))
        fed: NDArray[np.int64] = np.ascontiguousarray(ids, dtype=np.int64)
        wrong = fed.view(np.uint64) >= self.config.vocab_size  # a negative one is large there
        if wrong.any():
            raise outside_vocabulary(ids[wrong][0], self.config.vocab_size)
        self._resting[row] = 0
        self.call_off(row)
        return row, fed

    def _full(self, row: int, new: int) -> UserError:
        return UserError("the context is full", got=f"{int(self.length[row])} cached and {new} new tokens in sequence {row}",
                         allowed=f"a capacity of {self.capacity} tokens", fix="raise the capacity (--capacity) or shorten the prompt")
