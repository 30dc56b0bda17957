"""Greedy steps that are begun before the host has what came of the one before: the half of a backend that looks ahead. numpy only."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sessa_deploy.errors import UserError
from sessa_deploy.runtime.sampling import finite_tokens

IntArray = NDArray[np.integer]


@dataclass
class Begun:
    """A greedy step that was begun and is not ended. ids (B,T): what it is fed; None: the tokens of the step before it. new (B,): new_length, 0 for sequences
    that were called off since; of a step with a draft of its own the most it may be. slot: where on the host its tokens arrive; picked (B,): they, once they
    are there. rows: of a step that has a draft of its own how many it has at most; 1 of a plain one behind such; else 0."""

    ids: NDArray[np.int64] | None
    new: NDArray[np.int32]
    slot: int = 0
    picked: NDArray[np.int64] | None = None
    rows: int = 0


class Beginning(ABC):
    """Steps that run while the host works.

    looks_ahead: whether they do, so that it is worth while to begin the next one before it has ended; may be set to False. draft_rows: over how many rows the
    backend begins steps whose drafts it makes itself, ascending; none where it makes none.
    """

    looks_ahead = False
    draft_rows: tuple[int, ...] = ()
    batch: int
    capacity: int
    length: NDArray[np.int32]
    _begun: deque[Begun]
    _picked: NDArray[np.int64] | None  # by the step ended last

    def begin_greedy(self, input_ids: IntArray, new_length: IntArray) -> None:
        """Begin what `step_greedy` does and do not wait for it: `end_greedy` gives the tokens, and only then do lengths advance.

        What was begun before and not ended is called off. So it is by `step`, `step_all` and `step_greedy`, and for one sequence by whatever feeds or changes
        it alone. Raises UserError as `step` does, with nothing changed.
        """
        ids, new = self._checked(input_ids, new_length)
        begun = Begun(ids, new.copy())
        self._begin(begun)
        self._begun.append(begun)

    def begin_next(self, new_length: IntArray) -> bool:
        """Begin, behind the step that was begun last, one that feeds each sequence what that one picks or settles last, which nobody need have seen.

        new_length (B,): 1 for sequences that go on, 0 for others. False, with nothing begun, where that cannot be: no step is under way or two are, another
        came between, a sequence had no part in it or was changed since, or has no room left.
        """
        if len(self._begun) != 1:
            return False
        new, before = (np.asarray(new_length) > 0).astype(np.int32), self._begun[0].new.tolist()
        going = [(fed, held + fed < self.capacity) for goes, fed, held in zip(new.tolist(), before, self.length.tolist(), strict=True) if goes]
        if not going or not all(fed and room for fed, room in going):
            return False
        begun = Begun(None, new)
        if not self._begin_next(begun):
            return False
        self._begun.append(begun)
        return True

    def end_greedy(self) -> NDArray[np.int64]:
        """The tokens (B,) of the step that was begun first, unspecified for sequences that it did not feed or that were called off; lengths advance by it.

        Raises NotFinite, a SessaError, as `step_greedy` does: lengths are then unchanged, and what was begun behind it is called off. Raises UserError where
        nothing is under way.
        """
        begun = self._first()
        try:
            self._picked = finite_tokens(self._end(begun), begun.new)
            self.length += begun.new
        except BaseException:
            self._begun.clear()
            raise
        self._begun.popleft()
        return self._picked

    @property
    def under_way(self) -> int:
        """Greedy steps that were begun and neither ended nor called off."""
        return len(self._begun)

    def call_off(self, row: int | None = None) -> None:
        """Let a sequence (None: every one) have had no part in the steps that were begun and are not ended."""
        if row is None:
            self._begun.clear()
        elif self._begun:
            for begun in self._begun:
                begun.new[row] = 0
            self._begun = deque(begun for begun in self._begun if begun.new.any())

    def tell(self, tokens: Sequence[int], since: int) -> None:
        """Say what the one sequence's conversation is, in which drafts are looked for: `tokens`, which are from `since` on what was not told before.

        The last of them is what the step under way is fed. What steps with drafts settle from then on, one right behind the other, need not be told.
        """
        if self.draft_rows:
            self._tell(tokens, since)

    def begin_drafted(self, rows: int) -> bool:
        """Begin, behind the step of the one sequence that was begun last, one of up to `rows` rows (one of `draft_rows`) whose draft nobody need have seen.

        It is fed what that one settles last and, behind it, what followed in the conversation (`tell`) where it last agreed longest with its end. False, with
        nothing begun, where that cannot be: no step is under way or two are, another came between, or there is no room.
        """
        if len(self._begun) != 1 or rows not in self.draft_rows or int(self.length[0]) + int(self._begun[0].new[0]) + rows > self.capacity:
            return False
        begun = Begun(None, np.array([rows], np.int32), rows=rows)
        if not self._begin_drafted(begun):
            return False
        self._begun.append(begun)
        return True

    def end_drafted(self) -> tuple[list[int], int]:
        """(tokens that the step of the one sequence that was begun first settles, how many were drafted): what was right of the draft, and the token behind.

        The last is -1 where logits were NaN or Inf. The length advances by the others. A plain step settles one. Raises UserError where nothing is under way.
        """
        begun = self._first()
        try:
            picks, draft = self._end_drafted(begun)
            right = next((at for at, token in enumerate(draft) if picks[at] != token), len(draft))
            settled = picks[: right + 1]
            self.length[0] += right + (settled[right] >= 0)
        except BaseException:
            self._begun.clear()
            raise
        self._begun.popleft()
        self._picked = np.array(settled[-1:])
        return settled, len(draft)

    def _first(self) -> Begun:
        if not self._begun:
            raise UserError("there is no greedy step to end", fix="begin_greedy first")
        return self._begun[0]

    @abstractmethod
    def _checked(self, input_ids: IntArray, new_length: IntArray) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Ids (B,T) and new_length (B,) of a step, proven; what was begun is called off."""

    @abstractmethod
    def _pick(self, ids: NDArray[np.int64], new: NDArray[np.int32]) -> NDArray[np.int64]:
        """Run a step; the most likely tokens (B,), -1 where a row's largest logit is not finite."""

    def _begin(self, begun: Begun) -> None:  # noqa: B027 - a backend that cannot run behind the host need do nothing
        """Launch a step that is fed ids; here it waits until somebody wants its tokens."""

    def _begin_next(self, begun: Begun) -> bool:
        """Launch a step that is fed what the one before it picks; whether that can be."""
        return True

    def _end(self, begun: Begun) -> NDArray[np.int64]:
        """The tokens of a step as `_pick` gives them."""
        ids = begun.ids
        if ids is None:
            assert self._picked is not None  # the step before it has ended
            ids = self._picked[:, None]
        return self._pick(np.ascontiguousarray(ids[:, : int(begun.new.max())]), begun.new)

    def _tell(self, tokens: Sequence[int], since: int) -> None:
        """Keep the conversation where drafts are made."""
        raise NotImplementedError

    def _begin_drafted(self, begun: Begun) -> bool:
        """Launch a step of begun.rows rows with a draft behind the one before; whether that can be. Only called with one of `draft_rows`."""
        raise NotImplementedError

    def _end_drafted(self, begun: Begun) -> tuple[list[int], list[int]]:
        """(the most likely token behind each row that a step of one sequence was fed, its draft); of a plain step one, and none."""
        return self._end(begun).tolist(), []
