"""`sessa-deploy bench`: first-token and inter-token latency of a bundle."""

from __future__ import annotations

from typing import Any

import click

from sessa_deploy.cli import inputs
from sessa_deploy.cli.options import BACKEND, DRAFTED, FILE, NOT_NEGATIVE, PATH, POSITIVE, POSITIVE_INT, THREADS
from sessa_deploy.cli.output import check_outputs, to_stdout, write_json


@click.command("bench")
@click.argument("bundle", type=PATH)
@click.option("--json", "json_file", type=FILE, help="Write the figures to this file; - for standard output.")
@click.option("--backend", type=BACKEND, default="auto", show_default=True, help="What runs the graph.")
@click.option("--batch", type=POSITIVE_INT, default=1, show_default=True, help="Sequences decoded together.")
@click.option("--prompt-tokens", type=POSITIVE_INT, default=128, show_default=True, help="Context at which decoding starts.")
@click.option("--window", type=POSITIVE_INT, default=128, show_default=True, help="Tokens decoded before the context is rewound to there.")
@click.option("--steps", type=POSITIVE_INT, default=1000, show_default=True, help="Decode at least this many steps,")
@click.option("--seconds", type=NOT_NEGATIVE, default=3.0, show_default=True, help="and for at least this long,")
@click.option("--max-seconds", type=NOT_NEGATIVE, default=60.0, show_default=True, help="but for no longer than this.")
@click.option("--capacity", type=POSITIVE_INT, help="Tokens a cache holds; default: the model's max_context, or what prompt and window need.")
@click.option("--threads", type=THREADS, help="CPU threads, no more than the cores there are; default: all.")
@click.option("--prompt-file", type=PATH, metavar="FILE", help="Begin with the first tokens of this text, in place of random ones; - for standard input.")
@click.option("--lookup", type=DRAFTED, metavar="N",
              help="Also measure prompt lookup with drafts of up to N tokens (1 to 15), against plain decoding, over windows of greedy text.")
@click.option("--bandwidth", type=POSITIVE, help="Memory bandwidth in GB/s, which sets the floor; default on a GPU: measured by a copy.")
def command(
    bundle: str, json_file: str | None, backend: str, batch: int, prompt_tokens: int, window: int, steps: int, seconds: float, max_seconds: float,
    capacity: int | None, threads: int | None, prompt_file: str | None, lookup: int | None, bandwidth: float | None,
) -> None:
    """Measure BUNDLE: time to the first token, time between tokens (p50, p95, p99), tokens a second, and what memory they took."""
    from dataclasses import replace

    from sessa_deploy.cuda import devices, used_memory
    from sessa_deploy.runtime import traffic
    from sessa_deploy.runtime.bench import BenchOptions, measure
    from sessa_deploy.runtime.bundle import Bundle
    from sessa_deploy.runtime.engines import ON_A_GPU, choose
    from sessa_deploy.runtime.report import count_progress
    from sessa_deploy.runtime.session import Session

    check_outputs({"--json": (json_file, "the figures")})
    given = None if bandwidth is None else bandwidth * 1e9
    options = BenchOptions(prompt_tokens, window, steps, seconds, max_seconds, bandwidth=given)
    written = None if prompt_file is None else inputs.read_text(prompt_file, "--prompt-file")
    opened = Bundle.open(bundle)
    name = choose(opened) if backend == "auto" else backend
    before = 0
    if name in ON_A_GPU and devices():
        options = options if given else replace(options, bandwidth=traffic.copy_bandwidth())
        before = used_memory() or 0
    capacity = max(opened.config.max_context, prompt_tokens + window) if capacity is None else capacity
    with Session(opened, name, max_batch=batch, capacity=capacity, threads=threads, lookup=lookup or 0) as session, \
            count_progress("decoding", 0) as progress:
        result = measure(session, options, progress, before, None if written is None else session.encode(written))
    result["settings"] |= {"threads": threads, "lookup": lookup, "prompt_file": prompt_file}
    result["settings"] |= {"bandwidth_is": "given" if given else "measured by a copy" if options.bandwidth else None}
    _show(result, aside=to_stdout(json_file))
    if json_file is not None:
        write_json(json_file, result)


def _show(result: dict[str, Any], aside: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from sessa_deploy.runtime.lookup import DraftStats

    settings, first, between = result["settings"], result["ttft_ms"], result["inter_token_ms"]
    form = (result["bundle"]["weights"] or {}).get("format")
    stored = f" with {form} weights" if form else ""
    table = Table(title=f"{result['backend']}, {result['bundle']['precision']}{stored}, batch {settings['batch']}, context {settings['prompt_tokens']} to "
                        f"{settings['prompt_tokens'] + settings['window']} of {settings['capacity']}")
    for name, justify in (("what", "left"), ("p50", "right"), ("p95", "right"), ("p99", "right"), ("n", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for name, row in (("first token, ms", first), ("between tokens, ms", between)):
        table.add_row(name, *(f"{row[q]:.3f}" for q in ("p50", "p95", "p99")), str(row["count"]))
    console = Console(stderr=aside)
    console.print(table)
    line = f"{result['tokens_per_second']:.1f} tokens/s decoded, {result['prefill_tokens_per_second']:.0f} tokens/s of prompt, "
    line += f"{result['achieved_bytes_per_second'] / 1e9:.2f} GB/s of weights and valid cache rows"
    if "share_of_floor" in result:
        line += f", {100 * result['share_of_floor']:.0f}% of the bandwidth floor ({result['floor_ms']:.3f} ms)"
    held = result["weight_bytes"]
    if form:
        line += f"; weights {held['total'] / 2**20:.0f} MiB, "
        line += f"{held['total_ratio']:.2f} x of wide ones" if held["eight"] else "made wide as the graph opened"
    memory = f"peak memory {result['peak_host_bytes'] / 2**20:.0f} MiB"
    if "peak_device_bytes" in result:  # beside the CUDA context
        memory += f", on the device {result['peak_device_bytes'] / 2**20:.0f} MiB"
    console.print(f"{line}; {memory}", highlight=False)
    if "lookup" in result:
        found = result["lookup"]
        stats = DraftStats(*(found[name] for name in ("steps", "tokens", "drafted", "accepted")))
        console.print(f"lookup {found['most']}: {stats}; {found['tokens_per_second']:.1f} tokens/s, plain {found['plain_tokens_per_second']:.1f}: "
                      f"{found['ratio']:.2f} x", highlight=False)
