"""Prompts in, tokens out: chunked prefill, ragged batches, streaming, and conversations that continue on the cache they have."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from sessa_deploy.checks import as_integer, check_tokens, integer
from sessa_deploy.contract import TOKENIZER_FILE
from sessa_deploy.errors import UserError
from sessa_deploy.runtime.backend import Backend
from sessa_deploy.runtime.bundle import Bundle
from sessa_deploy.runtime.drafted import Step, steps_with_drafts
from sessa_deploy.runtime.engines import open_backend
from sessa_deploy.runtime.generation import Found, Row, Steps, check_fits, take_all
from sessa_deploy.runtime.lookup import MOST_DRAFTED, Drafter, DraftStats
from sessa_deploy.runtime.sampling import Sampler, SamplingParams
from sessa_deploy.runtime.tokenizer import Tokenizer

Prompt = str | Sequence[int] | NDArray[np.integer]
Prompts = str | Sequence[Prompt | None]


@dataclass(frozen=True)
class Chunk:
    """One generated token of sequence `row`: the text it completes (may be empty) and, with the last one, why generation ended.

    finish: None while it goes on; "stop" (a stop token or string), "length" (max_new_tokens), "context" (the capacity is full).
    """

    row: int
    token: int
    text: str
    finish: str | None = None


@dataclass
class Generation:
    """What one sequence got: its new tokens (a stop token included), their text without the stop, and why it ended (see Chunk).

    No tokens and a finish of None where the prompt was None: the sequence was left alone.
    """

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: str | None = None


@dataclass
class _Slot:
    """tokens: all of the conversation so far. The last `pending` of them are not in the cache yet; what it holds beyond the others is of a draft that
    nobody took, or of tokens that are still to be shown. drafter: what knows where the conversation repeats itself, once it was asked."""

    tokens: list[int] = field(default_factory=list)
    pending: int = 0
    drafter: Drafter | None = None


class Session:
    """A bundle, opened for generation on `max_batch` sequences of at most `capacity` tokens (default: the model's max_context).

    backend: "auto", "ort", "ort-cuda", "trt", or a Backend that is already open. chunk: tokens a prefill step takes at most; None takes what suits the backend.
    threads: of the CPU backend; None takes all. progress: hears (tokens done, tokens in all) of the longest prompt after each prefill step.
    lookup: prompt-lookup decoding: up to so many tokens (0 to 15) of what followed the last ones earlier in the conversation are verified in one step,
    where that pays. The tokens are those of plain decoding, drawn with a seed or not. For one sequence, of a bundle exported with --all-logits.
    drafts: what drafts brought in the latest call of `stream` or `generate`.
    Sequence b keeps its conversation: each call appends to it until `reset`. Numbers may be Python's or numpy's.
    Raises UserError on bad input; a call that raises it has changed nothing.
    """

    def __init__(self, bundle: Bundle | str | Path, backend: str | Backend = "auto", max_batch: int = 1, capacity: int | None = None,
                 chunk: int | None = None, threads: int | None = None, progress: Callable[[int, int], None] | None = None,
                 lookup: int = 0) -> None:
        chunk = None if chunk is None else integer("chunk", chunk, 1)
        self.lookup, self.drafts = integer("lookup", lookup, 0, MOST_DRAFTED), DraftStats()
        self.bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        self.config, self._progress = self.bundle.config, progress
        self._tokenizer = Tokenizer.of(self.bundle)
        self.backend = backend if isinstance(backend, Backend) else open_backend(self.bundle, backend, max_batch, capacity, threads)
        self.chunk = self.backend.best_chunk if chunk is None else chunk
        self.max_batch, self.capacity = self.backend.batch, self.backend.capacity
        if self.lookup:
            try:
                self._check_lookup()
                self.backend.expect_rows(1 + self.lookup)
            except BaseException:
                if self.backend is not backend:
                    self.close()
                raise
        self._slots = [_Slot() for _ in range(self.max_batch)]
        self._turn = 0  # counts uses, so that a stream that was overtaken notices

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the engine and the caches."""
        self.backend.close()

    @property
    def has_tokenizer(self) -> bool:
        """Whether the bundle has a tokenizer, and text is therefore taken and given."""
        return self._tokenizer is not None

    @property
    def tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer. Raises UserError if it has none."""
        if self._tokenizer is None:
            raise UserError(f"the bundle has no {TOKENIZER_FILE}", got=str(self.bundle.path), allowed="prompts as token ids (--prompt-ids)",
                            fix=f"put a {TOKENIZER_FILE} into the checkpoint and run: sessa-deploy export")
        return self._tokenizer

    def tokens(self, row: int = 0) -> list[int]:
        """All tokens of a sequence's conversation, prompts and answers."""
        return list(self._slots[integer("the sequence", row, 0, self.max_batch - 1)].tokens)

    def reset(self, rows: Iterable[int] | None = None) -> None:
        """Begin anew in `rows`, in every sequence by default."""
        chosen = [integer("the sequence", row, 0, self.max_batch - 1) for row in (range(self.max_batch) if rows is None else rows)]
        self._turn += 1
        for row in chosen:
            self._slots[row] = _Slot()
            self.backend.reset([row])

    def encode(self, prompt: Prompt, row: int = 0) -> list[int]:
        """Token ids of a prompt; text that begins a conversation gets the model's first token once (bos_token_id, else what the tokenizer's template
        puts first)."""
        if not isinstance(prompt, str):
            return _token_ids(prompt, f"prompt {row}")
        fresh = not self._slots[integer("the sequence", row, 0, self.max_batch - 1)].tokens
        return self.tokenizer.encode_first(prompt, self.config.bos_token_id) if fresh else self.tokenizer.encode(prompt)

    def prefill(self, prompts: Prompts) -> NDArray[np.float32]:
        """Append prompts[b] to sequence b (None: leave it alone), in chunks; logits (len(prompts), V) after each one's last token.

        Rows of sequences left alone are zero. Raises UserError if a prompt is empty or does not fit.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        feeds = self._encode_all(prompts, [1] * len(prompts))
        self._turn += 1
        return self._feed(feeds)

    def decode(self, tokens: Sequence[int | None]) -> NDArray[np.float32]:
        """Append one token to each sequence (None: it stands still); logits (len(tokens), V)."""
        return self.prefill([None if token is None else [token] for token in tokens])

    def generate(self, prompts: Prompts, max_new_tokens: int | Sequence[int | None] | None = None,
                 sampling: SamplingParams | Sequence[SamplingParams] | None = None, stop_tokens: int | Iterable[int] | None = None,
                 stop: Sequence[str] = ()) -> list[Generation]:
        """Like `stream`, collected: one Generation a prompt, an empty one for a prompt of None."""
        prompts = [prompts] if isinstance(prompts, str) else prompts
        results = [Generation() for _ in prompts]
        for chunk in self.stream(prompts, max_new_tokens, sampling, stop_tokens, stop):
            result = results[chunk.row]
            result.tokens.append(chunk.token)
            result.text += chunk.text
            result.finish = chunk.finish
        return results

    def stream(self, prompts: Prompts, max_new_tokens: int | Sequence[int | None] | None = None,
               sampling: SamplingParams | Sequence[SamplingParams] | None = None, stop_tokens: int | Iterable[int] | None = None,
               stop: Sequence[str] = ()) -> Iterator[Chunk]:
        """Generate behind prompts[b] in sequence b, yielding each token as it is drawn. A prompt of None leaves its sequence alone.

        max_new_tokens: one for all or one a prompt; None goes on until a stop or until the capacity is full. sampling: one for all or one a
        prompt; None is greedy. stop_tokens: ids that end a sequence; None takes the model's eos_token_ids. stop: strings that end it, not shown.
        The iterator may be dropped at any time; the conversation then holds the tokens drawn so far.
        Raises UserError, before anything is computed, on bad input and when a prompt and max_new_tokens together exceed the capacity.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        limits = _limits(max_new_tokens, len(prompts))
        params = [sampling or SamplingParams()] * len(prompts) if sampling is None or isinstance(sampling, SamplingParams) else [
            one or SamplingParams() for one in sampling]
        if len(params) != len(prompts):
            raise UserError("sampling has the wrong length", got=len(params), allowed=f"one, or one for each of {len(prompts)} prompts")
        if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop):
            raise UserError("stop is wrong", got=repr(stop), allowed="a list of non-empty strings")
        if stop:
            _ = self.tokenizer
        ends = _token_set(self.config.eos_token_ids if stop_tokens is None else stop_tokens)
        feeds = self._encode_all(prompts, [limit or 1 for limit in limits])
        self._turn += 1
        return self._stream(self._turn, feeds, limits, params, ends, stop)

    def check(self, prompt: Prompt, max_new_tokens: int | None = None, row: int = 0) -> list[int]:
        """Token ids of a prompt, proven to fit behind sequence `row` with max_new_tokens after it. Computes nothing. Raises UserError as `stream` does."""
        return self._encode_one(prompt, row, _limits(max_new_tokens, 1)[0] or 1)

    def _check_lookup(self) -> None:
        if self.max_batch > 1:
            raise UserError("prompt lookup is for one sequence", got=f"lookup {self.lookup} with max_batch {self.max_batch}", allowed="max_batch 1",
                            fix="generate one after the other, or leave lookup out")
        if not self.backend.all_logits:
            build = "; then build its engine again" if self.backend.name == "trt" else ""
            raise UserError("prompt lookup needs the logits of every token of a step", got="a bundle whose graph gives those of the last alone",
                            fix=f"{self.bundle.export_hint(f' --precision {self.bundle.precision} --all-logits')}{build}, or leave lookup out")

    def _stream(self, turn: int, feeds: list[list[int] | None], limits: list[int | None], params: list[SamplingParams],
                ends: frozenset[int], stop: Sequence[str]) -> Iterator[Chunk]:
        self._check_turn(turn)
        logits = self._feed(feeds)
        rows = [Row(row, self._slots[row].tokens, Sampler(params[row], self.config.vocab_size, self._slots[row].tokens), self._tokenizer, ends, stop,
                    limits[row], self.capacity) for row, feed in enumerate(feeds) if feed is not None]
        self.drafts = DraftStats()
        if self.lookup and rows:
            yield from self._stream_drafts(turn, rows[0], logits[0])
            return
        steps = Steps(self.backend)
        found: list[Found] = [logits[row.index] for row in rows]
        while rows:
            self._expect(rows, 1)  # first: who is interrupted in the next line feeds a token again at worst
            try:
                drawn = take_all(rows, found)
            except Exception:  # no row is a token further
                self._expect(rows, 0)
                raise
            chunks = [Chunk(row.index, one.token, one.text, one.finish) for row, one in zip(rows, drawn, strict=True)]
            rows = [row for row, one in zip(rows, drawn, strict=True) if one.finish is None]
            yield from chunks
            if not rows:
                break
            self._check_turn(turn)
            rows, found = steps(rows)
            self._expect(rows, 0)

    def _stream_drafts(self, turn: int, row: Row, logits: NDArray[np.float32]) -> Iterator[Chunk]:
        """Generate in the one sequence, its first token from logits (V,), the others by steps with drafts where those are worth it."""
        slot, drafts = self._slots[row.index], self.drafts
        steps = steps_with_drafts(self.backend, self._drafter(slot), row.greedy)
        step = Step([logits], [], 0)
        while True:
            for at, what in enumerate(step.found):
                look = row.look(what)
                if isinstance(look, Exception):
                    raise look
                slot.pending = 1  # first: who is interrupted in the next line feeds a token again at worst
                one = row.take(look)
                accepted = at < len(step.draft) and one.token == step.draft[at]
                drafts.tokens += drafts.steps > 0  # the first is the prompt's
                drafts.accepted += accepted
                over = one.finish is not None
                if step.draft and (over or not accepted):
                    self._forget_drafts(row.index)
                yield Chunk(row.index, one.token, one.text, one.finish)
                if over:
                    return
                self._check_turn(turn)
                if not accepted:
                    break
            step = steps(row)
            drafts.steps += 1
            drafts.drafted += step.drafted

    def _expect(self, rows: list[Row], pending: int) -> None:
        """Say how many of the last tokens of some sequences are not in the cache."""
        for row in rows:
            self._slots[row.index].pending = pending

    def _drafter(self, slot: _Slot) -> Drafter:
        """What drafts behind a conversation: the one that knows it already, or a new one."""
        if slot.drafter is None or not slot.drafter.follow(slot.tokens):
            slot.drafter = Drafter(list(slot.tokens), min(self.lookup, self.backend.most_rows - 1), self.backend.draft_cost)
        return slot.drafter

    def _forget_drafts(self, row: int) -> None:
        """Shorten a sequence's cache to the conversation, less what is pending."""
        held = len(self._slots[row].tokens) - self._slots[row].pending
        if self.backend.length[row] > held:
            self.backend.rewind(row, held)

    def _check_turn(self, turn: int) -> None:
        if turn != self._turn:
            raise UserError("the session was used for something else while this stream was open", fix="finish or drop a stream before the next call")

    def _encode_all(self, prompts: Sequence[Prompt | None], new_tokens: Sequence[int]) -> list[list[int] | None]:
        """Token ids to append to each sequence, checked against the batch, the vocabulary and the capacity."""
        if not 1 <= len(prompts) <= self.max_batch:
            raise UserError("the number of prompts does not fit the session", got=len(prompts), allowed=f"1..{self.max_batch} (max_batch)")
        return [None if prompt is None else self._encode_one(prompt, row, new_tokens[row]) for row, prompt in enumerate(prompts)]

    def _encode_one(self, prompt: Prompt, row: int, new_tokens: int) -> list[int]:
        ids = self.encode(prompt, row)
        slot = self._slots[row]
        if not ids and not slot.pending:
            raise UserError(f"prompt {row} is empty", allowed="at least one token", fix="pass some text")
        check_tokens(ids, self.config.vocab_size)
        check_fits(len(ids), new_tokens, self.capacity, len(slot.tokens))
        return ids

    def _feed(self, feeds: list[list[int] | None]) -> NDArray[np.float32]:
        """Run what is pending and then feeds[b] through sequence b, chunk by chunk; logits (len(feeds), V) after each one's last token."""
        whole = []
        for row, (slot, feed) in enumerate(zip(self._slots, feeds, strict=False)):
            self._forget_drafts(row)
            late = slot.tokens[len(slot.tokens) - slot.pending :] if feed is not None else []
            whole.append([*late, *(feed or [])])
        logits = np.zeros((len(feeds), self.config.vocab_size), np.float32)
        longest = max((len(w) for w in whole), default=0)
        for start in range(0, longest, self.chunk):
            parts = [w[start : start + self.chunk] for w in whole]
            new = np.zeros(self.max_batch, np.int32)
            ids = np.zeros((self.max_batch, max(len(p) for p in parts)), np.int64)
            for b, part in enumerate(parts):
                new[b] = len(part)
                ids[b, : len(part)] = part
            result = self.backend.step(ids, new)
            for b, part in enumerate(parts):
                if not part:
                    continue
                slot, known = self._slots[b], min(len(part), self._slots[b].pending)
                slot.pending -= known
                slot.tokens += part[known:]
                logits[b] = result[b]  # a prompt that ended in an earlier chunk keeps the logits of that one
            if self._progress is not None:
                self._progress(min(start + self.chunk, longest), longest)
        return logits


def _token_ids(prompt: object, what: str) -> list[int]:
    """A prompt's token ids as Python's integers. Raises UserError on anything else."""
    if isinstance(prompt, np.ndarray) and prompt.ndim == 1 and prompt.dtype.kind in "iu":
        return [int(token) for token in prompt.tolist()]
    if isinstance(prompt, (bytes, bytearray)) or not isinstance(prompt, (Sequence, np.ndarray)) or (isinstance(prompt, np.ndarray) and prompt.ndim != 1):
        raise UserError(f"{what} is neither text nor token ids", got=type(prompt).__name__, allowed="a string or a list of integers")
    ids = [as_integer(token) for token in prompt]
    if None in ids:
        raise UserError(f"{what} is neither text nor token ids", got=repr(prompt[ids.index(None)]), allowed="a string or a list of integers")
    return [token for token in ids if token is not None]


def _token_set(tokens: int | Iterable[int] | None) -> frozenset[int]:
    """One id, several or none, as config.eos_token_id and stop_tokens have them."""
    if tokens is None:
        return frozenset()
    given = [tokens] if as_integer(tokens) is not None or not isinstance(tokens, Iterable) else tokens
    ids = [as_integer(token) for token in given]
    if None in ids:
        raise UserError("stop_tokens is wrong", got=repr(tokens), allowed="a token id or a list of them")
    return frozenset(token for token in ids if token is not None)


def _limits(max_new_tokens: int | Sequence[int | None] | None, prompts: int) -> list[int | None]:
    """max_new_tokens of each prompt."""
    if isinstance(max_new_tokens, (Sequence, np.ndarray)) and not isinstance(max_new_tokens, str) and as_integer(max_new_tokens) is None:
        if len(max_new_tokens) != prompts:
            raise UserError("max_new_tokens has the wrong length", got=len(max_new_tokens), allowed=f"one, or one for each of {prompts} prompts")
        return [None if limit is None else integer("max_new_tokens", limit, 1) for limit in max_new_tokens]
    return [None if max_new_tokens is None else integer("max_new_tokens", max_new_tokens, 1)] * prompts
