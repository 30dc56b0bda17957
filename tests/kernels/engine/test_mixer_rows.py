"""A mixer's step of several rows, both attentions at a time, against plain torch in float64: on a GPU, or through Triton's interpreter (TRITON_INTERPRET=1)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from feedback_cases import make  # noqa: E402
from rows_cases import SHARED, case, first, mixed  # noqa: E402
from rule import check  # noqa: E402

from sessa_deploy.contract import FEW_ROWS  # noqa: E402
from sessa_deploy.kernels.engine import mixer_rows  # noqa: E402
from sessa_deploy.kernels.engine.spec import few_variant, mixer_rows_variants, rows_combines, rows_early  # noqa: E402
from sessa_deploy.kernels.launch import table  # noqa: E402
from sessa_deploy.kernels.launch.jit import interpreted  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() and not interpreted() else "cpu"
pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not interpreted(), reason="needs a GPU or TRITON_INTERPRET=1")
# Under the interpreter, whose time is the tiles': heads up to 128 and widths up to 512.
SMALL: dict[str, dict[str, Any]] | None = {
    "mixer_rows_partial": dict(ROWS_F=16, HEADS_F=2, LANES_F=128, STAGES_F=1, ROWS_B=16, CHUNKS_B=2, LANES_B=256, STAGES_B=1, QUERIES=16),
    "mixer_rows_combine": dict(BLOCK_F=8, BLOCK_B=8, MOST_F=7, MOST_B=5, NF=32, NB=16, DF=128, DB=256),
    "mixer_rows_out": dict(BM=16, BN=128, BK=256, KS=2, AHEAD=1, FORM=0),
} if DEVICE == "cpu" else None  # fmt: skip


def small(tokens: int) -> dict[str, dict[str, Any]] | None:
    """SMALL for so many rows: up to FEW_ROWS of them have tiles of their own, as in the tables."""
    if SMALL is None or tokens > FEW_ROWS:
        return SMALL
    return {**SMALL, "mixer_rows_partial": {**SMALL["mixer_rows_partial"], "QUERIES": 8}, "mixer_rows_out": {**SMALL["mixer_rows_out"], "BM": 8}}


SHAPES = [
    (4, 4, 64, 40, [40, 0, 7], 5),  # a full, an empty and a short sequence
    (8, 2, 64, 70, [70], 16),  # four query heads a key
    (2, 1, 128, 20, [20, 3], 2),  # two query heads a key
    (3, 3, 24, 33, [33, 1], 11),  # narrower than any tile
    (1, 1, 16, 300, [300], 9),  # longer than all splits together have at least: each takes more
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_step_of_several_rows(shape: tuple[Any, ...]) -> None:
    a = case(*shape, DEVICE)
    check(mixer_rows.step(**a, tiles=small(shape[-1])), mixed(a, torch.float64), mixed(a, torch.float32))


def test_a_row_depends_neither_on_those_behind_it_nor_on_its_batch() -> None:
    """Bits, for every number of rows; what lies behind may hold anything."""
    a = case(4, 2, 32, 40, [40, 5], 16, DEVICE)
    whole = mixer_rows.step(**a, tiles=SMALL)
    for tokens in (2, FEW_ROWS, 11):
        assert torch.equal(mixer_rows.step(**first(a, tokens), tiles=small(tokens)), whole[:, :tokens])
    for names in (("q",), ("k", "q_b"), ("v", "gamma"), ("k_b",)):
        b = {**a, **{name: a[name].clone() for name in names}}
        for name in names:
            b[name][:, 6] = torch.inf if name == "v" else torch.nan
        found = mixer_rows.step(**b, tiles=SMALL)
        assert torch.equal(found[:, :6], whole[:, :6]) and not torch.isfinite(found[0, 6 + (names == ("k_b",))]).any(), names
    alone = mixer_rows.step(**{n: x if n in SHARED else x[1:2] for n, x in a.items()}, tiles=SMALL)
    assert torch.equal(alone, whole[1:2])


@pytest.mark.parametrize(("routing", "dtype"), [("chain", torch.float16), ("alternating", torch.bfloat16), ("key0", torch.float16)])
def test_hard_routings(routing: str, dtype: torch.dtype) -> None:
    """gamma +-0.999 over the past's edge and the new rows; f comes from the causal branch, whose values are those of the routing's f."""
    for sign in (1.0, -1.0):
        a = case(2, 2, 64, 24, [24, 24], 16, DEVICE, dtype=dtype)
        q_b, k_b, gamma, f, past_kb, past_s, length = make(routing, 2, 16, 24, 128, dtype, sign)
        a |= {"q_b": q_b, "k_b": k_b, "gamma": gamma, "v": f.view(2, 16, 2, 64), "past_kb": past_kb, "past_s": past_s, "past_length": length}
        check(mixer_rows.step(**a, tiles=SMALL), mixed(a, torch.float64), mixed(a, torch.float32))


@pytest.mark.parametrize("tokens", [FEW_ROWS, FEW_ROWS + 1])
def test_a_chain_through_all_rows(tokens: int) -> None:
    """The inverse's last doubling is left out up to half of the rows that there may be: the first row then reaches no further than the last."""
    a = case(1, 1, 16, 4, [4], tokens, DEVICE)
    q_b, k_b, gamma, f, past_kb, past_s, length = make("chain", 1, tokens, 4, 16, torch.float16, 1.0)
    a |= {"q_b": q_b, "k_b": k_b, "gamma": gamma, "v": f.view(1, tokens, 1, 16), "past_kb": past_kb, "past_s": past_s, "past_length": length}
    check(mixer_rows.step(**a, tiles=small(tokens)), mixed(a, torch.float64), mixed(a, torch.float32))


def test_an_empty_past_adds_nothing_to_the_first_row() -> None:
    a = case(2, 2, 32, 8, [0, 0], 4, DEVICE)
    before = mixer_rows.step(**a, tiles=SMALL)
    a["gamma"][:, 0] = torch.nan
    assert torch.equal(mixer_rows.step(**a, tiles=SMALL), before)


def test_tiles_of_few_rows_sum_as_those_of_many() -> None:
    """Where an architecture has both: a row has the same bits whether 7 rows stand beside it or 15."""
    pairs = [(name, str(FEW_ROWS) + end, many) for name, end, many in (
        ("layer_tail", ".1024", "16.1024"), ("layer_tail", ".wide", "16"), ("layer_project_gain", ".1024", "16.1024"), ("layer_project_gain", ".wide", "16"),
        ("layer_enter", ".wide", "16"), ("layer_norm_enter_rows", ".1024", "1024"), ("mixer_rows_out", ".1024", "1024"), ("mixer_rows_out", ".wide", "any"),
    )] + [("mixer_rows_partial", f"{w}.{h}.{FEW_ROWS}", f"{w}.{h}") for w in (1024, 2048) for h in (64, 128)]  # fmt: skip
    for name, few, many in pairs:
        assert few in table.kernel(name).optional and table.has(name, 90, "bf16", few)
        mine, theirs = (table.options(name, 90, "fp16", v) for v in (few, many))
        free = {"BM", "BN", "QUERIES", "STAGES_F", "STAGES_B", "PDL", "num_stages"}  # what no order of sums follows from
        assert {k: v for k, v in mine.items() if k not in free} == {k: v for k, v in theirs.items() if k not in free}, name
        assert mine.get("BM", mine.get("QUERIES")) == FEW_ROWS or not mine.get("AHEAD", 1), name  # what comes ahead takes registers
    assert few_variant("layer_tail", 1, "", 80) == few_variant("layer_tail", 9, "", 80) == few_variant("layer_tail", 8, ".i8", 80) == ""
    assert few_variant("layer_tail", 8, "", 1024) == "8.1024" and few_variant("layer_tail", 2, "", 1040) == "8.wide"


def test_few_rows_as_the_short_side_without_weights_ahead() -> None:
    a = case(2, 2, 64, 40, [40], 8, DEVICE)
    out = dict(BM=8, BN=32, BK=64, KS=2, AHEAD=0, FORM=0, num_warps=2, num_stages=2) | ({} if DEVICE == "cpu" else {"PDL": 0})
    few = {**(small(8) or {}), "mixer_rows_out": out}
    if DEVICE == "cpu":
        check(mixer_rows.step(**a, tiles=few), mixed(a, torch.float64), mixed(a, torch.float32))
        return
    found, many = (mixer_rows.step(**a, tiles={"mixer_rows_out": {**out, "BM": rows}}) for rows in (8, 16))
    check(found, mixed(a, torch.float64), mixed(a, torch.float32))
    assert torch.equal(found, many)


def test_widths_without_a_kernel_are_named() -> None:
    assert mixer_rows_variants(9, 768, 64) == ("1024.64",) and mixer_rows_variants(8, 2048, 96) == ("2048.128.8", "2048.128")
    assert rows_combines(1024) == ("any",) and rows_combines(1040) == ("wide", "any")
    assert rows_early(16, 1024) and rows_early(8, 2048) and not rows_early(9, 2048)
    for width, head in ((4096, 64), (1024, 256)):
        with pytest.raises(ValueError, match="the largest are 2048 and 128"):
            mixer_rows_variants(2, width, head)
