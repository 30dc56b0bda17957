"""The import rules: what each room may import, by reading the source, and by importing it where the forbidden things are absent."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GROUND = ("checks", "config", "contract", "cuda", "cuda_arch", "errors", "files", "process", "reading")
HEAVY = {"torch", "triton", "onnx", "onnxscript", "onnxruntime", "tensorrt", "safetensors", "matplotlib"}
STDLIB_ONLY = (*(f"sessa_deploy/{name}.py" for name in GROUND), "sessa_deploy/checkpoint_layout.py", "sessa_deploy/__init__.py",
               "plugins/ops.py")
# Rooms of the kernels, each with those it may import beside itself and the ground.
_DEVICE = {"launch", "device"}
KERNEL_ROOMS = {
    "launch": set(), "device": {"launch"}, "feedback": _DEVICE, "causal": _DEVICE, "engine": {*_DEVICE, "feedback", "causal"}, "reference": set(),
    "blocked": set(), "route": {"launch", "blocked", "feedback", "causal"}, "ops": {"blocked", "route"}, "training": {*_DEVICE, "route", "ops"},
}  # fmt: skip
RUNTIME_MAY = {"numpy", "tokenizers", "rich", "platformdirs", "onnxruntime", "tensorrt"}
ENGINE_LIBRARIES = {"onnxruntime", "tensorrt"}


def imports(path: Path, top_level_only: bool = False) -> Iterator[str]:
    """Absolute names a file imports, `from a import b` as a.b; skips blocks under TYPE_CHECKING."""

    def walk(node: ast.AST, deep: bool) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module:
                yield from (f"{child.module}.{alias.name}" for alias in child.names)
            elif not deep and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                continue
            else:
                yield from walk(child, deep)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), not top_level_only)


def foreign(path: Path, top_level_only: bool = False) -> set[str]:
    roots = {name.split(".")[0] for name in imports(path, top_level_only)}
    return {root for root in roots if root not in sys.stdlib_module_names and root != "sessa_deploy"}


def files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("name", STDLIB_ONLY)
def test_shared_vocabulary_is_standard_library_only(name: str) -> None:
    assert foreign(ROOT / name) == set()


@pytest.mark.parametrize("path", files("runtime"), ids=lambda p: p.stem)
def test_runtime_never_reaches_torch_triton_or_onnx(path: Path) -> None:
    assert foreign(path) <= RUNTIME_MAY
    assert len(foreign(path) & ENGINE_LIBRARIES) <= 1, "one engine library a module"
    ours = {name for name in imports(path) if name.startswith("sessa_deploy.")}
    allowed = tuple(f"sessa_deploy.{name}" for name in ("runtime", *GROUND, "plugins.library", "__version__"))
    assert all(name.startswith(allowed) for name in ours), sorted(ours)


@pytest.mark.parametrize("path", [p for p in files("sessa_deploy/cli")], ids=lambda p: p.stem)
def test_verbs_import_nothing_heavy_before_they_are_called(path: Path) -> None:
    assert foreign(path, top_level_only=True) <= {"click"}


def test_only_kernels_import_triton_and_only_lowering_beside_them() -> None:
    users = {path.relative_to(ROOT).as_posix() for path in files("sessa_deploy", "export", "runtime", "plugins") if "triton" in foreign(path)}
    assert all(name.startswith("sessa_deploy/kernels/") or name == "plugins/lower.py" for name in users), users


def kernel_room(path: str) -> str:
    """The room under kernels/ of a dotted or slashed path below it."""
    return path.replace("/", ".").removesuffix(".py").split(".")[0]


@pytest.mark.parametrize("path", files("sessa_deploy/kernels"), ids=lambda p: p.relative_to(ROOT / "sessa_deploy/kernels").as_posix())
def test_kernels_import_down_alone(path: Path) -> None:
    """launch <- feedback, causal <- engine, ops <- training; no kernel knows the runtime or the model, and launch knows no family."""
    room = kernel_room(path.relative_to(ROOT / "sessa_deploy/kernels").as_posix())
    for name in imports(path):
        if name.startswith("sessa_deploy.kernels."):
            assert kernel_room(name.removeprefix("sessa_deploy.kernels.")) in {room, *KERNEL_ROOMS.get(room, set())}, name
        elif name.startswith("sessa_deploy."):
            assert name.split(".")[1] in GROUND, name


@pytest.mark.parametrize("path", files("sessa_deploy/kernels/launch"), ids=lambda p: p.stem)
def test_launching_is_described_in_the_standard_library(path: Path) -> None:
    assert foreign(path, top_level_only=True) == set()
    assert foreign(path) <= ({"torch", "triton"} if path.stem == "jit" else set())


def test_every_kernel_room_has_its_rule_and_families_their_tiles() -> None:
    house = ROOT / "sessa_deploy/kernels"
    assert {kernel_room(p.relative_to(house).as_posix()) for p in files("sessa_deploy/kernels")} - {"__init__"} == set(KERNEL_ROOMS)
    assert {p.parent.name for p in house.glob("*/spec.py")} - {"launch"} == {p.parent.name for p in house.glob("*/tiles.json")}


BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Block())
import importlib
for name in {modules}:
    importlib.import_module(name)
print("ok")
"""


def import_without(blocked: set[str], modules: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", BLOCKED.format(blocked=blocked, modules=modules)], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "ok", done.stderr


def test_runtime_engine_builder_and_plugin_finder_import_without_torch() -> None:
    modules = [f"sessa_deploy.runtime.{path.stem}" for path in files("runtime") if path.stem != "__init__"]
    modules += ["sessa_deploy", "sessa_deploy.config", "sessa_deploy.contract", "sessa_deploy.cli", "sessa_deploy.cli.run", "sessa_deploy.cli.doctor"]
    import_without({"torch", "triton", "onnx", "onnxscript"}, modules)
    import_without({"torch", "triton"}, ["sessa_deploy.kernels.launch.jit", "sessa_deploy.kernels.engine.spec"])
    if (ROOT / "plugins/library.py").exists():
        import_without({"torch", "triton", "onnx"}, ["sessa_deploy.plugins.library"])
    if (ROOT / "export/to_engine.py").exists():
        import_without({"torch", "triton"}, ["sessa_deploy.export.to_engine"])


def test_help_loads_no_heavy_library() -> None:
    code = (
        "import sys\nfrom sessa_deploy.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        f"loaded = sorted({HEAVY} & set(sys.modules))\nassert not loaded, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "export" in done.stdout and "validate" in done.stdout
