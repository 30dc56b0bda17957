"""From logits to a token: numpy only, random numbers keyed by seed, choice and position.

The order is that of Hugging Face transformers: repetition penalty, temperature, top-k, top-p, min-p; a bias comes before and the penalties of presence and
frequency behind the repetition penalty, as in vLLM.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sessa_deploy.checks import as_number, integer
from sessa_deploy.errors import SessaError, UserError

_CANDIDATES = (1024, 8192)  # so many of the most likely tokens are looked at alone, where they reach top_p


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is drawn. The defaults are greedy.

    temperature: 0 takes the most likely token; else the logits are divided by it.
    top_k: keep the k most likely tokens; 0 keeps all.
    top_p: keep the smallest set of most likely tokens whose probability reaches p, in (0, 1].
    min_p: drop tokens less likely than min_p times the most likely one, in [0, 1).
    repetition_penalty: divide positive and multiply negative logits of tokens seen before (prompt included); 1 changes nothing.
    seed: of this sequence's random stream; None takes a fresh one. A batch draws what single runs with the same seed draw.
    presence_penalty, frequency_penalty: taken once, and as often as it was drawn, from the logit of each token drawn so far (the prompt does not count);
    in [-2, 2], OpenAI's definition.
    Raises UserError on a value outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def __post_init__(self) -> None:
        checked = {
            "temperature": _number("temperature", self.temperature, 0.0, math.inf, "a number >= 0"),
            "top_p": _number("top_p", self.top_p, 0.0, 1.0, "a number in (0, 1]", open_low=True, closed_high=True),
            "min_p": _number("min_p", self.min_p, 0.0, 1.0, "a number in [0, 1)"),
            "repetition_penalty": _number("repetition_penalty", self.repetition_penalty, 0.0, math.inf, "a number > 0", open_low=True),
            **{name: _number(name, getattr(self, name), -2.0, 2.0, "a number in [-2, 2]", closed_high=True)
               for name in ("presence_penalty", "frequency_penalty")},
            "top_k": integer("top_k", self.top_k, 0, allowed="an integer >= 0 (0 keeps every token)"),
            "seed": None if self.seed is None else integer("seed", self.seed, 0),
        }
        for name, value in checked.items():  # Python's own numbers from here on
            object.__setattr__(self, name, value)

    @property
    def plain_greedy(self) -> bool:
        """Whether the choice is the argmax of the untouched logits."""
        return self.temperature == 0.0 and self.repetition_penalty == 1.0 and not self.counts_drawn

    @property
    def counts_drawn(self) -> bool:
        """Whether it matters how often a token was drawn."""
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


def _number(name: str, value: object, low: float, high: float, allowed: str, open_low: bool = False, closed_high: bool = False) -> float:
    found = as_number(value)
    inside = found is not None and (found > low if open_low else found >= low) and (found <= high if closed_high else found < high)
    if found is None or not inside:  # NaN is inside of nothing
        raise UserError(f"{name} is out of range", got=repr(value), allowed=allowed)
    return found


class NotFinite(SessaError):
    """The model gave logits that are NaN or Inf."""

    def __init__(self) -> None:
        super().__init__("the model produced logits that are not finite; fix: run sessa-deploy validate on the bundle")


def random_stream(seed: int | None, choice: int = 0, position: int = 0) -> np.random.Generator:
    """Random numbers of a request's token number `position` and those behind it. The same three give the same, whatever was drawn before and elsewhere.

    choice 0 is the stream of `Generator(PCG64(seed))`; each draw of a token takes one number of it.
    """
    source: int | np.random.SeedSequence | None = seed if choice == 0 else np.random.SeedSequence(seed, spawn_key=(choice,))
    bits = np.random.PCG64(source)
    return np.random.Generator(bits.advance(position) if position else bits)


class Sampler:
    """Draws one sequence's tokens. `observe` tells it of tokens that count as seen; `next_token` draws.

    seen: tokens of the prompt; drawn: tokens behind it that were drawn before, elsewhere: the draws go on behind them. choice: which of several answers to
    one request. bias: token -> what is added to its logit.
    """

    def __init__(self, params: SamplingParams, vocab_size: int, seen: Iterable[int] = (), choice: int = 0, drawn: Iterable[int] = (),
                 bias: Mapping[int, float] | None = None) -> None:
        self.params, self.vocab_size, drawn = params, vocab_size, list(drawn)
        self.greedy = params.plain_greedy and not bias  # the argmax of the untouched logits, which a device can find
        self._random = random_stream(params.seed, choice, len(drawn))
        self._seen = np.zeros(vocab_size, dtype=bool)
        self._drawn = np.zeros(vocab_size) if params.counts_drawn else None
        self._bias = (np.fromiter(bias.keys(), np.int64), np.fromiter(bias.values(), np.float64)) if bias else None
        self.observe(seen)
        self._count(drawn)

    def observe(self, tokens: Iterable[int]) -> None:
        """Count `tokens` as seen by the repetition penalty."""
        if self.params.repetition_penalty != 1.0:
            self._seen[np.fromiter(tokens, dtype=np.int64)] = True

    def next_token(self, logits: NDArray[np.floating]) -> int:
        """Token id for `logits` (V,). Consumes one random number unless greedy. Raises NotFinite on such logits."""
        best = int(np.argmax(logits))
        if not math.isfinite(logits[best]):  # NaN wins a maximum; -inf elsewhere is a plain "never"
            raise NotFinite()
        if self.greedy:
            return best
        scores = np.asarray(logits, dtype=np.float64)
        if self._bias is not None:
            scores = scores.copy()
            scores[self._bias[0]] += self._bias[1]
        scores = filter_logits(scores, self.params, self._seen, self._drawn)
        token = int(np.argmax(scores)) if self.params.temperature == 0.0 else self._draw(scores)
        self._count((token,))
        return token

    def _count(self, tokens: Iterable[int]) -> None:
        """Count drawn tokens."""
        self.observe(tokens)
        if self._drawn is not None:
            np.add.at(self._drawn, np.fromiter(tokens, dtype=np.int64), 1.0)

    def _draw(self, scores: NDArray[np.float64]) -> int:
        kept = np.flatnonzero(scores > -np.inf)  # the rest adds nothing to the sums
        total = np.cumsum(np.exp(scores[kept] - scores.max()))
        at = int(np.searchsorted(total, self._random.random() * total[-1], side="right"))
        return int(kept[min(at, len(kept) - 1)])  # rounding may land on the end


def filter_logits(
    logits: NDArray[np.float64], params: SamplingParams, seen: NDArray[np.bool_], drawn: NDArray[np.float64] | None = None,
) -> NDArray[np.float64]:
    """Scores (V,) float64 whose softmax is drawn from; excluded tokens are -inf. seen: (V,) bool, tokens of the repetition penalty; drawn: (V,) how often
    each token was drawn, which the penalties of presence and frequency need."""
    scores = np.array(logits, dtype=np.float64)
    if params.repetition_penalty != 1.0:
        old = scores[seen]
        scores[seen] = np.where(old > 0, old / params.repetition_penalty, old * params.repetition_penalty)
    if drawn is not None:
        scores -= params.frequency_penalty * drawn + params.presence_penalty * (drawn > 0)
    if params.temperature == 0.0:
        return scores
    scores /= params.temperature
    if 0 < params.top_k < scores.size:
        scores[scores < np.partition(scores, -params.top_k)[-params.top_k]] = -np.inf
    if params.top_p < 1.0:
        scores = _nucleus(scores, params.top_p)
    if params.min_p > 0.0:
        chance = _softmax(scores)
        scores[chance < params.min_p * chance.max()] = -np.inf
    return scores


def _nucleus(scores: NDArray[np.float64], top_p: float) -> NDArray[np.float64]:
    """Scores (V,) with all but the most likely tokens that reach top_p at -inf. What the less likely ones sum to decides; the last always stays."""
    chance, result = _softmax(scores), np.full_like(scores, -np.inf)
    among, rest = np.arange(scores.size), 0.0
    for count in _CANDIDATES if scores.size > 4 * _CANDIDATES[0] else ():  # sorting all of a large vocabulary takes ten times as long as all else
        if count < scores.size:
            best = np.sort(np.argpartition(chance, -count)[-count:])
            others = max(0.0, 1.0 - float(chance[best].sum()))
            if others <= 1.0 - top_p:
                among, rest = best, others
                break
    order = among[np.argsort(scores[among], kind="stable")]
    keep = rest + np.cumsum(chance[order]) > 1.0 - top_p
    keep[-1] = True
    result[order[keep]] = scores[order[keep]]
    return result


def _softmax(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    weight = np.exp(scores - scores.max())
    result: NDArray[np.float64] = weight / weight.sum()
    return result


def log_probabilities(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """log softmax (..., V) float64 of untouched logits, before any penalty or temperature: what requests for logprobs get."""
    scores = np.asarray(logits, dtype=np.float64)
    top = scores.max(axis=-1, keepdims=True)
    if not np.isfinite(top).all():
        raise NotFinite()
    scores = scores - top
    result: NDArray[np.float64] = scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))
    return result


def last_rows(logits: NDArray[np.float32], new: NDArray[np.int32]) -> NDArray[np.float32]:
    """(B,V) of each sequence's last new row, from (B,T,V) of all or from (B,V), which is that already."""
    return logits if logits.ndim == 2 else logits[np.arange(len(new)), np.maximum(new - 1, 0)]


def most_likely_tokens(logits: NDArray[np.float32]) -> NDArray[np.int64]:
    """The most likely tokens (...) of logits (..., V), -1 where the largest is NaN or Inf."""
    return np.where(np.isfinite(logits.max(axis=-1)), logits.argmax(axis=-1), -1)


def finite_tokens(picked: NDArray[np.int64], new_length: NDArray[np.int32]) -> NDArray[np.int64]:
    """What a step picked (B,), -1 made 0 in sequences that stood still, whose logits may be anything. Raises NotFinite where another has -1."""
    if picked.min() < 0:
        if (picked[new_length > 0] < 0).any():
            raise NotFinite()
        picked = np.maximum(picked, 0)
    return picked


def most_likely(logprobs: NDArray[np.float64], count: int) -> tuple[tuple[int, float], ...]:
    """The `count` most likely tokens of logprobs (V,) with theirs, best first, the lower id first among equals."""
    count = min(count, logprobs.size)
    if count == 0:
        return ()
    kth = np.partition(logprobs, -count)[-count]
    among = np.flatnonzero(logprobs >= kth)
    best = among[np.lexsort((among, -logprobs[among]))][:count]
    return tuple(zip(best.tolist(), logprobs[best].tolist(), strict=True))
