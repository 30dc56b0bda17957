"""A small checkpoint that has a chat template, and what its template makes of a conversation (a support module, no tests)."""

from __future__ import annotations

import json
from pathlib import Path

TEMPLATE = """{%- if messages[0]['role'] == 'assistant' -%}{{ raise_exception('a conversation begins with the user') }}{%- endif -%}
{{ bos_token }}
{%- for message in messages -%}
<{{ message.role }}>{{ message['content'] | trim }}{{ eos_token }}
{% endfor -%}
{%- if add_generation_prompt -%}
<assistant>
{%- endif -%}"""
END = "<|endoftext|>"
SETTINGS = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "^", "eos_token": {"content": END, "special": True}, "model_max_length": 64}


def rendered(*messages: tuple[str, str]) -> str:
    """What TEMPLATE makes of (role, content) pairs, the beginning of an answer behind them."""
    return "^" + "".join(f"<{role}>{content.strip()}{END}\n" for role, content in messages) + "<assistant>"


def add_template(folder: Path, where: str = "jinja") -> Path:
    """Put TEMPLATE into a checkpoint's folder, as a file of its own ("jinja"), as text ("text") or as one of several ("named") in tokenizer_config.json."""
    settings = dict(SETTINGS)
    if where == "jinja":
        (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    elif where == "text":
        settings |= {"chat_template": TEMPLATE}
    else:
        settings |= {"chat_template": [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": TEMPLATE}]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def templated_checkpoint(folder: Path, where: str = "jinja", max_context: int = 256) -> Path:
    """A random byte-level model of one small layer, with TEMPLATE."""
    import torch

    from sessa_deploy.checkpoint import save_checkpoint
    from sessa_deploy.config import SessaConfig
    from sessa_deploy.model import SessaLM
    from sessa_deploy.runtime.tokenizer import byte_level_tokenizer

    torch.manual_seed(0)
    config = SessaConfig(d_model=16, n_layers=1, n_heads=2, vocab_size=257, max_context=max_context, eos_token_id=256)
    save_checkpoint(SessaLM(config), folder, tokenizer=byte_level_tokenizer())
    return add_template(folder, where)
