"""The demo checkpoint: small, loadable, and it knows held-out Python better than xz does."""

from __future__ import annotations

import lzma
import sysconfig
from pathlib import Path

import torch

from sessa_deploy.checkpoint import load_checkpoint, read_state
from sessa_deploy.data import is_held_out
from sessa_deploy.runtime.tokenizer import Tokenizer
from sessa_deploy.train import held_out_bits

DEMO = Path(__file__).resolve().parents[1] / "checkpoints" / "demo"
HELD_OUT = ("sched.py", "secrets.py", "tkinter/dialog.py")


def test_it_is_small_sixteen_bit_and_carded() -> None:
    assert sum(x.stat().st_size for x in DEMO.iterdir()) <= 6_000_000
    config, state = read_state(DEMO)
    assert {x.dtype for name, x in state.items() if ".gamma_" not in name} == {torch.float16}
    assert Tokenizer(DEMO).vocab_size == config.vocab_size and config.eos_token_id == Tokenizer(DEMO).token_id("<|endoftext|>")
    card = (DEMO / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert all(word in card for word in ("Python Software Foundation", "xz -9", "1.329", "1.780", "5,787 steps"))


def test_it_predicts_held_out_modules_of_this_very_python() -> None:
    library = Path(sysconfig.get_paths()["stdlib"])
    found = [library / name for name in HELD_OUT if (library / name).is_file()]
    assert found and all(is_held_out(name, 0.05) for name in HELD_OUT)
    texts = [path.read_bytes() for path in found]
    tokens = torch.tensor([256] + [t for text in texts for t in (*text, 256)])
    size = sum(map(len, texts))
    bits = held_out_bits(load_checkpoint(DEMO), tokens, size, context=512, batch_size=8)
    assert bits < 2.0 and bits < len(lzma.compress(b"".join(texts), preset=9)) * 8 / size
