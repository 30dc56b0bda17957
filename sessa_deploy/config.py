"""SessaConfig: everything that fixes a model's shape and arithmetic, read from and written to config.json."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sessa_deploy.checks import as_flag, as_number, integer
from sessa_deploy.errors import UserError, one_line
from sessa_deploy.files import write_whole
from sessa_deploy.reading import read_json

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
_MAX_CONTEXT = 2**31 - 1  # lengths are int32 in the graph
_OWN_KEYS = frozenset({"model_type", "architectures"})  # written by `to_dict` beside the fields
# Keys that the tools of a model hub write into config.json and that change nothing of this model's arithmetic: names and versions, training, generation.
# A key that is neither here nor a field is refused, since it may be a misspelt field or ask for arithmetic that this model does not have.
_HUB_KEYS = frozenset("""
    add_cross_attention attention_dropout attn_dropout attn_implementation attn_pdrop auto_map bad_words_ids base_model_name_or_path
    begin_suppress_tokens bos_token chunk_size_feed_forward classifier_dropout cross_attention_hidden_size decoder_start_token_id
    diversity_penalty do_sample dropout dtype early_stopping embd_dropout embd_pdrop encoder_no_repeat_ngram_size eos_token
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id gradient_checkpointing hidden_dropout
    hidden_dropout_prob id2label init_std initializer_factor initializer_range is_decoder is_encoder_decoder keys_to_ignore_at_inference label2id
    length_penalty library_name license mask_token_id max_length max_new_tokens min_length model_name name_or_path no_repeat_ngram_size num_beam_groups
    num_beams num_return_sequences output_attentions output_hidden_states output_router_logits output_scores pad_token pipeline_tag prefix
    pretraining_tp problem_type pruned_heads remove_invalid_values rescale_prenorm_residual residual_dropout resid_pdrop repetition_penalty return_dict
    return_dict_in_generate sep_token_id suppress_tokens summary_activation summary_first_dropout summary_proj_to_labels summary_type
    summary_use_proj tags task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript
    training_args transformers.js_config transformers_version typical_p unk_token_id unsloth_fixed unsloth_version use_bfloat16 use_cache
    use_flash_attention use_flash_attention_2
""".split())  # noqa: SIM905
# Other tools' names of fields: passed over where they say the same as the field, unknown where they do not.
_OTHER_NAMES = {
    "hidden_size": "d_model", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads", "num_key_value_heads": "n_kv_heads",
    "num_kv_heads": "n_kv_heads", "head_dim": "head_dim", "n_positions": "max_context", "n_ctx": "max_context", "max_position_embeddings": "max_context",
    "layer_norm_epsilon": "layer_norm_eps", "norm_eps": "layer_norm_eps",
}
Note = Callable[[str], None]


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
    bos_token_id, pad_token_id: special tokens, or None. eos_token_id: the token that ends a text, several as a tuple (a list is taken), or None.

    Numpy's numbers are taken too, and kept as Python's. Raises UserError on a value outside its range.
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
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in ("d_model", "n_layers", "n_heads", "vocab_size"):
            self._set(name, integer(name, getattr(self, name), 1))
        self._set("max_context", integer("max_context", self.max_context, 1, _MAX_CONTEXT))
        self._set("n_kv_heads", self.n_heads if self.n_kv_heads is None else integer("n_kv_heads", self.n_kv_heads, 1, self.n_heads))
        for name in ("use_forward_rope", "tie_word_embeddings"):
            value = as_flag(getattr(self, name))
            if value is None:
                raise UserError(f"{name} is not a boolean", got=repr(getattr(self, name)), allowed="true or false")
            self._set(name, value)
        if self.d_model % self.n_heads:
            raise UserError("d_model is not divisible by n_heads", got=f"d_model={self.d_model}, n_heads={self.n_heads}",
                            allowed="d_model a multiple of n_heads")
        if self.n_heads % self.kv_heads:
            raise UserError("n_heads is not divisible by n_kv_heads", got=f"n_heads={self.n_heads}, n_kv_heads={self.n_kv_heads}",
                            allowed="n_heads a multiple of n_kv_heads")
        if self.use_forward_rope and self.head_dim % 2:
            raise UserError("head width d_model / n_heads is odd, and RoPE rotates pairs", got=f"{self.head_dim}",
                            allowed="an even head width, or use_forward_rope false")
        for name, low, high in (("gamma_max", 0.0, 1.0), ("layer_norm_eps", 0.0, math.inf)):
            number = as_number(getattr(self, name))
            if number is None or not low < number < high or number > 1e300:
                raise UserError(f"{name} is out of range", got=repr(getattr(self, name)), allowed=f"a number in ({low:g}, {high:g})")
            self._set(name, number)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            given = getattr(self, name)
            several = name == "eos_token_id" and (isinstance(given, (list, tuple)) or bool(getattr(given, "shape", ())))
            ids = tuple(dict.fromkeys(integer(name, x, 0, self.vocab_size - 1) for x in (given if several else _ids(given))))
            self._set(name, (ids or None) if several else ids[0] if ids else None)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """All tokens that end a text; () where there is none."""
        return _ids(self.eos_token_id)

    @property
    def kv_heads(self) -> int:
        """Hkv, resolved."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def head_dim(self) -> int:
        """d = d_model / n_heads."""
        return self.d_model // self.n_heads

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON's values, with the `model_type` that tools look for."""
        fields = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
        return {"model_type": "sessa", "architectures": ["SessaLM"], **fields}

    @classmethod
    def from_dict(cls, data: dict[str, Any], source: str = CONFIG_FILE, note: Note | None = None) -> SessaConfig:
        """Build from plain values. Keys of a model hub that change nothing are passed over, and `note` hears of them in one line; other unknown keys
        and missing ones are refused by name. Raises UserError, whose fix names `source`."""
        if not isinstance(data, dict):
            raise UserError(f"{source} is not a JSON object", got=type(data).__name__, allowed="an object with the model's fields")
        if data.get("model_type", "sessa") != "sessa":
            raise UserError(f"{source} describes another kind of model", got=f"model_type={data['model_type']!r}", allowed="'sessa'")
        fields = {f.name: f for f in dataclasses.fields(cls)}
        foreign = {k: v for k, v in data.items() if k not in fields and k not in _OWN_KEYS}
        unknown = sorted(k for k in foreign if k not in _HUB_KEYS and k not in _OTHER_NAMES and not k.startswith("_"))
        missing = sorted(n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in data)
        config = None
        if not unknown and not missing:
            try:
                config = cls(**{k: v for k, v in data.items() if k in fields})
            except UserError as error:
                raise UserError(error.what, got=error.got, allowed=error.allowed, fix=f"correct {source}") from None
            unknown = sorted(k for k, v in foreign.items() if k in _OTHER_NAMES and v != getattr(config, _OTHER_NAMES[k]))
        if unknown:
            raise UserError(f"{source} has unknown keys", got=", ".join(unknown), allowed=", ".join(fields), fix="remove or rename them")
        if config is None:
            raise UserError(f"{source} lacks keys", got=f"no {', '.join(missing)}", allowed=", ".join(fields), fix="add them")
        if foreign and note is not None:
            note(one_line(f"{source}: ignored {', '.join(sorted(foreign))}"))
        return config

    def save(self, folder: str | Path) -> Path:
        """Write config.json into `folder`; returns its path."""
        path = Path(folder) / CONFIG_FILE
        return write_whole(path, json.dumps(self.to_dict(), indent=2) + "\n", what="the configuration")

    @classmethod
    def load(cls, path: str | Path, note: Note | None = None) -> SessaConfig:
        """Read a config.json, or the one in a folder. The eos_token_id of a generation_config.json beside it end a text too.

        note: hears of what was passed over, a line each. Raises UserError if it is absent, not JSON or not a Sessa configuration.
        """
        path = Path(path)
        if os.path.isdir(path):
            path = path / CONFIG_FILE
        if not os.path.lexists(path):
            raise UserError("no model configuration", got=str(path), allowed="an existing config.json", fix="name the folder that holds it")
        config = cls.from_dict(read_json(path), source=str(path), note=note)
        beside = path.parent / GENERATION_CONFIG_FILE
        return config._with_ends_of(beside, note) if os.path.lexists(beside) else config

    def _with_ends_of(self, file: Path, note: Note | None) -> SessaConfig:
        """This configuration with the eos_token_id of a generation_config.json added."""
        data = read_json(file)
        eos = data.get("eos_token_id") if isinstance(data, dict) else None
        more = [x for x in (eos if isinstance(eos, list) else _ids(eos)) if x not in self.eos_token_ids]
        if not more:
            return self
        try:
            config = dataclasses.replace(self, eos_token_id=(*self.eos_token_ids, *more) if len(self.eos_token_ids) + len(more) > 1 else more[0])
        except UserError as error:
            raise UserError(f"{file}: {error.what}", got=error.got, allowed=error.allowed, fix=f"correct {file}") from None
        if note is not None:
            note(f"{file}: {', '.join(map(str, more))} ends a text too")
        return config


def _ids(value: Any) -> tuple[Any, ...]:
    return () if value is None else value if isinstance(value, tuple) else (value,)
