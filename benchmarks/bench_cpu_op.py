"""The CPU op beside the official algorithm (materialised T x T matrix + solve_triangular): time, peak memory, cost against T.

    python benchmarks/bench_cpu_op.py [--quick]
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from common import line_plot, machine, paired_ms, peak_growth_mib, write
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sessa_deploy.kernels.ops import feedback_attention

HEADLINE = (1, 2048, 512)


def official(q: Tensor, k: Tensor, gamma: Tensor, f: Tensor) -> Tensor:
    """The algorithm of the official layer: full scores, masked softmax, one dense triangular solve."""
    tokens = q.shape[1]
    mask = torch.ones(tokens, tokens, dtype=torch.bool).triu()
    scores = (torch.einsum("btd,bsd->bts", q, k) * q.shape[-1] ** -0.5).masked_fill(mask, -torch.inf)
    scores[:, 0, 0] = 0.0
    alpha = torch.softmax(scores, -1).masked_fill(mask, 0.0)
    return torch.linalg.solve_triangular(-(gamma[..., None] * alpha), f, upper=False, unitriangular=True)


def inputs(batch: int, tokens: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    q, k, f = (torch.randn(batch, tokens, width, generator=g) for _ in range(3))
    return q, k, 0.999 * torch.tanh(torch.randn(batch, tokens, generator=g)), f


def run_official(shape: tuple[int, int, int]) -> None:
    with torch.no_grad():
        official(*inputs(*shape))


def run_ours(shape: tuple[int, int, int]) -> None:
    with torch.no_grad():
        feedback_attention(*inputs(*shape))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repeats, T up to 1024")
    quick = parser.parse_args().quick
    lengths = [256, 512, 1024, *([] if quick else [2048, 4096, 8192])]
    rows = []
    for tokens in lengths:
        shape = (HEADLINE[0], tokens, HEADLINE[2])
        data = inputs(*shape)
        difference = (official(*data) - feedback_attention(*data)).abs().max()
        if difference > 1e-4:
            raise SystemExit(f"the two disagree by {difference:.1e} at {shape}: nothing to compare")
        repeats = 3 if quick or tokens > 2048 else 9
        row: dict[str, Any] = {"shape": shape}
        calls = (lambda d=data: official(*d), lambda d=data: feedback_attention(*d))
        (row["official_ms"], row["ours_ms"]), row["speedup"] = paired_ms(calls, repeats)
        small = (1, 8, shape[2])
        row["official_mib"], row["ours_mib"] = (peak_growth_mib(run, (shape,), (small,)) for run in (run_official, run_ours))
        rows.append(row)
    console = Console(width=120)
    table = Table(title=f"feedback attention, float32, {machine()['cpu']}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for column in ("(B,T,D)", "official ms", "ours ms", "times faster", "official peak MiB", "ours peak MiB"):
        table.add_column(column, justify="right")
    for row in rows:
        figures = [f"{row[key]:.1f}" for key in ("official_ms", "ours_ms", "speedup", "official_mib", "ours_mib")]
        table.add_row(str(row["shape"]), *figures)
    console.print(table)
    peers = {"official algorithm": "official_ms", "sessa-deploy": "ours_ms"}
    series = {name: ([r["shape"][1] for r in rows], [r[key] for r in rows]) for name, key in peers.items()}
    print(write("cpu_op", rows), line_plot("cpu_op", series, "T (tokens)", "ms", "Feedback attention on a CPU, B=1, D=512, float32"))


if __name__ == "__main__":
    main()
