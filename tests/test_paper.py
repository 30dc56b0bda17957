"""The paper's tasks on a CPU: data, ladder and Bayes-optimal reader against what they must be, ten training steps of each model, a run that is resumed."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import itertools
import json
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "paper"))

import bayes
import choices
import crew
import deploy
import models
import mqar
import publish
import report
import run
import scan
import soup
import tasks
import training

from sessa_deploy.errors import UserError
from sessa_deploy.runtime.tokenizer import Tokenizer

WITH_TRANSFORMERS = sys.version_info >= (3, 11) and importlib.util.find_spec("transformers") is not None
needs_transformers = pytest.mark.skipif(not WITH_TRANSFORMERS, reason="Llama and Mamba-2 need transformers (Python >= 3.11): pip install 'sessa-deploy[paper]'")
HERE = models.MODELS if WITH_TRANSFORMERS else ("sessa", "no-feedback")
# Accuracy of partial rules at G = 32, 77, 168, found by an independent simulation.
LADDER = {
    "chance": (0.0156, 0.0156, 0.0156), "any stored value": (0.125, 0.125, 0.125), "first 1 symbol, uniform over matches": (0.129, 0.068, 0.041),
    "first 2 symbols, uniform over matches": (0.225, 0.124, 0.070), "last symbol, uniform over matches": (0.405, 0.217, 0.115),
    "first 1 symbol, stored pairs only": (0.459, 0.459, 0.459), "first 2 symbols, stored pairs only": (0.500, 0.500, 0.500),
    "first 1 symbol, most recent": (0.018, 0.015, 0.015), "first 2 symbols, most recent": (0.035, 0.016, 0.015), "whole key": (1.0, 1.0, 1.0),
}


@pytest.mark.parametrize("key", [2, 3])
def test_every_query_has_one_answer_at_the_lag_it_says(key: int) -> None:
    spec = mqar.Spec(key=key)
    for gap in (8, 32, 77):
        batch = mqar.test_batch(spec, gap, 60)
        assert batch.tokens.shape == (60, spec.tokens(gap)) and batch.tokens.min() >= 0 and batch.tokens.max() < mqar.VOCABULARY
        for row, at, labels, lags in zip(batch.tokens.tolist(), batch.at.tolist(), batch.labels.tolist(), batch.lags.tolist(), strict=True):
            sep, ask = row.index(mqar.SEP), row.index(mqar.ASK)
            assert row[0] == mqar.BOS and [row.count(x) for x in (mqar.BOS, mqar.SEP, mqar.ASK)] == [1, 1, 1]
            groups = [[tuple(row[i : i + key + 1]) for i in range(begin, end, key + 1)] for begin, end in ((1, sep), (sep + 1, ask))]
            stored = {pair[:key]: pair[key] for pair in groups[0]}
            assert len(stored) == spec.pairs == len(set(stored.values())) and not stored.keys() & {pair[:key] for pair in groups[1]}
            prefixes = [k[:-1] for k in stored]
            assert all(prefixes.count(p) == spec.family for p in prefixes) and len(groups[1]) == gap
            asked = [tuple(row[i : i + key]) for i in range(ask + 1, len(row), key)]
            assert len(set(asked)) == spec.queries and labels == [stored[k] for k in asked]
            assert at == [ask + key * (i + 1) for i in range(spec.queries)]
            assert all(row[a - lag] == label and a - lag < sep for a, lag, label in zip(at, lags, labels, strict=True))


def test_lags_lie_at_one_two_and_four_times_the_training_ones() -> None:
    spec = mqar.Spec()
    for gap, low, high, tokens in ((32, 133, 182, 187), (77, 313, 362, 367), (168, 677, 726, 731)):
        lags = mqar.test_batch(spec, gap, 200).lags
        assert (lags.min(), lags.max(), spec.tokens(gap)) == (low, high, tokens)
    task = tasks.Mqar()
    assert {task.training_batch(0, i).tokens.shape[1] for i in range(60)} <= {spec.tokens(g) for g in range(8, 33)} and task.length == 187


def test_same_seed_same_bytes() -> None:
    for one, two, other in ((mqar.training_batch(mqar.Spec(), s, i, 16) for s, i in ((3, 5), (3, 5), (4, 5))), (soup.stream_batch(s, 2, 8) for s in (1, 1, 2))):
        assert one.tokens.tobytes() == two.tokens.tobytes() and one.labels.tobytes() == two.labels.tobytes()
        assert one.tokens.tobytes() != other.tokens.tobytes()
    batch = mqar.training_batch(mqar.Spec(), 0, 0, 128)  # the bytes are the same on every machine
    assert hashlib.sha256(batch.tokens.astype("<i8").tobytes()).hexdigest()[:16] == "a9ddd07333f42fcf"


def test_the_ladder_of_partial_rules() -> None:
    for i, gap in enumerate((32, 77, 168)):
        found = mqar.ladder(mqar.Spec(), gap, 1500)
        assert found.keys() == LADDER.keys()
        assert found == {name: pytest.approx(values[i], abs=0.01) for name, values in LADDER.items()}


def test_the_official_data_begins_as_published() -> None:
    """The whole of it takes ten seconds (below); its first hundred examples fix every kind of draw."""
    rows = [(text, c) for split, text, c in itertools.islice(soup.official_rows(), 100) if split == "train"]
    assert hashlib.sha256("\n\n".join(f"{text}\t{c}" for text, c in rows).encode()).hexdigest()[:16] == "495a3ddfe39824b4"
    assert soup.checksums({})["labels"] == soup.SHA256["labels"]
    for text, _ in rows[:20]:
        ids = soup.encode(text)
        assert 400 <= len(ids) <= 600 and ids[0] == soup.BOS and ids[-1] == soup.LABEL and ids.count(soup.SEP1) == ids.count(soup.SEP2) == 2


@pytest.mark.study
def test_the_official_data_is_the_published_one() -> None:
    found = soup.official()
    assert soup.checksums(found) == soup.SHA256
    right, expected = bayes.accuracy(found["test"])
    assert right == pytest.approx(bayes.CEILING, abs=5e-4) and expected == pytest.approx(0.823, abs=1e-3)


def counts(block: list[int] | np.ndarray) -> np.ndarray:
    """(16 + 256,) letters and bigrams of a block."""
    block = np.asarray(block)
    return np.concatenate([np.bincount(block, minlength=16), np.bincount(16 * block[:-1] + block[1:], minlength=256)])


def test_the_stream_draws_as_the_official_generator() -> None:
    """Letter and bigram counts of blocks of forty letters, style by style: within 4 standard errors, blocks being the independent draws."""
    import random

    rng, blocks, length = random.Random(1), 150, 40
    for style in range(len(soup.STYLES)):
        exact = np.array([counts([soup.LETTERS.index(x) for x in soup._block(rng, style, length)]) for _ in range(blocks)])
        drawn = soup.draw_blocks(np.random.default_rng(style), np.full(4 * blocks, style), np.full(4 * blocks, length))
        ours = np.array([counts(block) for block in drawn])
        error = np.sqrt(exact.var(0) / len(exact) + ours.var(0) / len(ours)) + 1.0 / len(exact)
        assert (np.abs(exact.mean(0) - ours.mean(0)) < 4 * error).all(), style


def test_stream_examples_have_the_published_form() -> None:
    batch = soup.stream_batch(0, 0, 40)
    for ids, (at,), (label,) in zip(batch.tokens.tolist(), batch.at.tolist(), batch.labels.tolist(), strict=True):
        text = "".join((*soup.LETTERS, " ", "\n", "<bos>", "<sep1>", "<sep2>", "<sep>", "<label>")[x] for x in ids[: at + 1])
        assert soup.encode(text) == ids[: at + 1] and text.startswith("<bos>\n") and text.endswith("\n<sep> <label>") and 400 <= at + 1 <= 600
        assert soup.FIRST_LABEL <= label < soup.VOCABULARY and all(soup.blocks_of(text))


def test_the_bayes_optimal_reader() -> None:
    rows = [(text, c) for _, text, c in itertools.islice(soup.official_rows(), 50)]
    right, expected = bayes.accuracy(rows)
    assert right == pytest.approx(expected, abs=3 * (expected * (1 - expected) / 50) ** 0.5) and right > 0.7
    # A likelihood is a distribution: over all blocks of three letters it sums to one, whatever the style. At rest they are scaled by a constant a letter.
    every = [bayes.log_likelihoods("".join(x)) for x in itertools.product(soup.LETTERS, repeat=3)]
    assert np.exp(np.array(every)).sum(0) / bayes._SCALE**3 == pytest.approx(np.ones(9), rel=1e-9)


@needs_transformers
def test_models_are_matched_in_parameters() -> None:
    found = {name: models.parameters(models.build(name, mqar.PADDED))["body"] for name in models.MODELS}
    assert found == {"sessa": 595_716, "no-feedback": 578_816, "llama": 595_072, "mamba2": 590_328}
    assert max(found.values()) / min(found.values()) < 1.03


def test_without_feedback_nothing_is_fed_back() -> None:
    model = models.build("no-feedback", 32, 32, 2).train()
    mixer = model.layers[0].mixer
    a = torch.randn(1, 20, 32)
    assert (mixer.gain(a) == 0).all()
    model(torch.arange(20)[None]).sum().backward()
    assert mixer.gamma_bias.grad is None and mixer.proj_fb.weight.grad is None and mixer.q_proj.weight.grad is not None


@pytest.mark.parametrize("name", HERE)
def test_reach_is_causal_and_forgets_nothing_at_once(name: str) -> None:
    model = models.build(name, 32, 32, 2)
    found = models.reach(model, torch.randint(0, 32, (1, 80), generator=torch.Generator().manual_seed(0)), [10], 2)[:, 0]
    assert (found[:10] == 0).all() and (found[10:] > 0).all() and np.isfinite(found).all()


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A whole study in miniature: every model, two rates, ten steps."""
    folder = tmp_path_factory.mktemp("paper")
    args = ["--preset", "tiny", "--tasks", "mqar", "--models", ",".join(HERE), "--out", str(folder), "--device", "cpu", "--no-influence", "--examples", "8"]
    assert run.main(args) == 0
    return folder, args


def test_a_study_leaves_tables_and_pictures(study: tuple[Path, list[str]]) -> None:
    folder, _ = study
    summary, = report.summaries(folder)
    assert tuple(summary["models"]) == HERE and summary["steps"] == 10
    for entry in summary["models"].values():
        result, = entry["runs"]
        assert np.isfinite([loss for _, loss in result["curve"]]).all() and result["curve"][-1][0] == 10 and result["validation"]["loss"] > 0
        assert set(entry["points"]) == {"G 32", "G 77", "G 168"} == set(result["test"]) and entry["lr"] in (1e-3, 2e-3)
    page = (folder / "table.md").read_text()
    assert "whole key" in page and "0.8601" not in page and all(models.TITLES[name] in page for name in HERE)
    assert all((folder / name).read_bytes()[:4] == b"\x89PNG" for name in ("mqar/loss.png", "mqar/accuracy.png"))
    assert json.loads((folder / "table.json").read_text())[0]["task"] == "mqar"


def test_finished_runs_are_not_made_again(study: tuple[Path, list[str]]) -> None:
    folder, args = study
    before = {path: path.stat().st_mtime_ns for path in (*folder.glob("mqar/*steps*.json"), *folder.glob("mqar/*.pt"))}
    assert len(before) == 4 * len(HERE)  # two searches and a whole run of each, and its weights
    assert run.main(args) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_later_command_keeps_what_others_found(study: tuple[Path, list[str]]) -> None:
    """One model, at a rate of its own: the other models' rows stay as they were, on the machine that made them."""
    folder, args = study
    before, = report.summaries(folder)
    only = [*args[:4], "--models", "sessa", *args[6:]]
    assert run.main(only) == 0
    after, = report.summaries(folder)
    assert after == before and tuple(after["models"]) == HERE and after["machine"]["torch"] == torch.__version__


def test_the_page_is_written_from_runs(study: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = study
    page, results = tmp_path / "page.md", tmp_path / "results"
    page.write_text("before\n<!-- mqar -->\nstale\n<!-- end of mqar -->\nbehind\n")
    monkeypatch.setattr(report, "NOISE_TOKENS", 32)
    monkeypatch.setattr(models, "reach", lambda model, ids, sources, probes: np.ones((ids.shape[1], len(sources))))  # it has a test of its own
    monkeypatch.setattr(sys, "argv", ["publish.py", "--runs", str(folder), "--results", str(results), "--page", str(page)])
    assert publish.main() == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("behind\n") and "stale" not in text and "| whole key | 1.000 |" in text
    assert all(text.count(f"| {title}, seed 0 |" if name in HERE else f"| {title} | ... |") == 1 for name, title in models.TITLES.items())
    assert {x.name for x in results.iterdir()} == {"paper-mqar.json", "paper-mqar-accuracy.png", "paper-mqar-loss.png", "paper-influence.png"}
    assert json.loads((results / "paper-mqar.json").read_text())["models"]["sessa"]["runs"][0]["curve"][-1][0] == 10
    summary, = report.summaries(folder)
    assert publish.between(text, "mqar", publish.table(summary)) == text
    page.write_text("no place\n")
    with pytest.raises(UserError, match="no place for this table"):
        publish.main()
    assert page.read_text() == "no place\n"


def test_a_run_cut_short_goes_on_as_if_it_had_not_been(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "CURVE_EVERY", 3)
    task, setting = tasks.Mqar(examples=4), training.Setting("mqar", "sessa", 0, 1e-3, 7, 16, 1)
    task.batch_size = 2
    whole = training.run(setting, task, training.Machine(tmp_path / "a", torch.device("cpu")))
    late = training.Machine(tmp_path / "b", torch.device("cpu"), deadline=time.monotonic())
    for _ in range(2):  # ends at steps 3 and 6
        with pytest.raises(training.OutOfTime):
            training.run(setting, task, late)
    assert training.finished(setting, late.folder) is None
    resumed = training.run(setting, task, dataclasses.replace(late, deadline=None))
    assert resumed["curve"] == whole["curve"] and resumed["test"] == whole["test"] and not list(tmp_path.rglob("*.partial"))


def test_time_is_kept_by_fewer_seeds_first_then_fewer_steps() -> None:
    fit = partial(run.fit_steps, {"a": 0.01, "b": 0.03}, seeds={"a": 2, "b": 2}, rates=dict.fromkeys("ab", training.RATES))
    assert fit(1000, 8000) == (8000, 2)
    assert fit(600, 8000) == (8000, 1)  # one seed and a fifth for each of three rates: 0.04 * 1.6 a step
    assert fit(320, 8000) == (5000, 1) and fit(0.1, 8000) == (run.LEAST_STEPS, 1)
    assert fit(600, 4000, most=16000) == (5700, 2) and fit(9000, 4000, most=16000) == (16000, 2)
    assert fit(400, 4000, rates={"a": (1e-3,), "b": ()}) == (4000, 2)  # a rate that is given is not searched
    assert fit(200, 4000, seeds={"a": 2, "b": 1}, rates={}) == (4000, 2)


def a_study(tmp_path: Path, *args: str, names: tuple[str, ...] = ("sessa",)) -> run.Study:
    options = choices.options_of(["--preset", "tiny", "--tasks", "mqar", "--models", ",".join(names), "--out", str(tmp_path), *args])
    machine = training.Machine(tmp_path, torch.device("cpu"), deadline=None if options.minutes is None else time.monotonic() + 60 * options.minutes)
    return run.Study(options, machine, names, options.rates, Console(quiet=True), crew.Crew(["cpu"], lambda *_: None, lambda *_: None))


def test_a_pilot_decides_the_length_of_keys(tmp_path: Path) -> None:
    study, seen = a_study(tmp_path, "--key-length", "auto"), []

    def do(place: str, work: run.Work, tell: crew.Tell) -> dict[str, object]:
        seen.append(work.setting.stem)
        return {"validation": {"accuracy": 0.4, "loss": 1.0}, "curve": [], "seconds": 0.0, "cuda_graph": False}

    study.crew.do = do
    plan = run.plan(study, "mqar")
    assert (plan.key, plan.steps, plan.search, plan.seeds) == (2, 10, 2, {"sessa": 1}) and len(seen) == 1
    task = run.make_task("mqar", study.options, plan.key)
    assert task.name == "mqar-key2" and task.length == mqar.Spec(key=2).tokens(32)
    assert run.plan(study, "mqar").key == 2 and len(seen) == 1  # what was decided stands


def test_steps_are_fitted_to_what_the_search_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 1 and 3 ms alone; two minutes; the searches come first, then each seed at its model's best rate."""
    monkeypatch.setitem(choices.PRESETS["tiny"], "steps", None)
    names, order = ("sessa", "no-feedback"), []
    study = a_study(tmp_path, "--minutes", "2", "--seeds", "2", names=names)

    def do(place: str, work: run.Work, tell: crew.Tell) -> object:
        setting = work.setting
        if work.timed:
            return 0.001 if setting.model == "sessa" else 0.003
        order.append((setting.model, setting.seed, setting.lr, setting.steps, work.test))
        return {"validation": {"accuracy": 0.4, "loss": setting.lr}, "curve": [], "seconds": 0.0, "cuda_graph": False}

    study.crew.do = do
    run.study_task(study, "mqar")
    search, steps = order[0][3], order[-1][3]
    assert [(m, lr) for m, _, lr, _, _ in order[:4]] == [("sessa", 1e-3), ("sessa", 2e-3), ("no-feedback", 1e-3), ("no-feedback", 2e-3)]
    assert order[4:] == [(m, seed, 1e-3, steps, True) for seed in (0, 1) for m in names]
    # 0.78 of two minutes: 0.004 * 2.4 a step with both searches, then 0.004 * 2 without them.
    assert search * run.SEARCH == pytest.approx(9700, abs=100) and steps == pytest.approx(11600, abs=100)
    assert json.loads((tmp_path / "mqar-plan.json").read_text()) == {"key": 3, "search": search, "steps": steps}


def test_a_rate_that_is_given_is_not_searched(tmp_path: Path) -> None:
    """Runs in the order of --seeds, one model after the other; a model with two rates is searched first."""
    study = a_study(tmp_path, "--rates", "sessa=2e-3,llama=4e-3,1e-3,3e-3", "--seeds", "llama=1,sessa=2,no-feedback=1", names=("sessa", "no-feedback", "llama"))
    seen = []

    def do(place: str, work: run.Work, tell: crew.Tell) -> dict[str, object]:
        seen.append((work.setting.model, work.setting.seed, work.setting.lr, work.setting.steps))
        return {"validation": {"accuracy": 0.4, "loss": work.setting.lr}, "curve": [], "seconds": 0.0, "cuda_graph": False}

    study.crew.do = do
    run.study_task(study, "mqar")
    assert seen == [("no-feedback", 0, 1e-3, 2), ("no-feedback", 0, 3e-3, 2), ("llama", 0, 4e-3, 10), ("sessa", 0, 2e-3, 10), ("sessa", 1, 2e-3, 10),
                    ("no-feedback", 0, 1e-3, 10)]


@pytest.mark.parametrize("given", ["sessa=2e-3", "fast", "gpt=1e-3", "0", "sessa=1e-3,,2e-3", "nan", "inf"])
def test_rates_that_say_nothing_are_named(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        choices.options_of(["--rates", given, "--models", "sessa,llama"])
    assert ended.value.code == 2 and "--rates: " in capsys.readouterr().err.splitlines()[-1]


@needs_transformers
def test_mamba2_computes_what_transformers_does() -> None:
    """Scan and convolution, values and gradients, against those of the library."""
    from transformers.models.mamba2 import modeling_mamba2 as library

    draw = torch.Generator().manual_seed(0)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw).requires_grad_()

    theirs = {"scan": getattr(library.mamba2_chunk_scan, "theirs", library.mamba2_chunk_scan),
              "conv": getattr(library.causal_conv1d_fn, "theirs", library.causal_conv1d_fn)}
    for groups, length, begun in ((1, 150, False), (2, 50, True), (1, 48, False)):
        args = [some(2, length, 4, 8), some(2, length, 4), (-torch.arange(1.0, 5.0)).requires_grad_(), some(2, length, groups, 16), some(2, length, groups, 16)]
        gain, bias, state = some(4), some(4), some(2, 4, 8, 16) if begun else None
        found = []
        for function in (theirs["scan"], scan.chunk_scan):
            y, last = function(*args, chunk_size=48, D=gain, dt_bias=bias, dt_softplus=True, return_final_states=True, initial_states=state)
            found.append((y, last, *torch.autograd.grad(y.sin().sum() + last.cos().sum(), [*args, gain, bias])))
        for one, other in zip(*found, strict=True):
            assert float((one - other).detach().abs().max()) <= 1e-4 * float(one.detach().abs().max())
    x, weight, bias = some(2, 12, 10), some(12, 4), some(12)
    assert torch.allclose(theirs["conv"](x, weight, bias, "silu"), scan.causal_conv(x, weight, bias, "silu"), atol=2e-6)
    scan.install()
    assert library.mamba2_chunk_scan is scan.chunk_scan and library.causal_conv1d_fn is scan.causal_conv


def test_the_language_task_reads_a_folder(tmp_path: Path) -> None:
    for i in range(8):
        (tmp_path / f"{i}.py").write_text(f"def f{i}(x):\n    return x + {i}\n" * 40)
    task = tasks.Language(str(tmp_path), 32)
    task.batch_size = 4
    result = training.run(training.Setting("language", "sessa", 0, 1e-2, 5, 16, 1), task, training.Machine(tmp_path / "out", torch.device("cpu")))
    assert 0 < result["test"]["held out"]["bits"] < 9 and task.yardsticks()["held out"]["a byte at random"] == 8.0


def test_the_recall_tokenizer_spells_every_token() -> None:
    spec = mqar.Spec()
    tokenizer = Tokenizer.from_json(deploy.tokenizer_json(spec))
    batch = mqar.test_batch(spec, 8, 3)
    for row in batch.tokens:
        assert tokenizer.encode(deploy.words_of(spec, row)) == row.tolist() == tokenizer.encode_first(deploy.words_of(spec, row[1:]), mqar.BOS)
    assert tokenizer.vocab_size <= mqar.PADDED and tokenizer.decode([16, 79]) == "0 63"


@pytest.mark.study
def test_a_sessa_goes_down_the_whole_road(
    study: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    folder, _ = study
    args = ["deploy.py", "--runs", folder, "--checkpoint", tmp_path / "recall", "--bundle", tmp_path / "bundle", "--examples", 4, "--engines", "ort"]
    monkeypatch.setattr(sys, "argv", [str(x) for x in args])
    assert deploy.main() == 0
    out = capsys.readouterr().out
    assert "parity: PASSED" in out and "largest difference: 0.000 points" in out and "run --max-new-tokens 1" in out
    assert (tmp_path / "recall" / "MODEL_CARD.md").read_text().count("| ort, fp32 |") == 1
    monkeypatch.setattr(sys, "argv", [str(x) for x in (*args[:1], "--measure", *args[3:-1], "ort,trt:fp32")])
    assert deploy.main() == 2  # no TensorRT here: named, and the other's accuracy is there
    said = capsys.readouterr()
    assert said.err.startswith("trt, fp32: ") and "largest difference: 0.000 points" in said.out
