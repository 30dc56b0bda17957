"""SCALE.md: its commands are ours, its table is the model's inputs, and its code for Ray Serve answers, with a stand-in for Ray where that is not installed."""

from __future__ import annotations

import asyncio
import importlib.util
import re
import shlex
import sys
import types
from pathlib import Path
from typing import Any

import fake_dynamo
import httpx
import pytest
from numpy_model import NumpyBackend
from served import MODEL, bundle, greedy

from sessa_deploy.cli import cli
from sessa_deploy.runtime.serve import dynamo, lifecycle
from sessa_deploy.runtime.serve.triton import INPUTS

PAGE = (Path(__file__).resolve().parents[3] / "runtime/serve/SCALE.md").read_text(encoding="utf-8")


def test_the_table_is_that_of_the_inputs() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+)(, any number)? \| (.+) \|$", PAGE, flags=re.MULTILINE)
    assert rows == [(known.name, known.type, "" if known.dims == (1,) else ", any number", known.what) for known in INPUTS]


def test_its_commands_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in fake_dynamo.modules():
        monkeypatch.setitem(sys.modules, name, module)
    made, found = bundle(tmp_path / "tiny"), 0
    for line in re.findall(r"^    (.+)$", PAGE, flags=re.MULTILINE):
        words = [str(made.path) if word == "BUNDLE" else word for word in shlex.split(line.rstrip("\\&"), comments=True)]
        if words[:1] == ["sessa-deploy"]:
            command = cli.get_command(None, words[1])  # type: ignore[arg-type]
            assert command is not None
            command.make_context(words[1], words[2:])
            found += 1
        elif words[:3] == ["python", "-m", "sessa_deploy.runtime.serve.dynamo"]:
            dynamo.parse(words[3:])
            found += 1
    assert found == 3
    options = {word for action in parser_options() for word in action}
    assert options >= set(re.findall(r"--[a-z-]+", PAGE[PAGE.index("lists them behind ours") : PAGE.index("From Python 3.11 on")]))


def parser_options() -> list[list[str]]:
    """The option strings of the worker's own parser, read out of its source: argparse keeps them to itself."""
    return [re.findall(r'"(--[a-z-]+)"', line) for line in Path(dynamo.__file__).read_text(encoding="utf-8").splitlines() if "add_argument(" in line]


def test_its_code_for_ray_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(code) == 1
    built: list[Any] = []
    if importlib.util.find_spec("ray") is None:
        ray = types.ModuleType("ray")
        ray.serve = types.SimpleNamespace(  # type: ignore[attr-defined]
            deployment=lambda **options: lambda cls: types.SimpleNamespace(bind=lambda: (cls, options)), ingress=lambda app: lambda cls: cls)
        monkeypatch.setitem(sys.modules, "ray", ray)
    made = bundle(tmp_path / "tiny")
    monkeypatch.setenv("SESSA_BUNDLE", str(made.path))
    monkeypatch.setattr(lifecycle, "open_slots", lambda *args: built.append(args) or NumpyBackend(MODEL, 8))
    space: dict[str, Any] = {"__name__": "sessa_on_ray"}
    exec(compile(code[0], "SCALE.md", "exec"), space)
    assert space["app"] is not None
    app = space["build"]()

    async def complete() -> httpx.Response:
        async with app.router.lifespan_context(app), httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://ray") as client:
            return await client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 12, "temperature": 0})

    answer = asyncio.run(complete())
    wanted = bytes(token for token in greedy(list(b"abc"), 12) if token < 256).decode("utf-8", "replace")
    assert answer.status_code == 200 and answer.json()["choices"][0]["text"] == wanted and len(built) == 1
