"""Prove a bundle's numbers against its checkpoint: run the rungs, judge every output, name the first that diverges.

    report = validate("bundle", "checkpoint")
    report.passed, report.line()

Rungs run as processes (see rungs.py), the oracle first and the others side by side; their tensors meet here only as files.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sessa_deploy import __version__
from sessa_deploy.config import SessaConfig
from sessa_deploy.contract import CACHE_FIELDS, LOGITS, MODEL_FILE, PARITY_FILE
from sessa_deploy.errors import UserError, need
from sessa_deploy.export.parity.cases import CASES_FILE, LENGTHS, Case, Cases, build_cases, load_cases, save_cases
from sessa_deploy.export.parity.drive import Tensors, layer_name
from sessa_deploy.export.parity.engines import has_all_logits, resolve_backends
from sessa_deploy.export.parity.metrics import TokenCheck, Yardstick, check_tokens, compare, position_errors
from sessa_deploy.export.parity.process import Launch, ProcessLaunch, Progress, RungError, launch_all, silent
from sessa_deploy.export.parity.rungs import ENGINE_RUNGS, HEADER_FILE, ORACLE, PLAIN, TORCH, WORTH, RungJob, read_header, read_tensors
from sessa_deploy.export.parity.verdict import Failure, Report, first_divergence
from sessa_deploy.files import scratch
from sessa_deploy.runtime.bundle import Bundle, add_files

WIDE = 512  # from this width on, matrix products gain from more than one thread


def validate(
    bundle: str | Path, checkpoint: str | Path, backends: Sequence[str] = ("auto",), *, dump: str | Path | None = None, elsewhere: str | Path | None = None,
    lengths: Sequence[int] = LENGTHS, seed: int = 0, launch: Launch | None = None, workers: int | None = None, progress: Progress = silent,
    record: bool = False, also: Sequence[int] = (), config: str | Path | None = None, texts: Mapping[str, Sequence[int]] | None = None,
    worth_texts: Mapping[str, str] | None = None, max_loss: float | None = None,
) -> Report:
    """Judge a bundle against the checkpoint it was exported from.

    backends: engines to run as rungs ("ort", ..., or "auto": those that run here). dump: keep cases and tensors in this folder. elsewhere: judge the rungs
    found in this folder, which other machines wrote, instead of running engines here. lengths, seed, also, texts: of the cases, see build_cases.
    config: config.json of a checkpoint that has none. launch, workers: how rungs are started and how many side by side.
    worth_texts: name -> text on which weights in 8 bits are held against the checkpoint's own (None: the checkpoint's held_out.txt); max_loss: how many percent
    more bits per byte they may take (None: 0.5 for int8, 1 for fp8).
    Raises UserError on bad input, ParityError on a checkpoint of another shape; disagreement is in the report.
    """
    need("torch", "onnx", "safetensors")
    from sessa_deploy.export.parity import worth  # torch and onnx, which dump_engines does without
    from sessa_deploy.export.parity.weights import check_weights

    begun = time.perf_counter()
    opened = Bundle.open(bundle)
    most, judged_on = worth.bound(opened, max_loss), {}
    if opened.weights is not None:
        judged_on = worth.texts_for(checkpoint, worth_texts)
        worth.check_texts(opened, judged_on)
    launch = launch or ProcessLaunch()
    cores = len(os.sched_getaffinity(0))
    workers = workers or min(3, cores)
    with ExitStack() as stack:
        folder = (stack.enter_context(scratch("sessa-parity-")) if dump is None else Path(dump)).absolute()
        if elsewhere is None:
            rungs = [TORCH, *resolve_backends(backends, opened)]
            sources = {rung: folder for rung in rungs}
            save_cases(build_cases(opened.config, seed, lengths, also=also, texts=texts, all_logits=has_all_logits(opened)), folder)
        else:
            given = load_cases(elsewhere)
            save_cases(Cases(given.cases, given.seed, "oracle"), folder)
            sources = _found_elsewhere(Path(elsewhere).absolute(), opened, given)
            sources.setdefault(TORCH, folder)
            rungs = sorted(sources, key=[TORCH, *ENGINE_RUNGS].index)
        given_config = None if config is None else Path(config).absolute()
        weights = check_weights(opened.model, checkpoint, opened.precision, opened.config, None if given_config is None else SessaConfig.load(given_config),
                                opened.weights)

        def job(rung: str) -> RungJob:
            threads = max(1, cores // (1 if rung == ORACLE else workers)) if opened.config.d_model >= WIDE else 1
            return RungJob(rung, folder, opened.path.absolute(), None if rung in ENGINE_RUNGS else Path(checkpoint).absolute(), threads,
                          None if rung in ENGINE_RUNGS else given_config)

        launch_all([job(ORACLE)], launch, 1, progress)
        beside = [PLAIN, *([WORTH] if judged_on else []), *(r for r in rungs if sources[r] == folder)]
        if judged_on:
            worth.save_texts(judged_on, folder)
        died = launch_all([job(r) for r in beside], launch, workers, progress)
        cases = load_cases(folder)
        sources |= {ORACLE: folder, PLAIN: folder}
        headers = {rung: read_header(source, rung) for rung, source in sources.items() if rung not in died}
        report = _judge(opened, cases, sources, headers, [r for r in rungs if r not in died])
        if judged_on:
            report.judge_worth(read_header(folder, WORTH)["worth"], most)
    report.weights = {"tensors": weights.tensors, "missing": dict(weights.missing)}
    report.failure = _first_failure(report, headers, died)
    report.seconds = time.perf_counter() - begun
    return report


def record(bundle: str | Path, report: Report) -> Bundle:
    """Write a report's verdict and worst cases into the bundle as parity.json. Raises UserError or OSError if the bundle cannot be written."""
    return add_files(bundle, {PARITY_FILE: (json.dumps(report.to_dict(details=False), indent=1) + "\n").encode()})


def dump_engines(
    bundle: str | Path, folder: str | Path, backends: Sequence[str] = ("auto",), *, seed: int = 0, lengths: Sequence[int] = LENGTHS,
    launch: Launch | None = None, progress: Progress = silent, also: Sequence[int] = (), texts: Mapping[str, Sequence[int]] | None = None,
) -> list[str]:
    """Write the engines' tensors into `folder`, for a comparison on the machine that has the checkpoint; returns the rungs written.

    Uses the cases in the folder, or makes them (then generated tokens are seeded ones). Needs neither torch nor the checkpoint.
    """
    opened, folder = Bundle.open(bundle), Path(folder).absolute()
    rungs = resolve_backends(backends, opened)
    if not (folder / CASES_FILE).is_file():
        save_cases(build_cases(opened.config, seed, lengths, also=also, texts=texts, all_logits=has_all_logits(opened)), folder)
    elif also or texts:
        raise UserError("the folder holds cases already", got=f"{folder / CASES_FILE}", allowed="further lengths and texts for new cases only",
                        fix="name another --dump, or leave --length and --text out")
    jobs = [RungJob(rung, folder, opened.path.absolute(), None, len(os.sched_getaffinity(0))) for rung in rungs]
    died = launch_all(jobs, launch or ProcessLaunch(), 1, progress)
    for error in died.values():
        raise error
    return rungs


def _found_elsewhere(folder: Path, bundle: Bundle, cases: Cases) -> dict[str, Path]:
    """Rungs in a folder written elsewhere, each proven to be of this bundle and these cases. Raises UserError otherwise or if there is none."""
    found = {}
    for rung in (TORCH, *ENGINE_RUNGS):
        if not (folder / rung / HEADER_FILE).is_file():
            continue
        header = read_header(folder, rung)
        for key, own, what in (("model_sha256", bundle.sha256(MODEL_FILE), f"another {MODEL_FILE}"), ("cases", cases.digest(), "other cases")):
            if header.get(key) != own:
                raise UserError(f"the tensors of {rung} in {folder} are of {what}", got=header.get(key), allowed=own, fix="dump them again with this bundle")
        found[rung] = folder
    if not found:
        raise UserError(f"{folder} holds no rung to compare", got="none", allowed=", ".join((TORCH, *ENGINE_RUNGS)),
                        fix="write one with `sessa-deploy validate BUNDLE --dump DIR`")
    return found


def _judge(bundle: Bundle, cases: Cases, sources: dict[str, Path], headers: dict[str, dict[str, Any]], rungs: Sequence[str]) -> Report:
    """Compare every output of every rung, mode and case."""
    config, pairs = bundle.config, [(rung, mode) for rung in rungs for mode in headers[rung]["modes"]]
    alone = [case for case in cases.cases if case.kind == "prefill"]
    plotted = {max(alone, key=lambda case: case.lengths.max()).name, "chunked"} if alone else {"chunked"}
    judged: dict[tuple[str, str], list[Any]] = {pair: [] for pair in pairs}
    tokens: dict[tuple[str, str], list[Any]] = {pair: [] for pair in pairs}
    positions: dict[str, dict[str, dict[int, list[float]]]] = {}
    pooled = _yardsticks(cases, sources)
    for case in cases.cases:
        oracle, plain = (read_tensors(sources[rung], rung, "graph", case.name) for rung in (ORACLE, PLAIN))
        rows, logit_rows = case.rows(), case.logit_rows()
        if case.name in plotted:
            positions[case.name] = {PLAIN: _positions(oracle, plain, config.n_layers)}
        for rung, mode in pairs:
            if case.name not in headers[rung]["modes"][mode]:
                continue
            own = read_tensors(sources[rung], rung, mode, case.name)
            judged[rung, mode] += _compare_case(oracle, plain, own, pooled, case, rows, logit_rows, bundle, rung, mode)
            kept = slice(None) if LOGITS in own else case.last_rows()  # a runner that picks tokens itself picks one a step
            tokens[rung, mode].append((case.name, logit_rows[kept], oracle[LOGITS][kept], own.get(LOGITS), own["token"]))
            if case.name in plotted and mode == next(iter(headers[rung]["modes"])):
                positions[case.name][rung] = _positions(oracle, own, config.n_layers)
    headers = {rung: headers[rung] for rung in (ORACLE, PLAIN, *rungs)}
    names = {rung: {k: v for k, v in header.items() if k in ("modes", "versions", "platform", "seconds")} for rung, header in headers.items()}
    listing = {case.name: {"kind": case.kind, "batch": case.batch, "steps": len(case.steps), "lengths": case.lengths.tolist(), "capacity": case.capacity,
                           "poison": case.poison} for case in cases.cases}
    environment = {"sessa-deploy": __version__, "platform": platform.platform(terse=True), "processor": f"{platform.machine()}, {os.cpu_count()} cores",
                   "python": platform.python_version(), "bundle": bundle.path.name, **{f"bundle {k}": v for k, v in bundle.versions.items()}}
    headroom = {rung: headers[rung]["headroom"] for rung in (ORACLE, TORCH) if rung in headers and headers[rung].get("headroom")}
    return Report(bundle.precision, config, environment, names, listing, [c for pair in pairs for c in judged[pair]],
                  _check_tokens(pairs, tokens), headroom, positions, {})


def _check_tokens(pairs: Sequence[tuple[str, str]], parts: dict[tuple[str, str], list[Any]]) -> list[TokenCheck]:
    """Tokens of every rung and mode; a mode without logits is held to the errors of its rung's session."""
    checks: dict[tuple[str, str], TokenCheck] = {}
    for rung, mode in pairs:
        checks[rung, mode] = check_tokens(rung, mode, parts[rung, mode], checks[rung, "session"].logit_error if mode == "greedy" else None)
    return list(checks.values())


def _yardsticks(cases: Cases, sources: dict[str, Path]) -> dict[str, Yardstick]:
    """The yardstick of every output, pooled over all cases."""
    pooled: dict[str, Yardstick] = {}
    for case in cases.cases:
        oracle, plain = (read_tensors(sources[rung], rung, "graph", case.name) for rung in (ORACLE, PLAIN))
        for name, reference in oracle.items():
            if name != "token":
                pooled.setdefault(name, Yardstick()).add(reference, plain[name])
    return pooled


def _compare_case(
    oracle: Tensors, plain: Tensors, own: Tensors, pooled: dict[str, Yardstick], case: Case, rows: Any, logit_rows: Any, bundle: Bundle, rung: str, mode: str
) -> list[Any]:
    out = []
    for layer in range(bundle.config.n_layers):
        for field in CACHE_FIELDS:
            name = layer_name(layer, field)
            if name in own or mode == "graph":
                if name not in own:
                    raise UserError(f"the rung {rung} wrote no {name} for case {case.name}", fix="run that rung again")
                out.append(compare(oracle[name], plain[name], own[name], rows, bundle.precision, rung, mode, case.name, layer, field,
                                   pooled[name]))
    if LOGITS in own or mode != "greedy":
        out.append(compare(oracle[LOGITS], plain[LOGITS], own[LOGITS], logit_rows[:, 1:], bundle.precision, rung, mode, case.name, None, LOGITS,
                           pooled[LOGITS]))
    return out


def _positions(oracle: Tensors, own: Tensors, layers: int) -> dict[int, list[float]]:
    names = {i: layer_name(i, "s") for i in range(layers)}
    return {i: position_errors(oracle[name], own[name]) for i, name in names.items() if name in own and own[name].shape == oracle[name].shape}


def _first_failure(report: Report, headers: dict[str, dict[str, Any]], died: dict[str, RungError]) -> Failure | None:
    """Weights first, since wrong ones explain everything after; then a rung that died; then outputs, padding and tokens."""
    missing = report.weights["missing"]
    if missing:
        name, what = next(iter(missing.items()))
        others = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        return Failure(f"weights: {name}{others}", f"model.onnx does not hold the checkpoint's tensor; {what}", "export this checkpoint again", field=name)
    found = first_divergence(report.comparisons, report.cases)
    if died and (found is None or found.rung in ENGINE_RUNGS):
        rung, error = next(iter(died.items()))
        return Failure(f"rung {rung}", str(error), rung=rung)
    if found is not None:
        return found
    for rung, header in headers.items():
        if header.get("nonzero_padding"):
            case, count = next(iter(header["nonzero_padding"].items()))
            return Failure("new rows beyond new_length", f"{rung}, case {case}: {count} elements are not zero", "the graph's masking of its outputs", rung)
    for check in report.tokens:
        if check.disagreements:
            first = check.disagreements[0]
            return Failure("tokens", f"{check.rung} ({check.mode}), case {first['case']}, step {first['step']}: token {first['got']} where {first['expected']} "
                           f"leads by {first['gap']}", "how the token is picked from the logits", check.rung)
    return None
