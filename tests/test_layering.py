"""The house rules: who may import whom, by folder; no circles; and what is imported where something is absent."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNELS = "sessa_deploy/kernels"
DISTRIBUTED = "sessa_deploy/distributed"
LAUNCH, FEEDBACK, CAUSAL, ENGINE, TRAINING = (f"{KERNELS}/{name}" for name in ("launch", "feedback", "causal", "engine", "training"))
HEAVY = {"torch", "triton", "onnx", "onnxscript", "onnxruntime", "tensorrt", "safetensors", "matplotlib", "fastapi", "uvicorn", "pydantic", "jinja2"}
ENGINE_LIBRARIES = {"onnxruntime", "tensorrt"}
# The modules beside the package's folders that need the standard library alone.
GROUND = {"__init__", "checks", "config", "contract", "cuda", "cuda_arch", "errors", "files", "process", "reading"}
# folder -> (the other folders of ours it may import, the packages of others); every room may import the ground.
ROOMS: dict[str, tuple[set[str], set[str]]] = {
    "ground": (set(), set()),
    LAUNCH: (set(), {"triton", "torch"}),  # where jit compiles and launches, never at import
    FEEDBACK: ({LAUNCH, KERNELS}, {"triton", "torch"}),
    CAUSAL: ({LAUNCH, KERNELS}, {"triton", "torch"}),
    ENGINE: ({LAUNCH, FEEDBACK, CAUSAL, KERNELS}, {"triton", "torch"}),
    KERNELS: ({LAUNCH, FEEDBACK, CAUSAL}, {"triton", "torch"}),
    TRAINING: ({LAUNCH, KERNELS}, {"triton", "torch"}),
    DISTRIBUTED: (set(), {"torch"}),
    "sessa_deploy": ({KERNELS, TRAINING, DISTRIBUTED, "runtime"}, {"torch", "numpy", "safetensors", "tokenizers", "matplotlib", "onnx", "google", "wandb"}),
    "sessa_deploy/cli": ({"sessa_deploy", "runtime", "runtime/ort", "runtime/trt", "runtime/serve", "export", "export/parity", "plugins"},
                         {"click", "rich", "numpy"}),
    "export": ({"sessa_deploy", KERNELS, "runtime", "runtime/device", "runtime/ort", "runtime/trt", "plugins", "export/engine", "export/graph",
                "export/parity", "export/trt"}, {"torch", "onnx", "numpy", "platformdirs"}),
    "export/engine": ({LAUNCH, "runtime", "plugins", "export/graph"}, {"onnx", "numpy"}),
    "export/graph": ({"sessa_deploy", KERNELS, "export", "plugins"}, {"torch", "onnx", "onnx_ir", "onnxscript", "numpy"}),
    "export/parity": ({"sessa_deploy", KERNELS, "runtime", "runtime/ort", "runtime/trt", "export/graph"}, {"torch", "onnx", "numpy", "matplotlib"}),
    "export/trt": ({"runtime", "export/engine", "export/graph"}, {"onnx", "numpy"}),
    "runtime": ({"plugins", "runtime/device", "runtime/ort", "runtime/trt"}, {"numpy", "tokenizers", "rich", "platformdirs", "jinja2"}),
    "runtime/device": ({"runtime"}, {"numpy"}),
    "runtime/ort": ({"runtime", "runtime/device", "plugins"}, {"numpy", "onnxruntime"}),
    "runtime/trt": ({"runtime", "runtime/device", "plugins"}, {"numpy", "platformdirs"}),
    "runtime/serve": ({"runtime"}, {"numpy", "fastapi", "starlette", "uvicorn", "pydantic", "pydantic_core", "prometheus_client", "dynamo", "platformdirs",
                                     "triton_python_backend_utils"}),
    "plugins": ({LAUNCH, FEEDBACK, CAUSAL, ENGINE}, {"triton", "torch", "platformdirs"}),
}
# Where a room may see but a part of another: (from, into) -> the modules.
DOORS = {
    (FEEDBACK, KERNELS): {"device", "device_rows"},
    (CAUSAL, KERNELS): {"device", "device_rows"},
    (ENGINE, KERNELS): {"device", "device_rows"},
    (TRAINING, KERNELS): {"beside", "device", "ops", "replay", "route"},
    ("sessa_deploy", "runtime"): {"bundle", "publish", "sizes", "template", "tokenizer"},
    ("runtime", "plugins"): {"library"},
    ("runtime/ort", "plugins"): {"library"},
    ("runtime/trt", "plugins"): {"library"},
}
PREFIXES = {"sessa_deploy.export": "export", "sessa_deploy.runtime": "runtime", "sessa_deploy.plugins": "plugins", "sessa_deploy": "sessa_deploy"}


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


def room(path: Path) -> str:
    folder = path.parent.relative_to(ROOT).as_posix()
    if path.stem == "__main__":
        return "sessa_deploy/cli"
    return "ground" if folder == "sessa_deploy" and path.stem in GROUND else folder


def resolve(name: str) -> Path | None:
    """The file that `sessa_deploy.a.b` or `sessa_deploy.a.b.Thing` names; None for the package itself and for names of others."""
    for package, folder in PREFIXES.items():
        if name == package or name.startswith(f"{package}."):
            parts = name[len(package):].strip(".").split(".")
            for count in range(len(parts), 0, -1):
                module = ROOT.joinpath(folder, *parts[:count])
                for file in (module.with_suffix(".py"), module / "__init__.py"):
                    if file.is_file():
                        return file
            init = ROOT / folder / "__init__.py"
            return init if init.is_file() else None
    return None


ALL = files(*dict.fromkeys(PREFIXES.values()))


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_every_folder_of_code_is_a_room() -> None:
    assert {room(path) for path in ALL} == set(ROOMS)


@pytest.mark.parametrize("path", ALL, ids=named)
def test_a_room_imports_what_it_may(path: Path) -> None:
    here = room(path)
    rooms, packages = ROOMS[here]
    assert foreign(path) <= packages, f"{here} may import {sorted(packages)}"
    for name in imports(path):
        target = resolve(name)
        if target is None or room(target) in ("ground", here):
            continue
        assert room(target) in rooms, f"{here} may not import {name}"
        allowed = DOORS.get((here, room(target)))
        assert allowed is None or target.stem in allowed, f"{here} sees only {sorted(allowed or ())} of {room(target)}: {name}"


@pytest.mark.parametrize("path", files("runtime"), ids=named)
def test_one_engine_library_a_module(path: Path) -> None:
    assert len(foreign(path) & ENGINE_LIBRARIES) <= 1


@pytest.mark.parametrize("path", files(LAUNCH), ids=named)
def test_the_launch_folder_imports_the_standard_library_alone(path: Path) -> None:
    assert foreign(path, top_level_only=True) == set()
    if path.stem != "jit":
        assert foreign(path) == set()


def test_families_are_where_the_table_looks_for_them() -> None:
    """A folder with kernels as data has their tiles beside it; which folders there are nobody writes down."""
    assert {p.parent.name for p in (ROOT / KERNELS).glob("*/spec.py")} - {"launch"} == {p.parent.name for p in (ROOT / KERNELS).glob("*/tiles.json")}


@pytest.mark.parametrize("path", files("sessa_deploy/cli"), ids=named)
def test_verbs_import_nothing_heavy_before_they_are_called(path: Path) -> None:
    assert foreign(path, top_level_only=True) <= {"click"}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected sets of more than one module (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph.get(node, ())):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            group = stack[stack.index(node):]
            del stack[stack.index(node):]
            if len(group) > 1:
                found.append(sorted(group))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def test_no_circles() -> None:
    graph = {named(path): {named(target) for name in imports(path) if (target := resolve(name)) is not None and target != path} for path in ALL}
    scripts = {path.stem: path for path in files("benchmarks")}
    graph |= {named(path): {named(scripts[name.split(".")[0]]) for name in imports(path) if name.split(".")[0] in scripts} - {named(path)}
              for path in scripts.values()}
    for package in [node for node in graph if node.endswith("__init__.py")]:
        graph[package] = set() if package == "sessa_deploy/__init__.py" else graph[package]  # its public names are imported when they are asked for
    assert circles(graph) == []


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


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


def modules_of(folder: str) -> list[str]:
    package = {value: key for key, value in PREFIXES.items()}[folder.split("/")[0]]
    inside = (path.relative_to(ROOT / folder.split("/")[0]).with_suffix("") for path in files(folder))
    return [".".join((package, *path.parts)).removesuffix(".__init__") for path in inside]


def test_runtime_engine_builder_and_plugin_finder_import_without_torch() -> None:
    ground = [f"sessa_deploy.{name}" for name in sorted(GROUND) if not name.startswith("__")]
    import_without({"torch", "triton", "onnx", "onnxscript"}, [*modules_of("runtime"), *ground, "sessa_deploy.cli.run", "sessa_deploy.plugins.library"])
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
