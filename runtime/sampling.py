"""From logits to a token: numpy only, one seeded stream of random numbers for each sequence.

The order is that of Hugging Face transformers: repetition penalty, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sessa_deploy.checks import as_number, integer
from sessa_deploy.errors import SessaError, UserError


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is drawn. The defaults are greedy.

    temperature: 0 takes the most likely token; else the logits are divided by it.
    top_k: keep the k most likely tokens; 0 keeps all.
    top_p: keep the smallest set of most likely tokens whose probability reaches p, in (0, 1].
    min_p: drop tokens less likely than min_p times the most likely one, in [0, 1).
    repetition_penalty: divide positive and multiply negative logits of tokens seen before (prompt included); 1 changes nothing.
    seed: of this sequence's random stream; None takes a fresh one. A batch draws what single runs with the same seed draw.
    Raises UserError on a value outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        checked = {
            "temperature": _number("temperature", self.temperature, 0.0, math.inf, "a number >= 0"),
            "top_p": _number("top_p", self.top_p, 0.0, 1.0, "a number in (0, 1]", open_low=True, closed_high=True),
            "min_p": _number("min_p", self.min_p, 0.0, 1.0, "a number in [0, 1)"),
            "repetition_penalty": _number("repetition_penalty", self.repetition_penalty, 0.0, math.inf, "a number > 0", open_low=True),
            "top_k": integer("top_k", self.top_k, 0, allowed="an integer >= 0 (0 keeps every token)"),
            "seed": None if self.seed is None else integer("seed", self.seed, 0),
        }
        for name, value in checked.items():  # Python's own numbers from here on
            object.__setattr__(self, name, value)

    @property
    def plain_greedy(self) -> bool:
        """Whether the choice is the argmax of the untouched logits."""
        return self.temperature == 0.0 and self.repetition_penalty == 1.0


def _number(name: str, value: object, low: float, high: float, allowed: str, open_low: bool = False, closed_high: bool = False) -> float:
    found = as_number(value)
    inside = found is not None and (found > low if open_low else found >= low) and (found <= high if closed_high else found < high)
    if found is None or not inside:  # NaN is inside of nothing
        raise UserError(f"{name} is out of range", got=repr(value), allowed=allowed)
    return found


class Sampler:
    """Draws one sequence's tokens. `observe` tells it of tokens that count as seen; `next_token` draws."""

    def __init__(self, params: SamplingParams, vocab_size: int, seen: Iterable[int] = ()) -> None:
        self.params = params
        self._random = np.random.Generator(np.random.PCG64(params.seed))
        self._seen = np.zeros(vocab_size, dtype=bool)
        self.observe(seen)

    def observe(self, tokens: Iterable[int]) -> None:
        """Count `tokens` as seen by the repetition penalty."""
        if self.params.repetition_penalty != 1.0:
            self._seen[np.fromiter(tokens, dtype=np.int64)] = True

    def next_token(self, logits: NDArray[np.floating]) -> int:
        """Token id for `logits` (V,). Consumes one random number unless greedy. Raises SessaError if the logits are not finite."""
        scores = np.asarray(logits, dtype=np.float64)
        if not np.isfinite(scores.max()):  # NaN wins a maximum; -inf elsewhere is a plain "never"
            raise SessaError("the model produced logits that are not finite; fix: run sessa-deploy validate on the bundle")
        if self.params.plain_greedy:
            return int(np.argmax(scores))
        scores = filter_logits(scores, self.params, self._seen)
        token = int(np.argmax(scores)) if self.params.temperature == 0.0 else self._draw(scores)
        self.observe((token,))
        return token

    def _draw(self, scores: NDArray[np.float64]) -> int:
        total = np.cumsum(np.exp(scores - scores.max()))
        at = int(np.searchsorted(total, self._random.random() * total[-1], side="right"))
        return min(at, int(np.flatnonzero(np.isfinite(scores))[-1]))  # rounding may land on the end


def filter_logits(logits: NDArray[np.float64], params: SamplingParams, seen: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Scores (V,) float64 whose softmax is drawn from; excluded tokens are -inf. seen: (V,) bool, tokens of the repetition penalty."""
    scores = np.array(logits, dtype=np.float64)
    if params.repetition_penalty != 1.0:
        old = scores[seen]
        scores[seen] = np.where(old > 0, old / params.repetition_penalty, old * params.repetition_penalty)
    if params.temperature == 0.0:
        return scores
    scores /= params.temperature
    if 0 < params.top_k < scores.size:
        scores[scores < np.partition(scores, -params.top_k)[-params.top_k]] = -np.inf
    if params.top_p < 1.0:
        order = np.argsort(scores, kind="stable")  # ascending: what the less likely tokens sum to decides, the last always stays
        drop = np.cumsum(_softmax(scores[order])) <= 1.0 - params.top_p
        drop[-1] = False
        scores[order[drop]] = -np.inf
    if params.min_p > 0.0:
        chance = _softmax(scores)
        scores[chance < params.min_p * chance.max()] = -np.inf
    return scores


def _softmax(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    weight = np.exp(scores - scores.max())
    result: NDArray[np.float64] = weight / weight.sum()
    return result
