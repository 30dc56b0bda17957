"""Every command that a `next:` or a `fix:` prints works as it stands, with the paths of a user who likes spaces."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import click
import pytest
import torch

from sessa_deploy.checkpoint import save_checkpoint
from sessa_deploy.cli import VERBS, cli, main
from sessa_deploy.config import SessaConfig
from sessa_deploy.contract import MODEL_FILE
from sessa_deploy.export.parity import process as parity_process
from sessa_deploy.model import SessaLM
from sessa_deploy.runtime.bundle import Bundle, write_bundle
from sessa_deploy.runtime.publish import STAGING_MARK

ROOT = Path(__file__).resolve().parents[2]
CONFIG = SessaConfig(d_model=16, n_layers=1, n_heads=2, vocab_size=257, max_context=8)
SHORT = ["--max-new-tokens", "2"]
Do = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, a state dict without a configuration, a bundle of each and a text."""
    folder = tmp_path_factory.mktemp("somebody's own folder")
    torch.manual_seed(0)
    model = SessaLM(CONFIG)
    save_checkpoint(model, folder / "check point")
    torch.save(model.state_dict(), folder / "state dict.pt")
    (folder / "shape").mkdir()
    CONFIG.save(folder / "shape")
    (folder / "text").mkdir()
    for i in range(4):
        (folder / f"text/{i}.txt").write_text("what is said here is said again " * 40)
    return folder


@pytest.fixture
def do(home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Do:
    """Run one command in the user's folder, rungs inside this process: (exit code, stdout, stderr)."""
    monkeypatch.setattr(parity_process, "ProcessLaunch", lambda python: parity_process.launch_here)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})  # one rung at a time: they patch the same modules
    monkeypatch.chdir(home)

    def call(*words: str) -> tuple[int, str, str]:
        code = 0
        try:
            main(list(words))
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


def printed(text: str) -> list[list[str]]:
    """The words of every command of ours in `next:` and `fix:` lines, placeholders filled in."""
    filled = {"CHECKPOINT": "check point", "BUNDLE": "a new bundle", "DIR": "a new folder"}
    found = []
    for line in text.splitlines():
        _, mark, rest = line.partition("next: ") if line.startswith("next: ") else line.rpartition("; fix: ")
        start = rest.find("sessa-deploy ")
        if mark and start >= 0:
            words = shlex.split(rest[start:])[1:]
            found.append([filled.get(word, word) for word in words])
    return found


def follow(do: Do, text: str) -> tuple[list[str], str]:
    """Run the one command that a text advises: (its words, what it printed)."""
    commands = printed(text)
    assert len(commands) == 1, text
    code, out, err = do(*commands[0])
    assert code == 0, (commands[0], out, err)
    return commands[0], out


def test_the_road_from_text_to_a_proven_bundle(do: Do) -> None:
    code, out, err = do("train", "--data", "text", "--out", "my run", "--steps", "2", "--d-model", "16", "--n-layers", "1", "--n-heads", "2", "--context", "8",
                        "--batch-size", "2", "--device", "cpu")
    assert code == 0, err
    words, out = follow(do, out)
    assert words[:2] == ["export", "my run/checkpoint"]
    words, out = follow(do, out)
    assert words[0] == "validate" and out.splitlines()[-1].startswith("parity: PASSED")


def test_a_state_dict_with_a_configuration_elsewhere(do: Do) -> None:
    code, out, err = do("export", "state dict.pt", "--config", "shape/config.json", "--out", "its bundle")
    assert code == 0, err
    words, out = follow(do, out)
    assert words[-2:] == ["--config", "shape/config.json"] and out.splitlines()[-1].startswith("parity: PASSED")


def test_a_bundle_of_all_logits(do: Do) -> None:
    code, out, err = do("export", "check point", "--all-logits", "--out", "all logits")
    assert code == 0, err
    words, out = follow(do, out)
    assert words[:2] == ["validate", "all logits"] and out.splitlines()[-1].startswith("parity: PASSED")
    assert do("run", "all logits", "--prompt", "a", *SHORT)[0] == 0


def test_tensors_dumped_here_and_judged_there(do: Do) -> None:
    assert do("export", "check point", "--out", "my bundle")[0] == 0
    code, out, err = do("validate", "my bundle", "--dump", "my tensors", "--backend", "ort")
    assert code == 0, err
    words, out = follow(do, out)
    assert words[-2:] == ["--compare", "my tensors"] and out.splitlines()[-1].startswith("parity: PASSED")


def test_mistakes_whose_fix_is_a_command(do: Do, home: Path) -> None:
    assert do("export", "check point", "--out", "good bundle")[0] == 0

    def damaged() -> str:
        shutil.copytree(home / "good bundle", home / "bad bundle")
        with open(home / "bad bundle" / MODEL_FILE, "r+b") as file:
            file.write(b"\0\0\0\0")
        return "bad bundle"

    def killed() -> str:
        folder = home / f".my bundle{STAGING_MARK}0123"
        folder.mkdir()
        return folder.name

    def wide() -> str:
        opened = Bundle.open(home / "good bundle")
        write_bundle(home / "bf16 bundle", {name: opened.file(name) for name in opened.names()}, CONFIG, "bf16", {})
        return "bf16 bundle"

    for make, mends in ((damaged, True), (killed, False), (wide, False), (lambda: "check point", False), (lambda: "no bundle", True)):
        name = make()
        code, _, err = do("run", name, "--prompt", "a", *SHORT)
        assert code == 2 and err.count("\n") == 1, (name, err)
        words, _ = follow(do, err)
        assert words[0] == "export"
        shutil.rmtree(home / "a new bundle", ignore_errors=True)
        if mends:
            assert do("run", name, "--prompt", "a", *SHORT)[0] == 0
    assert do("validate", "good bundle", "--checkpoint", "check point", "--compare", "no tensors")[0] == 2
    code, _, err = do("validate", "good bundle", "--checkpoint", "check point", "--json", "no folder/p.json")
    assert code == 2 and f"mkdir -p {shlex.quote(str(home / 'no folder'))}" in err
    os.rename(home / "good bundle", home / f".good bundle{STAGING_MARK}old-0123")  # as a kill between two renames leaves it
    code, _, err = do("run", "good bundle", "--prompt", "a", *SHORT)
    moved = re.search(r"fix: .*: mv (.*)$", err.strip())
    assert code == 2 and moved is not None
    os.rename(*shlex.split(moved[1]))
    assert do("run", "good bundle", "--prompt", "a", *SHORT)[0] == 0


# --- and those that need a GPU, or a machine that lacks something, by their words ---


def commands(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, what follows our name) of every command in a module's messages, docstrings left out; whatever is filled in later reads HOLE."""
    docs = {id(node.body[0].value) for node in ast.walk(tree) if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and node.body
            and isinstance(node.body[0], ast.Expr)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            found.append((node.lineno, node.value))
        elif isinstance(node, ast.JoinedStr):
            found.append((node.lineno, "".join(str(x.value) if isinstance(x, ast.Constant) else "HOLE" for x in node.values)))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "command":
            found.append((node.lineno, " ".join(["sessa-deploy", *(str(x.value) if isinstance(x, ast.Constant) else "HOLE" for x in node.args)])))
    return [(line, words) for line, text in found for words in re.findall(r"sessa-deploy ([a-z]+(?: [^,;`)]*)?)", text)]


@pytest.mark.parametrize("path", sorted(p for room in ("sessa_deploy", "runtime", "export", "plugins") for p in (ROOT / room).rglob("*.py")),
                         ids=lambda p: p.relative_to(ROOT).as_posix())
def test_commands_in_messages_exist_with_their_options(path: Path) -> None:
    for line, words in commands(ast.parse(path.read_text(encoding="utf-8"))):
        verb = words.split()[0]
        if verb == "and":  # "has sessa-deploy and what it needs"
            continue
        assert verb in VERBS, f"{path}:{line}: no verb {verb!r}"
        command = cli.get_command(click.Context(cli), verb)
        known = {name for p in command.params for name in (*p.opts, *p.secondary_opts)} if command is not None else set()
        options = set(re.findall(r"--[a-z][a-z-]*", re.split(r" or ", words)[0]))
        assert isinstance(command, click.Group) or options <= known, f"{path}:{line}: {verb} has no {options - known}"
