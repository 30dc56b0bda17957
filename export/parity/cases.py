"""What parity feeds a model: seeded token ids in the shapes that deployment meets. numpy only, so it runs where an engine runs.

A case is a list of steps; a step is what a session hands the graph: input_ids (B,T) and new_length (B,). Every rung turns a case into the
same canonical tensors (see `Case.rows` and `Case.logit_rows`), so a whole-sequence oracle and a step-by-step engine can be compared.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sessa_deploy.config import SessaConfig
from sessa_deploy.contract import MAX_POSITION
from sessa_deploy.errors import UserError
from sessa_deploy.files import whole, write_whole
from sessa_deploy.reading import JSON_LIMIT, read_plain

CASES_FILE, CASES_IDS_FILE = "cases.json", "cases.npz"
CASES_SCHEMA = 1
LENGTHS = (1, 2, 63, 64, 65, 257)
TEXT_CHUNK = 256
BLOCK_EDGE = 64  # lengths around it cross the edges of every blocked implementation
POISON = (np.nan, np.inf, -np.inf)


@dataclasses.dataclass(frozen=True)
class Step:
    """input_ids (B,T) int64 and new_length (B,) int32 in 0..T: how many of the T tokens of each sequence count."""

    input_ids: np.ndarray
    new_length: np.ndarray


@dataclasses.dataclass(frozen=True)
class Case:
    """One script of steps for B sequences.

    capacity: rows P of the past handed to the graph in every step, or None for views of exact length (P = 0 in the first step).
    poison: fill the rows of the past beyond each length with NaN and Inf.
    generated: the steps from this one on carry one token each that the oracle chooses greedily; None if all ids are seeded.
    all_logits: judge the logits after every token, of a graph that gives them all, not only those after each step's last.
    """

    name: str
    kind: str
    steps: tuple[Step, ...]
    capacity: int | None = None
    poison: bool = False
    generated: int | None = None
    all_logits: bool = False

    @property
    def batch(self) -> int:
        """B."""
        return int(self.steps[0].input_ids.shape[0])

    @property
    def lengths(self) -> np.ndarray:
        """Tokens (B,) of each sequence at the end."""
        return np.sum([step.new_length for step in self.steps], axis=0).astype(np.int64)

    def sequences(self) -> list[np.ndarray]:
        """The counted token ids of each sequence, in order."""
        return [np.concatenate([step.input_ids[b, : step.new_length[b]] for step in self.steps]) for b in range(self.batch)]

    def rows(self) -> np.ndarray:
        """(R,2): sequence and position of each row of a canonical per-layer tensor: sequences one after the other, every position."""
        return np.array([(b, t) for b, n in enumerate(self.lengths) for t in range(n)], dtype=np.int64).reshape(-1, 2)

    def logit_rows(self) -> np.ndarray:
        """(N,3): step, sequence and position of each row of the canonical logits: those at new_length - 1, where new_length > 0, or all of them."""
        seen, out = np.zeros(self.batch, dtype=np.int64), []
        for i, step in enumerate(self.steps):
            for b, count in enumerate(step.new_length.tolist()):
                out += [(i, b, seen[b] + t) for t in (range(count) if self.all_logits else range(max(count - 1, 0), count))]
            seen = seen + step.new_length
        return np.array(out, dtype=np.int64).reshape(-1, 3)

    def last_rows(self) -> np.ndarray:
        """(N,) bool: which of logit_rows are the last of their step and sequence."""
        rows = self.logit_rows()
        return np.append((rows[1:, :2] != rows[:-1, :2]).any(axis=1), True)[: len(rows)]

    def alone(self, sequence: int) -> Case:
        """The steps in which one sequence has new tokens, as a case of one sequence; its other rows and steps are left out."""
        steps = tuple(Step(s.input_ids[sequence : sequence + 1], s.new_length[sequence : sequence + 1]) for s in self.steps if s.new_length[sequence] > 0)
        return dataclasses.replace(self, steps=steps)

    def with_generated(self, tokens: np.ndarray) -> Case:
        """This case with the oracle's tokens (B,N) in its generated steps."""
        if self.generated is None:
            return self
        steps = list(self.steps)
        for i in range(self.generated, len(steps)):
            steps[i] = Step(np.asarray(tokens[:, i - self.generated : i - self.generated + 1], dtype=np.int64), steps[i].new_length)
        return dataclasses.replace(self, steps=tuple(steps))


@dataclasses.dataclass(frozen=True)
class Cases:
    """All cases of one validation. chosen_by: "seed" until the oracle has chosen the generated tokens, then "oracle"."""

    cases: tuple[Case, ...]
    seed: int
    chosen_by: str = "seed"

    def digest(self) -> str:
        """sha256 over everything that a rung reads, so that tensors of other cases are never compared."""
        h = hashlib.sha256()
        for case in self.cases:
            h.update(json.dumps([case.name, case.kind, case.capacity, case.poison, case.generated, *([True] if case.all_logits else [])]).encode())
            for step in case.steps:
                h.update(repr(step.input_ids.shape).encode() + step.input_ids.astype("<i8").tobytes() + step.new_length.astype("<i4").tobytes())
        return h.hexdigest()


def build_cases(config: SessaConfig, seed: int = 0, lengths: Sequence[int] = LENGTHS, generate: int = 24, also: Sequence[int] = (),
                texts: Mapping[str, Sequence[int]] | None = None, all_logits: bool = False) -> Cases:
    """Prefill at the odd lengths, step-by-step decode, greedy generation, chunked prefill, a ragged batch and poisoned caches.

    Lengths beyond config.max_context are left out or cut to it; those in `also` are judged as they are, since a session may be opened for more tokens
    than that. Ids are uniform over the vocabulary, from `seed` alone. texts: name -> token ids of real text, each fed in chunks of TEXT_CHUNK and cut
    to max_context. all_logits: judge the logits of every token. Raises UserError on a length that rotary positions do not reach.
    """
    for n in also:
        if config.use_forward_rope and n > MAX_POSITION:
            raise UserError("no rotary position is that far out", got=f"a length of {n}", allowed=f"at most {MAX_POSITION} tokens",
                            fix="choose another --length")
    rng = np.random.default_rng([seed, config.vocab_size, config.max_context])
    limit = config.max_context

    def step(*new: int, tokens: int | None = None) -> Step:
        width = max(new) if tokens is None else tokens
        return Step(rng.integers(0, config.vocab_size, (len(new), width), dtype=np.int64), np.array(new, dtype=np.int32))

    def fit(steps: list[tuple[int, ...]]) -> list[Step]:
        """Steps of B new lengths each, cut so that no sequence exceeds the context."""
        seen, out = np.zeros(len(steps[0]), dtype=np.int64), []
        for new in steps:
            cut = np.minimum(new, limit - seen)
            if cut.max() > 0:
                out.append(step(*(int(n) for n in cut)))
                seen += cut
        return out

    cases = [Case(f"prefill-{n}", "prefill", (step(n),)) for n in dict.fromkeys((*(n for n in lengths if n <= limit), *also))]
    cases.append(Case("decode", "decode", tuple(fit([(1,)] * (BLOCK_EDGE + 2)))))
    cases.append(Case("chunked", "chunked", tuple(fit([(64,), (65,), (1,), (63,), (2,), (62,)]))))
    ragged = fit([(65, 1, 0, 63), (2, 64, 64, 0), (1, 1, 1, 1), (0, 1, 1, 1), (1, 0, 1, 0), (5, 3, 0, 1), (1, 1, 1, 1)])
    cases.append(Case("ragged", "ragged", tuple(ragged), capacity=_longest(ragged) + 3, poison=True))
    poisoned = fit([(31, 0), (33, 2), (1, 1), (1, 1), (0, 40), (1, 1)])
    cases.append(Case("poisoned", "poisoned", tuple(poisoned), capacity=2 * _longest(poisoned), poison=True))
    prompt = min(33, max(1, limit - generate))
    greedy = fit([(prompt,), *[(1,)] * min(generate, limit - prompt)])
    cases.append(Case("greedy", "greedy", tuple(greedy), generated=1 if len(greedy) > 1 else None))
    for name, given in (texts or {}).items():
        ids = np.asarray(given[:limit], dtype=np.int64)
        parts = [ids[at : at + TEXT_CHUNK] for at in range(0, len(ids), TEXT_CHUNK)]
        cases.append(Case(name, "text", tuple(Step(part[None], np.array([len(part)], dtype=np.int32)) for part in parts)))
    return Cases(tuple(dataclasses.replace(case, all_logits=all_logits) for case in cases), seed)


def _longest(steps: Sequence[Step]) -> int:
    return int(np.sum([step.new_length for step in steps], axis=0).max())


class _OtherSchemaError(UserError):
    pass


def save_cases(cases: Cases, folder: str | Path) -> None:
    """Write cases.npz and cases.json into `folder`, the JSON last and each whole or not at all. Raises UserError if that fails."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {f"{case.name}/{j}/{key}": getattr(step, key) for case in cases.cases for j, step in enumerate(case.steps) for key in ("input_ids", "new_length")}
    with whole(folder / CASES_IDS_FILE, what="the cases", sync=False) as stream:
        np.savez(stream, **arrays)  # type: ignore[arg-type]
    fields = ("name", "kind", "capacity", "poison", "generated", "all_logits")
    listing = [{**{f: getattr(case, f) for f in fields}, "steps": len(case.steps)} for case in cases.cases]
    text = json.dumps({"schema": CASES_SCHEMA, "seed": cases.seed, "chosen_by": cases.chosen_by, "digest": cases.digest(), "cases": listing}, indent=1)
    write_whole(folder / CASES_FILE, text + "\n", what="the cases", sync=False)


def load_cases(folder: str | Path) -> Cases:
    """Read what save_cases wrote. Raises UserError if it is absent, damaged or of another schema."""
    folder = Path(folder)
    mend = "make the folder with `sessa-deploy validate BUNDLE --checkpoint CHECKPOINT --dump DIR`"
    try:
        data: dict[str, Any] = json.loads(read_plain(folder / CASES_FILE, JSON_LIMIT))
        if data.get("schema") != CASES_SCHEMA:
            raise _OtherSchemaError(f"{folder / CASES_FILE} has another schema", got=data.get("schema"), allowed=CASES_SCHEMA, fix=mend)
        with np.load(folder / CASES_IDS_FILE, allow_pickle=False) as arrays:
            cases = Cases(tuple(
                Case(entry["name"], entry["kind"],
                     tuple(Step(arrays[f"{entry['name']}/{j}/input_ids"], arrays[f"{entry['name']}/{j}/new_length"]) for j in range(entry["steps"])),
                     entry["capacity"], entry["poison"], entry["generated"], entry.get("all_logits", False))
                for entry in data["cases"]), data["seed"], data["chosen_by"])
        digest = data["digest"]
    except _OtherSchemaError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, ArithmeticError, RecursionError, UserError, zipfile.BadZipFile,
            zlib.error) as error:
        raise UserError(f"{folder} holds no readable parity cases", got=error, allowed=f"{CASES_FILE} and {CASES_IDS_FILE}", fix=mend) from None
    if cases.digest() != digest:
        raise UserError(f"the cases in {folder} are damaged", got="another digest", allowed=digest, fix=mend)
    return cases
