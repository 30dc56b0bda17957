"""SessaConfig: everything that fixes a model's shape and arithmetic, read from and written to config.json."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from sessa_deploy.errors import UserError
from sessa_deploy.files import write_whole

CONFIG_FILE = "config.json"
# Keys that other tools write into config.json and that say nothing about the arithmetic.
_FOREIGN_KEYS = frozenset({"model_type", "architectures", "torch_dtype", "dtype", "transformers_version"})


@dataclasses.dataclass(frozen=True)
class SessaConfig:
    """Shape and constants of a SessaLM.

    d_model: width D of the residual stream and of the one feedback head.
    n_layers, vocab_size: number of layers; rows of the embedding.
    n_heads, n_kv_heads: query and key/value heads of the forward branch (n_heads % n_kv_heads == 0); n_kv_heads None means n_heads.
    gamma_max: bound of the feedback gain, in (0, 1).
    use_forward_rope: rotate q and k of the forward branch (head width must be even).
    layer_norm_eps: epsilon of every LayerNorm.
    max_context: tokens the model was trained for; the default cache capacity, not a hard limit.
    tie_word_embeddings: lm_head shares the embedding's weight.
    bos_token_id, eos_token_id, pad_token_id: special tokens, or None.

    Raises UserError on a value outside its range.
    """

    d_model: int
    n_layers: int
    n_heads: int
    vocab_size: int
    n_kv_heads: int | None = None
    gamma_max: float = 0.999
    use_forward_rope: bool = True
    layer_norm_eps: float = 1e-5
    max_context: int = 2048
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        fix = f"correct {CONFIG_FILE}"
        for name in ("d_model", "n_layers", "n_heads", "vocab_size", "max_context"):
            _check_int(name, getattr(self, name), 1, None, fix)
        if self.n_kv_heads is None:
            object.__setattr__(self, "n_kv_heads", self.n_heads)
        _check_int("n_kv_heads", self.n_kv_heads, 1, self.n_heads, fix)
        for name in ("use_forward_rope", "tie_word_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"{name} is not a boolean", got=repr(getattr(self, name)), allowed="true or false", fix=fix)
        if self.d_model % self.n_heads:
            raise UserError("d_model is not divisible by n_heads", got=f"d_model={self.d_model}, n_heads={self.n_heads}",
                            allowed="d_model a multiple of n_heads", fix=fix)
        if self.n_heads % self.kv_heads:
            raise UserError("n_heads is not divisible by n_kv_heads", got=f"n_heads={self.n_heads}, n_kv_heads={self.n_kv_heads}",
                            allowed="n_heads a multiple of n_kv_heads", fix=fix)
        if self.use_forward_rope and self.head_dim % 2:
            raise UserError("head width d_model / n_heads is odd, and RoPE rotates pairs", got=f"{self.head_dim}",
                            allowed="an even head width, or use_forward_rope false", fix=fix)
        for name, low, high in (("gamma_max", 0.0, 1.0), ("layer_norm_eps", 0.0, math.inf)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low < value < high:
                raise UserError(f"{name} is out of range", got=repr(value), allowed=f"a number in ({low:g}, {high:g})", fix=fix)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 0, self.vocab_size - 1, fix)

    @property
    def kv_heads(self) -> int:
        """Hkv, resolved."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def head_dim(self) -> int:
        """d = d_model / n_heads."""
        return self.d_model // self.n_heads

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, with the `model_type` that tools look for."""
        return {"model_type": "sessa", "architectures": ["SessaLM"], **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any], source: str = CONFIG_FILE) -> SessaConfig:
        """Build from plain values; unknown and missing keys are refused by name with UserError."""
        if not isinstance(data, dict):
            raise UserError(f"{source} is not a JSON object", got=type(data).__name__, allowed="an object with the model's fields")
        if data.get("model_type", "sessa") != "sessa":
            raise UserError(f"{source} describes another kind of model", got=f"model_type={data['model_type']!r}", allowed="'sessa'")
        fields = {f.name: f for f in dataclasses.fields(cls)}
        unknown = sorted(set(data) - set(fields) - _FOREIGN_KEYS)
        if unknown:
            raise UserError(f"{source} has unknown keys", got=", ".join(unknown), allowed=", ".join(fields), fix="remove or rename them")
        missing = sorted(n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in data)
        if missing:
            raise UserError(f"{source} lacks keys", got=f"no {', '.join(missing)}", allowed=", ".join(fields), fix="add them")
        return cls(**{k: v for k, v in data.items() if k in fields})

    def save(self, folder: str | Path) -> Path:
        """Write config.json into `folder`; returns its path."""
        path = Path(folder) / CONFIG_FILE
        return write_whole(path, json.dumps(self.to_dict(), indent=2) + "\n", what="the configuration")

    @classmethod
    def load(cls, path: str | Path) -> SessaConfig:
        """Read a config.json, or the one in a folder. Raises UserError if it is absent, not JSON or not a Sessa configuration."""
        path = Path(path)
        if path.is_dir():
            path = path / CONFIG_FILE
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError("no model configuration", got=str(path), allowed="an existing config.json", fix="name the folder that holds it") from None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UserError(f"{path} cannot be read as JSON", got=str(error), allowed="a JSON object") from None
        return cls.from_dict(data, source=str(path))


def _check_int(name: str, value: object, low: int, high: int | None, fix: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        allowed = f"an integer >= {low}" if high is None else f"an integer in {low}..{high}"
        raise UserError(f"{name} is out of range", got=repr(value), allowed=allowed, fix=fix)
