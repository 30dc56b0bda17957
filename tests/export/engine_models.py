"""The tiny model of the tests of graphs and engines; conftest.py's `models` exports it."""

from __future__ import annotations

from sessa_deploy.config import SessaConfig

CONFIG = SessaConfig(d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=257, max_context=32)
