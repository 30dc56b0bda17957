"""Shared fixtures: golden files, and the skip rule of the gpu marker."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# A run tries what the run before tried, on however slow a machine. --hypothesis-profile full draws anew, twenty times the requests in the batcher's tests.
settings.register_profile("usual", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("full", max_examples=2000, deadline=None)
settings.load_profile("usual")

GOLDEN = sorted((Path(__file__).parent / "golden").glob("layer_*.safetensors"))


def _has_gpu() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # xdist gives out files in the order below; else the few long tests of test_lower.py and the like come last
    if "PYTEST_XDIST_WORKER" in os.environ:  # before torch and numpy are here: workers whose threads outnumber the cores wait for one another
        cores = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores)))
    # `nohup make test &` starts Python with both ignored, which children inherit; tests send them
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
            signal.signal(number, usual)


def pytest_collection_finish(session: pytest.Session) -> None:
    """All that was imported stays: the collector need not look at it again and again, a tenth of the time of what makes many objects."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    if any(item.get_closest_marker("gpu") for item in items) and not _has_gpu():
        skip = pytest.mark.skip(reason="no CUDA GPU on this machine")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the graphs that this run traced, common to its processes: each shape is traced once. Shared where a test module brought torch."""
    run = tmp_path_factory.getbasetemp()
    folder = (run.parent if "PYTEST_XDIST_WORKER" in os.environ else run) / "traces"
    if "torch" in sys.modules and importlib.util.find_spec("onnxscript") is not None:
        from traces import share

        share(folder)
    return folder


@pytest.fixture(autouse=True)
def _draws() -> None:
    """What torch draws is a test's own, whatever the same process of xdist tested before."""
    if "torch" in sys.modules:
        sys.modules["torch"].default_generator.manual_seed(0)  # torch.manual_seed takes milliseconds to note who asked


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that other users can look into; pytest's own are closed to them."""
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        yield Path(place)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A folder of six small text files to train on."""
    (tmp_path / "text").mkdir()
    for i in range(6):
        (tmp_path / "text" / f"{i}.txt").write_text(f"a line {i}\n" * 30)
    return tmp_path / "text"


@pytest.fixture(params=GOLDEN, ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest) -> tuple[dict[str, Any], dict[str, Any]]:
    """(config, tensors) of one file of numbers from the official implementation."""
    from safetensors import safe_open

    with safe_open(str(request.param), "pt") as handle:
        return json.loads(handle.metadata()["config"]), {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
