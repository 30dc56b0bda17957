"""How likely a model finds a text: log-likelihood, bits per byte and perplexity, over texts of any length."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sessa_deploy.checks import integer
from sessa_deploy.errors import UserError
from sessa_deploy.runtime.sampling import log_probabilities
from sessa_deploy.runtime.session import Prompt, Session
from sessa_deploy.runtime.sizes import bounded_chunk


@dataclass(frozen=True)
class Score:
    """log_likelihood: nats, the sum over `tokens` tokens that stand for `bytes` bytes of UTF-8 (None: unknown, without a tokenizer).

    first_scored: whether the text's first token counts, which it does behind a first token of the model (bos); else nothing precedes it, and neither it
    nor its bytes count. window, stride, windows: tokens the model sees at once, tokens from one window to the next, and how many windows there were.
    """

    log_likelihood: float
    tokens: int
    bytes: int | None
    first_scored: bool
    window: int
    stride: int
    windows: int

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood of a token."""
        mean = -self.log_likelihood / self.tokens
        return math.exp(mean) if mean < math.log(np.finfo(np.float64).max) else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """Bits the model needs for a byte of the text; None where its bytes are not known."""
        return -self.log_likelihood / (math.log(2) * self.bytes) if self.bytes else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"log_likelihood": self.log_likelihood, "bits_per_byte": self.bits_per_byte, "perplexity": self.perplexity, "tokens": self.tokens,
                "bytes": self.bytes, "first_token_scored": self.first_scored, "window": self.window, "stride": self.stride, "windows": self.windows}


def score(
    session: Session, text: Prompt, stride: int | None = None, progress: Callable[[float, float], None] | None = None,
    seen: Callable[[NDArray[np.int64], NDArray[np.float32]], None] | None = None,
) -> Score:
    """Score text, or token ids, on sequence 0 of a session, which begins anew before and after.

    A text of at most the session's capacity is one window, and every token sees all before it. A longer one is read in windows of the capacity, each
    `stride` tokens (None: half the capacity) behind the last; a window scores only the tokens that the one before did not reach, so each counts once and
    sees more than capacity - stride tokens. A graph without all logits is fed one token a step. progress hears (tokens read, tokens to read);
    seen hears (tokens (N,), the logits (N,V) that stood before them) of each stretch that is scored, right after the backend's step.
    Raises UserError on text that is empty or too short to score, SessaError on logits that are not finite.
    """
    window = session.capacity
    stride = max(1, window // 2) if stride is None else integer("stride", stride, 1, window)
    session.reset([0])
    ids = session.encode(text)
    plain = session.tokenizer.encode(text) if isinstance(text, str) else ids
    first = len(ids) - len(plain)  # tokens of the model in front, which are not scored
    unscored = 1 if first == 0 else 0
    tokens = len(plain) - unscored
    if tokens < 1:
        raise UserError("the text is too short to score", got=f"{len(plain)} tokens",
                        allowed="at least 2 tokens, as nothing precedes the first" if plain else "some text")
    wrong = next((token for token in ids if not 0 <= token < session.config.vocab_size), None)
    if wrong is not None:
        raise UserError("a token id is outside the vocabulary", got=wrong, allowed=f"0..{session.config.vocab_size - 1}",
                        fix="score the text with the tokenizer the model was trained with")
    total, windows, done = 0.0, 0, 0
    plan = list(_windows(len(ids), max(first, 1), window, stride))
    work = sum(end - start for start, end, _ in plan)
    for start, end, fresh in plan:
        for at, logits in _read(session, ids[start:end], fresh - 1 - start):
            targets = np.asarray(ids[start + at + 1 : start + at + 1 + len(logits)])  # row i predicts the token behind it
            total += float(_log_likelihood(logits, targets).sum())
            if seen is not None:
                seen(targets, logits)
            if progress is not None:
                progress(done + at + len(logits), work)
        done, windows = done + end - start, windows + 1
    session.reset([0])
    return Score(total, tokens, _bytes(session, text, plain, unscored), not unscored, window, stride, windows)


def _windows(count: int, first: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, first token to score) of each window over `count` tokens: it reads start..end-1 and predicts up to token `end`."""
    start, fresh = 0, first
    while fresh < count:
        end = min(start + window, count - 1)  # what follows the last token is nobody's to score
        yield start, end, fresh
        start, fresh = start + stride, end + 1


def _read(session: Session, ids: Sequence[int], known: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """(position, logits (T,V) of the tokens there) in chunks, through sequence 0 from its beginning; the first `known` tokens are read without them."""
    backend = session.backend
    session.reset([0])
    at = 0
    while at < len(ids):
        scoring = at >= known
        chunk = bounded_chunk(session.chunk, backend.batch, session.config.vocab_size) if scoring or backend.all_logits else session.chunk
        part = ids[at : at + chunk] if scoring else ids[at : min(at + chunk, known)]
        fed, new = np.zeros((backend.batch, len(part)), np.int64), np.zeros(backend.batch, np.int32)
        fed[0, : len(part)], new[0] = part, len(part)
        if scoring:
            yield at, backend.step_all(fed, new)[0]
        else:
            backend.step(fed, new)
        at += len(part)


def _log_likelihood(logits: NDArray[np.float32], targets: NDArray[np.int64]) -> NDArray[np.float64]:
    """log p (N,) of `targets` (N,) under logits (N,V)."""
    found: NDArray[np.float64] = log_probabilities(logits)[np.arange(len(targets)), targets]
    return found


def _bytes(session: Session, text: Prompt, ids: Sequence[int], unscored: int) -> int | None:
    """Bytes that the scored tokens stand for."""
    if not isinstance(text, str):
        if not session.has_tokenizer:
            return None
        return len(session.tokenizer.decode(ids[unscored:], skip_special=False).encode("utf-8", "replace"))
    total = len(text.encode("utf-8"))
    if not unscored:
        return total
    token = session.tokenizer.token_bytes(ids[0])
    if not token:  # another kind of tokenizer, or a special token, which is text too
        token = session.tokenizer.decode(ids[:1], skip_special=False).encode("utf-8", "replace")
    return max(total - len(token), 0)
