"""Configurations that are accepted, refused and round-tripped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sessa_deploy import SessaConfig, UserError

GOOD: dict[str, Any] = {"d_model": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 11}


def test_round_trip(tmp_path: Path) -> None:
    config = SessaConfig(**GOOD, n_kv_heads=2, gamma_max=0.5, eos_token_id=3)
    config.save(tmp_path)
    assert SessaConfig.load(tmp_path) == config == SessaConfig.load(tmp_path / "config.json")


def test_kv_heads_default_to_query_heads() -> None:
    assert SessaConfig(**GOOD).n_kv_heads == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_model": 66}, "d_model is not divisible by n_heads: got d_model=66"),
        ({"d_model": 12}, "odd"),
        ({"n_kv_heads": 3}, "not divisible by n_kv_heads"),
        ({"n_kv_heads": 8}, "integer in 1..4"),
        ({"gamma_max": 1.0}, r"gamma_max is out of range: got 1.0; allowed: a number in \(0, 1\)"),
        ({"gamma_max": 0}, "gamma_max"),
        ({"gamma_max": float("nan")}, "gamma_max"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps"),
        ({"n_layers": True}, "n_layers"),
        ({"n_layers": 2.0}, "n_layers"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"eos_token_id": 11}, r"eos_token_id is out of range: got 11; allowed: an integer in 0..10"),
        ({"use_forward_rope": 1}, "boolean"),
        ({"n_layer": 3}, "unknown keys: got n_layer"),
        ({"model_type": "llama"}, "another kind of model"),
    ],
)
def test_refusals_are_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        SessaConfig.from_dict({**GOOD, **change})
    assert "\n" not in str(error.value)


def test_missing_key_missing_file_and_broken_json(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lacks keys: got no vocab_size"):
        SessaConfig.from_dict({k: v for k, v in GOOD.items() if k != "vocab_size"})
    with pytest.raises(UserError, match="no model configuration"):
        SessaConfig.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        SessaConfig.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps([1]))
    with pytest.raises(UserError, match="not a JSON object"):
        SessaConfig.load(tmp_path)
