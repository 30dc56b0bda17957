"""Stop strings in streamed text: nothing of a stop string is ever shown, not even its beginning."""

from __future__ import annotations

from collections.abc import Sequence


class StopText:
    """Passes text through until one of `stops` occurs. Text that may yet turn out to begin one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""

    @property
    def held(self) -> bool:
        """Whether text is held back."""
        return bool(self._held)

    def push(self, text: str) -> tuple[str, bool]:
        """(text that may be shown, whether a stop string was found); what follows a stop string is dropped."""
        if not self._stops:
            return text, False
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            shown, self._held = self._held[: min(found)], ""
            return shown, True
        keep = max(self._overlap(stop) for stop in self._stops)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown, False

    def flush(self) -> str:
        """What is held back, when no more text comes."""
        text, self._held = self._held, ""
        return text

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins `stop`."""
        at = max(0, len(self._held) - len(stop) + 1)
        while (at := self._held.find(stop[0], at)) >= 0:  # most texts hold no beginning at all
            if stop.startswith(self._held[at:]):
                return len(self._held) - at
            at += 1
        return 0
