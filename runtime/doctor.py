"""What `doctor` finds: plain data, no optional package imported in this process."""

from __future__ import annotations

import platform
import sys
from typing import Any

from sessa_deploy import __version__
from sessa_deploy.cuda import driver_version
from sessa_deploy.errors import install_command
from sessa_deploy.runtime import environment

DOCTOR_SCHEMA = 1
_CUDA = "CUDAExecutionProvider"
# what it is for -> (package, whether a deployed machine cannot do without it, command that mends its absence)
_PACKAGES = (
    ("runtime", "numpy", True, "pip install numpy"),
    ("runtime", "tokenizers", True, "pip install tokenizers"),
    ("runtime", "rich", True, "pip install rich"),
    ("runtime", "platformdirs", True, "pip install platformdirs"),
    ("runtime", "click", True, "pip install click"),
    ("run on ONNX Runtime", "onnxruntime", False, "pip install 'sessa-deploy[ort]' (with a GPU: pip install 'sessa-deploy[cuda]')"),
    ("run on TensorRT", "tensorrt", False, install_command("tensorrt")),
    ("export, validate, train", "torch", False, install_command("torch")),
    ("export", "onnx", False, install_command("onnx")),
    ("export", "onnxscript", False, install_command("onnxscript")),
    ("export, train", "safetensors", False, install_command("safetensors")),
    ("validate, train: plots", "matplotlib", False, install_command("matplotlib")),
    ("train on a GPU, plugin", "triton", False, install_command("triton")),
)


_PAIRED = ("torch", "triton")  # a torch build wants one triton: show both beside what is supported


def examine() -> dict[str, Any]:
    """Findings: `checks`, each with name, use, found, state ("ok", "missing", "optional") and mend; `gpus`; and `ready`, the verbs that can work.

    Libraries are probed in processes of their own, so a broken one is reported and breaks nothing.
    """
    checks: list[dict[str, Any]] = []

    def add(use: str, name: str, found: str | None, needed: bool, mend: str) -> None:
        state = "ok" if found is not None else "missing" if needed else "optional"
        checks.append({"use": use, "name": name, "found": found or "not installed", "state": state, "mend": "" if found else mend})

    cpu, gpus = environment.processor(), environment.gpus()
    add("all", "sessa-deploy", __version__, True, "")
    add("all", "Python", platform.python_version() if sys.version_info >= (3, 10) else None, True, "install Python 3.10 or later")
    add("all", "processor", f"{cpu['model']}, {cpu['cores']} cores, {cpu['memory'] / 2**30:.0f} GiB", True, "")
    versions = {name: environment.package_version(name) for _, name, _, _ in _PACKAGES}
    for use, name, needed, mend in _PACKAGES:
        version, wanted = versions[name], environment.declared_range(name)
        if version is not None and not environment.in_range(version, wanted):
            checks.append({"use": use, "name": name, "found": f"{version}, outside {wanted}", "state": "missing" if needed else "optional", "mend": mend})
        else:
            add(use, name, f"{version} (in {wanted})" if version and name in _PAIRED and wanted else version, needed, mend)
    providers = _providers(add, versions["onnxruntime"], bool(gpus))
    trt = _tensorrt(add, versions["tensorrt"])
    add("a GPU", "CUDA driver", f"supports CUDA {driver_version()}" if driver_version() else None, False,
        "install the NVIDIA driver (a CPU needs none)")
    for gpu in gpus:
        more = f", driver {gpu['driver_version']}" if "driver_version" in gpu else ""
        add("a GPU", f"GPU {gpu['index']}", f"{gpu['name']}, {gpu['arch']}, {gpu['memory'] / 2**30:.0f} GiB{more}", False, "")
    plugin = _plugin(add)
    ready = []
    if "CPUExecutionProvider" in providers:
        ready.append("run and bench on a CPU")
    if _CUDA in providers and gpus and not any(c["name"] == "CUDA provider" for c in checks):
        ready.append("run and bench with ort-cuda")
    if trt and plugin and gpus:
        ready.append("build and run with trt")
    if all(versions[name] for name in ("torch", "onnx", "onnxscript", "safetensors")):
        ready.append("export")
        if providers:
            ready.append("validate")
    if versions["torch"] and versions["safetensors"]:
        ready.append("train")
    return {"schema_version": DOCTOR_SCHEMA, "checks": checks, "gpus": gpus, "providers": providers, "ready": ready}


def _providers(add: Any, installed: str | None, has_gpu: bool) -> list[str]:
    if installed is None and not environment.importable("onnxruntime"):
        return []
    providers, error = environment.providers()
    add("run on ONNX Runtime", "its providers", ", ".join(providers) if providers else None, False,
        f"it cannot be imported ({error}): pip install -U onnxruntime")
    if has_gpu and providers and _CUDA not in providers:
        add("run on ONNX Runtime", "CUDA provider", None, False,
            "pip uninstall onnxruntime; pip install onnxruntime-gpu (Python 3.10: onnxruntime-gpu==1.23.2)")
    elif has_gpu and providers:
        code = "import json\nfrom sessa_deploy.runtime import ort\nr = ort.load()\nort.preload(r)\nprint(json.dumps(ort.why_no_cuda(r)))"
        missing, error = environment.probe(code)
        if missing or error:
            add("run on ONNX Runtime", "CUDA provider", None, False, f"it does not load ({missing or error}): install the CUDA and cuDNN it was built for")
    return providers


def _tensorrt(add: Any, installed: str | None) -> str | None:
    if installed is None and not environment.importable("tensorrt"):
        return None
    version, error = environment.probe("import json, tensorrt; print(json.dumps(tensorrt.__version__))")
    add("run on TensorRT", "tensorrt imports", version, False, f"it cannot be imported ({error}): pip install -U tensorrt")
    return None if version is None else str(version)


def _plugin(add: Any) -> str | None:
    """The plugin library's path, as sessa_deploy.plugins.library finds it."""
    if not environment.importable("sessa_deploy.plugins.library"):
        return None
    code = "import json\nfrom sessa_deploy.plugins import library\nprint(json.dumps(str(library.find())))"
    path, _ = environment.probe(code)
    add("run on TensorRT", "plugin library", path, False, "sessa-deploy plugin build")
    return None if path is None else str(path)
