"""Whether this package installs where nothing of it is yet: `resolve`, `packages` and `lowest`, any of them in one call, side by side.

resolve: every extra, and the constraints, from the package index alone for Python 3.10 to 3.13. packages: the sdist and the wheel hold what they should, and
the wheel with [ort] generates text. lowest: the lowest version of every dependency (torch as constrained) runs tests of export and runtime.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = ("cuda", "dynamo", "tensorrt", "dev")  # [dev] holds what all others ask for: where it resolves, so does each of them
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
ELSEWHERE = "special placeholder package"  # what NVIDIA's stubs of TensorRT say where their own index is out of reach
TESTS = ("tests/export/test_to_onnx.py", "tests/export/graph/test_onnx_functions.py", "tests/runtime/ort/test_ort.py", "tests/runtime/test_session.py",
         "tests/runtime/test_tokenizer.py", "tests/test_checkpoint.py", "tests/runtime/serve/test_completions.py", "tests/runtime/serve/test_refusals.py")
# Left out: what takes the same calls of the libraries as a test that stays. Of the golden layers, one with rotary positions and one without stay.
LEFT_OUT = ["tests/export/test_to_onnx.py::test_bytes_are_the_same_from_two_folders_and_two_processes",
            *(f"tests/export/test_to_onnx.py::test_golden_numbers_through_onnx_runtime[layer_0{i}]" for i in (1, 3, 4, 5))]
_building = threading.Lock()


def run(command: Sequence[str | Path], clean: bool = False, **more: object) -> subprocess.CompletedProcess[str]:
    """A command, its output kept. clean: without any local setting of pip or Python."""
    environment = {name: value for name, value in os.environ.items() if not clean or name == "PIP_CERT" or not name.startswith(("PIP_", "PYTHON"))}
    environment |= {"PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"} if clean else {}
    return subprocess.run([str(x) for x in command], capture_output=True, text=True, check=False, env=environment, **more)  # type: ignore[call-overload,no-any-return]


def must(command: Sequence[str | Path], clean: bool = False, **more: object) -> str:
    done = run(command, clean, **more)
    if done.returncode:
        sys.exit(f"failed: {' '.join(map(str, command))}\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    return done.stdout


def interpreter(version: str) -> Path | None:
    """A Python of this version, on PATH or of pyenv."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = [*sorted(root.glob(f"{version}.*/bin/python")), *filter(None, [shutil.which(f"python{version}")])]
    for path in map(Path, found):
        if run([path, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]).stdout.strip() == version:
            return path
    return None


def environment(work: Path, python: Path, name: str, newest_pip: bool = False) -> Path:
    """A new virtual environment's interpreter."""
    must([python, "-m", "venv", work / name])
    mine = work / name / "bin/python"
    if newest_pip:
        must([mine, "-m", "pip", "install", "-q", "-U", "pip"], clean=True)
    return mine


def resolve(work: Path) -> None:
    """Every extra by `pip install --dry-run` from the index alone."""
    pythons = {version: interpreter(version) for version in PYTHONS}
    pip = environment(work, Path(sys.executable), "pip", newest_pip=True)  # an older one fetches every wheel whole, gigabytes for each resolve with torch
    wheel = build(work)[1]
    jobs = [(version, extra, constrained) for version in PYTHONS for extra in EXTRAS for constrained in (False, True) if pythons[version]
            and (not constrained or extra == "dev")]

    def one(job: tuple[str, str, bool]) -> tuple[bool, str]:
        version, extra, constrained = job
        begun = time.monotonic()
        bound = ["-c", ROOT / "constraints.txt"] if constrained else []
        # fast-deps: metadata is read out of gigabytes of wheels without fetching them, where the index can do that
        command = [pip, "-m", "pip", "--python", str(pythons[version]), "install", "--dry-run", "--ignore-installed", "--quiet",
                   "--timeout", "60", "--use-feature=fast-deps", *bound, f"{wheel}[{extra}]"]
        done = run(command, clean=True)
        if done.returncode and not any(word in done.stdout + done.stderr for word in ("ResolutionImpossible", ELSEWHERE)):
            done = run(command, clean=True)  # the network, most likely: a conflict has that name
        what = f"Python {version} [{extra}]{' with constraints.txt' if constrained else ''}"
        took = f"{time.monotonic() - begun:.0f} s"
        if done.returncode and extra in ("tensorrt", "dynamo") and ELSEWHERE in done.stdout + done.stderr:
            return True, f"not proven: {what}: wheels that it needs are on NVIDIA's own index, which this machine does not reach ({took})"
        return done.returncode == 0, f"resolved: {what} ({took})" if done.returncode == 0 else f"FAILED: {what}\n{(done.stdout + done.stderr)[-3000:]}"

    for version in (v for v in PYTHONS if pythons[v] is None):
        print(f"skipped: Python {version}: no such interpreter here")
    failed = 0
    with ThreadPoolExecutor(4) as pool:  # each waits for the network nine tenths of its time
        for good, line in pool.map(one, jobs):
            print(line, flush=True)
            failed += not good
    if failed:
        sys.exit(f"{failed} of {len(jobs)} were not resolved")


def build(work: Path) -> tuple[Path, Path]:
    """(the sdist, the wheel made from it), made once."""
    with _building:
        if not (work / "dist").is_dir():
            python = environment(work, Path(sys.executable), "build")
            must([python, "-m", "pip", "install", "-q", "build"])
            must([python, "-m", "build", "--outdir", work / "dist", ROOT])
    return next((work / "dist").glob("*.tar.gz")), next((work / "dist").glob("*.whl"))


def packages(work: Path) -> None:
    """The sdist holds the clone, the wheel every module, and text comes out of the wheel with [ort]."""
    sdist, wheel = build(work)
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    tracked = set(must(["git", "-C", ROOT, "ls-files"]).split("\n")) - {"", ".gitignore"}
    if tracked - held:
        sys.exit(f"the sdist lacks {sorted(tracked - held)}")
    rooms = {"export": "sessa_deploy/export", "runtime": "sessa_deploy/runtime", "plugins": "sessa_deploy/plugins", "sessa_deploy": "sessa_deploy"}
    sources = [path.partition("/") for path in tracked if path.endswith((".py", ".json", ".cpp", ".h", ".txt", ".html"))]
    wanted = {f"{rooms[room]}/{rest}" for room, _, rest in sources if room in rooms}
    lacking = wanted - set(zipfile.ZipFile(wheel).namelist())
    if lacking:
        sys.exit(f"the wheel lacks {sorted(lacking)}")
    print(f"built: {sdist.name} with all {len(tracked)} files, {wheel.name} with all {len(wanted)}", flush=True)
    bundle = work / "bundle"
    must([ROOT / ".venv/bin/python", "-m", "sessa_deploy", "export", ROOT / "checkpoints/demo", "--out", bundle])
    for version in ("3.10", "3.13"):
        python = interpreter(version)
        if python is None:
            print(f"skipped: the wheel on Python {version}: no such interpreter here")
            continue
        mine = environment(work, python, f"ort-{version}")
        must([mine, "-m", "pip", "install", "-q", f"{wheel}[ort]"])
        tool, texts = mine.parent / "sessa-deploy", []
        for folder in (work, ROOT):  # a neutral place, and beside the sources, which must not be taken for the package
            texts.append(must([tool, "run", bundle, "--prompt", "def main():", "--max-new-tokens", "24"], cwd=folder))
            no_torch = run([tool, "validate", bundle, "--checkpoint", ROOT / "checkpoints/demo"], cwd=folder)
            if no_torch.returncode != 2 or "sessa-deploy[export]" not in no_torch.stderr:
                sys.exit(f"validate without [export] ended with {no_torch.returncode}: {no_torch.stderr}")
        if len(texts[0].strip()) < 12 or texts[0] != texts[1]:  # 24 bytes of source, blanks around them
            sys.exit(f"the wheel on Python {version} wrote {texts}")
        print(f"generated: the wheel with [ort] on Python {version}", flush=True)


def minima() -> list[str]:
    """The lowest version of every dependency but torch and triton, which constraints.txt names."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    pairs = dict(re.findall(r'"([a-zA-Z][\w-]*)>=([\d.]+)', text.partition("[project]")[2]))
    return [f"{name}=={version}" for name, version in pairs.items()
            if name not in ("torch", "triton", "onnxruntime-gpu", "ruff", "mypy", "cmake", "kernel-lens", "guidellm", "schemathesis", "ai-dynamo",
                            "transformers")
            and not name.startswith("tensorrt")]


def lowest(work: Path) -> None:
    """Tests of export and runtime where every dependency is as old as pyproject.toml allows."""
    python = environment(work, interpreter("3.11") or Path(sys.executable), "lowest", newest_pip=True)  # that of 3.11 searches old versions for very long
    must([python, "-m", "pip", "install", "-q", "--only-binary", ":all:", "-c", ROOT / "constraints.txt", "torch", *minima()])
    must([python, "-m", "pip", "install", "-q", "--no-deps", "-e", ROOT])
    skipped = [word for test in LEFT_OUT for word in ("--deselect", test)]
    subprocess.run([str(python), "-m", "pytest", "-n", "2", "--dist", "loadfile", *TESTS, *skipped], cwd=ROOT, check=True)


def main(names: Sequence[str]) -> None:
    steps = {"resolve": resolve, "packages": packages, "lowest": lowest}
    if not names or set(names) - set(steps):
        sys.exit(f"usage: install_check.py {' | '.join(steps)} ...")

    def one(name: str) -> None:
        begun = time.monotonic()
        steps[name](Path(work))
        print(f"{name}: done in {time.monotonic() - begun:.0f} s", flush=True)

    with tempfile.TemporaryDirectory(prefix="sessa-install-") as work, ThreadPoolExecutor(len(names)) as pool:
        for running in [pool.submit(one, name) for name in names]:
            running.result()


if __name__ == "__main__":
    main(sys.argv[1:])
