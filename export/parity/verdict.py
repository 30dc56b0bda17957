"""From judged outputs to one verdict: which output diverged first, and which part of the model it points at."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from sessa_deploy.config import SessaConfig
from sessa_deploy.contract import CACHE_FIELDS
from sessa_deploy.export.parity.metrics import PASS, UNFIT_VERDICT, Comparison, TokenCheck, plain_number

REPORT_SCHEMA = 1
FP16_MAX = 65504.0
_PARALLEL = 0.999


@dataclasses.dataclass(frozen=True)
class Failure:
    """The first thing that is wrong. where: "layer 2 s", "logits", "weights", a rung; detail: the rest of the line; hint: what to look at."""

    where: str
    detail: str
    hint: str = ""
    rung: str = ""
    layer: int | None = None
    field: str = ""

    @property
    def line(self) -> str:
        """One line without the hint."""
        return f"{self.where}: {self.detail}"


@dataclasses.dataclass
class Report:
    """Everything one validation found. passed and failure are the verdict; `line()` is the last line of the verb."""

    precision: str
    config: SessaConfig
    environment: dict[str, str]
    rungs: dict[str, dict[str, Any]]
    cases: dict[str, dict[str, Any]]
    comparisons: list[Comparison]
    tokens: list[TokenCheck]
    headroom: dict[str, dict[str, list[float]]]
    positions: dict[str, dict[str, dict[int, list[float]]]]
    weights: dict[str, Any]
    failure: Failure | None = None
    seconds: float = 0.0
    worth: dict[str, Any] | None = None  # of weights in 8 bits, see worth.measure; with passed, max_loss and line

    @property
    def passed(self) -> bool:
        """Whether everything agrees, and weights in 8 bits are worth it."""
        return self.failure is None and (self.worth is None or self.worth["passed"])

    def judge_worth(self, found: dict[str, Any], max_loss: float) -> None:
        """Take the figures of weights in 8 bits, and their verdict: a loss of more than max_loss percent fails, and so does one that is no number."""
        costliest = found["layers"][0]
        passed = bool(found["loss_percent"] <= max_loss)
        line = (f"{found['format']} takes {found['loss_percent']:+.3f}% bits per byte ({found['bits_per_byte']:.4f} for {found['original_bits_per_byte']:.4f}; "
                f"at most +{max_loss:g}%), KL {found['kl']:.1e} nats a token, greedy agreement {found['agreement']:.2%}, on {found['tokens']} tokens of "
                f"{', '.join(found['texts'])}; the layer that costs most is {costliest['name']} (KL {costliest['kl']:.1e} alone)")
        self.worth = {**found, "passed": passed, "line": line, "max_loss_percent": max_loss}

    def verdicts(self) -> list[str]:
        """Of weights in 8 bits, the two verdicts: whether the numbers are those of the weights as they are stored, and what these are worth."""
        if self.worth is None:
            return []
        exact = f"FAILED at {self.failure.line}" if self.failure else f"PASSED ({self._agreement()}, with the weights as they are stored)"
        return [f"exactness: {exact}", f"worth: {'PASSED' if self.worth['passed'] else 'FAILED'} ({self.worth['line']})"]

    @property
    def judged(self) -> list[tuple[str, str]]:
        """(rung, mode) of everything that was judged, in order."""
        return list(dict.fromkeys((c.rung, c.mode) for c in self.comparisons))

    def worst(self) -> list[Comparison]:
        """Of every rung, mode and output the case with the worst verdict and the largest share of its limit, in the model's order."""
        found: dict[tuple[str, str, int | None, str], Comparison] = {}
        for c in self.comparisons:
            key = (c.rung, c.mode, c.layer, c.field)
            if key not in found or _badness(c) > _badness(found[key]):
                found[key] = c
        place = {pair: i for i, pair in enumerate(self.judged)}
        return sorted(found.values(), key=lambda c: (place[c.rung, c.mode], c.order))

    def line(self) -> str:
        """`parity: PASSED (...)` or `parity: FAILED at ...`."""
        if self.failure is not None:
            return f"parity: FAILED at {self.failure.line}"
        if self.worth is not None and not self.worth["passed"]:
            return f"parity: FAILED at worth: {self.worth['line']}"
        return f"parity: PASSED ({self._agreement()}; {self.seconds:.0f} s)"

    def _agreement(self) -> str:
        worst = max(self.comparisons, key=_badness)
        return (f"{', '.join(dict.fromkeys(r for r, _ in self.judged))} against float64 at {self.precision}; {len(self.comparisons)} outputs "
                f"of {len(self.cases)} cases, the worst at {worst.score:.0%} of its limit in {worst.output}")

    def to_dict(self, details: bool = True) -> dict[str, Any]:
        """Plain values for JSON. details: every comparison and position, not only the worst case of each output."""
        failure = None if self.failure is None else {**dataclasses.asdict(self.failure), "line": self.failure.line}
        data = {
            "schema_version": REPORT_SCHEMA, "passed": self.passed, "line": self.line(), "failure": failure, "precision": self.precision,
            "config": self.config.to_dict(), "environment": self.environment, "seconds": round(self.seconds, 1), "rungs": self.rungs, "cases": self.cases,
            "weights": self.weights, "exactness": None if self.worth is None else {"passed": self.failure is None, "line": self.verdicts()[0]},
            "worth": None if self.worth is None else _plain(self.worth),
            "worst": [c.to_dict() for c in self.worst()], "tokens": [t.to_dict() for t in self.tokens],
            "fp16_max": FP16_MAX,
            "headroom": {rung: {key: [plain_number(float(v)) for v in row] for key, row in rows.items()} for rung, rows in self.headroom.items()},
        }
        if details:
            data["comparisons"] = [c.to_dict() for c in self.comparisons]
            data["positions"] = {case: {name: {str(i): [plain_number(v) for v in row] for i, row in layers.items()} for name, layers in by.items()}
                                 for case, by in self.positions.items()}
        return data


def _plain(value: Any) -> Any:
    """Plain values for JSON at any depth."""
    if isinstance(value, dict):
        return {key: _plain(x) for key, x in value.items()}
    return [_plain(x) for x in value] if isinstance(value, list) else plain_number(value)


def _badness(c: Comparison) -> tuple[int, float]:
    return ({PASS: 0, UNFIT_VERDICT: 2}.get(c.verdict, 1), c.score if not math.isnan(c.score) else math.inf)


def first_divergence(comparisons: Sequence[Comparison], cases: Mapping[str, Mapping[str, Any]]) -> Failure | None:
    """The first output, in the order of a forward pass, that fails in the first rung and mode that has any failure; None if all pass.

    cases: name -> kind and poison, as in Report.
    """
    bad = [c for c in comparisons if c.verdict != PASS]
    if not bad:
        return None
    rung, mode = bad[0].rung, bad[0].mode
    here = [c for c in bad if (c.rung, c.mode) == (rung, mode)]
    order = min(c.order for c in here)
    first = max((c for c in here if c.order == order), key=lambda c: c.verdict == UNFIT_VERDICT)  # else the first, simplest case
    fields = {c.field for c in here if c.layer == first.layer and c.case == first.case}
    at = f", sequence {first.first_bad[0]}, position {first.first_bad[1]}" if first.first_bad else ""
    if first.verdict == UNFIT_VERDICT:
        hint = ""
    elif mode != "graph" and _passes(comparisons, rung, "graph"):
        hint = "the graph itself passes: look at how the session keeps, appends to or hands over its caches"
    else:
        hint = _where_in_cases({c.case for c in here}, {c.case for c in comparisons if (c.rung, c.mode) == (rung, mode)}, cases) or _hint(first, fields)
    return Failure(first.output, f"{rung} ({mode}), case {first.case}{at}: {first.reason}", hint, rung, first.layer, first.field)


def _where_in_cases(failing: set[str], judged: set[str], cases: Mapping[str, Mapping[str, Any]]) -> str:
    """What the choice of failing cases says by itself, "" if nothing."""
    fine = judged - failing
    if fine and all(cases[name]["poison"] for name in failing) and not any(cases[name]["poison"] for name in fine):
        return "only cases with NaN beyond the lengths fail: something reads rows of the past at or beyond past_length[b]"
    kinds = {cases[name]["kind"] for name in failing}
    if "prefill" not in kinds and any(cases[name]["kind"] == "prefill" for name in fine):
        return "prefill from an empty past is right: look at how the past is used (positions, lengths, the mask of the past)"
    return ""


def _passes(comparisons: Sequence[Comparison], rung: str, mode: str) -> bool:
    own = [c for c in comparisons if c.rung == rung and c.mode == mode]
    return bool(own) and all(c.verdict == PASS for c in own)


def _hint(first: Comparison, fields: set[str]) -> str:
    """Which part of the model the failing fields of the first bad layer point at. s follows k_f, v_f and k_b, so those are read first."""
    layer = first.layer
    if layer is None:
        return "every layer is right: look at the last W_out, the final LayerNorm, lm_head, or which row the logits are taken from"
    early = fields & {"k_f", "v_f", "k_b"}
    if len(early) == 3:
        before = "the embedding" if layer == 0 else f"layer {layer - 1}'s gate or W_out"
        return f"all of the layer's inputs are off: look at {before}, or layer {layer}'s LayerNorm or W_in"
    if early == {"k_f"}:
        return "forward branch: k_proj or the rotary positions"
    if early == {"v_f"}:
        return "forward branch: v_proj"
    if early == {"k_b"}:
        return "feedback branch: proj_fb"
    if early:
        return f"several projections: {', '.join(f for f in CACHE_FIELDS if f in early)}"
    at, parallel = first.first_bad, first.first_cosine is not None and first.first_cosine > _PARALLEL
    if at is not None and at[1] == 0:
        if parallel:
            return "feedback branch: position 0 is a multiple of what it should be, so it has a predecessor; it must have none"
        return "forward branch: position 0 is off, where s is f alone: look at q_proj, causal attention or out_proj"
    return "feedback branch: position 0, where s is f alone, is right: look at feedback attention or gamma (or causal attention from that position on)"
