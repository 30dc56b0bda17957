"""Configurations that are accepted, refused and round-tripped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sessa_deploy import SessaConfig, UserError

GOOD: dict[str, Any] = {"d_model": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 11}


def test_round_trip(tmp_path: Path) -> None:
    config = SessaConfig(**GOOD, n_kv_heads=2, gamma_max=0.5, eos_token_id=3)
    config.save(tmp_path)
    assert SessaConfig.load(tmp_path) == config == SessaConfig.load(tmp_path / "config.json")


def test_kv_heads_default_to_query_heads() -> None:
    assert SessaConfig(**GOOD).n_kv_heads == 4


def test_numbers_of_numpy_are_kept_as_python_s(tmp_path: Path) -> None:
    given = {"d_model": np.int64(64), "n_layers": np.uint8(2), "n_heads": np.int32(4), "vocab_size": np.array(11), "n_kv_heads": np.int16(2),
             "gamma_max": np.float64(0.5), "layer_norm_eps": np.float64(1e-6), "use_forward_rope": np.bool_(True), "bos_token_id": np.int64(0),
             "eos_token_id": np.array([3, 4, 3]), "pad_token_id": np.uint64(1), "max_context": np.int64(99)}
    config = SessaConfig(**given)
    plain = SessaConfig(**GOOD, n_kv_heads=2, gamma_max=0.5, layer_norm_eps=1e-6, bos_token_id=0, eos_token_id=(3, 4), pad_token_id=1, max_context=99)
    assert config == plain and {k: type(v) for k, v in vars(config).items()} == {k: type(v) for k, v in vars(plain).items()}
    config.save(tmp_path)
    assert SessaConfig.load(tmp_path) == config
    assert SessaConfig(**GOOD, eos_token_id=[np.int64(3)]).eos_token_ids == (3,) and SessaConfig(**GOOD, eos_token_id=[]).eos_token_id is None


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
        ({"eos_token_id": [3, 11]}, r"eos_token_id is out of range: got 11"),
        ({"eos_token_id": [3, True]}, "got True"),
        ({"eos_token_id": [[3]]}, "eos_token_id"),
        ({"eos_token_id": {}}, "eos_token_id"),
        ({"bos_token_id": [3]}, "bos_token_id"),
        ({"vocab_size": np.float64(11)}, "vocab_size"),
        ({"n_layers": np.bool_(True)}, "n_layers"),
        ({"gamma_max": 10**400}, "gamma_max"),
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
