"""Which sequence of a backend a request gets, and what it can take over from conversations that are already in the caches."""

from __future__ import annotations

from dataclasses import dataclass, field

from sessa_deploy.runtime.backend import Backend
from sessa_deploy.runtime.sizes import bounded_chunk


@dataclass(eq=False)
class Slot:
    """Sequence `index` of the backend. tokens: the conversation of its cache, which may have fewer rows than tokens; used: when it was let go last;
    sound: whether its rows are what reading a prompt in chunks gives, so that others may take them over."""

    index: int
    tokens: list[int] = field(default_factory=list)
    busy: bool = False
    used: int = 0
    sound: bool = True


class Slots:
    """All sequences of one backend. A finished one keeps its conversation, resting, until its place is needed.

    Prompts are taken over up to a multiple of `chunk`, so that what is left of them is read in the very chunks of a request that is alone.
    """

    def __init__(self, backend: Backend, chunk: int, reuse: bool = True) -> None:
        self._backend, self._chunk, self._reuse = backend, chunk, reuse
        self.all = [Slot(index) for index in range(backend.batch)]
        self._clock = 0

    @property
    def free(self) -> int:
        """How many are not busy."""
        return sum(not slot.busy for slot in self.all)

    @property
    def resting(self) -> int:
        """How many keep a conversation that has ended."""
        return sum(not slot.busy and bool(slot.tokens) for slot in self.all)

    def take(self, prompt: list[int], sound: bool = True) -> tuple[Slot, int]:
        """(a free slot for a prompt, how many tokens of it are in its cache already).

        That whose whole conversation the prompt goes on from; else the lowest empty one; else the one let go longest ago, but not the one that holds the
        most of this prompt where there is another. sound False: nothing is taken over.
        """
        free = [slot for slot in self.all if not slot.busy]
        best, shared = self._best(prompt, free) if sound else (None, 0)
        chosen = best
        if best is None or not self._continues(prompt, best):
            empty = [slot for slot in free if self._backend.held(slot.index) == 0]
            others = [slot for slot in free if slot is not best] or free
            chosen = empty[0] if empty else min(others, key=lambda slot: slot.used)
        assert chosen is not None
        kept = shared if chosen is best else 0
        if kept:
            self._backend.wake(chosen.index, kept)
        else:
            self._backend.reset([chosen.index])
        chosen.tokens, chosen.busy, chosen.sound = prompt, True, sound
        return chosen, kept

    def share(self, slot: Slot, done: int) -> int:
        """How many tokens of a slot's prompt, of which `done` are read, it has when it has copied what another slot holds of it; `done` where none has more."""
        if not (slot.sound and self._backend.copies_rows):
            return done
        best, shared = self._best(slot.tokens, [other for other in self.all if other is not slot], done)
        if best is None:
            return done
        self._backend.copy_row(best.index, slot.index, shared)
        return shared

    def chunk_of(self, prompt: list[int], done: int, all_logits: bool = False) -> list[int]:
        """The tokens of a prompt that are read next, `done` of them being read; fewer where a large vocabulary's logits of all of them are wanted."""
        return prompt[done : done + (bounded_chunk(self._chunk, 1, self._backend.config.vocab_size) if all_logits else self._chunk)]

    def give_back(self, slot: Slot) -> None:
        """Let a slot go. Its conversation rests for others to go on from, where they may."""
        self._clock += 1
        slot.busy, slot.used = False, self._clock
        if self._reuse and slot.sound and self._backend.held(slot.index) >= self._chunk:
            self._backend.rest(slot.index)
        else:
            self.forget(slot)

    def forget(self, slot: Slot) -> None:
        """Drop what a slot's cache holds."""
        slot.tokens, slot.sound = [], True  # first, so that nobody goes on from rows that are in doubt
        self._backend.reset([slot.index])

    def _best(self, prompt: list[int], among: list[Slot], least: int = 0) -> tuple[Slot | None, int]:
        """(the slot with the longest beginning of a prompt, in whole chunks, how long it is); None where none has more than `least`."""
        best, most = None, least
        if self._reuse:
            for slot in among:
                if slot.sound and (shared := self._shared(prompt, slot)) > most:
                    best, most = slot, shared
        return best, most

    def _shared(self, prompt: list[int], slot: Slot) -> int:
        """Tokens, in whole chunks, that a prompt and a slot's cache begin with alike; the prompt's last token is not among them, as its logits are needed."""
        most, at = min(self._backend.held(slot.index), len(prompt) - 1), 0
        while at + self._chunk <= most and prompt[at : at + self._chunk] == slot.tokens[at : at + self._chunk]:
            at += self._chunk
        return at

    def _continues(self, prompt: list[int], slot: Slot) -> bool:
        held = self._backend.held(slot.index)
        return prompt[:held] == slot.tokens[:held]
