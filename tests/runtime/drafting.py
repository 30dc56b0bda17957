"""Texts drawn with drafts against those of plain decoding, and a backend that makes drafts itself, for the tests of prompt lookup."""

from __future__ import annotations

from typing import Any

import numpy as np
from fake_cuda import likely

from sessa_deploy.config import SessaConfig
from sessa_deploy.runtime.backend import Backend
from sessa_deploy.runtime.sampling import most_likely_tokens
from sessa_deploy.runtime.session import Session

WORDS = SessaConfig(d_model=8, n_layers=1, n_heads=2, vocab_size=257, max_context=400)
PROMPTS = [[int(t) for t in np.random.default_rng(i).integers(0, 257, 4)] * (1 + i % 4) for i in range(8)]


class DraftsItself(Backend):
    """A backend with all logits that makes drafts itself, when a step is waited for: `itself` says whether. ended_rows: rows of such steps; told: how many
    tokens it was told each time."""

    itself = False

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self.text: list[int] = []
        self.ended_rows: list[int] = []
        self.told: list[int] = []
        self.settled_last = 1

    def expect_rows(self, rows: int) -> None:
        if self.itself and rows > 1:
            self.draft_rows = tuple(sorted({min(rows, 8), rows}))

    def _tell(self, tokens: Any, since: int) -> None:
        self.told.append(len(tokens) - since)
        self.text[since:] = tokens[since:]

    def _begin_drafted(self, begun: Any) -> bool:
        return True

    def _end_drafted(self, begun: Any) -> tuple[list[int], list[int]]:
        assert self._picked is not None or not begun.rows
        last, self.settled_last = self.settled_last, 1
        known = [*self.rows[0][: int(self.length[0])], *(self._picked if self._picked is not None else [])]  # type: ignore[attr-defined]
        if begun.rows:  # what the step before settled goes where it stands, and all before it must be there
            self.text[len(known) - last :] = known[-last:]
            assert self.text == known, "what it was told, or found itself"
        if begun.rows < 2:
            return super()._end_drafted(begun)
        self.ended_rows.append(begun.rows)
        draft = likely(known, begun.rows - 1)
        picks = most_likely_tokens(self._forward_all(np.array([[known[-1], *draft]]), np.array([1 + len(draft)]))[0]).tolist()
        self.settled_last = next((at for at, token in enumerate(draft) if picks[at] != token), len(draft)) + 1
        return picks, draft


def settled(session: Session) -> None:
    """What holds between two calls: all but the last token are in the cache, and nothing else."""
    assert session.backend.length[0] == len(session.tokens()) - 1


def close_to_plain(drafting: Session, plain: Session, prompts: list[list[int]], new: int) -> int:
    """How many greedy texts leave that of plain decoding where the two best logits are all but equal; none may elsewhere. All by chance drafts too."""
    left = 0
    for prompt in prompts:
        for s in (drafting, plain):
            s.reset()
        found, expected = (s.generate([prompt], new, stop_tokens=())[0].tokens for s in (drafting, plain))
        settled(drafting)
        at = next((i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b), None)
        if at is not None:
            plain.reset()
            best = np.sort(plain.prefill([[*prompt, *expected[:at]]])[0])[-2:]
            assert best[1] - best[0] < 1e-4, (at, best)
            left += 1
    return left
