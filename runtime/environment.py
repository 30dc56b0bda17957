"""What this machine and this Python have: processor, GPUs, packages, ONNX Runtime's providers. Standard library only; nothing optional is imported here."""

from __future__ import annotations

import importlib.util
import json
import operator
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from sessa_deploy import __version__
from sessa_deploy.checks import integer
from sessa_deploy.cuda import devices, driver_version
from sessa_deploy.process import python

_PROBE_SECONDS = 60.0
# distribution names under which one library is installed
ALIASES = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "tensorrt": ("tensorrt", "tensorrt-cu12", "tensorrt-cu13", "tensorrt-lean", "tensorrt-lean-cu12", "tensorrt-lean-cu13"),
    "tensorrt_rtx": ("tensorrt-rtx-cu13-bindings", "tensorrt-rtx", "tensorrt-rtx-cu12-bindings"),
    "triton": ("triton", "pytorch-triton"),
}


def importable(module: str) -> bool:
    """Whether Python would find a module, without importing it (its parent packages are)."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def package_version(name: str) -> str | None:
    """Installed version of a library, under whichever distribution name it came, or None. Where several are installed, of the one that Python imports."""
    found = []
    for alias in ALIASES.get(name, (name,)):
        try:
            found.append((alias, metadata.distribution(alias)))
        except metadata.PackageNotFoundError:
            continue
    if not found:  # a copy that pip did not install still says what it is
        version = getattr(sys.modules.get(name), "__version__", None)
        return None if version is None else f"{version} (not installed by pip)"
    alias, chosen = next((pair for pair in found if len(found) > 1 and _is_imported_from(name, pair[1])), found[0])
    return chosen.version if alias == name else f"{chosen.version} ({alias})"


def declared_range(name: str) -> str:
    """The versions of a library that this package asks for, as in ">=3.6,<3.8"; "" where it asks for none, or was not installed."""
    try:
        lines = metadata.requires("sessa-deploy") or []
    except metadata.PackageNotFoundError:
        return ""
    for line in lines:
        found = re.match(r"([\w.-]+)\s*\(?([<>=!~][^;)]*)", line)
        if found and found[1] in ALIASES.get(name, (name,)):
            return ",".join(sorted((part.strip() for part in found[2].split(",")), reverse=True))
    return ""


def in_range(version: str, wanted: str) -> bool:
    """Whether a version lies in a range of >=, >, <=, <, == parts. Only its numbers count: 2.13.0+cpu is 2.13.0."""
    numbers = _numbers(version)
    for part in filter(None, wanted.split(",")):
        sign, bound = re.match(r"([<>=]+)(.*)", part).groups()  # type: ignore[union-attr]
        if not {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt, "==": operator.eq}[sign](numbers, _numbers(bound)):
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    parts = [int(x) for x in re.findall(r"\d+", re.split(r"[+ (a-z]", version.strip(), maxsplit=1)[0])]
    return tuple(parts + [0] * (4 - len(parts)))


def _is_imported_from(module: str, distribution: metadata.Distribution) -> bool:
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None and Path(str(distribution.locate_file(module))) == Path(spec.origin).parent


def cores() -> int:
    """The cores this process may use: those of its affinity."""
    return len(os.sched_getaffinity(0))


def default_threads() -> int:
    """How many threads suit this process: its cores, or fewer where its control group grants less processor time than they have."""
    return min(cores(), _granted() or cores())


def _granted(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """Cores' worth of time, rounded up, that control groups (version 2, else 1) grant this process; None where nothing limits it."""
    quotas = []
    try:
        inside = next((line.partition("::")[2].strip("/") for line in own.read_text(encoding="utf-8").splitlines() if line.startswith("0::")), "")
    except OSError:
        inside = ""
    folder = root / inside
    pairs = [(at / "cpu.max", None) for at in (folder, *folder.parents) if at.is_relative_to(root)]
    for quota, period in [*pairs, (root / "cpu/cpu.cfs_quota_us", root / "cpu/cpu.cfs_period_us")]:
        try:
            text = quota.read_text(encoding="utf-8") + " " + (period.read_text(encoding="utf-8") if period else "")
            time, of = text.split()
            if time != "max" and int(time) > 0:  # version 1 says -1 for no limit
                quotas.append(max(1, -(-int(time) // int(of))))
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return min(quotas, default=None)


def check_threads(threads: object) -> int | None:
    """threads as an int, or None for what suits this process. Raises UserError where it is no integer in 1..`cores()`."""
    if threads is None:
        return None
    most = cores()
    return integer("threads", threads, 1, most, f"an integer in 1..{most}, the cores this process may use")


def processor() -> dict[str, Any]:
    """Model name, the cores this process may use, and memory in bytes."""
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    except OSError:
        model = model or "unknown"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"model": model, "cores": cores(), "memory": memory}


def gpus() -> list[dict[str, Any]]:
    """The GPUs the driver shows, with NVIDIA's driver version and clocks (MHz) where nvidia-smi tells them."""
    told = _nvidia_smi()
    return [{"index": d.index, "name": d.name, "arch": d.arch, "memory": d.memory, **told.get(d.index, {})} for d in devices()]


def providers() -> tuple[list[str], str | None]:
    """(providers of the installed ONNX Runtime, None), or ([], why it cannot be imported). Asked in a process of its own: a broken library may crash."""
    found, error = probe("import json, onnxruntime; print(json.dumps(onnxruntime.get_available_providers()))")
    return (list(found), None) if error is None else ([], error)


def probe(code: str) -> tuple[Any, str | None]:
    """(the JSON that `code` prints last, None), or (None, the last line of its error), from a fresh interpreter."""
    try:
        done = subprocess.run(python(code), capture_output=True, text=True, timeout=_PROBE_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, str(error)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        return None, lines[-1] if lines else f"it ended with {done.returncode}"
    try:
        return json.loads(done.stdout.strip().splitlines()[-1]), None
    except (ValueError, IndexError):
        return None, "it printed no answer"


def describe() -> dict[str, Any]:
    """What a measurement should carry with it: versions, processor, GPUs."""
    names = ("numpy", "onnxruntime", "tensorrt")
    return {"python": platform.python_version(), "platform": platform.platform(), "cpu": processor(), "gpus": gpus(),
            "cuda_driver": driver_version(), "packages": {"sessa-deploy": __version__, **{n: _version(n) for n in names}}}


def _version(name: str) -> str | None:
    # what is imported need not be what was installed: a library may come from a folder on the path
    loaded = getattr(sys.modules.get(name), "__version__", None)
    return package_version(name) or (None if loaded is None else str(loaded))


def _nvidia_smi() -> dict[int, dict[str, str]]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    fields = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem")
    try:
        done = subprocess.run([tool, f"--query-gpu=index,{','.join(fields)}", "--format=csv,noheader,nounits"], capture_output=True, text=True,
                              timeout=_PROBE_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    told = {}
    for line in done.stdout.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == len(fields) + 1 and parts[0].isdigit():
            told[int(parts[0])] = dict(zip(fields, parts[1:], strict=True))
    return told
