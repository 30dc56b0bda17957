"""Find, build and load the libraries of our operations: libsessa_plugin.so for TensorRT, libsessa_ort.so for ONNX Runtime on CUDA.

Runs where there is no torch, triton or onnx. A `product` is what a library is for: "tensorrt" (TensorRT for RTX with it, whose headers count as 11) or "ort".
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sessa_deploy.contract import ENGINE_OPS as OPS
from sessa_deploy.contract import ORT_API, PLUGIN_NAMESPACE, PLUGIN_STATE, PLUGIN_VERSION
from sessa_deploy.cuda_arch import ARCHS
from sessa_deploy.errors import UserError, need
from sessa_deploy.files import scratch, whole
from sessa_deploy.process import run_group
from sessa_deploy.reading import load_library

LIBRARY = "libsessa_plugin.so"
ENVIRONMENT = "SESSA_PLUGIN_LIBRARY"  # a path that goes before every other place
ORT_LIBRARY = "libsessa_ort.so"
ORT_ENVIRONMENT = "SESSA_ORT_LIBRARY"  # the same for that one
MAJORS = (11, 10, 8)
BUILD = "sessa-deploy plugin build"
_ORT_BUILD = f"{BUILD} --for ort"
_HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Checked:
    """What `check` saw: the library's path, size in bytes, which interface it offers ("V3": IPluginV3 of TensorRT 10 and 11, "V2": 8.6, "ort": ONNX Runtime's
    C API), the major version of TensorRT's headers it was compiled with or the version of that C API, compute capabilities it has kernels for or serves,
    and its operations."""

    path: Path
    size: int
    interface: str
    major: int
    archs: tuple[int, ...] = ()
    ops: tuple[str, ...] = ()


def build_command(major: int | None, product: str = "tensorrt") -> str:
    """The command that builds the library for a TensorRT of this major, or for ONNX Runtime."""
    if product == "ort":
        return _ORT_BUILD
    return f"{BUILD} --tensorrt {major}" if major else BUILD


def user_folder() -> Path:
    """Where `build` puts libraries: one folder a TensorRT major, and one for ONNX Runtime, whose C API is the same for all."""
    import platformdirs

    return Path(platformdirs.user_data_dir("sessa-deploy", appauthor=False)) / "plugin"


def candidates(major: int | None = None, product: str = "tensorrt") -> list[Path]:
    """Every place a library may be, best first: the environment variable, then for each major what was built here, then the wheel's own."""
    given = os.environ.get(ORT_ENVIRONMENT if product == "ort" else ENVIRONMENT)
    if given:
        return [Path(given)]
    if product == "ort":
        return [folder / "ort" / ORT_LIBRARY for folder in (user_folder(), _HERE / "lib")]
    wanted = [major] if major is not None else list(MAJORS)
    return [folder / f"trt{m}" / LIBRARY for m in wanted for folder in (user_folder(), _HERE / "lib")]


def find(major: int | None = None, product: str = "tensorrt") -> Path:
    """Path of the library for headers of TensorRT `major` (None: of the newest built; TensorRT for RTX counts as 11), or for product "ort".

    Raises UserError, which names the command that mends it.
    """
    places = candidates(major, product)
    for path in places:
        if path.is_file():
            return path
    name, variable = (ORT_LIBRARY, ORT_ENVIRONMENT) if product == "ort" else (LIBRARY, ENVIRONMENT)
    what = "no library of kernels for ONNX Runtime" if product == "ort" else "no TensorRT plugin library" + (f" for TensorRT {major}" if major else "")
    raise UserError(what, got=", ".join(map(str, places)), allowed=f"a {name} in one of these, or its path in {variable}", fix=build_command(major, product))


def check(path: Path | None = None, major: int | None = None, product: str = "tensorrt") -> Checked:
    """Load the library without TensorRT, ONNX Runtime or a GPU and look at its exports. Raises UserError if it is not a loadable one of this version."""
    path, fix = path or find(major, product), build_command(major, product)
    kind, name = ("library for ONNX Runtime", ORT_LIBRARY) if product == "ort" else ("plugin library", LIBRARY)
    try:
        handle = load_library(path)
    except OSError as error:
        raise UserError(f"the {kind} cannot be loaded", got=str(error), allowed=f"a {name} built on this kind of machine", fix=fix) from None
    if product == "ort":
        if not hasattr(handle, "RegisterCustomOps") or not hasattr(handle, "sessaOrtApiVersion"):
            raise UserError("not a library for ONNX Runtime", got=str(path), allowed="exports RegisterCustomOps and sessaOrtApiVersion", fix=fix)
        interface, version = "ort", int(handle.sessaOrtApiVersion())
    else:
        interface = "V3" if hasattr(handle, "getCreators") else "V2" if hasattr(handle, "getPluginCreators") else ""
        if not interface or not hasattr(handle, "setLoggerFinder"):
            raise UserError("not a TensorRT plugin library", got=str(path), allowed="exports getCreators or getPluginCreators, and setLoggerFinder", fix=fix)
        if not hasattr(handle, "sessaTensorRTMajor"):
            raise UserError("the plugin library was built by an older sessa-deploy", got=f"{path}, which does not say whose headers it was compiled with",
                            allowed="a library of this version", fix=fix)
        version = int(handle.sessaTensorRTMajor())
    seen = Checked(path, path.stat().st_size, interface, version, _architectures(handle), _listed(handle))
    other = f"the {kind} was built by another sessa-deploy"
    if seen.ops != OPS:
        raise UserError(other, got=f"{path} with {', '.join(seen.ops) or 'operations that it does not name'}", allowed=", ".join(OPS), fix=fix)
    # the same names may stand for other numbers
    state = int(handle.sessaStateVersion()) if hasattr(handle, "sessaStateVersion") else None
    if state != PLUGIN_STATE:
        raise UserError(other, got=f"{path}, operations of {'no state' if state is None else f'state {state}'}", allowed=f"state {PLUGIN_STATE}", fix=fix)
    return seen


def _architectures(handle: ctypes.CDLL) -> tuple[int, ...]:
    """Compute capabilities that a library carries a decode kernel for or serves, of those there are."""
    if not hasattr(handle, "sessaFindCubin"):
        return ()
    out = ctypes.create_string_buffer(64)  # SessaCubin of plugins/src/door.cpp, which nobody reads here
    return tuple(arch for arch in ARCHS if handle.sessaFindCubin(b"decode_append", ctypes.c_int32(arch), b"fp32", b"any", out))


def _listed(handle: ctypes.CDLL) -> tuple[str, ...]:
    """The operations that a library says it has."""
    if not hasattr(handle, "sessaOpName"):
        return ()
    handle.sessaOpName.restype = ctypes.c_char_p
    found: list[str] = []
    while (name := handle.sessaOpName(len(found))) is not None:
        found.append(name.decode())
    return tuple(found)


def load(trt: Any, path: Path | None = None, major: int | None = None) -> Path:
    """Register the plugins with `trt`, an imported tensorrt (or tensorrt_lean, tensorrt_rtx) module; returns the library's path. Safe to call again.

    major: of the headers that fit that module (None: the module's own version's; TensorRT for RTX counts as 11).
    Raises UserError if the library is missing, is for another TensorRT, or does not bring the plugins.
    """
    major = major or int(trt.__version__.split(".")[0])
    path = path or find(major)
    if set(OPS) - set(ops(trt)):
        require_major(check(path, major), major)
        trt.get_plugin_registry().load_library(str(path))
    lacking = [name for name in OPS if name not in ops(trt)]
    if lacking:
        raise UserError("TensorRT loaded the library but not every plugin", got=f"{path} without {', '.join(lacking)}",
                        allowed=f"{', '.join(OPS)}, version {PLUGIN_VERSION}", fix=build_command(major))  # fmt: skip
    return path


def register(options: Any, path: Path | None = None) -> Path:
    """Register the operations with `options`, an onnxruntime.SessionOptions, for sessions on CUDA made with it; returns the library's path.

    Raises UserError if the library is missing or of another version, or ONNX Runtime, being too old say, does not take it.
    """
    path = path or find(product="ort")
    check(path, product="ort")
    try:
        options.register_custom_ops_library(str(path))
    except Exception as error:  # ONNX Runtime's own, which is not imported here
        raise UserError("ONNX Runtime does not take the library", got=f"{path}: {error}", allowed=f"ONNX Runtime 1.{ORT_API} or later",
                        fix=_ORT_BUILD) from None
    return path


def require_major(seen: Checked, major: int) -> None:
    """Raise UserError unless the library was compiled with headers of TensorRT `major`.

    Majors are different ABIs, though 10 and 11 share IPluginV3: ILogger and ILoggerFinder changed at 11, so that a library of another major calls the
    wrong entry of the logger's table, or past its end.
    """
    if seen.major != major:
        raise UserError("the plugin library is for another TensorRT", got=f"{seen.path}, compiled with headers of TensorRT {seen.major}",
                        allowed=f"one compiled with headers of TensorRT {major}", fix=build_command(major))


def ops(trt: Any) -> tuple[str, ...]:
    """Names of our plugins that `trt`'s registry holds now."""
    registry = trt.get_plugin_registry()
    if not hasattr(registry, "all_creators"):  # 8.6
        return tuple(name for name in OPS if registry.get_plugin_creator(name, PLUGIN_VERSION, PLUGIN_NAMESPACE) is not None)
    names = {(c.name, c.plugin_version, c.plugin_namespace) for c in registry.all_creators}
    return tuple(name for name in OPS if (name, PLUGIN_VERSION, PLUGIN_NAMESPACE) in names)


def include_major(folder: Path) -> int:
    """TensorRT's major version from its NvInferVersion.h. Raises UserError if there is none."""
    header = folder / "NvInferVersion.h"
    if not header.is_file():
        raise UserError("no TensorRT headers", got=str(folder), allowed="the include folder of TensorRT 8.6, 10 or 11 (it holds NvInferVersion.h)")
    for line in header.read_text(encoding="utf-8", errors="replace").splitlines():
        words = line.split()
        if len(words) > 2 and words[0] == "#define" and words[1] in ("NV_TENSORRT_MAJOR", "TRT_MAJOR_ENTERPRISE") and words[2].isdigit():
            return int(words[2])
    raise UserError("TensorRT's version cannot be read", got=str(header), allowed="a #define of NV_TENSORRT_MAJOR")


def build(
    tensorrt_include: Path | None = None, cuda_include: Path | None = None, cubins: Path | None = None, archs: str | None = None,
    out: Path | None = None, say: Callable[[str], None] = lambda line: None, major: int | None = None, product: str = "tensorrt",
    onnxruntime_include: Path | None = None,
) -> Path:  # fmt: skip
    """Build the library of a product with CMake and a C++17 compiler (no nvcc) and put it in place by rename; returns its path.

    tensorrt_include: folder of NvInfer.h (default: an installed TensorRT's headers of that major, else fetched by tag). major: of the TensorRT that is
    to load the library, 8, 10 or 11 (default: of the headers found, else 11); headers of another are refused. cuda_include: folder of
    cuda_runtime_api.h (default: the toolkit's, else our own two declarations). onnxruntime_include: for "ort", folder of onnxruntime_c_api.h, C API
    18 or later (default: an installed one, else fetched by tag). cubins: a folder that lowering wrote (default: lower now, which needs torch and triton).
    archs: compute capabilities to lower for, e.g. "90,86". out: folder for the library (default: where `find` looks).
    Raises UserError if CMake or the compiler is missing or fails, or the headers of another product are given.
    """
    cmake = shutil.which("cmake") or shutil.which("cmake", path=str(Path(sys.executable).parent))  # pip's, where the environment is not activated
    if cmake is None:
        raise UserError("the plugin needs CMake to build", got="no cmake on PATH", allowed="CMake 3.18 or later", fix="pip install cmake")
    if cubins is None:
        need("triton", "torch")
    options = {"TENSORRT_INCLUDE_DIR": tensorrt_include, "CUDA_INCLUDE_DIR": cuda_include, "ONNXRUNTIME_INCLUDE_DIR": onnxruntime_include,
               "SESSA_CUBIN_DIR": cubins}
    for name, path in options.items():
        if path is not None and not Path(path).is_dir():
            raise UserError(f"{name} is not a folder", got=str(path), allowed="an existing folder")
    given = None if tensorrt_include is None else include_major(Path(tensorrt_include))
    if given is not None and major is not None and given != major:
        raise UserError("headers of another TensorRT", got=f"{given} in {tensorrt_include}", allowed=f"those of TensorRT {major}",
                        fix=f"name their folder, or {build_command(given)}")
    if onnxruntime_include is not None:
        _check_api(Path(onnxruntime_include))
    name = ORT_LIBRARY if product == "ort" else LIBRARY
    with scratch("sessa-plugin-") as work:
        configure = [cmake, "-S", str(_HERE), "-B", str(work), f"-DSESSA_PYTHON={sys.executable}", f"-DSESSA_TARGETS={product}"]
        configure += [f"-D{option}={Path(path).resolve()}" for option, path in options.items() if path is not None]
        configure += [f"-DSESSA_ARCHS={archs}"] if archs else []
        configure += [f"-DSESSA_TENSORRT_MAJOR={major}"] if major else []
        log = _run(configure, "configuring the plugin", say)
        _run([cmake, "--build", str(work), "--parallel", str(os.cpu_count() or 1)], "compiling the plugin", say)
        if product == "ort":
            folder = "ort"
        else:
            found = [line for line in log.splitlines() if "-- TensorRT " in line]
            folder = f"trt{int(found[-1].split('-- TensorRT ')[1].split()[0])}"
        target = (Path(out) if out is not None else user_folder() / folder) / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(work / name, "rb") as built, whole(target, "--out", "the library") as stream:
            shutil.copyfileobj(built, stream)
    check(target, product=product)
    return target


def _check_api(folder: Path) -> None:
    """Raise UserError unless the folder holds ONNX Runtime's C header, of a version that has what the library uses (plugins/src/ort.h)."""
    allowed = f"the folder of onnxruntime_c_api.h, of ONNX Runtime 1.{ORT_API} or later"
    header = folder / "onnxruntime_c_api.h"
    if not header.is_file():
        raise UserError("no header of ONNX Runtime", got=str(folder), allowed=allowed)
    found = re.search(r"#define ORT_API_VERSION +(\d+)", header.read_text(encoding="utf-8", errors="replace"))
    if found is None or int(found[1]) < ORT_API:
        raise UserError("the header of another ONNX Runtime", got=f"C API {found[1] if found else 'unknown'} in {header}", allowed=allowed)


def _run(command: list[str], what: str, say: Callable[[str], None]) -> str:
    say(what)
    done = run_group(command)
    if done.returncode != 0:
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        fetched = re.search(r"No headers of TensorRT (\d+) here: fetching (\S+)", done.stdout)
        ort = re.search(r"No header of ONNX Runtime here: fetching (\S+)", done.stdout)
        if ort and "-- ONNX Runtime, " not in done.stdout and re.search("could not be fetched|Could NOT find Git", done.stderr):
            raise UserError(f"the header of ONNX Runtime ({ort[1]}) could not be fetched", got=" / ".join(lines[:4])[-400:],
                            allowed="a network that reaches github.com, or the folder of onnxruntime_c_api.h", fix=f"{_ORT_BUILD} --onnxruntime-include DIR")
        if fetched and "-- TensorRT " not in done.stdout and re.search(r"clone|checkout|download|tensorrt-subbuild", done.stderr + done.stdout):
            raise UserError(f"the headers of TensorRT {fetched[1]} ({fetched[2]}) could not be fetched", got=" / ".join(lines[-4:])[-400:],
                            allowed="a network that reaches github.com, or the folder of NvInfer.h",
                            fix=f"{build_command(int(fetched[1]))} --tensorrt-include DIR")
        raise UserError(f"{what} failed", got=" / ".join(lines[-12:])[-900:], allowed="exit code 0", fix=f"run it by hand: {' '.join(command)}")
    return done.stdout
