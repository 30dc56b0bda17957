"""Texts drawn with the next step begun before the tokens of the one before are known, against those drawn without, for the tests on every backend."""

from __future__ import annotations

from typing import Any

import numpy as np

from sessa_deploy.runtime.sampling import SamplingParams
from sessa_deploy.runtime.session import Generation, Session


def conversations(session: Session, seed: int, turns: int = 4) -> list[tuple[list[Generation], list[list[int]], list[int]]]:
    """Calls of `generate` on random sequences that end for random reasons: a token, a string, a limit, the capacity, a sampled neighbour, a reset, a stream
    that is dropped. After each: what came of it, the conversations, and the lengths of the caches."""
    rng, batch, found = np.random.default_rng(seed), session.max_batch, []
    session.reset()
    for _ in range(turns):
        prompts: list[Any] = [rng.integers(0, 257, rng.integers(1, 6)).tolist() if rng.random() < 0.8 else None for _ in range(batch)]
        room = [session.capacity + 1 - len(session.tokens(row)) - len(prompt or ()) for row, prompt in enumerate(prompts)]
        if min(room) < 4:
            session.reset()
            continue
        limits = [None if rng.random() < 0.2 else int(rng.integers(1, min(14, least) + 1)) for least in room]
        params = [SamplingParams(0.9, seed=1) if rng.random() < 0.1 else SamplingParams() for _ in range(batch)]
        ends, stop = rng.integers(0, 257, rng.integers(0, 60)).tolist(), [chr(c) for c in rng.integers(97, 123, rng.integers(0, 4))]
        most = int(rng.integers(1, 12)) if rng.random() < 0.2 else 1 << 30  # chunks until the stream is dropped
        made = [Generation() for _ in range(batch)]
        for taken, chunk in enumerate(session.stream(prompts, limits, params, ends, stop)):
            one = made[chunk.row]
            made[chunk.row] = Generation([*one.tokens, chunk.token], one.text + chunk.text, chunk.finish)
            if taken >= most:
                break
        if rng.random() < 0.2:
            session.reset([int(rng.integers(batch))])
        found.append((made, [session.tokens(row) for row in range(batch)], session.backend.length.tolist()))
    return found
