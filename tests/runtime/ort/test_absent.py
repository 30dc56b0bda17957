"""What runs, and what is said, where optional packages are absent: each in an interpreter of its own."""

from __future__ import annotations

import json
import subprocess
import sys

BLOCKED = """
import importlib.abc, json, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Block())
"""


def run_blocked(code: str, *blocked: str) -> str:
    done = subprocess.run([sys.executable, "-c", BLOCKED.format(blocked=blocked) + code], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_module_imports_with_nothing_optional_installed():
    code = """
import importlib, pkgutil, sessa_deploy.runtime
names = [m.name for m in pkgutil.walk_packages(sessa_deploy.runtime.__path__, "sessa_deploy.runtime.")]
for name in names:
    importlib.import_module(name)
print(len(names))
"""
    assert int(run_blocked(code, "torch", "triton", "onnx", "onnxruntime", "onnxscript", "safetensors", "tensorrt", "ml_dtypes")) >= 20


def test_generates_where_there_is_no_torch_and_no_onnx(tiny_bundle, tiny):
    code = f"""
from sessa_deploy.runtime.session import Session
print(json.dumps(Session({str(tiny_bundle.path)!r}).generate([[1, 2, 3]], 5)[0].tokens))
assert not {{"torch", "triton", "onnx"}} & set(sys.modules)
"""
    assert json.loads(run_blocked(code, "torch", "triton", "onnx", "onnxscript")) == tiny.greedy([1, 2, 3], 5)


def test_without_onnxruntime_the_command_is_named(tiny_bundle):
    code = f"""
from sessa_deploy.errors import UserError
from sessa_deploy.runtime.session import Session
for backend in ("ort", "auto"):
    try:
        Session({str(tiny_bundle.path)!r}, backend)
    except UserError as error:
        print(error)
"""
    lines = run_blocked(code, "onnxruntime").splitlines()
    assert len(lines) == 2 and all("pip install 'sessa-deploy[ort]'" in line for line in lines)
