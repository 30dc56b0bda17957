"""Texts drawn with drafts against those of plain decoding, for the tests of prompt lookup on every backend."""

from __future__ import annotations

import numpy as np

from sessa_deploy.runtime.session import Session

PROMPTS = [[int(t) for t in np.random.default_rng(i).integers(0, 257, 4)] * (1 + i % 4) for i in range(8)]


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
