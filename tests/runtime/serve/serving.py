"""`sessa-deploy serve` started as a process of its own (a support module, no tests)."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from templated import add_template


class Process:
    """A server started by the command line; `url` once it serves, or at once where its port is named. What it says goes to a file, which never blocks it."""

    def __init__(self, *args: object, port: int = 0) -> None:
        environment = {k: v for k, v in os.environ.items() if k != "SESSA_API_KEY"}
        handle, name = tempfile.mkstemp()
        self._log = Path(name)
        command = [sys.executable, "-m", "sessa_deploy", "serve", *map(str, args), "--port", str(port)]
        self.process = subprocess.Popen(command, stderr=handle, stdout=subprocess.PIPE, text=True, env=environment)
        os.close(handle)
        end = time.monotonic() + 120
        while port == 0 and "serving" not in self.said():
            assert self.process.poll() is None and time.monotonic() < end, self.said()
            time.sleep(0.02)
        self.url = f"http://127.0.0.1:{port}" if port else re.search(r"http://[\d.]+:\d+", self.said())[0]  # type: ignore[index]

    def said(self) -> str:
        """What it wrote to standard error so far."""
        return self._log.read_text(encoding="utf-8")

    def end(self, number: int | None = signal.SIGTERM, seconds: float = 100) -> tuple[int, str]:
        """(exit code, what it said), after a signal."""
        if number is not None:
            self.process.send_signal(number)
        out, _ = self.process.communicate(timeout=seconds)
        assert out == ""
        return self.process.returncode, self.said()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *caught: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        with contextlib.suppress(ValueError):
            self.process.communicate()
        self._log.unlink()


@contextlib.contextmanager
def kept_port() -> Iterator[int]:
    """A port for a server and nothing else: those who bind with SO_REUSEADDR, as servers do, may share it until one of them listens."""
    with socket.socket() as keeper:
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        keeper.bind(("127.0.0.1", 0))
        yield keeper.getsockname()[1]


def export_demo(folder: Path) -> Path:
    """The demo with a chat template, as a bundle."""
    from sessa_deploy.export.to_onnx import export_bundle

    shutil.copytree(Path(__file__).parents[3] / "checkpoints/demo", folder / "checkpoint")
    return export_bundle(add_template(folder / "checkpoint"), folder / "demo")
