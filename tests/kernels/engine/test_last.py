"""The logits behind each sequence's last new row: the row that new_length names, whatever stands in the others, with the bits of norm and product alone."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from sessa_deploy.kernels.engine import last, layer
from sessa_deploy.kernels.launch import jit
from sessa_deploy.kernels.launch.spec import WAITS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTH, TOKENS, COLUMNS = 48, 4, 40


def operands(batch: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(batch)
    x, gain, shift, head = (torch.randn(*shape, device=DEVICE).to(dtype) for shape in ((batch, TOKENS, WIDTH), (WIDTH,), (WIDTH,), (COLUMNS, WIDTH)))
    return x, gain, shift, head


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_named_row_alone_is_normed_and_multiplied(dtype: torch.dtype) -> None:
    """0 takes the first row, and what no step may hold stays within the sequence's rows: an engine that tries kernels gives them anything."""
    new = torch.tensor([TOKENS, 0, 2, -7, 1000], dtype=torch.int32, device=DEVICE)
    at = new.clamp(1, TOKENS).long() - 1
    x, gain, shift, head = operands(len(new), dtype)
    rows = x[torch.arange(len(new), device=DEVICE), at]
    poisoned = torch.full_like(x, torch.nan)
    poisoned[torch.arange(len(new), device=DEVICE), at] = rows
    normal = layer.norm(rows, gain, shift, 1e-5)
    assert torch.equal(last.norm_last(poisoned, new, gain, shift, 1e-5), normal)
    found = last.last_logits(poisoned, new, gain, shift, 1e-5, head)
    assert torch.equal(found, layer.linear(normal, head, None)) and found.dtype == torch.float32
    exact = torch.nn.functional.layer_norm(rows.double(), (WIDTH,), gain.double(), shift.double()) @ head.double().T
    assert (found - exact).abs().max() < (0.02 if dtype == torch.float16 else 0.15)


@pytest.mark.skipif(not jit.interpreted(), reason="the interpreter alone shows who reads what before the wait")
def test_the_row_is_read_behind_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    from sessa_deploy.kernels import device
    from sessa_deploy.kernels.engine import pointwise

    x, gain, shift, _ = operands(2, torch.float16)
    new, late = torch.tensor([3, 1], dtype=torch.int32), torch.full_like(x, torch.nan)
    monkeypatch.setattr(device, "gdc_wait", lambda: late.copy_(x))
    monkeypatch.setattr(device, "gdc_launch_dependents", lambda: None)
    monkeypatch.setattr(last, "pinned", lambda *_: {"layer_norm_last": {"BD": 64, "PDL": WAITS, "num_warps": 4}})
    assert pointwise.begin is device.begin
    assert torch.equal(last.norm_last(late, new, gain, shift, 1e-5, early=2), layer.norm(x[[0, 1], [2, 0]], gain, shift, 1e-5))
