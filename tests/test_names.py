"""Names that one module takes from another of ours exist: a type checker that reads the rooms as packages of their own does not see across them."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import types
from pathlib import Path

import pytest
from test_layering import ALL, ROOT, files, named

TESTS = files("tests", "benchmarks")


def exists(name: str) -> bool:
    """Whether `sessa_deploy.a.b.Thing` is a module or a name in one."""
    module, _, leaf = name.rpartition(".")
    try:
        return hasattr(importlib.import_module(module), leaf) or importlib.util.find_spec(name) is not None
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("sessa_deploy"):
            return False
        pytest.skip(f"needs {error.name}")


def taken(tree: ast.AST) -> dict[str, str]:
    """local name -> the full name of what is imported from us under it."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "sessa_deploy":
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def assigned(tree: ast.AST) -> set[str]:
    """Names that the file also gives to something else: parameters, loop variables, assignments."""
    names = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    return names | {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}


@pytest.mark.parametrize("path", [*ALL, *TESTS], ids=named)
def test_what_is_taken_from_another_module_is_there(path: Path) -> None:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    names, missing = taken(tree), []
    missing += [name for name in names.values() if not exists(name)]
    modules = {}
    for local, name in names.items():
        if name not in missing and local not in assigned(tree):
            module, _, leaf = name.rpartition(".")
            thing = getattr(importlib.import_module(module), leaf, None)
            modules |= {local: thing} if isinstance(thing, types.ModuleType) else {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            thing = modules[node.value.id]
            if not hasattr(thing, node.attr) and importlib.util.find_spec(f"{thing.__name__}.{node.attr}") is None:
                missing.append(f"{thing.__name__}.{node.attr} (line {node.lineno})")
        match node:  # what a test puts something else in the place of, which may only run where there are headers or a GPU
            case ast.Call(ast.Attribute(attr="setattr"), [ast.Name(local), ast.Constant(str(attribute)), _], []) if local in modules:
                if not hasattr(modules[local], attribute):
                    missing.append(f"{modules[local].__name__}.{attribute} (line {node.lineno})")
    assert not missing
