"""An engine on a GPU, in one run on the demo: how soon it starts, numbers and text against ONNX Runtime's on a CPU, decode steps timed, a soak, memcheck.

    python benchmarks/engine_check.py prepare --checkpoint checkpoints/demo --work DIR     where there is torch: bundles, prepared graphs, reference numbers
    python benchmarks/engine_check.py run --engine trt --work DIR --out DIR [--plugin LIB] [--only STEP ...]      where there is TensorRT and a GPU; no torch
    python benchmarks/engine_check.py run --engine ort --work DIR --out DIR [--plugin LIB] [--only STEP ...]      where there is onnxruntime-gpu and a GPU

Every step is a process with its own time limit and writes STEP.json into --out; a step that fails or hangs does not keep the next from running.
The last lines are a table.
"""

from __future__ import annotations

import time

BEGAN = time.perf_counter()

import argparse  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402
import traceback  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
from common import run_logged  # noqa: E402
from engine_steps import BATCH, CAPACITY, ENGINES, FORMS, REFERENCES, SOAK_STEPS, TOKENS, WORK, drive, greedy  # noqa: E402

PROMPTS = ("def ", "import os\n\nclass ", "    return self.")


def prepare(args: argparse.Namespace) -> None:
    """Export the bundles, write what ONNX Runtime computes on a CPU, and prepare their graphs for ONNX Runtime on a GPU."""
    from sessa_deploy.export.to_onnx import export_bundle
    from sessa_deploy.export.to_ort import build_ort
    from sessa_deploy.runtime.bundle import Bundle
    from sessa_deploy.runtime.ort.backend import OrtBackend
    from sessa_deploy.runtime.tokenizer import Tokenizer

    args.work.mkdir(parents=True, exist_ok=True)
    for form, (precision, weights, _) in FORMS.items():
        bundle = Bundle.open(export_bundle(args.checkpoint, args.work / form, precision, weights=weights))
        backend = OrtBackend(bundle, batch=BATCH, capacity=CAPACITY, threads=2)
        tokenizer = Tokenizer(bundle.file("tokenizer.json"))
        prompts = [[0 if bundle.config.bos_token_id is None else bundle.config.bos_token_id, *tokenizer.encode(p)] for p in PROMPTS]
        np.savez(args.work / f"{form}.npz", **drive(backend))
        (args.work / f"{form}.json").write_text(json.dumps({"prompts": prompts, "tokens": greedy(backend, prompts)}))
        if form not in REFERENCES:
            build_ort(bundle)


def run(args: argparse.Namespace) -> int:
    """All steps, each a process of its own."""
    args.out.mkdir(parents=True, exist_ok=True)
    rows, limits = [], ENGINES[args.engine].limits
    for name in args.only or list(limits):
        command = [sys.executable, __file__, "step", "--engine", args.engine, "--name", name, "--work", str(args.work), "--out", str(args.out)]
        command += ["--plugin", str(args.plugin)] if args.plugin else []
        command += [] if args.opt_level is None else ["--opt-level", str(args.opt_level)]
        command += [] if args.layers is None else ["--layers", args.layers]
        command += ["--soak", str(args.soak)]
        begun, log, file = time.monotonic(), args.out / f"{name}.log", args.out / f"{name}.json"
        file.unlink(missing_ok=True)
        code = run_logged(command, log, limits.get(name, 120))
        result = json.loads(file.read_text()) if file.is_file() else {"ok": False, "error": " / ".join(log.read_text(errors="replace").splitlines()[-4:])}
        rows.append((name, code, time.monotonic() - begun, result))
        print(f"{name} {code} {time.monotonic() - begun:.1f}s {json.dumps(result)[:1500]}", flush=True)
    print(f"\n{'step':<14}{'result':<8}{'seconds':>8}")
    for name, code, seconds, result in rows:
        print(f"{name:<14}{'ok' if code == 0 and result['ok'] else 'FAILED':<8}{seconds:>8.1f}")
    return 0 if all(code == 0 and result["ok"] for _, code, _, result in rows) else 1


def step(args: argparse.Namespace) -> int:
    """One step in this process; its JSON is written whatever happens short of a crash."""
    kind, _, precision = args.name.partition("-")
    try:
        result: dict[str, Any] = WORK[kind](args, precision)
    except Exception as error:
        traceback.print_exc()
        result = {"ok": False, "error": f"{type(error).__name__}: {error}"}
    (args.out / f"{args.name}.json").write_text(json.dumps(result, indent=1))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("prepare", "run", "step"))
    parser.add_argument("--engine", choices=list(ENGINES), default="trt")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/demo"))
    parser.add_argument("--out", type=Path, default=Path("out/engine_check"))
    parser.add_argument("--plugin", type=Path, help="path of the engine's library")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="these steps: KIND-FORM, as in the table; int8: weights of 8 bits, the rest fp16")
    parser.add_argument("--name", metavar="STEP")
    parser.add_argument("--opt-level", type=int, help="of TensorRT's builds; default: its own")
    parser.add_argument("--layers", choices=("plugin", "tensorrt"), help="of TensorRT's builds: who computes what stands around the attentions")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="to generate in the text steps")
    parser.add_argument("--soak", type=int, default=SOAK_STEPS, help="steps of the soak")
    parser.add_argument("--force", action="store_true", help="build even where the engine is there")
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()
    args.began = BEGAN
    for name in [*(args.only or ()), *([args.name] if args.name else ())]:
        if name.partition("-")[0] not in WORK:
            parser.error(f"no step {name}; there are {', '.join(WORK)}, with one of {', '.join(FORMS)} behind: numbers-fp16")
    if args.verb == "prepare":
        prepare(args)
        return 0
    return run(args) if args.verb == "run" else step(args)


if __name__ == "__main__":
    sys.exit(main())
