"""Memory of an export: the weights are read where they lie and written one by one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import resource, sys, torch
from sessa_deploy.config import SessaConfig
from sessa_deploy.model import SessaLM
from sessa_deploy.export.to_onnx import export_onnx
with torch.device("meta"):
    model = SessaLM(SessaConfig(d_model=1024, n_layers=3, n_heads=16, vocab_size=60000))
model = model.to_empty(device="cpu")
for x in model.parameters():
    x.data.fill_(0.01)
export_onnx(model, "model.onnx", inline_limit=int(sys.argv[1]))
weights = sum(x.numel() * 4 for x in model.parameters())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / weights)
"""


@pytest.mark.slow
@pytest.mark.parametrize("inline_limit", [2**31, 1000])
def test_peak_memory_is_under_three_times_the_weights(tmp_path: Path, inline_limit: int) -> None:
    """The acceptance bound is 4x for 350M parameters; at 24 layers, d_model 1024 and 1.09 GiB of weights the peak was 1.7x."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(inline_limit)], cwd=tmp_path, capture_output=True, text=True, timeout=280, check=True)
    assert float(done.stdout) < 3.0
