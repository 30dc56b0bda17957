"""The best Sessa of Diffuse MQAR down the whole road: checkpoint, export, validate, ONNX Runtime (and TensorRT where there is one), its accuracy at each.

    python benchmarks/paper/deploy.py --runs out/paper [--checkpoint checkpoints/recall] [--bundle out/recall]
    python benchmarks/paper/deploy.py --measure --engines trt:fp16,ort-cuda:fp16     # on a GPU: the accuracy alone, of the checkpoint as it is

Writes a checkpoint with a word-level tokenizer.json and a card, so that `run` takes it; refuses more than 3 MB. Exit code 1 where an engine's accuracy is
more than 0.1 points from PyTorch's in float32, 2 where a step of the road fails. --measure needs no runs and writes nothing into the checkpoint; an engine
that fails is named, and the others go on.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import models
import mqar
import numpy as np
import report
import tasks
import torch
import training
from batches import Batch, Ints
from door import leave
from run import task_called
from training import Setting

from sessa_deploy import SessaConfig, SessaLM, UserError, load_checkpoint, save_checkpoint
from sessa_deploy.errors import SessaError
from sessa_deploy.files import write_whole
from sessa_deploy.runtime.session import Session

LARGEST = 3_000_000  # bytes
ALLOWED = 0.001  # of accuracy, between an engine and PyTorch in float32
ROWS = 50  # sequences of an engine's batch
EXACT, FACTS = "PyTorch, float32", "recall.json"


def tokenizer_json(spec: mqar.Spec) -> str:
    """A word-level tokenizer: symbols a, b, ..., values 0, 1, ..., and <bos>, <sep>, <ask>, with white space between words."""
    from tokenizers import AddedToken, Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel

    marks = {"<bos>": mqar.BOS, "<sep>": mqar.SEP, "<ask>": mqar.ASK, "<unk>": mqar.VOCABULARY - 1}
    words = [chr(ord("a") + i) for i in range(spec.alphabet)] + [str(i) for i in range(spec.values)]
    library = Tokenizer(WordLevel({word: i for i, word in enumerate(words)} | marks, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in marks if word != "<unk>"])
    text: str = library.to_str(pretty=True)
    return text


def words_of(spec: mqar.Spec, tokens: np.ndarray) -> str:
    """Tokens (T,) as the text that the tokenizer reads."""
    marks = {mqar.BOS: "<bos>", mqar.SEP: "<sep>", mqar.ASK: "<ask>"}
    return " ".join(marks.get(t) or (chr(ord("a") + t) if t < spec.alphabet else str(t - spec.alphabet)) for t in map(int, tokens))


def best_run(folder: Path) -> tuple[Setting, tasks.Mqar, dict[str, Any]]:
    """(setting, task, result) of the finished Sessa run with the highest mean accuracy over the test points. Raises UserError where there is none."""
    found = []
    for name in sorted(path.name for path in folder.glob("mqar*") if path.is_dir()):
        for setting in report.tested(folder, name):
            run = training.finished(setting, folder)
            if setting.model == "sessa" and run is not None:
                found.append((float(np.mean([scores["accuracy"] for scores in run["test"].values()])), setting, run))
    if not found:
        raise UserError("there is no finished Sessa of Diffuse MQAR", got=folder, fix=f"python benchmarks/paper/run.py --tasks mqar --out {folder}")
    _, setting, run = max(found, key=lambda x: x[0])
    task = task_called(setting.task, argparse.Namespace(examples=2000, batch=None))
    assert isinstance(task, tasks.Mqar)
    return setting, task, run


def as_checkpoint(model: SessaLM, spec: mqar.Spec) -> SessaLM:
    """The model with the configuration that a deployed one needs: its first token, and the longest test as context."""
    shape = model.config.to_dict() | {"bos_token_id": mqar.BOS, "max_context": max(spec.tokens(gap) for gap in spec.test_gaps)}
    with torch.device("meta"):
        made = SessaLM(SessaConfig.from_dict(shape))
    made.load_state_dict(model.state_dict(), assign=True)
    return made.eval()


def engine_answers(session: Session, batch: Batch) -> Ints:
    """(B,Q) answers of a deployed engine: the text up to the first query's end in one prefill, each further query as a chunk behind the cached past."""
    found = np.empty(batch.at.shape, np.int64)
    for first in range(0, len(batch.tokens), ROWS):
        tokens, at = (x[first : first + ROWS] for x in (batch.tokens, batch.at))
        rows, start = len(tokens), 0
        backend = session.backend
        backend.reset()
        for query in range(at.shape[1]):
            end = int(at[0, query]) + 1
            ids, new = np.zeros((ROWS, end - start), np.int64), np.zeros(ROWS, np.int32)
            ids[:rows], new[:rows] = tokens[:, start:end], end - start
            found[first : first + rows, query] = backend.step(ids, new)[:rows].argmax(-1)
            start = end
    return found


@torch.no_grad()
def torch_answers(model: SessaLM, batch: Batch) -> Ints:
    """(B,Q) answers of PyTorch in float32."""
    parts = [slice(i, i + ROWS) for i in range(0, len(batch.tokens), ROWS)]
    found = [tasks.asked(model(torch.from_numpy(batch.tokens[part])), torch.from_numpy(batch.at[part])).argmax(-1) for part in parts]
    return torch.cat(found).numpy()


def cli(*words: object) -> str:
    """A command of sessa-deploy; its output. Raises UserError, with its last line, where it fails."""
    done = subprocess.run([sys.executable, "-m", "sessa_deploy", *map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"sessa-deploy {words[0]} failed", got=(done.stderr.strip().splitlines() or done.stdout.strip().splitlines() or ["no output"])[-1])
    return done.stdout


def engines(wanted: str) -> list[tuple[str, str]]:
    """[(backend, precision)] to judge; auto: ONNX Runtime in fp32 and fp16, and TensorRT in fp16 where both it and a GPU are."""
    if wanted != "auto":
        return [(backend, precision or "fp32") for backend, _, precision in (name.partition(":") for name in wanted.split(","))]
    tensorrt = torch.cuda.is_available() and importlib.util.find_spec("tensorrt") is not None
    return [("ort", "fp32"), ("ort", "fp16"), *([("trt", "fp16")] if tensorrt else [])]


def card(setting: Setting, task: tasks.Mqar, run: dict[str, Any], judge: Judge, example: str, told: str) -> str:
    """MODEL_CARD.md. run: the result of training."""
    spec, points, marks = task.spec, list(judge.points), task.yardsticks()
    partial = {point: max((height, rule) for rule, height in marks[point].items() if rule != "whole key") for point in points}
    best = max(partial.values())[1]
    lags = {point: "{}..{}".format(*x) for point, x in task.facts()["lags"].items()}
    rows = [*((name, [f"{100 * scores[p]:.2f}%" for p in points]) for name, scores in judge.figures.items()),
            (f"PyTorch, float32, {task.examples * spec.queries:,} answers a point", [f"{100 * run['test'][p]['accuracy']:.2f}%" for p in points]),
            (f"best partial rule: {best}", [f"{100 * partial[p][0]:.1f}%" for p in points]),
            ("any stored value", [f"{100 / spec.pairs:.1f}%" for _ in points])]
    table = "\n".join(f"| {name} | {' | '.join(cells)} |" for name, cells in rows)
    fall = "\n".join(f"| {point} | " + ", ".join(f"{lag}: {100 * y:.0f}%" for lag, y in run["test"][point]["lags"].items()) + " |" for point in points)
    changes = "\n".join(f"{name} answers other than PyTorch in float32, rightly or wrongly, to {' / '.join(f'{100 * y:.2f}%' for y in shares.values())} of the"
                        " questions." for name, shares in judge.changed.items())
    shown = textwrap.fill(example, 110, initial_indent=" " * 8, subsequent_indent=" " * 8)
    letters = f"a..{chr(ord('a') + spec.alphabet - 1)}"
    facts = run.get("machine", {})
    where = f"{facts['gpu'] + ', bf16 autocast' if facts.get('gpu') else facts.get('cpu', 'a machine')}, torch {facts.get('torch', 'unknown')}"
    again = (f"python benchmarks/paper/run.py --tasks mqar --key-length {spec.key} --models sessa --steps {setting.steps} "
             f"--rates sessa={setting.lr:g} --seeds {setting.seed + 1}")
    return f"""# Recall: a Sessa of Diffuse MQAR

{run['parameters']['all']:,} parameters ({setting.layers or models.LAYERS['sessa']} layers of {setting.width}), float32. It reads {spec.pairs} pairs of a key
of {spec.key} symbols and a value, then distractors that share prefixes with the keys, and says the value of each key that it is asked for.
A demonstration of recall, trained on one synthetic task: it knows no language.

| accuracy, {judge.points[points[0]].labels.size:,} answers a point | {' | '.join(points)} |
|{'---|' * (len(points) + 1)}
| lag, tokens | {' | '.join(lags[p] for p in points)} |
{table}

G is the number of distractors, the lag how many tokens lie between a question and its stored value. Training had at most {spec.gaps[1]} distractors, so the
last point lies at four times the largest training lag. What knows only a part of a key gets no further than the best partial rule.
{changes}

| point | accuracy by lag (middles of eighths of the range) |
|---|---|
{fall}

## Use

    sessa-deploy export checkpoints/recall --out out/recall
    sessa-deploy run out/recall --max-new-tokens 1 --prompt '
{shown}'

prints {told}. Words: {letters} are symbols, 0..{spec.values - 1} values, `<sep>` ends the pairs, `<ask>` begins the questions; `<bos>` comes before by itself.

## Training

{setting.steps:,} steps of {task.batch_size} fresh examples of at most {task.length} tokens, AdamW, peak rate {setting.lr:g}, seed {setting.seed}:
{run['seconds']:.0f} s on {where}. Again:

    {again}
    python benchmarks/paper/deploy.py

The seed decides: see [the study](../../benchmarks/paper/README.md) for those that never left "any stored value".

## Source and licence

No text and no data of others was used: `benchmarks/paper/mqar.py` draws the examples, after Diffuse MQAR of arXiv 2604.18580, section 5.1, whose sizes are
not published. Weights and code: Apache-2.0, as this repository.
"""


def short_example(model: SessaLM, spec: mqar.Spec) -> tuple[str, str]:
    """(a prompt with a few distractors, the model's answer to its first question) that the model gets right, where it gets one right."""
    batch = mqar.test_batch(spec, spec.gaps[0], 16, split=4)
    with torch.no_grad():
        chosen = model(torch.from_numpy(batch.tokens)).argmax(-1).numpy()
    first = chosen[np.arange(16), batch.at[:, 0]]
    row = int(np.argmax(first == batch.labels[:, 0]))
    return words_of(spec, batch.tokens[row, 1 : batch.at[row, 0] + 1]), words_of(spec, first[row : row + 1])


def main() -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("out/paper"), help="what run.py wrote; default: %(default)s")
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/recall"), help="where the checkpoint goes; default: %(default)s")
    parser.add_argument("--bundle", type=Path, default=Path("out/recall"), help="where bundles go, -PRECISION behind; default: %(default)s")
    parser.add_argument("--engines", default="auto", help="such as ort,ort-cuda:fp16,trt:fp16; default: ort:fp32,ort:fp16, and trt:fp16 where there is one")
    parser.add_argument("--measure", action="store_true", help="take --checkpoint as it is: accuracies alone, of PyTorch and the engines")
    parser.add_argument("--examples", type=int, default=250, help="of every test point; default: %(default)s")
    options = parser.parse_args()
    return measure(options) if options.measure else deploy(options)


def deployed(options: argparse.Namespace, backend: str, precision: str) -> Path:
    """The bundle for an engine, exported from the checkpoint and built where it is not there yet."""
    bundle = Path(f"{options.bundle}-{precision}")
    if not bundle.is_dir():
        cli("export", options.checkpoint, "--out", bundle, "--precision", precision)
    if backend == "trt":
        cli("build", bundle, "--max-batch", ROWS)
    return bundle


class Judge:
    """Accuracy of PyTorch's float32 and of engines on the same questions. figures: {engine: {point: accuracy}}; changed: {engine: {point: share of answers that
    are not PyTorch's, right or wrong}}."""

    def __init__(self, model: SessaLM, spec: mqar.Spec, examples: int) -> None:
        self.points = {f"G {gap}": mqar.test_batch(spec, gap, examples) for gap in spec.test_gaps}
        self.exact = {point: torch_answers(model.eval(), batch) for point, batch in self.points.items()}
        self.figures = {EXACT: {point: self._right(point, answers) for point, answers in self.exact.items()}}
        self.changed: dict[str, dict[str, float]] = {}

    def _right(self, point: str, answers: Ints) -> float:
        return float((answers == self.points[point].labels).mean())

    def __call__(self, bundle: Path, backend: str, precision: str) -> None:
        """An engine's answers."""
        with Session(bundle, backend, max_batch=ROWS) as session:
            name, answers = f"{session.backend.name}, {precision}", {point: engine_answers(session, batch) for point, batch in self.points.items()}
        self.figures[name] = {point: self._right(point, found) for point, found in answers.items()}
        self.changed[name] = {point: float((found != self.exact[point]).mean()) for point, found in answers.items()}

    def verdict(self) -> int:
        """Print the table; 1 where an engine is further from PyTorch's float32 than ALLOWED."""
        exact = self.figures[EXACT]
        worst = max(abs(scores[name] - exact[name]) for scores in self.figures.values() for name in exact)
        for name, scores in self.figures.items():
            print(f"{name:24} " + "   ".join(f"{point}: {100 * accuracy:.2f}%" for point, accuracy in scores.items()), flush=True)
        for name, shares in self.changed.items():
            print(f"{name:24} answers unlike PyTorch's: " + ", ".join(f"{point}: {100 * share:.2f}%" for point, share in shares.items()), flush=True)
        within = round(worst, 9) <= ALLOWED
        print(f"largest difference: {100 * worst:.3f} points ({'within' if within else 'beyond'} {100 * ALLOWED:g})", flush=True)
        return 0 if within else 1


def measure(options: argparse.Namespace) -> int:
    """--measure; its exit code."""
    facts = options.checkpoint / FACTS
    if not facts.is_file():
        raise UserError(f"this checkpoint has no {FACTS}", got=options.checkpoint, fix="make it first: python benchmarks/paper/deploy.py --runs RUNS")
    spec = mqar.Spec(key=int(json.loads(facts.read_text())["key"]))
    judge, failed = Judge(load_checkpoint(options.checkpoint), spec, options.examples), False
    for backend, precision in engines(options.engines):
        try:
            judge(deployed(options, backend, precision), backend, precision)
        except SessaError as error:
            print(f"{backend}, {precision}: {error}", file=sys.stderr, flush=True)
            failed = True
    return judge.verdict() or 2 * failed


def deploy(options: argparse.Namespace) -> int:
    """The whole road; its exit code."""
    setting, task, run = best_run(options.runs)
    spec = task.spec
    loaded = training.load(setting, task, options.runs)
    assert isinstance(loaded, SessaLM)
    model = as_checkpoint(loaded, spec)
    judge = Judge(model, spec, options.examples)
    prompt, told = short_example(model, spec)

    def save() -> int:
        text = card(setting, task, run, judge, prompt, told)
        save_checkpoint(model, options.checkpoint, tokenizer=tokenizer_json(spec), card=text)
        facts = {"key": spec.key, "run": setting.stem, "answers": options.examples * spec.queries, "accuracy": judge.figures, "changed": judge.changed}
        write_whole(options.checkpoint / FACTS, json.dumps(facts, indent=1) + "\n", "--checkpoint", "the accuracies")
        return sum(file.stat().st_size for file in options.checkpoint.iterdir() if file.is_file())

    size = save()
    print(f"{options.checkpoint}: {size / 1e6:.2f} MB, from {setting.stem}", flush=True)
    if size > LARGEST:
        raise UserError("the checkpoint is too large for the tree", got=f"{size:,} bytes", allowed=f"{LARGEST:,}", fix="train a smaller --width")
    for backend, precision in engines(options.engines):
        bundle = deployed(options, backend, precision)
        print(cli("validate", bundle, "--checkpoint", options.checkpoint, "--backend", backend).strip().splitlines()[-1], flush=True)
        judge(bundle, backend, precision)
    save()
    backend, precision = engines(options.engines)[0]
    said = cli("run", deployed(options, backend, precision), "--backend", backend, "--max-new-tokens", 1, "--prompt", prompt).strip()
    if said != told:
        raise UserError("run answers the card's example otherwise than PyTorch", got=said, allowed=told)
    print(f"run --max-new-tokens 1 --prompt '{prompt}': {said}", flush=True)
    return judge.verdict()


if __name__ == "__main__":
    leave(main)
