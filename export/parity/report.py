"""One HTML file that shows a whole validation: verdict, figures, tables. No script, nothing fetched from anywhere."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sessa_deploy.export.parity import plots
from sessa_deploy.export.parity.metrics import FACTOR, NEAR_TIE, PASS, UNFIT, Comparison, floor_eps
from sessa_deploy.export.parity.rungs import ORACLE, PLAIN
from sessa_deploy.export.parity.verdict import FP16_MAX, Report
from sessa_deploy.files import write_whole

_STYLE = """
:root{--ink:#1d222b;--soft:#5b626e;--line:#e3e6eb;--paper:#fff;--wash:#f6f7f9;--good:#1e7d4a;--bad:#c62f3b}
*{box-sizing:border-box}body{margin:0;background:var(--wash);color:var(--ink);font:15px/1.55 system-ui,-apple-system,"Segoe UI","DejaVu Sans",sans-serif}
main{max-width:1120px;margin:0 auto;padding:28px 24px 64px}h1{font-size:22px;margin:0 0 2px}h2{font-size:16px;margin:0 0 10px}
.card{background:var(--paper);border:1px solid var(--line);border-radius:10px;padding:18px 20px;margin-top:18px}
.verdict{border-left:6px solid var(--good)}.verdict.bad{border-left-color:var(--bad)}.verdict strong{color:var(--good)}.verdict.bad strong{color:var(--bad)}
.soft{color:var(--soft)}.small{font-size:13px}.two{display:grid;grid-template-columns:1fr 1fr;gap:18px}.two .card{margin-top:0}.two{margin-top:18px}
@media(max-width:800px){.two{grid-template-columns:1fr}}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:13px;font-variant-numeric:tabular-nums}
th{text-align:left;color:var(--soft);font-weight:600;border-bottom:1px solid var(--line);padding:5px 10px 5px 0;white-space:nowrap}
td{border-bottom:1px solid #eff1f4;padding:4px 10px 4px 0;white-space:nowrap}td.n,th.n{text-align:right}tr:last-child td{border-bottom:0}
td.wrap{white-space:normal}tr.bad td{background:#fdf0f1}.tag{display:inline-block;border-radius:4px;padding:0 7px;font-size:12px;font-weight:600}
.pass{background:#e4f4ea;color:var(--good)}.fail,.unfit{background:#fbe3e5;color:var(--bad)}
.bar{position:relative;min-width:110px;background:#eef0f3;border-radius:3px;height:8px;display:inline-block;vertical-align:middle;margin-right:8px;overflow:hidden}
.bar i{position:absolute;left:0;top:0;bottom:0;background:#6fa8dc;border-radius:3px}.bar i.over{background:var(--bad)}
img{max-width:100%;height:auto;display:block;margin:0 auto}code{font:13px ui-monospace,"DejaVu Sans Mono",monospace}
details summary{cursor:pointer;font-weight:600}
"""


def write_report(report: Report, path: str | Path) -> Path:
    """Write the report as one HTML file, whole or not at all. Raises UserError if that fails or matplotlib is missing."""
    return write_whole(path, render(report), "--report", "the report")


def render(report: Report) -> str:
    """The report as HTML text."""
    sections = [_verdict(report), *([_worth(report.worth)] if report.worth else []), _facts(report)]
    if report.comparisons:
        sections.append(_card("Error by layer", _image(plots.error_by_layer(report), "error by layer"),
                              "Every output in the order of a forward pass, the worst case of each. A red ring marks an output beyond its limit."))
    for case in report.positions:
        sections.append(_card(f"Error by position: {case}", _image(plots.error_by_position(report, case), "error by position"),
                              "s carries the state of the feedback branch, so an error that grows with position shows here first."))
    if report.headroom:
        sections.append(_headroom(report))
    sections += [_tokens(report), _outputs(report), _cases(report)]
    title = "Parity: " + ("passed" if report.passed else "failed")
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
            f"<title>{title}</title><style>{_STYLE}</style></head><body><main>{''.join(sections)}</main></body></html>\n")


def _text(value: Any) -> str:
    return html.escape(str(value))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2e}" if value and (abs(value) < 1e-3 or abs(value) >= 1e4) else f"{value:.4g}"


def _image(svg: bytes, alt: str) -> str:
    return f'<img alt="{_text(alt)}" src="data:image/svg+xml;base64,{base64.b64encode(svg).decode()}">'


def _card(title: str, body: str, note: str = "") -> str:
    said = f'<p class="soft small">{_text(note)}</p>' if note else ""
    return f'<section class="card"><h2>{_text(title)}</h2>{said}{body}</section>'


def _table(head: Sequence[tuple[str, bool]], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    """head: (title, is a number); rows: (class of the row, cells as HTML)."""
    kinds = [' class="n"' if number else "" for _, number in head]
    top = "".join(f"<th{kind}>{_text(name)}</th>" for (name, _), kind in zip(head, kinds, strict=True))
    body = ""
    for row, cells in rows:
        inner = "".join(f"<td{kind}>{cell}</td>" for cell, kind in zip(cells, kinds, strict=True))
        body += f'<tr class="{row}">{inner}</tr>'
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _pairs(items: Iterable[tuple[Any, Any]]) -> str:
    return "<table>" + "".join(f'<tr><td class="soft">{_text(k)}</td><td class="wrap">{_text(v)}</td></tr>' for k, v in items) + "</table>"


def _verdict(report: Report) -> str:
    word = "passed" if report.passed else "failed"
    detail = report.line().removeprefix("parity: PASSED (").removesuffix(")") if report.failure is None else f"at {report.failure.line}"
    hint = f'<p class="small">Where to look: {_text(report.failure.hint)}</p>' if report.failure and report.failure.hint else ""
    both = "".join(f'<p class="small">{_text(line)}</p>' for line in report.verdicts())
    rule = (f"An output passes when its error is at most {FACTOR:g} times the yardstick's plus {floor_eps(report.precision):.2g} of its size, as RMS and "
            f"as maximum, both against float64; a yardstick off by more than {UNFIT:.0%} makes the precision unfit.")
    kind = "card verdict" if report.passed else "card verdict bad"
    name = _text(report.environment.get("bundle", ""))
    return (f'<h1>Sessa parity report</h1><div class="soft">{name}, {_text(report.precision)}</div>'
            f'<section class="{kind}"><h2><strong>Parity {word}</strong></h2><div>{_text(detail)}</div>{hint}{both}'
            f'<p class="soft small" style="margin-bottom:0">{_text(rule)}</p></section>')


def _worth(worth: dict[str, Any]) -> str:
    rows = [("", [_text(x["name"]), _number(x["kl"]), f"{x['loss_percent']:+.3f}%"]) for x in worth["layers"]]
    word = "pass" if worth["passed"] else "fail"
    facts = _pairs([("weights", worth["format"] + (f", kept: {', '.join(worth['kept'])}" if worth["kept"] else "")),
                    ("bits per byte", f"{worth['bits_per_byte']:.4f}, of the original weights {worth['original_bits_per_byte']:.4f}"),
                    ("more bits", f"{worth['loss_percent']:+.3f}%, at most +{worth['max_loss_percent']:g}%"),
                    ("KL, nats a token", f"{_number(worth['kl'])}, at most {_number(worth['kl_max'])}"), ("greedy agreement", f"{worth['agreement']:.2%}"),
                    ("text", f"{', '.join(worth['texts'])}: {worth['tokens']} tokens, {worth['bytes']} bytes")])
    table = _table([("layer alone in 8 bits", False), ("KL, nats a token", True), ("more bits", True)], rows)
    return _card("Worth of the weights in 8 bits", f'<p><span class="tag {word}">{word}</span></p>{facts}{table}',
                 f"Beside the model with the checkpoint's own weights, both float32. The layers, each alone in 8 bits, on {worth['layer_tokens']} tokens.")


def _facts(report: Report) -> str:
    rungs = [("", [f"<code>{_text(name)}</code>", _text(_MEANING.get(name, "the engine")),
                   _text(", ".join(f"{k} {v}" for k, v in info["versions"].items())), f"{info['seconds']:.1f} s"]) for name, info in report.rungs.items()]
    config = [(k, v) for k, v in report.config.to_dict().items() if v is not None and k not in ("model_type", "architectures")]
    weights = report.weights
    count, lost = weights["tensors"], len(weights["missing"])
    held = f"{lost} of {count} tensors differ" if lost else f"all {count} tensors of the checkpoint, bit for bit"
    extra = "".join(f'<p class="small"><code>{_text(name)}</code>: {_text(what)}</p>' for name, what in list(weights["missing"].items())[:20])
    ladder = _table([("rung", False), ("what it is", False), ("versions", False), ("time", True)], rungs)
    return (f'<div class="two"><section class="card"><h2>Model</h2>{_pairs(config)}</section><section class="card"><h2>Environment</h2>'
            f"{_pairs([*report.environment.items(), ('weights in the graph', held)])}{extra}</section></div>{_card('Rungs', ladder)}")


_MEANING = {ORACLE: "float64, token by token: the truth", PLAIN: "the textbook ops at the bundle's precision: the yardstick",
            "torch": "the model at the bundle's precision", "worth": "its 8-bit weights beside the checkpoint's, on text",
            "ort": "model.onnx in ONNX Runtime, CPU", "ort-cuda": "ONNX Runtime, GPU", "trt": "the TensorRT engine"}


def _score(c: Comparison) -> str:
    width = min(100.0, 100.0 * c.score) if c.score == c.score else 100.0
    kind = "" if c.score <= 1 else "over"
    return f'<span class="bar"><i class="{kind}" style="width:{width:.0f}%"></i></span>{c.score:.0%}'


def _outputs(report: Report) -> str:
    head = [("output", False), ("verdict", False), ("share of the limit", False), ("RMS error", True), ("yardstick", True), ("max error", True),
            ("limit", True), ("tolerance", True), ("factor", True), ("cosine", True), ("KL", True), ("greedy", True), ("worst case", False)]
    blocks = []
    worst, shown = report.worst(), [pair for pair in report.judged if pair[1] != "greedy"][-1]
    for rung, mode in report.judged:
        rows = []
        for c in (c for c in worst if (c.rung, c.mode) == (rung, mode)):
            place = c.case + (f" (from position {c.first_bad[1]})" if c.first_bad else "")
            rows.append(("" if c.verdict == PASS else "bad", [
                _text(c.output), f'<span class="tag {c.verdict}">{c.verdict}</span>', _score(c), _number(c.rms_error), _number(c.plain_rms),
                _number(c.max_error), _number(c.limit_max), _number(c.tolerance), _number(c.factor), f"{c.cosine:.9f}", _number(c.kl),
                "" if c.agreement is None else f"{c.agreement:.1%}", _text(place)]))
        failed = any(c.verdict != PASS for c in worst if (c.rung, c.mode) == (rung, mode))
        first = (rung, mode) == shown or failed
        word = "fail" if failed else "pass"
        summary = f'<summary>{_text(rung)}, {_text(mode)} <span class="tag {word}">{word}</span></summary>'
        blocks.append(f"<details{' open' if first else ''}>{summary}{_table(head, rows)}</details>")
    note = ("RMS errors are relative to the output's RMS; max error and limit are absolute. Tolerance and factor: the smallest tolerance (relative to the "
            "largest value) and the smallest multiple of the yardstick that would pass.")
    return _card("Outputs, the worst case of each", "".join(blocks), note)


def _tokens(report: Report) -> str:
    rows = [("bad" if t.disagreements else "", [_text(t.rung), _text(t.mode), str(t.steps), str(t.agree), str(len(t.near_ties)), str(len(t.disagreements)),
                                                _number(t.logit_error)]) for t in report.tokens]
    table = _table([("rung", False), ("mode", False), ("steps", True), ("agree", True), ("near ties", True), ("disagree", True), ("largest logit error", True)],
                   rows)
    listed = [(t, e, word) for t in report.tokens for word, found in (("disagrees", t.disagreements), ("near tie", t.near_ties)) for e in found]
    if listed:
        head = [("rung", False), ("mode", False), ("case", False), ("sequence", True), ("position", True), ("expected", True), ("got", True), ("gap", True),
                ("", False)]
        keys = ("case", "sequence", "position", "expected", "got", "gap")
        table += _table(head, [("", [_text(t.rung), _text(t.mode), *(_text(e[key]) for key in keys), word]) for t, e, word in listed[:40]])
    note = f"Teacher-forced. Another token is excused where float64's best two logits lie closer than {NEAR_TIE:g} times the largest logit error."
    return _card("Greedy tokens", table, note)


def _headroom(report: Report) -> str:
    rows = report.headroom[ORACLE]
    peak = max(float(v) for v in rows["s*g"] + rows["s"])
    left = f"The largest value is {_number(peak)}, {FP16_MAX / peak:.3g} times below the end of fp16." if peak > 0 else "Everything is zero."
    return _card("Headroom", _image(plots.headroom(report), "headroom"), f"Largest |s| and |s*g| in float64 over all cases. {left}")


def _cases(report: Report) -> str:
    rows = [("", [_text(name), _text(c["kind"]), str(c["batch"]), str(c["steps"]), _text(", ".join(map(str, c["lengths"]))),
                  _text(c["capacity"] or "exact"), "NaN, Inf" if c["poison"] else ""]) for name, c in report.cases.items()]
    return _card("Cases", _table([("case", False), ("kind", False), ("sequences", True), ("steps", True), ("tokens", False), ("rows of past", False),
                                  ("beyond the lengths", False)], rows))
