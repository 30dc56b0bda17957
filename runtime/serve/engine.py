"""A bundle, opened to serve: prompts to token ids, tokens to the strings that log probabilities are told with, and the batcher that runs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sessa_deploy.errors import UserError
from sessa_deploy.runtime.batcher import Batcher
from sessa_deploy.runtime.serve.errors import ApiError
from sessa_deploy.runtime.serve.strings import TokenStrings
from sessa_deploy.runtime.template import ChatTemplate, TemplateError
from sessa_deploy.runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from sessa_deploy.runtime.backend import Backend
    from sessa_deploy.runtime.bundle import Bundle

_LONG = 1 << 16  # bytes of text from which on its least number of tokens is judged before it is encoded


class Engine:
    """What a loaded bundle answers with.

    queue, queue_timeout, chunk: the batcher's. capacity: tokens of prompt and answer together. ends: tokens that end an answer in a conversation, beside the
    model's own.
    """

    def __init__(self, bundle: Bundle, backend: Backend, queue: int = 256, queue_timeout: float | None = 30.0, chunk: int | None = None) -> None:
        self.bundle, self.backend, self.config, self.queue = bundle, backend, bundle.config, queue
        self.capacity, self.slots = backend.capacity, backend.batch
        self.tokenizer = Tokenizer.of(bundle)
        self.template = ChatTemplate.of(bundle) if self.tokenizer is not None else None
        self.batcher = Batcher(backend, self.tokenizer, chunk, queue, queue_timeout)
        self.ends: tuple[int, ...] = ()
        self._strings = TokenStrings(self.tokenizer)
        self._longest = 0
        if self.tokenizer is not None:
            self._longest = max((len(self._strings.raw(token)) for token in range(self.tokenizer.vocab_size)), default=1) or 1
            self.ends = () if self.template is None else self.template.ends(self.tokenizer)

    def close(self) -> None:
        """End the batcher and let go of the engine."""
        self.batcher.close()
        self.backend.close()

    def text(self, param: str) -> Tokenizer:
        """The tokenizer, for a request that names text in `param`. Raises ApiError if the bundle has none."""
        if self.tokenizer is None:
            raise ApiError(400, f"{param} is text, and this model has no tokenizer: send token ids", param, "no_tokenizer")
        return self.tokenizer

    def encode(self, prompt: str, first: bool = True, param: str = "prompt") -> list[int]:
        """Token ids of text; first: as the beginning of a conversation. Raises ApiError on text that cannot be encoded, or is far too long for it."""
        tokenizer, size = self.text(param), len(prompt.encode("utf-8", "replace"))
        if size > _LONG and size > self._longest * self.capacity:
            raise ApiError(400, f"{param} is too long: at least {-(-size // self._longest)} tokens; this model takes {self.capacity} with the answer", param,
                           "context_length_exceeded")
        try:
            return tokenizer.encode_first(prompt, self.config.bos_token_id) if first else tokenizer.encode(prompt)
        except UserError as error:
            raise ApiError.of(error, param) from None

    def tokenizer_info(self) -> dict[str, str | None]:
        """The special tokens by name, and the chat template: what a client that renders or encodes by itself asks for."""
        tokenizer, special = self.text("prompt"), dict(self.template.special) if self.template is not None else {}
        config = self.config
        ids = {"bos_token": config.bos_token_id, "eos_token": next(iter(config.eos_token_ids), None), "pad_token": config.pad_token_id}
        own = {name: None if token is None else tokenizer.token(token) for name, token in ids.items()}
        return {"tokenizer_class": "PreTrainedTokenizerFast", **own, **special, "chat_template": self.template.text if self.template is not None else None}

    def check_ids(self, ids: Sequence[int], param: str) -> None:
        """Raise ApiError unless ids are tokens of the model."""
        wrong = next((token for token in ids if not 0 <= token < self.config.vocab_size), None)
        if wrong is not None:
            raise ApiError(400, f"{param} has a token id outside the vocabulary: got {wrong}; allowed: 0..{self.config.vocab_size - 1}", param)

    def render(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text. Raises ApiError where the bundle has no template, or the template takes no such conversation."""
        if self.template is None:
            what = "tokenizer" if self.tokenizer is None else "chat template"
            raise ApiError(400, f"this model has no {what}, and without one there is no chat: use /v1/completions, or export a checkpoint that has one",
                           "messages", "no_chat_template")
        try:
            return self.template.render(messages, add_generation_prompt)
        except TemplateError as error:
            raise ApiError.of(error, "messages") from None

    def check_fits(self, prompt: int, new: int, param: str = "max_tokens") -> None:
        """Raise ApiError, with the numbers, unless a prompt and an answer fit together."""
        if prompt + new > self.capacity:
            raise ApiError(400, f"the prompt has {prompt} tokens and max_tokens is {new}: together {prompt + new}, and this model takes {self.capacity}",
                           "prompt" if prompt >= self.capacity else param, "context_length_exceeded")

    def string(self, token: int) -> str:
        """A token as log probabilities name it (see TokenStrings)."""
        return self._strings.string(token)

    def token_bytes(self, token: int) -> list[int]:
        """A token's bytes, as chat's log probabilities list them."""
        return list(self._strings.raw(token))
