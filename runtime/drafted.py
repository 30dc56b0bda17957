"""The decode steps of a row whose next tokens may be drafted: drafts made here that a step verifies, or steps with drafts that the backend makes itself."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sessa_deploy.runtime.backend import Backend
from sessa_deploy.runtime.generation import Found, Row, Steps, verify
from sessa_deploy.runtime.lookup import Drafter

_LATELY = 0.15  # share of the latest step in the mean of tokens a step
_AT_FIRST, _MOST = 2.0, 4  # that mean where drafting begins, and what a step counts at most, so that what comes to an end is soon known to
_WIDE = 2  # steps in a row that were right in full, after which the next are of more rows


class Step(NamedTuple):
    """What a step gave. found: what tokens come from, as `decode` has it; draft: as much of it as is still to be compared with them; drafted: tokens that were
    in doubt."""

    found: list[Found]
    draft: list[int]
    drafted: int


class Verified:
    """Steps that verify what `drafter` drafts, where it does, of any backend and for any row."""

    def __init__(self, backend: Backend, drafter: Drafter) -> None:
        self._backend, self._drafter, self._steps = backend, drafter, Steps(backend)

    def __call__(self, row: Row) -> Step:
        backend, drafter = self._backend, self._drafter
        if not drafter.keeps_up(row.tokens):
            return Step(self._steps([row])[1], [], 0)
        draft = [] if backend.under_way else drafter.draft(row.left - 1)  # first what is under way already
        found = verify(backend, row, draft) if draft else self._steps([row], ahead=drafter.most < 1 or not drafter.sees_more())[1]
        return Step(found, draft, len(draft))


class Drafted:
    """Steps of a greedy row on a backend that makes drafts itself: each is begun before the one before it has ended, as in plain decoding, so that neither
    waits for the host. Here it is decided alone how many rows they have: one, where drafts bring less than they cost.

    `drafter` says where they would begin to; whether they still do is told by how many tokens the latest steps brought. sizes: the rows that they may have,
    ascending.
    """

    def __init__(self, backend: Backend, drafter: Drafter, sizes: Sequence[int]) -> None:
        self._backend, self._drafter, self._sizes = backend, drafter, sizes
        self._begun: deque[int] = deque()  # rows of each step that is under way
        self._told = 0  # tokens of the conversation
        self._drafting, self._mean, self._full = False, 0.0, 0

    def __call__(self, row: Row) -> Step:
        backend, begun = self._backend, self._begun
        if not begun or len(begun) != backend.under_way:  # or somebody else was at the backend
            begun.clear()
            self._drafting = False
            backend.begin_greedy(np.array([[row.tokens[-1]]]), np.ones(1, np.int32))
            begun.append(1)
        try:
            if row.left > 1:
                self._begin_next(row)
            settled, drafted = backend.end_drafted()
        except BaseException:
            begun.clear()
            backend.call_off()
            raise
        rows = begun.popleft()
        if rows > 1:
            self._mean += _LATELY * (min(len(settled), _MOST) - self._mean)
            self._full = self._full + 1 if len(settled) == rows else 0
        return Step(list(settled), settled[:-1], drafted)

    def _begin_next(self, row: Row) -> None:
        """Begin the step behind the one under way."""
        rows, backend = self._rows(row), self._backend
        if rows > 1 and backend.begin_drafted(rows):
            self._begun.append(rows)
            return
        self._drafting = False  # who drafts again is told what comes meanwhile
        if backend.begin_next(np.ones(1, np.int32)):
            self._begun.append(1)

    def _rows(self, row: Row) -> int:
        """Of the next step."""
        few, many, drafter = self._sizes[0], self._sizes[-1], self._drafter
        first, each = self._backend.draft_cost
        if self._drafting and self._mean < 1.0 + first + each * (few - 1):
            drafter.drafting = False
            return 1
        if not self._drafting:
            if not (drafter.keeps_up(row.tokens) and drafter.draft(row.left - 1)):
                return 1
            self._backend.tell(row.tokens, self._told)
            self._told = len(row.tokens)
            self._drafting, self._mean, self._full = True, _AT_FIRST, 0
        return many if self._full >= _WIDE else few


def steps_with_drafts(backend: Backend, drafter: Drafter, greedy: bool) -> Drafted | Verified:
    """The steps of a row, greedy or not, with drafts of at most `drafter.most` tokens: the backend's own where it makes such and need not wait."""
    sizes = [rows for rows in backend.draft_rows if rows <= 1 + drafter.most] if greedy and backend.looks_ahead else []
    return Drafted(backend, drafter, sizes) if sizes else Verified(backend, drafter)
