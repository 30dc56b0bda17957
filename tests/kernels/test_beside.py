"""The second stream of a captured layer: what waits for what, where somebody else captures and where we do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sessa_deploy.kernels import beside
from sessa_deploy.kernels.beside import Beside

GPU = torch.device("cuda", 0)


class Stream:
    """A stream that writes down what it records and waits for."""

    log: list[str]
    device_index = 0

    def __init__(self, name: str) -> None:
        self.name, self.cuda_stream = name, hash(name)

    def record_event(self) -> str:
        return self.name

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    seen = SimpleNamespace(capturing=True, log=[], current=Stream("main"))

    def change(stream: Any) -> None:
        seen.current = stream
        seen.log.append(f"on {stream.name}")

    monkeypatch.setattr(Stream, "log", seen.log, raising=False)
    monkeypatch.setattr(beside, "_SIDES", {})
    for module, name, value in ((torch._C, "_cuda_isCurrentStreamCapturing", lambda: seen.capturing), (torch._C, "_cuda_getDevice", lambda: 0),
                                (torch.cuda, "current_stream", lambda: seen.current), (torch.cuda, "set_stream", change),
                                (torch.cuda, "Stream", lambda: Stream("second"))):  # fmt: skip
        monkeypatch.setattr(module, name, value, raising=False)
    return seen


FORK = ["second waits for main", "on second", "on main"]


def test_in_somebody_elses_graph_a_piece_ends_without_waiting(gpu: SimpleNamespace) -> None:
    side = Beside(GPU)
    with side:
        pass
    side.rest()
    assert gpu.log == FORK and side.pending
    side.join()
    side.join()  # once is enough
    assert gpu.log == [*FORK, "main waits for second"] and not side.pending
    assert len(beside._SIDES) == 1 and Beside(GPU)._side is side._side  # a workspace of the products for each


def test_in_a_graph_of_ours_a_piece_ends_whole(gpu: SimpleNamespace) -> None:
    beside.pair(gpu.current, Stream("second"))
    side = Beside(GPU)
    with side:
        pass
    side.rest()
    assert gpu.log == [*FORK, "main waits for second"] and not side.pending


def test_where_nothing_is_captured_all_is_in_one_line(gpu: SimpleNamespace) -> None:
    gpu.capturing = False
    for device in (GPU, torch.device("cpu")):
        side = Beside(device)
        with side:
            assert gpu.current.name == "main"
        side.rest()
        side.join()
    assert not gpu.log
