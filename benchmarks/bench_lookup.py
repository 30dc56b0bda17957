"""Prompt lookup against plain decoding: tokens a second of both in turn, tokens a step, acceptance, and whether the texts are the same.

    sessa-deploy export checkpoints/demo --out demo --precision fp16 --all-logits; sessa-deploy build demo; python benchmarks/bench_lookup.py demo --backend trt

For each engine of --backend (several with commas): what a step of several rows costs beside one of a single row; then texts of three kinds, each drawn with
drafts and without, in turn, so that other load hits both alike: code of the standard library completed greedily, the same drawn at temperature 1, and noise
(temperature 5), in which nothing repeats. A greedy text may leave that of plain decoding at a step whose two best logits are closer than ten times what the
logits of a step of several rows differ from those of single rows; such texts are counted. Exit code 1 where a text differs otherwise, or where noise is
slower than 0.97 of plain decoding.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import sysconfig
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sessa_deploy.contract import STEP_ROWS
from sessa_deploy.files import write_whole
from sessa_deploy.runtime.bundle import Bundle
from sessa_deploy.runtime.lookup import DraftStats
from sessa_deploy.runtime.sampling import SamplingParams
from sessa_deploy.runtime.session import Session

FILES = ("argparse", "json/decoder", "textwrap", "heapq", "dataclasses", "shutil", "random", "csv", "queue", "typing", "ast", "copy", "enum", "inspect",
         "logging", "subprocess", "tarfile", "zipfile", "statistics", "optparse")
KINDS = {"code, greedy": SamplingParams(), "code, temperature 1": SamplingParams(1.0, seed=0), "noise": SamplingParams(5.0, seed=0)}
GAP_FACTOR = 10  # design: a step whose two best logits are closer than this many times the logits' error may go either way
SLOWEST = 0.97
ROWS = (1, 2, 3, 4, 6, 8, 12, 16)


@dataclass
class Kind:
    """Texts of one kind. ratios: of each pair, plain seconds / seconds with drafts; close, wrong: texts that differ, where they may and elsewhere."""

    plain: float = 0.0
    drafted: float = 0.0
    tokens: int = 0
    ratios: list[float] = field(default_factory=list)
    stats: DraftStats = field(default_factory=DraftStats)
    close: int = 0
    wrong: int = 0

    def row(self) -> dict[str, Any]:
        return {"texts": len(self.ratios), "ratio": self.plain / self.drafted, "median_ratio": statistics.median(self.ratios),
                "tokens_per_second": self.tokens / self.drafted, "plain_tokens_per_second": self.tokens / self.plain, **self.stats.to_dict(),
                "differ_where_close": self.close, "wrong": self.wrong}


def source(name: str, library: Path) -> str:
    """The text of a module of the standard library, which may be a package in one Python and a file in another."""
    found = library / f"{name}.py"
    return (found if found.is_file() else library / name / "__init__.py").read_text(encoding="utf-8")


def prompts(session: Session, tokens: int) -> list[list[int]]:
    """A piece of each file of the standard library, in its own tokens."""
    library, found, rng = Path(sysconfig.get_paths()["stdlib"]), [], np.random.default_rng(0)
    for name in FILES:
        text = source(name, library)
        at = int(rng.integers(0, max(1, len(text) - 8 * tokens)))
        found.append(session.tokenizer.encode_first(text[at : at + 8 * tokens], session.config.bos_token_id)[:tokens])
    return found


def step_costs(session: Session, most: int, prompt: list[int], repeats: int = 30) -> dict[int, float]:
    """Milliseconds of a step of so many rows behind a prompt, ids out, the sizes in turn; what is recorded for a size is recorded before."""
    session.reset()
    session.prefill([prompt])
    backend, ids = session.backend, np.array((prompt * STEP_ROWS)[:STEP_ROWS])
    times: dict[int, list[float]] = {rows: [] for rows in range(1, most + 2) if rows in ROWS or rows == most + 1}
    for rows in range(1, most + 2):
        for turn in range(4):
            (backend.step_row_all if turn % 2 else backend.step_row_picks)(0, ids[:rows])
            backend.rewind(0, len(prompt))
    for _ in range(repeats):
        for rows, found in times.items():
            start = time.perf_counter()
            if rows == 1:
                backend.step_greedy(ids[None, :1], np.ones(1, np.int32))
            else:
                backend.step_row_picks(0, ids[:rows])
            found.append(time.perf_counter() - start)
            backend.rewind(0, len(prompt))
    return {rows: 1e3 * statistics.median(found) for rows, found in times.items()}


def logit_error(session: Session, tokens: list[int], most: int) -> float:
    """The largest difference of a logit between steps of several rows and steps of one."""
    worst, half = 0.0, len(tokens) // 2
    for start in range(half, len(tokens) - most - 1, 4 * (most + 1)):
        session.reset()
        session.prefill([tokens[:start]])
        part = np.array(tokens[start : start + most + 1])
        together = session.backend.step_row_all(0, part)
        session.backend.rewind(0, start)
        alone = np.stack([session.backend.step_row_all(0, part[i : i + 1])[0] for i in range(len(part))])
        worst = max(worst, float(np.abs(together.astype(np.float64) - alone).max()))
    return worst


def draw(session: Session, prompt: list[int], new: int, params: SamplingParams, lookup: int) -> tuple[list[int], float]:
    """(tokens, seconds from the first to the last) of one text."""
    session.reset()
    session.lookup = lookup
    stream = session.stream([prompt], new, params, stop_tokens=())
    tokens = [next(stream).token]
    start = time.perf_counter()
    tokens += [chunk.token for chunk in stream]
    return tokens, time.perf_counter() - start


def compare(session: Session, kind: Kind, prompt: list[int], new: int, params: SamplingParams, most: int, error: float, first: bool) -> None:
    """One text with and without drafts."""
    found: dict[int, tuple[list[int], float]] = {}
    for lookup in (most, 0) if first else (0, most):
        found[lookup] = draw(session, prompt, new, params, lookup)
        if lookup:
            kind.stats += session.drafts
    (mine, drafted), (theirs, plain) = found[most], found[0]
    kind.drafted, kind.plain, kind.tokens = kind.drafted + drafted, kind.plain + plain, kind.tokens + len(mine) - 1
    kind.ratios.append(plain / drafted)
    at = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b), None)
    if at is not None:
        session.reset()
        best = np.sort(session.prefill([[*prompt, *theirs[:at]]])[0].astype(np.float64))[-2:]
        close = bool(best[1] - best[0] < GAP_FACTOR * max(error, 1e-6)) or params.temperature > 0  # a draw may fall between two tokens that are far apart
        kind.close, kind.wrong = kind.close + close, kind.wrong + (not close)


def measure(bundle: Bundle, backend: str, given: argparse.Namespace) -> dict[str, Any]:
    """All kinds on one engine."""
    most = given.lookup
    with Session(bundle, backend, threads=given.threads, lookup=most) as session:
        room = min(session.capacity, session.config.max_context)
        prompt_tokens = min(given.prompt_tokens, room // 3)
        new = min(given.new, room - prompt_tokens)
        texts = prompts(session, prompt_tokens)
        costs = step_costs(session, most, texts[0])
        error = logit_error(session, draw(session, texts[0], new, SamplingParams(), 0)[0], most)
        kinds = {name: Kind() for name in KINDS}
        end, rounds = time.perf_counter() + given.seconds, 0
        while time.perf_counter() < end and (rounds < len(texts) or given.repeat):
            for name, params in KINDS.items():
                compare(session, kinds[name], texts[rounds % len(texts)], new, params, most, error, bool(rounds % 2))
            rounds += 1
        return {"backend": session.backend.name, "lookup": most, "precision": bundle.precision, "prompt_tokens": prompt_tokens, "new_tokens": new,
                "draft_cost": session.backend.draft_cost, "logit_error": error, "step_ms": costs, "kinds": {name: kind.row() for name, kind in kinds.items()}}


def main() -> int:
    """The command line; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--backend", default="auto", help="one or several of auto, ort, ort-cuda, trt, with commas")
    parser.add_argument("--lookup", type=int, default=STEP_ROWS - 1)
    parser.add_argument("--prompt-tokens", type=int, default=160)
    parser.add_argument("--new", type=int, default=320, help="new tokens of a text")
    parser.add_argument("--seconds", type=float, default=20.0, help="for the texts of one engine; a round is always ended")
    parser.add_argument("--repeat", action="store_true", help="go through the texts again while there is time")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    given = parser.parse_args()
    bundle, results, failed = Bundle.open(given.bundle), [], []
    for backend in given.backend.split(","):
        found = measure(bundle, backend, given)
        results.append(found)
        costs = found["step_ms"]
        print(f"{found['backend']}, {found['precision']}, drafts of up to {found['lookup']}; logits of several rows differ by {found['logit_error']:.2g}")
        print("  a step of 1 row takes " + f"{costs[1]:.3f} ms; " + ", ".join(f"{n}: {ms / costs[1]:.2f} x" for n, ms in costs.items() if n > 1)
              + f" (assumed: {found['draft_cost'][0]:g} and {found['draft_cost'][1]:g} a row)")
        for name, row in found["kinds"].items():
            share = "none" if row["acceptance"] is None else f"{100 * row['acceptance']:.0f}%"
            print(f"  {name}: {row['ratio']:.2f} x plain ({row['tokens_per_second']:.0f} and {row['plain_tokens_per_second']:.0f} tokens/s; median of texts "
                  f"{row['median_ratio']:.2f}), {row['tokens_per_step']:.2f} tokens a step, accepted {share} of {row['drafted']}; {row['texts']} texts, "
                  f"{row['differ_where_close']} differ where two logits are close, {row['wrong']} elsewhere")
            if row["wrong"]:
                failed.append(f"{found['backend']}, {name}: {row['wrong']} texts are not those of plain decoding")
        noise = found["kinds"]["noise"]
        if max(noise["ratio"], noise["median_ratio"]) < SLOWEST:  # other load may fall into one text
            failed.append(f"{found['backend']}: noise at {noise['ratio']:.3f} of plain decoding, below {SLOWEST}")
    for line in failed:
        print(f"WRONG {line}")
    if given.out:
        write_whole(given.out, (json.dumps(results, indent=2) + "\n").encode())
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
