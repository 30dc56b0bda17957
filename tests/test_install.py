"""Every verb and public function where a package is absent: one line that names the extra, exit code 2, never a verdict about numbers."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sessa_deploy
from sessa_deploy.cli import VERBS
from sessa_deploy.errors import EXTRA_OF, MissingPackage, UserError, missing_package

ROOT = Path(__file__).resolve().parents[1]
# As pip leaves it: the finders know nothing of the package, and the metadata neither. Interpreters that this one starts lack it too.
SITECUSTOMIZE = """
import sys
from importlib import metadata
GONE = {gone!r}
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in GONE:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
real = metadata.distribution
def distribution(name):
    if name.replace("-", "_") in GONE:
        raise metadata.PackageNotFoundError(name)
    return real(name)
metadata.distribution = distribution
"""
TENSORRTS = ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings")
ALL = (*EXTRA_OF, *TENSORRTS)
RUNTIME_ONLY = tuple(name for name in ALL if name != "onnxruntime")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A small checkpoint in both forms, its bundle, and a text to train on."""
    import torch

    from sessa_deploy.checkpoint import save_checkpoint
    from sessa_deploy.config import SessaConfig
    from sessa_deploy.export.to_onnx import export_bundle
    from sessa_deploy.model import SessaLM

    folder = tmp_path_factory.mktemp("made")
    model = SessaLM(SessaConfig(vocab_size=257, d_model=16, n_layers=1, n_heads=2, max_context=64))
    save_checkpoint(model, folder / "checkpoint")
    torch.save(model.state_dict(), folder / "model.pt")
    (folder / "config.json").write_bytes((folder / "checkpoint/config.json").read_bytes())
    export_bundle(folder / "checkpoint", folder / "bundle")
    (folder / "text").mkdir()
    for i in range(4):
        (folder / f"text/{i}.txt").write_text("to be or not to be, that is the question\n" * 40)
    return {name: str(folder / name) for name in ("checkpoint", "model.pt", "bundle", "text", "new")} | {"onnx": str(folder / "bundle/model.onnx")}


# verb -> (its arguments, what is absent, the extra to name, or None where the verb does without)
CASES: list[tuple[str, str, tuple[str, ...], str | None]] = [
    ("train", "--data {text} --out {new}-t --steps 1", RUNTIME_ONLY, "train"),
    ("train", "--data {text} --out {new}-t --steps 1", ("matplotlib",), "train"),
    ("train", "--data {text} --out {new}-t --steps 1", ("safetensors",), "train"),
    ("export", "{checkpoint} --out {new}-e", RUNTIME_ONLY, "export"),
    ("export", "{checkpoint} --out {new}-e", ("onnx",), "export"),
    ("export", "{checkpoint} --out {new}-e", ("onnxscript",), "export"),
    ("export", "{model.pt} --out {new}-e", ("safetensors",), "export"),
    ("validate", "{bundle} --checkpoint {checkpoint}", RUNTIME_ONLY, "export"),
    ("validate", "{bundle} --checkpoint {checkpoint}", ("onnx",), "export"),
    ("validate", "{bundle} --checkpoint {checkpoint} --backend ort", ("onnxruntime",), "ort"),
    ("validate", "{bundle} --checkpoint {checkpoint} --report {new}.html", ("matplotlib",), "export"),
    ("validate", "{bundle} --dump {new}-d --backend ort", ALL, "ort"),
    ("validate", "{bundle} --checkpoint {checkpoint} --backend trt", TENSORRTS, "tensorrt"),
    ("build", "{bundle}", ALL, "export"),
    ("build", "{bundle}", (*TENSORRTS, "torch"), "tensorrt"),
    ("build", "{bundle} --for rtx", TENSORRTS, "rtx"),
    ("build", "{bundle} --for rtx", ("onnx",), "export"),
    ("build", "{bundle} --for ort", ("onnx",), "export"),
    ("build", "{bundle} --for ort", (*TENSORRTS, "torch", "triton", "onnxruntime"), None),
    ("run", "{bundle} --prompt a --max-new-tokens 2", ALL, "ort"),
    ("run", "{bundle} --prompt a --max-new-tokens 2 --backend trt", ALL, "tensorrt"),
    ("run", "{bundle} --prompt a --max-new-tokens 2", RUNTIME_ONLY, None),
    ("chat", "{bundle}", ALL, "ort"),
    ("serve", "{bundle}", ALL, "serve"),
    *(("serve", "{bundle}", (name,), "serve") for name in ("fastapi", "uvicorn", "pydantic", "jinja2", "prometheus_client")),
    ("serve", "{bundle} --port 0", ("onnxruntime",), "ort"),
    ("serve", "{bundle} --backend trt", TENSORRTS, "tensorrt"),
    ("export-triton", "{bundle} --out {new}-r", ALL, None),
    ("score", "{bundle} --text {text}/0.txt", ALL, "ort"),
    ("score", "{bundle} --text {text}/0.txt", RUNTIME_ONLY, None),
    ("bench", "{bundle} --prompt-tokens 4 --window 4", ALL, "ort"),
    ("influence", "{checkpoint}", RUNTIME_ONLY, "export"),
    ("influence", "{checkpoint} --plot {new}.png", ("matplotlib",), "export"),
    ("influence", "{checkpoint}", ("safetensors",), "export"),
    ("inspect", "{model.pt}", RUNTIME_ONLY, "export"),
    ("inspect", "{model.pt} --no-verify", ("torch",), "export"),
    ("inspect", "{onnx}", RUNTIME_ONLY, "export"),
    ("inspect", "{checkpoint}", RUNTIME_ONLY, None),
    ("inspect", "{bundle}", RUNTIME_ONLY, None),
    ("plugin", "build --arch 90", ("triton", "torch"), "train"),
    ("doctor", "", ALL, None),
]


def without(gone: tuple[str, ...], folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """A Python command in an environment that lacks `gone`."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE.format(gone=gone))
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=250, cwd=folder, env=environment, check=False)


def test_every_verb_is_walked() -> None:
    assert {verb for verb, *_ in CASES} >= set(VERBS)


@pytest.mark.parametrize(("verb", "arguments", "gone", "extra"), CASES, ids=[f"{v}-{'all' if g == ALL else g[0]}-{i}" for i, (v, _, g, _) in enumerate(CASES)])
def test_a_verb_names_the_extra_it_lacks(made: dict[str, str], tmp_path: Path, verb: str, arguments: str, gone: tuple[str, ...], extra: str | None) -> None:
    words = [re.sub(r"\{(.+?)\}", lambda m: made[m[1]], word) for word in arguments.split()]
    done = without(gone, tmp_path / "absent", "-m", "sessa_deploy", verb, *words)
    said = done.stderr.strip().splitlines()
    if extra is None:
        assert done.returncode == 0, done.stderr
        for written in Path(made["new"]).parent.glob("new*"):
            shutil.rmtree(written)
        return
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(said) == 1 and said[0].startswith("error: ") and f"pip install 'sessa-deploy[{extra}]'" in said[0], done.stderr
    assert "parity" not in done.stdout
    assert not list(Path(made["new"]).parent.glob("new*"))


def test_a_public_name_names_the_extra_it_lacks(tmp_path: Path) -> None:
    code = """
import json, sessa_deploy
from sessa_deploy.errors import UserError
said = {}
for name in sessa_deploy.__all__:
    try:
        getattr(sessa_deploy, name)
    except UserError as error:
        assert isinstance(error, ImportError), "what asks for ImportError meets it too"
        said[name] = str(error)
print(json.dumps(said))
"""
    done = without(RUNTIME_ONLY, tmp_path / "absent", "-c", code)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert set(said) == set(sessa_deploy.__all__) - {"SessaConfig", "SessaError", "UserError", "ParityError", "__version__"}
    assert all("sessa-deploy[export]" in line for line in said.values()), said


def test_inspect_shows_a_checkpoint_without_torch_and_says_why_it_was_not_verified(made: dict[str, str], tmp_path: Path) -> None:
    done = without(RUNTIME_ONLY, tmp_path / "absent", "-m", "sessa_deploy", "inspect", made["checkpoint"])
    assert done.returncode == 0 and "d_model" in done.stdout and "not verified: this needs the package torch" in done.stdout, done.stdout + done.stderr


def test_a_failed_import_without_a_message_still_says_something() -> None:
    empty = missing_package(ImportError("", name="onnxruntime"))
    assert empty is not None and "got ;" not in str(empty) and "built for another version" in str(empty)


def test_an_import_that_is_our_own_bug_stays_one() -> None:
    assert missing_package(ModuleNotFoundError("No module named 'sessa_deploy.nothing'", name="sessa_deploy.nothing")) is None
    assert missing_package(ModuleNotFoundError("No module named 'somewhere'", name="somewhere")) is None
    assert issubclass(MissingPackage, UserError)


def test_constraints_lie_within_what_the_package_declares() -> None:
    """A pin outside a declared range cannot be installed by anyone."""
    from packaging.requirements import Requirement

    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    declared = [Requirement(line) for line in re.findall(r'"([a-z][\w-]*[><=][^"]*)"', text)]
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            ranges = [r.specifier for r in declared if r.name == name]
            assert ranges and all(version in r for r in ranges), line


def test_every_library_that_an_extra_brings_is_known_by_its_extra() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for module, extra in EXTRA_OF.items():
        listed = re.search(rf"^{extra} = \[(.*?)\]$", text, flags=re.MULTILINE | re.DOTALL)
        package = {"dynamo": "ai-dynamo"}.get(module, module.replace("_", "-"))
        assert listed is not None and f'"{package}' in listed.group(1), (module, extra)


def test_doctor_says_whether_versions_are_in_range(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    from sessa_deploy.runtime import doctor, environment

    real = environment.package_version
    monkeypatch.setattr(metadata, "requires", lambda name: ["torch>=2.10; extra == 'train'", "triton<3.8,>=3.6; sys_platform == 'linux' and extra == 'train'"])
    monkeypatch.setattr(environment, "package_version", lambda name: {"triton": "3.9.0", "torch": "2.13.0+cpu"}.get(name) or real(name))
    found = {check["name"]: check for check in doctor.examine()["checks"]}
    assert found["triton"]["state"] == "optional" and found["triton"]["found"] == "3.9.0, outside >=3.6,<3.8"
    assert found["triton"]["mend"] == "pip install 'sessa-deploy[train]'"
    assert found["torch"]["state"] == "ok" and found["torch"]["found"] == "2.13.0+cpu (in >=2.10)"
    assert environment.in_range("3.7.1", ">=3.6,<3.8") and not environment.in_range("3.8.0", ">=3.6,<3.8") and environment.in_range("3.6", ">=3.6")
