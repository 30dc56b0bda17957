"""A chat template: messages -> the text that a model was trained to answer, as Hugging Face's tokenizers render it, in jinja2's sandbox.

A bundle carries it as chat_template.jinja, and the special tokens that it may name (bos_token, eos_token, ...) as tokenizer_config.json.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from sessa_deploy.contract import TEMPLATE_FILE, TOKENIZER_CONFIG_FILE
from sessa_deploy.errors import UserError, need
from sessa_deploy.reading import parse_json

if TYPE_CHECKING:
    from sessa_deploy.runtime.bundle import Bundle
    from sessa_deploy.runtime.tokenizer import Tokenizer

Message = Mapping[str, Any]
# What a template is given beside the messages, by the names it has in tokenizer_config.json.
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_SAID = 300  # characters of a template's own error that are repeated
# Conversations of which a template must take one: some want a system message, some refuse it.
_PROBES: tuple[tuple[str, ...], ...] = (("user",), ("system", "user"), ("user", "assistant", "user"))


class TemplateError(UserError):
    """The template refuses a conversation (its raise_exception), or stumbles over it."""


class ChatTemplate:
    """A jinja2 template in the sandbox that Hugging Face's tokenizers use, with the functions and filters that their templates count on.

    text: the template. special: bos_token, eos_token and the like, by name. Raises UserError if it is no jinja2 template, or jinja2 is absent.
    """

    def __init__(self, text: str, special: Mapping[str, Any] | None = None, source: str = TEMPLATE_FILE) -> None:
        need("jinja2")
        import jinja2

        self.text, self.special, self._source = text, dict(special or {}), source
        try:
            self._template = _environment().from_string(text)
        except (jinja2.TemplateError, RecursionError, MemoryError, SyntaxError) as error:
            line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
            raise UserError(f"{source} is no chat template", got=f"{str(error)[:_SAID] or type(error).__name__}{line}", allowed="a jinja2 template",
                            fix="mend it, or remove it: the bundle then has no chat") from None

    @classmethod
    def of(cls, bundle: Bundle) -> ChatTemplate | None:
        """A bundle's template, of the very bytes that match the manifest; None if it has none. Raises UserError if it is broken."""
        if TEMPLATE_FILE not in bundle:
            return None
        special = parse_json(bundle.read(TOKENIZER_CONFIG_FILE), bundle.file(TOKENIZER_CONFIG_FILE)) if TOKENIZER_CONFIG_FILE in bundle else {}
        source = str(bundle.file(TEMPLATE_FILE))
        return cls(decoded(bundle.read(TEMPLATE_FILE), source), special if isinstance(special, dict) else {}, source)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The conversation as text, with the beginning of the answer behind it. Raises TemplateError where the template takes no such conversation."""
        try:
            return self._template.render(messages=[dict(m) for m in messages], add_generation_prompt=add_generation_prompt, tools=None, documents=None,
                                         **self.special)
        except _Refused as error:
            raise TemplateError("the chat template refuses the conversation", got=str(error)[:_SAID] or None) from None
        except Exception as error:  # a template is somebody's program: whatever it raises is its own fault
            raise TemplateError("the chat template fails on the conversation", got=f"{type(error).__name__}: {str(error)[:_SAID]}") from None

    def ends(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """The token that ends an answer in a conversation; none where the template's eos_token is no token."""
        end = tokenizer.token_id(str(self.special.get("eos_token")))
        return () if end is None else (end,)

    def prove(self) -> None:
        """Raise UserError unless it renders at least one of the plainest conversations."""
        last: TemplateError | None = None
        for roles in _PROBES:
            try:
                self.render([{"role": role, "content": "a"} for role in roles])
                return
            except TemplateError as error:
                last = error
        assert last is not None
        raise UserError(f"{self._source} is no chat template", got=f"{last.what} of one user message: {last.got}", allowed="a template that renders it",
                        fix="mend it, or remove it: the bundle then has no chat")


class _Refused(Exception):
    """What raise_exception raises inside a template."""


def decoded(raw: bytes, source: str) -> str:
    """A template's bytes as text. Raises UserError if they are no UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{source} is no chat template", got=str(error), allowed="UTF-8", fix="save it as UTF-8, or remove it") from None


@lru_cache(maxsize=1)
def _environment() -> Any:
    """The sandbox, with trimmed blocks, loop controls, {% generation %}, tojson, raise_exception and strftime_now."""
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}...{% endgeneration %} marks the assistant's part for training; here it is its contents."""

        tags = {"generation"}  # noqa: RUF012 - jinja2's own way

        def parse(self, parser: Any) -> list[nodes.Node]:
            next(parser.stream)
            body: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return body

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
        # jinja2's own escapes what HTML reserves, which is not what models have read
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message: Any = "") -> None:
        raise _Refused(str(message))

    def strftime_now(format: str) -> str:
        return datetime.datetime.now().strftime(format)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    return environment
