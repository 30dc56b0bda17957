"""Prompt lookup: drafts of what comes next, copied from where the conversation said the same before. A step of several rows verifies a draft.

No second model: where the last tokens stand somewhere before, what followed them there is the draft. How much of it to bet on is decided by what such
matches were worth in this very conversation: for each length of a match, how often the next token was the one that followed before. That is counted whether
a draft was made or not, so that drafting costs nothing where nothing repeats, and begins by itself where something does. It follows from the tokens, and from
the steps in which they came, alone.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

from sessa_deploy.contract import STEP_ROWS

MOST_DRAFTED = STEP_ROWS - 1  # tokens, beside the one before them
_SIZES = (6, 3)  # tokens that must agree; the longer first
_LENGTHS = (1, 3, 7)  # of drafts, beside the longest: steps of 2, 4 and 8 rows, so that an engine prepares itself for few sizes
_DEEP = 16  # tokens agreeing beyond which more mean nothing
_LATELY = 32.0  # matches that a rate looks back on
_REHEARSED = 256  # tokens at a prompt's end on which the rates are learnt; what stands before them is only remembered
_IDLE, _DOZE = 64, 16  # tokens behind none of which stood a match, after which note is taken of so many together: a step waits for a note
_START, _STAY = 1.15, 1.02  # expected tokens for the cost of one, above which drafting begins and goes on


@dataclass
class DraftStats:
    """What drafts brought. steps: decode steps, those without a draft included; tokens: drawn by them; drafted, accepted: tokens of drafts."""

    steps: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0

    def __add__(self, other: DraftStats) -> DraftStats:
        return DraftStats(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def __str__(self) -> str:
        if not self.steps:
            return "no step"
        share = "" if self.acceptance is None else f" ({100 * self.acceptance:.0f}%)"
        return f"{self.tokens_per_step:.2f} tokens a step, {self.accepted} of {self.drafted} drafted tokens accepted{share}"

    def to_dict(self) -> dict[str, int | float | None]:
        """The counts, with acceptance and tokens_per_step."""
        return {**asdict(self), "acceptance": self.acceptance, "tokens_per_step": self.tokens_per_step}

    @property
    def acceptance(self) -> float | None:
        """Share of the drafted tokens that were drawn; None where none was drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def tokens_per_step(self) -> float | None:
        """Tokens drawn by a decode step; None where there was none. Plain decoding has 1."""
        return self.tokens / self.steps if self.steps else None


class Drafter:
    """Drafts behind one conversation that only grows.

    tokens: the conversation, to which `keeps_up` and `follow` append, and the caller may. most: tokens of a draft at most. cost: what a step of several rows
    takes beyond one of a single row, and what each drafted row adds to that, both as shares of a step of one row.
    """

    def __init__(self, tokens: list[int], most: int, cost: tuple[float, float]) -> None:
        self.tokens, self.most, self._cost = tokens, most, cost
        self._after: list[dict[tuple[int, ...], int]] = [{} for _ in _SIZES]  # tokens -> where what followed them last stands
        self._known = 0
        self._at, self._match = -1, 0  # where the next token would stand if the text went on as before (-1: nowhere), and how many tokens agree
        # As if a match of m tokens had been right in a share m / (m + 4) of four cases.
        self._tries = [4.0] * (_DEEP + 1)
        self._hits = [4.0 * m / (m + 4) for m in range(_DEEP + 1)]
        self._idle, self._pause = 0, 1  # tokens since a match; how many it takes to take note
        self.drafting = False

    def follow(self, tokens: list[int]) -> bool:
        """Take `tokens` for the conversation; False, with nothing changed, where they are not what note was taken of and more, or that was interrupted."""
        known = self._known
        if known > len(self.tokens) or self.tokens[:known] != tokens[:known]:
            return False
        self.tokens[known:] = tokens[known:]
        return True

    def draft(self, room: int) -> list[int]:
        """What is worth betting on behind the conversation as it stands, at most `room` tokens; empty where it is not worth it."""
        most, tries, hits = min(self.most, room), self._tries, self._hits
        if not self.sees_more() or most < 1:
            return []
        first, each = self._cost
        best, length = _STAY if self.drafting else _START, 0
        chance, expected, count, match = 1.0, 1.0, 0, self._match
        for end in (*_LENGTHS, self.most):
            if end > most:
                continue
            while count < end:
                chance *= hits[match] / tries[match]
                expected += chance
                count += 1
                match = min(match + 1, _DEEP)
            worth = expected / (1.0 + first + each * end)
            if worth > best:
                best, length = worth, end
            elif chance < each:
                break
        self.drafting = length > 0
        tokens, at, period = self.tokens, self._at, len(self.tokens) - self._at
        return [tokens[at + i % period] for i in range(length)]  # a text that repeats itself goes on repeating

    def rests(self, count: int) -> bool:
        """Whether it takes no note of a conversation of `count` tokens yet, as nothing was said twice for long."""
        return 1 < self._pause > count - self._known

    def keeps_up(self, tokens: list[int]) -> bool:
        """Append what a conversation has more, unless it rests; whether it did."""
        rests = self.rests(len(tokens))
        if not rests:
            self.tokens += tokens[len(self.tokens) :]
        return not rests

    def sees_more(self) -> bool:
        """Whether something followed the conversation's last tokens before. Takes note of the tokens that came since the last time; where nothing was said
        twice for long, of some tokens at a time, and what stands before is no match until then."""
        start, end = self._known, len(self.tokens)
        if end > start and not self.rests(end):
            self._known = end + 1  # beyond what there is, until note is taken of all: who is interrupted knows nothing for certain (`follow`)
            if end == start + 1:
                self._take(start)
            else:
                self._catch_up(start)
            self._known = end
            self._pause = _DOZE if self._idle >= _IDLE else 1
        return self._at >= 0

    def _catch_up(self, start: int) -> None:
        """Take note of the tokens from `start` on."""
        tokens = self.tokens
        dozes = self._pause > 1 and len(tokens) - start < 2 * _DOZE
        rehearsed = max(start, len(tokens) - (1 if dozes else _REHEARSED))
        if rehearsed > start:
            for size, after in zip(_SIZES, self._after, strict=True):
                first = max(start + 1, size) - size
                last = max(first, rehearsed + 1 - size)
                after.update(zip(zip(*(tokens[first + i : last + i] for i in range(size)), strict=True), range(first + size, last + size), strict=True))
            self._at, self._match = -1, 0
            self._idle += rehearsed - start if dozes else 0
        for at in range(rehearsed, len(tokens)):
            self._take(at)

    def _take(self, at: int) -> None:
        """Take note of the token at `at`. A decode step waits for this: few passes over small lists."""
        tokens, match, end, known = self.tokens, self._match, at + 1, self._at
        if known >= 0:
            hit = tokens[known] == tokens[at]
            keep = min(1.0, (_LATELY - 1.0) / self._tries[match])
            self._tries[match] = self._tries[match] * keep + 1.0
            self._hits[match] = self._hits[match] * keep + hit
            known, match = (known + 1, min(match + 1, _DEEP)) if hit else (-1, 0)
        for size, after in zip(_SIZES, self._after, strict=True):
            if end < size:
                continue
            key = tuple(tokens[end - size : end])
            found = after.get(key) if match < size else None
            after[key] = end
            if found is not None:
                known, match = found, size
                while match < min(_DEEP, found) and tokens[found - 1 - match] == tokens[at - match]:
                    match += 1
        self._at, self._match = known, match
        self._idle = 0 if known >= 0 else self._idle + 1
