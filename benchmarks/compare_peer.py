"""What compare.py times, and what a peer of it must do; compare_worker.py and compare_torch.py have the peers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np

from sessa_deploy.config import SessaConfig
from sessa_deploy.runtime.backend import IntArray


@dataclass(frozen=True)
class Point:
    """What is timed. contexts: cached tokens of each sequence when decoding starts; prompt: tokens of a prefill instead, 0 for decoding; size: of another
    model than the run's, with random weights."""

    name: str
    capacity: int
    contexts: tuple[int, ...]
    prompt: int = 0
    size: str = ""

    @property
    def batch(self) -> int:
        """Sequences."""
        return len(self.contexts)


class Peer(ABC):
    """Something that decodes greedily. Opened for a batch and a capacity; `begin` says where each sequence stands. weights: which are read in 8 bits."""

    weights: Any = None

    def __init__(self, job: dict[str, Any]) -> None:
        self.job, self.config, self.precision = job, SessaConfig.from_dict(job["config"]), str(job["precision"])
        self.device = str(job["device"])

    @abstractmethod
    def open(self, batch: int, capacity: int) -> None:
        """Make room for `batch` sequences of `capacity` tokens."""

    @abstractmethod
    def begin(self, contexts: tuple[int, ...]) -> None:
        """Fill the caches so that sequence b holds contexts[b] tokens."""

    @abstractmethod
    def rewind(self) -> None:
        """Back to the contexts of `begin`."""

    @abstractmethod
    def step(self, last: bool = False) -> list[int]:
        """Feed each sequence its last token; the next ones, on the host. last: no step follows on this one."""

    @abstractmethod
    def prompt(self, ids: IntArray) -> list[int]:
        """Forget everything, feed sequence b the prompt ids[b] (B,T), from the host; the first new tokens, on the host."""

    def drawn(self, tokens: int, batch: int) -> IntArray:
        """Random prompts (batch, tokens), the same for every peer."""
        return np.random.default_rng(0).integers(0, self.config.vocab_size, (batch, tokens))

    def notes(self) -> dict[str, Any]:
        """What else the figures must be read with."""
        return {}

    def close(self) -> None:
        """Free the caches."""
        return
