"""What `doctor` finds: plain data, no optional package imported in this process."""

from __future__ import annotations

import platform
import sys
from typing import Any

from sessa_deploy import __version__
from sessa_deploy.contract import ORT_ENGINE
from sessa_deploy.cuda import driver_version
from sessa_deploy.cuda_arch import mend as arch_mend
from sessa_deploy.cuda_arch import nearest
from sessa_deploy.errors import UserError, install_command
from sessa_deploy.process import command
from sessa_deploy.runtime import environment
from sessa_deploy.runtime.bundle import Bundle
from sessa_deploy.runtime.ort.prepared import describe as describe_prepared
from sessa_deploy.runtime.sizes import weight_sizes
from sessa_deploy.runtime.trt import api, plan

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
    *(("serve", name, False, install_command("fastapi")) for name in ("fastapi", "uvicorn", "jinja2", "prometheus_client")),
    ("export, validate, train", "torch", False, install_command("torch")),
    ("export", "onnx", False, install_command("onnx")),
    ("export", "onnxscript", False, install_command("onnxscript")),
    ("export, train", "safetensors", False, install_command("safetensors")),
    ("validate, train: plots", "matplotlib", False, install_command("matplotlib")),
    ("train on a GPU, plugin", "triton", False, install_command("triton")),
)


_PAIRED = ("torch", "triton")  # a torch build wants one triton: show both beside what is supported


def examine(bundle: Bundle | None = None) -> dict[str, Any]:
    """Findings: `checks`, each with name, use, found, state ("ok", "missing", "optional") and mend; `gpus`; `ready`, the verbs that
    can work; and `tensorrt`, see `tensorrt_road`. bundle: of which `engine` is to say what `engine_here` finds.

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
    checks.append(ort_library(gpus))
    add("a GPU", "CUDA driver", f"supports CUDA {driver_version()}" if driver_version() else None, False,
        "install the NVIDIA driver (a CPU needs none)")
    for gpu in gpus:
        driver = f", driver {gpu['driver_version']}" if "driver_version" in gpu else ""
        add("a GPU", f"GPU {gpu['index']}", f"{gpu['name']}, {gpu['arch']}, {gpu['memory'] / 2**30:.0f} GiB{driver}", False, "")
    road = tensorrt_road(gpus)
    for one in road:
        add("run on TensorRT", one["title"], one["found"], False, one["mend"])
        if one["found"] is not None:
            add("run on TensorRT", f"{one['title']}: plugin library", one["library"], False, one["mend"])
        if one["refused"]:
            checks.append({"use": "run on TensorRT", "name": f"{one['title']}: this GPU", "found": one["refused"], "state": "optional", "mend": one["mend"]})
    more: dict[str, Any] = {}
    if bundle is not None:
        if bundle.weights is not None:
            checks.append(weights_here(bundle, gpus))
            more["weights"] = {**bundle.weights.to_dict(), "bytes": weight_sizes(bundle.config, bundle.precision, bundle.weights).to_dict()}
        checks.append(prepared_here(bundle))
        here = more["engine"] = engine_here(bundle, gpus)
        found = here["engine"] or f"none would load: {here['why']}"
        checks.append({"use": "run on TensorRT", "name": "the bundle's engine", "found": found, "state": "ok" if here["engine"] else "optional",
                       "mend": here["mend"]})
    ready = []
    if "CPUExecutionProvider" in providers:
        ready.append("run and bench on a CPU")
    if _CUDA in providers and gpus and not any(c["name"] == "CUDA provider" for c in checks):
        ready.append("run and bench with ort-cuda")
    ready += [one["ready"] for one in road if one["ready"]]
    if ready and all(versions[name] for use, name, *_ in _PACKAGES if use == "serve"):
        ready.append("serve")
    if all(versions[name] for name in ("torch", "onnx", "onnxscript", "safetensors")):
        ready.append("export")
        if providers:
            ready.append("validate")
    if versions["torch"] and versions["safetensors"]:
        ready.append("train")
    return {"schema_version": DOCTOR_SCHEMA, "checks": checks, "gpus": gpus, "providers": providers, "ready": ready, "tensorrt": road, **more}


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
        missing, error = environment.probe(_WHY_NO_CUDA)
        if missing or error:
            add("run on ONNX Runtime", "CUDA provider", None, False, f"it does not load ({missing or error}): install the CUDA and cuDNN it was built for")
    return providers


def ort_library(gpus: list[dict[str, Any]]) -> dict[str, Any]:
    """The check of the library with which ONNX Runtime's CUDA provider runs a bundle at an engine's speed: where it is and its architectures, or the command
    that makes it."""
    library, why = environment.probe(_ORT_LIBRARY)
    arch = int(gpus[0]["arch"].removeprefix("sm_")) if gpus else None
    found, mend = "not installed", ""
    if library is None:
        mend = str(why).rpartition("fix: ")[2] if "fix: " in str(why) else "sessa-deploy plugin build --for ort"
    else:
        found = f"{library['path']}, sm_{', '.join(map(str, library['archs']))}"
        if arch is not None and nearest(library["archs"], arch) is None:
            mend = arch_mend(arch, "ort")
    return {"use": "run on ONNX Runtime", "name": "kernels for its CUDA provider", "found": found, "state": "optional" if mend else "ok", "mend": mend}


def weights_here(bundle: Bundle, gpus: list[dict[str, Any]]) -> dict[str, Any]:
    """The check of matrices in 8 bits: what they take, and whether engines on this machine's GPU read them as they are."""
    sizes, mend = weight_sizes(bundle.config, bundle.precision, bundle.weights), ""
    read = "engines with our kernels read them in 8 bits, plain ONNX Runtime makes them wide as it opens"
    try:
        bundle.require_engine_weights("an engine", [int(gpu["arch"].removeprefix("sm_")) for gpu in gpus[:1]])
    except UserError as wrong:
        read, mend = f"plain ONNX Runtime alone runs them, wide; {wrong.what}: {wrong.got}; allowed: {wrong.allowed}", str(wrong.fix)
    share = f", {sizes.eight / sizes.instead_of:.2f} x of {bundle.precision}" if sizes.instead_of else ""
    found = f"{bundle.weights}; {sizes.eight / 1e6:.1f} MB with scales{share}; {read}"
    return {"use": "run the bundle", "name": "the bundle's weights", "found": found, "state": "optional" if mend else "ok", "mend": mend}


def prepared_here(bundle: Bundle) -> dict[str, Any]:
    """The check of the graph that `build --for ort` puts into a bundle: where it is and who computes its layers, or the command that makes it."""
    here = describe_prepared(bundle).get("prepared")
    found, mend = "none: build --for ort makes it", command("build", bundle.path, "--for", ORT_ENGINE)
    try:
        bundle.require_engine_weights("it")
    except UserError as wrong:
        found, mend = f"none: {wrong.what}", str(wrong.fix)
    if here is not None and here["why"]:
        found, mend = f"not used: {here['why']}", here["mend"]
    elif here is not None:
        eight = f", weights in 8 bits {here['eight_bytes'] / 1e6:.1f} MB" if here["eight_bytes"] else ""
        found, mend = f"{here['folder']}, layers by {'the library' if here['layers'] == 'plugin' else 'ONNX Runtime'}{eight}", ""
    return {"use": "run on ONNX Runtime", "name": "the bundle's graph for our kernels", "found": found, "state": "optional" if mend else "ok", "mend": mend}


def engine_here(bundle: Bundle, gpus: list[dict[str, Any]]) -> dict[str, Any]:
    """Which TensorRT engine of a bundle would load on this machine: engine (its folder; None: none), why not, and mend, the command that comes next."""
    installed = {p.name: v for p in api.PRODUCTS if (v := api.installed_version(p)) is not None}
    arch = int(gpus[0]["arch"].removeprefix("sm_")) if gpus else None
    try:
        bundle.require_engine_weights("a TensorRT engine", [] if arch is None else [arch])
        name = plan.product_for(bundle, arch, installed)
        product = api.product(name) if name in api.NAMES else api.PRODUCTS[0]
        if name is not None and name not in installed:
            raise UserError(f"{product.title} is not installed", fix=product.install)
        if name is not None and arch is None:
            takes = sorted({a for info in plan.engines(bundle).values() for a in info.archs})
            raise UserError("there is no CUDA GPU here", fix=f"run it where there is one of sm_{', '.join(map(str, takes))}" if takes else None)
        if arch is not None:
            api.check_target(product, arch)
        folder, _ = plan.choose(bundle, installed.get(product.name, ""), f"sm_{arch or 0}", product.name)
    except UserError as wrong:
        got = f": {wrong.got}" if wrong.got is not None else ""
        return {"engine": None, "why": f"{wrong.what}{got}", "mend": wrong.fix or ""}
    return {"engine": folder, "why": "", "mend": ""}


def tensorrt_road(gpus: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each TensorRT what stands between this machine and an engine: name, title, found (version; None: not installed), library (the plugin library's path,
    the headers' major it was compiled against and its architectures; None: none that fits), refused (why this GPU is not taken, or ""), ready (what can be
    done, or ""), and mend, the one command that comes next (or "").
    """
    road = []
    for product in api.PRODUCTS:
        module = api.importable(product)
        version, error = environment.probe(_IMPORTS.format(name=product.name)) if module else (None, None)
        major = api.header_major(product, version)
        library, why = environment.probe(_LIBRARY.format(major=major)) if version else (None, None)
        arch = int(gpus[0]["arch"].removeprefix("sm_")) if gpus else None
        refused, mend, ready = "", "", ""
        if arch is not None and version:
            try:
                api.check_target(product, arch)
            except UserError as wrong:
                refused, mend = f"{wrong.got}; it takes {wrong.allowed}", str(wrong.fix)
        if module and version is None:
            mend = f"it cannot be imported ({error}): {product.install} --upgrade"
        elif version is None:
            mend = product.install
        elif library is None:
            mend = str(why).rpartition("fix: ")[2] if "fix: " in str(why) else f"sessa-deploy plugin build --for {product.name}"
        elif arch is not None and not refused and nearest(library["archs"], arch) is None:
            mend = arch_mend(arch)
        elif product.ahead and (arch is None or refused):
            ready = f"build --for {product.name} ahead of time"
        elif arch is not None and not refused:
            ready = "build and run with trt" if product is api.PRODUCTS[0] else f"build --for {product.name} and run with trt"
        text = None
        if library is not None:
            text = f"{library['path']}, headers of TensorRT {library['major']}, sm_{', '.join(map(str, library['archs']))}"
        road.append({"name": product.name, "title": product.title, "found": version, "library": text, "refused": refused, "ready": ready, "mend": mend})
    return road


_WHY_NO_CUDA = "import json\nfrom sessa_deploy.runtime.ort import session as ort\nr = ort.load()\nort.preload(r)\nprint(json.dumps(ort.why_no_cuda(r)))"
_IMPORTS = "import json\nfrom sessa_deploy.runtime.trt import api\nprint(json.dumps(api.load({name!r}).__version__))"
_LIBRARY = """
import json
from sessa_deploy.plugins import library
seen = library.check(None, {major})
library.require_major(seen, {major})
print(json.dumps({{"path": str(seen.path), "major": seen.major, "archs": seen.archs}}))
"""
_ORT_LIBRARY = """
import json
from sessa_deploy.plugins import library
seen = library.check(product="ort")
print(json.dumps({"path": str(seen.path), "archs": seen.archs}))
"""
