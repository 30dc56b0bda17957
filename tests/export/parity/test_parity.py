"""The parts of parity: the rule, cases, rungs as processes, tensors made elsewhere, the report."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from parity_fixtures import CONFIG, LENGTHS, Here, judge

from sessa_deploy.config import SessaConfig
from sessa_deploy.contract import LOGITS, PARITY_FILE
from sessa_deploy.errors import ParityError, UserError
from sessa_deploy.export import parity
from sessa_deploy.export.parity.cases import Case, Step, build_cases, load_cases, save_cases
from sessa_deploy.export.parity.drive import Engine, Tensors, drive_graph, layer_name
from sessa_deploy.export.parity.engines import open_ort
from sessa_deploy.export.parity.metrics import Yardstick, check_tokens, compare, cosine, kl_divergence
from sessa_deploy.export.parity.process import ProcessLaunch
from sessa_deploy.export.parity.report import render, write_report
from sessa_deploy.export.parity.rungs import RungJob, read_header, read_tensors
from sessa_deploy.export.parity.verdict import first_divergence
from sessa_deploy.runtime.bundle import Bundle, write_bundle

ROWS = np.stack([np.zeros(8, dtype=np.int64), np.arange(8)], axis=1)
RNG = np.random.default_rng(0)
REFERENCE = RNG.standard_normal((8, 16))


def judged(x: np.ndarray, plain: np.ndarray | None = None, precision: str = "fp32", layer: int | None = 0, reference: np.ndarray = REFERENCE):  # type: ignore[no-untyped-def]
    return compare(reference, reference if plain is None else plain, x, ROWS, precision, "ort", "graph", "case", layer, "s" if layer is not None else LOGITS)


# --- the rule ---


def test_rule_is_twice_the_yardstick_plus_the_floor() -> None:
    noise = 1e-3 * RNG.standard_normal(REFERENCE.shape)
    plain = REFERENCE + noise
    assert judged(REFERENCE + 1.9 * noise, plain).verdict == "pass"
    assert judged(REFERENCE + 2.1 * noise, plain).verdict == "fail"
    found = judged(REFERENCE + 3.0 * noise, plain)
    assert found.factor == pytest.approx(3.0, rel=1e-2) and found.score == pytest.approx(1.5, rel=1e-2)
    assert found.tolerance == pytest.approx(3.0 * np.abs(noise).max() / np.abs(REFERENCE).max())


@pytest.mark.parametrize(("precision", "floor"), [("fp32", 8 * 2.0**-23), ("fp16", 2.0**-10), ("bf16", 2.0**-7)])
def test_floor(precision: str, floor: float) -> None:
    off = REFERENCE * (1 + floor)  # relative to every element, so RMS and maximum meet the floor together
    assert judged(REFERENCE + 0.99 * (off - REFERENCE), precision=precision).verdict == "pass"
    assert judged(REFERENCE + 1.01 * (off - REFERENCE), precision=precision).verdict == "fail"


def test_one_element_is_caught_by_the_maximum_and_many_by_the_rms() -> None:
    plain = REFERENCE.copy()
    plain[0, 0] += 1e-2
    one = REFERENCE.copy()
    one[3, 5] += 3e-2
    found = judged(one, plain)
    assert found.verdict == "fail" and found.first_bad == (0, 3)
    assert judged(REFERENCE + 9e-3, plain).verdict == "fail"  # below the largest error of the yardstick, everywhere


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_not_finite_fails_and_an_unfit_precision_never_passes(poison: float) -> None:
    x = REFERENCE.copy()
    x[2, 1] = poison
    assert judged(x).verdict == "fail" and judged(x).first_bad == (0, 2)
    assert judged(x, plain=x).verdict == "unfit"
    assert judged(REFERENCE, plain=REFERENCE * 1.06).verdict == "unfit"
    assert judged(REFERENCE, plain=REFERENCE * 1.04).verdict == "pass"


def test_a_short_case_is_held_to_the_pooled_yardstick() -> None:
    noise = 1e-4 * RNG.standard_normal(REFERENCE.shape)
    pooled = Yardstick()
    pooled.add(REFERENCE, REFERENCE + noise)
    short, lucky = REFERENCE[:2], REFERENCE[:2] + 1e-6

    def verdict(x: np.ndarray, pooled: Yardstick | None) -> str:
        return compare(short, lucky, x, ROWS[:2], "fp32", "ort", "graph", "case", 0, "s", pooled).verdict

    assert verdict(short + noise[:2], None) == "fail" and verdict(short + noise[:2], pooled) == "pass"
    assert verdict(short + 3 * noise[:2], pooled) == "fail"
    pooled.add(REFERENCE, REFERENCE * np.nan)
    assert verdict(short, pooled) == "unfit"


def test_zero_outputs_and_wrong_shapes() -> None:
    zero = np.zeros_like(REFERENCE)
    assert judged(zero, zero, reference=zero).verdict == "pass"
    assert judged(zero + 1e-30, zero, reference=zero).verdict == "fail"
    assert judged(REFERENCE[:7]).verdict == "fail"


def test_large_values_do_not_overflow_the_figures() -> None:
    found = judged(REFERENCE * 1e200, REFERENCE * 1e200, reference=REFERENCE * 1e200)
    assert found.verdict == "pass" and found.rms_error == 0 and found.cosine == pytest.approx(1)


def test_kl_and_cosine() -> None:
    assert kl_divergence(REFERENCE, REFERENCE) == 0
    p = np.array([[0.0, math.log(3.0)]])
    assert kl_divergence(p, np.zeros((1, 2))) == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    assert cosine(np.array([1.0, 0.0]), np.array([1.0, 1.0])) == pytest.approx(2**-0.5)
    assert judged(REFERENCE, layer=None).agreement == 1.0


def test_token_rule() -> None:
    reference = np.array([[1.0, 0.0, 0.0], [1.0, 0.9, 0.0]])
    rows = np.array([[0, 0, 0], [1, 0, 1]])

    def tokens(*picked: int, error: float):  # type: ignore[no-untyped-def]
        x = reference.copy()
        x[0, 2] += error
        return check_tokens("ort", "graph", [("case", rows, reference, x, np.array(picked))])

    assert tokens(0, 0, error=1e-3).agree == 2
    near = tokens(0, 1, error=0.011)  # a gap of 0.1 is under ten errors
    assert near.agree == 1 and len(near.near_ties) == 1 and not near.disagreements
    far = tokens(0, 1, error=0.009)
    assert far.disagreements[0]["expected"] == 0 and far.disagreements[0]["got"] == 1 and far.disagreements[0]["position"] == 1


# --- cases ---


def test_cases_cover_what_deployment_meets() -> None:
    cases = build_cases(SessaConfig(d_model=8, n_layers=1, n_heads=2, vocab_size=99, max_context=2048))
    kinds = {case.kind for case in cases.cases}
    assert kinds == {"prefill", "decode", "chunked", "ragged", "poisoned", "greedy"}
    assert [len(c.sequences()[0]) for c in cases.cases if c.kind == "prefill"] == [1, 2, 63, 64, 65, 257]
    ragged = next(c for c in cases.cases if c.kind == "ragged")
    assert ragged.poison and any(0 in step.new_length.tolist() and step.new_length.max() > 1 for step in ragged.steps)
    assert all(int(case.lengths.max()) <= 2048 and step.input_ids.max() < 99 for case in cases.cases for step in case.steps)


@pytest.mark.parametrize("context", [1, 2, 5, 64, 100])
def test_cases_stay_within_a_short_context(context: int) -> None:
    cases = build_cases(SessaConfig(d_model=8, n_layers=1, n_heads=2, vocab_size=9, max_context=context))
    assert all(1 <= case.lengths.max() <= context for case in cases.cases)
    assert all(len(case.logit_rows()) and len(case.rows()) == case.lengths.sum() for case in cases.cases)


def test_cases_are_reproducible_and_survive_the_file(tmp_path: Path) -> None:
    cases = build_cases(CONFIG, seed=3)
    save_cases(cases, tmp_path)
    assert load_cases(tmp_path).digest() == cases.digest() == build_cases(CONFIG, seed=3).digest() != build_cases(CONFIG, seed=4).digest()
    text = (tmp_path / "cases.json").read_text().replace('"seed": 3', '"seed": 4')
    (tmp_path / "cases.json").write_text(text.replace('"poison": true', '"poison": false'))
    with pytest.raises(UserError, match="damaged"):
        load_cases(tmp_path)
    with pytest.raises(UserError, match="--dump"):
        load_cases(tmp_path / "nowhere")


def test_the_driver_hands_over_poison_and_keeps_valid_rows() -> None:
    config = SessaConfig(d_model=4, n_layers=1, n_heads=2, vocab_size=9, max_context=16)
    steps = (Step(np.zeros((2, 3), np.int64), np.array([3, 1], np.int32)), Step(np.zeros((2, 1), np.int64), np.array([0, 1], np.int32)))
    seen: list[Tensors] = []

    def step(feeds: Tensors) -> Tensors:
        seen.append({name: x.copy() for name, x in feeds.items()})
        tokens = feeds["input_ids"].shape[1]
        mask = np.arange(tokens)[None, :, None] < feeds["new_length"][:, None, None]
        wide = np.where(mask, 10.0 * len(seen) + np.arange(tokens)[None, :, None] + np.zeros((2, 1, 4)), 0.0).astype(np.float32)
        return {LOGITS: np.ones((2, 9)), **{f"new.0.{f}": wide.reshape(2, tokens, 2, 2) if f in ("k_f", "v_f") else wide for f in ("k_f", "v_f", "k_b", "s")}}

    tensors, dirty = drive_graph(step, Case("c", "ragged", steps, capacity=5, poison=True), config, np.dtype("float32"))
    assert dirty == 0 and tensors[LOGITS].shape == (3, 9)
    assert tensors[layer_name(0, "s")][:, 0].tolist() == [10, 11, 12, 10, 20]
    past = seen[1]["past.0.s"]
    assert past.shape == (2, 5, 4) and past[0, :3, 0].tolist() == [10, 11, 12] and not np.isfinite(past[0, 3:]).any() and not np.isfinite(past[1, 1:]).any()


# --- with a bundle ---


def test_dump_on_a_machine_without_torch_and_compare(material: tuple[Path, Path, Path], tmp_path: Path) -> None:
    bundle, checkpoint, _ = material
    blocked = "import sys; sys.modules.update(dict.fromkeys(['torch', 'triton', 'onnx', 'safetensors', 'onnxscript'])); "
    run = f"from sessa_deploy.export.parity.prove import dump_engines; from sessa_deploy.export.parity.process import launch_here; \
print(dump_engines({str(bundle)!r}, {str(tmp_path / 'there')!r}, ['ort'], lengths={LENGTHS}, launch=launch_here))"
    subprocess.run([sys.executable, "-c", blocked + run], check=True, timeout=250)
    assert read_header(tmp_path / "there", "ort")["modes"].keys() == {"graph", "session", "greedy"}
    seeded = tmp_path / "seeded"  # cases whose generated tokens the seed chose, so other references than `kept`
    seeded.mkdir()
    report = parity.validate(bundle, checkpoint, elsewhere=tmp_path / "there", launch=Here(seeded), workers=1)
    assert report.passed and {rung for rung, _ in report.judged} == {"torch", "ort"}

    # a wrong number in the dump is found; a dump of another bundle or other cases is refused
    path = tmp_path / "there" / "ort" / "graph.prefill-65.npz"
    tensors = read_tensors(tmp_path / "there", "ort", "graph", "prefill-65")
    tensors[layer_name(2, "v_f")][40] *= 1.001
    np.savez(path, **tensors)  # type: ignore[arg-type]
    report = parity.validate(bundle, checkpoint, elsewhere=tmp_path / "there", launch=Here(seeded), workers=1)
    assert report.failure is not None and report.failure.where == "layer 2 v_f" and "position 40" in report.failure.detail
    header = tmp_path / "there" / "ort" / "header.json"
    header.write_text(header.read_text().replace(Bundle.open(bundle).sha256("model.onnx"), "0" * 64))
    with pytest.raises(UserError, match=r"another model\.onnx"):
        parity.validate(bundle, checkpoint, elsewhere=tmp_path / "there", launch=Here(seeded), workers=1)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="not readable"):
        read_tensors(tmp_path / "there", "ort", "graph", "prefill-65")
    header.unlink()  # what a killed rung leaves
    with pytest.raises(UserError, match="holds no"):
        parity.validate(bundle, checkpoint, elsewhere=tmp_path / "there", launch=Here(seeded))


def test_an_engine_for_one_sequence_runs_batches_one_after_the_other(material: tuple[Path, Path, Path]) -> None:
    def engine(job: RungJob) -> Engine:
        opened = open_ort(Bundle.open(job.bundle), 1)
        return Engine(None, opened.session, {}, eager=opened.session, max_batch=1)

    report = judge(*material, engine)
    assert report.passed, report.line()
    rows = {(c.mode, c.case): c.rows for c in report.comparisons if c.rung == "ort" and c.layer == 0 and c.field == "s"}
    assert rows["session", "ragged"] == rows["eager", "ragged"] == sum(report.cases["ragged"]["lengths"])


def test_another_checkpoint(material: tuple[Path, Path, Path], tmp_path: Path) -> None:
    from parity_fixtures import lively_model

    from sessa_deploy.checkpoint import save_checkpoint

    bundle, *_ = material
    save_checkpoint(lively_model(seed=1), tmp_path / "other")
    report = judge(bundle, tmp_path / "other", tmp_path / "kept")
    assert report.failure is not None and report.failure.where.startswith("weights: ") and report.weights["missing"]
    save_checkpoint(lively_model(SessaConfig(d_model=16, n_layers=3, n_heads=4, vocab_size=61, n_kv_heads=2)), tmp_path / "smaller")
    with pytest.raises(ParityError, match=r"d_model 16 \(the bundle: 32\)"):
        judge(bundle, tmp_path / "smaller", tmp_path / "kept")
    with pytest.raises(UserError):
        judge(bundle, tmp_path / "nothing", tmp_path / "kept")


def test_bf16_on_a_cpu_names_the_way_out(material: tuple[Path, Path, Path], tmp_path: Path) -> None:
    opened = Bundle.open(material[0])
    write_bundle(tmp_path / "bundle", {name: opened.file(name) for name in opened.names()}, opened.config, "bf16", {})
    with pytest.raises(UserError, match="--precision fp32") as caught:
        judge(tmp_path / "bundle", material[1], tmp_path / "kept")
    assert "\n" not in str(caught.value)


def test_report_and_record(material: tuple[Path, Path, Path], tmp_path: Path) -> None:
    bundle, checkpoint, kept = material
    report = judge(bundle, checkpoint, kept)
    text = write_report(report, tmp_path / "report.html").read_text()
    assert "Parity passed" in text and text.count("data:image/svg+xml;base64,") == 4
    assert not re.search(r"(src|href)=\"(?!data:)", text) and "<script" not in text and "@import" not in text and "url(" not in text
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["passed"] and len(data["comparisons"]) == len(report.comparisons) and set(data["headroom"]) == {"float64", "torch"}
    recorded = parity.record(bundle, report)
    kept = json.loads(Bundle.open(bundle).file(PARITY_FILE).read_text())
    assert PARITY_FILE in recorded and kept["passed"] and "comparisons" not in kept

    # the same report of a failure, with numbers that are not finite
    bad = report.comparisons[5]
    report.comparisons[5] = compare(*(np.full((3, 4), x) for x in (1.0, 1.0, np.nan)), ROWS[:3], "fp32", bad.rung, bad.mode, bad.case, bad.layer, bad.field)
    report.failure = first_divergence(report.comparisons, report.cases)
    assert report.line().startswith(f"parity: FAILED at {bad.output}: ")
    assert "Parity failed" in render(report)
    json.dumps(report.to_dict(), allow_nan=False)


def test_a_rung_is_a_process(material: tuple[Path, Path, Path], tmp_path: Path) -> None:
    bundle, *_ = material
    heard: list[tuple[str, int, int]] = []
    rungs = parity.dump_engines(bundle, tmp_path, ["ort"], lengths=(2,), launch=ProcessLaunch(), progress=lambda *x: heard.append(x))
    assert rungs == ["ort"] and heard[-1][1] == heard[-1][2] and not list(tmp_path.glob("*.log"))
    with pytest.raises(UserError, match="no such backend"):
        parity.dump_engines(bundle, tmp_path, ["abacus"])
    with pytest.raises(UserError, match="cannot be started"):
        parity.dump_engines(bundle, tmp_path, ["ort"], launch=ProcessLaunch("/nowhere/python"))
