"""What a device needs to make drafts itself: the conversation, the latest draft, and where on the host that draft is told."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sessa_deploy.contract import PLACE_BITS, STEP_ROWS
from sessa_deploy.runtime.device.buffers import Buffers, page_locked
from sessa_deploy.runtime.device.kernels import DRAFT

MOST_PLACES = 1 << PLACE_BITS  # of a conversation, that the kernel tells apart


class Drafts:
    """Device and page-locked memory of the drafts behind one sequence, that of `buffers`, which hold it alone.

    Steps of two slots take turns at two places on the host, as their tokens do.
    """

    def __init__(self, buffers: Buffers) -> None:
        self._buffers, self._cuda = buffers, buffers.cuda
        room = buffers.capacity + 1  # the last token is not in the cache
        self._text, self._drafted = self._cuda.allocate(4 * room), self._cuda.allocate(4 * STEP_ROWS)
        self._cuda.fill(self._text, 0, room)
        self._host_text: NDArray[np.int32] = page_locked(self._cuda, room, np.int32)
        self._told: NDArray[np.int32] = page_locked(self._cuda, 2 * STEP_ROWS, np.int32).reshape(2, STEP_ROWS)

    def put(self, tokens: Sequence[int], since: int) -> None:
        """Enqueue the conversation's tokens from `since` on to the device. Copies of what is replaced must be over."""
        if since < len(tokens):
            self._host_text[since : len(tokens)] = tokens[since:]
            self._cuda.to_device(self._text + 4 * since, self._host_text.ctypes.data + 4 * since, 4 * (len(tokens) - since))

    def make(self, rows: int, slot: int) -> None:
        """Enqueue what settles the step before and lays out one of `rows` rows."""
        buffers, ptr = self._buffers, "ptr"
        places = (ptr, self._text), (ptr, self._drafted), (ptr, self._told[slot].ctypes.data)
        step = (ptr, buffers.length), (ptr, buffers.new), (ptr, buffers.ids), ("i32", buffers.id_words), ("i32", rows)
        self._cuda.launch(buffers.kernels[DRAFT], (1, 1, 1), (*places, *step))

    def told(self, slot: int) -> list[int]:
        """The draft of the step of that slot, which is over: a list of the tokens behind its first."""
        found: list[int] = self._told[slot].tolist()
        return found[1 : found[0]]
