"""Models with random weights down the whole road on one machine: export, build, validate, bench; every step a process with its own time limit.

    python benchmarks/trt_models.py --work DIR --out DIR --trt-python python3.10             125M and 350M, fp16 and fp32, on a GPU with TensorRT
    python benchmarks/trt_models.py --work DIR --out DIR --backend ort-cuda                   with ONNX Runtime and libsessa_ort.so on a GPU
    python benchmarks/trt_models.py --work DIR --out DIR --backend ort --layers 1            a rehearsal where there is neither

Needs torch and the exporter; --trt-python names the interpreter that has TensorRT. Models go side by side, --jobs at a time. What each step said is in
--out, MODEL.STEP.log, its outcome in MODEL.json, written after every step; the last lines are a table. Exit code 1 if a step failed or ran out of time.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import run_logged
from random_bundle import SIZES, VOCABULARY

HERE = Path(__file__).parent


def commands(args: argparse.Namespace, size: str, precision: str) -> dict[str, list[str]]:
    """Step -> command line, in order."""
    name, engine = f"{size}-{precision}", str(args.trt_python or sys.executable)
    bundle, checkpoint = str(args.work / name), str(args.work / f"{name}.checkpoint")
    shape = ["--vocabulary", str(args.vocabulary), "--max-context", str(args.max_context), *(["--layers", str(args.layers)] if args.layers else [])]
    sessa = ["-m", "sessa_deploy"]
    limits = ["--max-batch", str(args.max_batch), "--max-context", str(args.max_context), "--max-prompt", str(args.max_context)]
    report = ["--json", str(args.out / f"{name}.parity.json")]
    kind = ["--size", size, "--precision", precision, *shape]
    found = {
        "export": [sys.executable, str(HERE / "random_bundle.py"), *kind, "--out", bundle, "--keep-checkpoint", checkpoint],
        "build": [engine, *sessa, "build", bundle, *limits],
        "validate": [sys.executable, *sessa, "validate", bundle, "--checkpoint", checkpoint, "--backend", args.backend, "--python", engine, *report],
        "bench": [engine, *sessa, "bench", bundle, "--backend", args.backend, "--capacity", str(args.max_context), "--steps", str(args.steps),
                  "--seconds", str(args.seconds), "--json", str(args.out / f"{name}.bench.json")],
    }  # fmt: skip
    if args.backend == "ort-cuda":
        found["build"] = [sys.executable, *sessa, "build", bundle, "--for", "ort"]
    elif args.backend != "trt":
        del found["build"]
    return found


def run(args: argparse.Namespace, size: str, precision: str) -> dict[str, Any]:
    """One model, step after step; a failed one ends it."""
    name = f"{size}-{precision}"
    result: dict[str, Any] = {"model": name, "backend": args.backend, "steps": {}}
    for step, command in commands(args, size, precision).items():
        log, begun = args.out / f"{name}.{step}.log", time.monotonic()
        code = run_logged(command, log, args.limit)
        said = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        result["steps"][step] = {"code": code, "seconds": time.monotonic() - begun, "said": said[-1][:300] if said else ""}
        (args.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        print(f"{name} {step} {code} {result['steps'][step]['seconds']:.0f}s {result['steps'][step]['said'][:160]}", flush=True)
        if code:
            break
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="bundles and checkpoints go here; what is there is made anew")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "fp16", "bf16"), default=["fp16", "fp32"])
    parser.add_argument("--backend", choices=("trt", "ort-cuda", "ort"), default="trt")
    parser.add_argument("--trt-python", help="interpreter, or a script that starts it, that has the engine library")
    parser.add_argument("--layers", type=int, help="another depth at the size's width")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--max-batch", type=int, default=4)
    parser.add_argument("--max-context", type=int, default=512)
    parser.add_argument("--steps", type=int, default=1000, help="of the bench")
    parser.add_argument("--seconds", type=float, default=3.0, help="of the bench")
    parser.add_argument("--limit", type=float, default=400.0, help="seconds a step may take")
    parser.add_argument("--jobs", type=int, default=2, help="models at a time")
    args = parser.parse_args()
    for folder in (args.work, args.out):
        folder.mkdir(parents=True, exist_ok=True)
    models = [(size, precision) for size in args.sizes for precision in args.precisions]
    with ThreadPoolExecutor(max(1, args.jobs)) as pool:
        results = list(pool.map(lambda model: run(args, *model), models))
    shown = list(commands(args, *models[0]))
    print(f"\n{'model':<12}" + "".join(f"{s:>16}" for s in shown))
    for result in results:
        steps = result["steps"]
        cells = [("-" if s not in steps else f"{'ok' if steps[s]['code'] == 0 else 'FAILED'} {steps[s]['seconds']:.0f} s") for s in shown]
        print(f"{result['model']:<12}" + "".join(f"{c:>16}" for c in cells))
    return 0 if all(len(r["steps"]) == len(shown) and all(s["code"] == 0 for s in r["steps"].values()) for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
