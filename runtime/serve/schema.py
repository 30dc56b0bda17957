"""What clients send, field by field, checked by pydantic: strict types, no unknown key. What is wrong becomes one ApiError of status 400."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, WrapValidator
from pydantic_core import PydanticCustomError

from sessa_deploy.runtime.serve.errors import ApiError

MOST_LOGPROBS = 20
MOST_CHOICES = 128
_MOST_STOPS = 64
_LOW_SEED, _HIGH_SEED = -(2**63), 2**64 - 1


def _says(text: str) -> WrapValidator:
    """One sentence for whatever is wrong with a value of several allowed types."""

    def check(value: Any, inner: Callable[[Any], Any]) -> Any:
        try:
            return inner(value)
        except ValueError:
            raise PydanticCustomError("several_types", "it must be {allowed}", {"allowed": text}) from None

    return WrapValidator(check)


Id = Annotated[int, Field(ge=0)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=4096)]
Prompt = Annotated[
    str | Annotated[list[Id], Field(min_length=1)] | Annotated[list[str], Field(min_length=1)] | Annotated[
        list[Annotated[list[Id], Field(min_length=1)]], Field(min_length=1)],
    _says("text, a list of texts, a list of token ids, or a list of lists of token ids, none of them empty")]
Stops = Annotated[Stop | Annotated[list[Stop], Field(max_length=_MOST_STOPS)], _says(f"text, or a list of at most {_MOST_STOPS} texts, none of them empty")]
Bias = Annotated[float, Field(ge=-100, le=100)]


class Body(BaseModel):
    """A JSON object whose every key is known, and every value of its own type."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class StreamOptions(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Generation(Body):
    """What both ways of asking for text have in common; null is as good as absent everywhere."""

    model: str | None = None
    max_tokens: int | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0, description="0 is greedy")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, description="0 and -1 keep every token")
    min_p: float | None = Field(None, ge=0, lt=1)
    repetition_penalty: float | None = Field(None, gt=0)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=_LOW_SEED, le=_HIGH_SEED)
    stop: Stops | None = None
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    logit_bias: dict[str, Bias] | None = Field(None, description="token id, as text, to what is added to its logit")
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="without effect")
    metadata: dict[str, Any] | None = Field(None, description="without effect")
    store: bool | None = Field(None, description="without effect")
    service_tier: str | None = Field(None, description="without effect")

    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionBody(Generation):
    """POST /v1/completions."""

    prompt: Prompt
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    best_of: int | None = Field(None, ge=1, le=1)
    suffix: None = None

    def prompts(self) -> list[str | list[int]]:
        """The prompts, one for each choice of n = 1."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else list(self.prompt)  # type: ignore[list-item,arg-type]


class TextPart(Body):
    type: Literal["text"]
    text: str


Content = Annotated[str | Annotated[list[TextPart], Field(min_length=1)], _says("text, or a list of parts of type text")]


class Message(Body):
    """One turn. What OpenAI's own messages carry beside it is taken where it is null."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: str | None = None
    refusal: None = None
    tool_calls: None = None
    function_call: None = None
    audio: None = None
    annotations: None = None

    def plain(self) -> dict[str, str]:
        """What a template sees: a developer is what models know as system."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        found = {"role": "system" if self.role == "developer" else self.role, "content": content}
        return found if self.name is None else {**found, "name": self.name}


Messages = Annotated[list[Message], Field(min_length=1)]


class ChatBody(Generation):
    """POST /v1/chat/completions."""

    messages: Messages
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    tools: None = None
    response_format: None = None


class TokenizeBody(Body):
    """POST /tokenize: text, or messages as chat would render them."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = Field(None, description="of text: put the first token of a conversation before it (default true)")
    add_generation_prompt: bool | None = Field(None, description="of messages: put the beginning of an answer behind them (default true)")


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[Id]


def refusal(errors: Sequence[Any]) -> ApiError:
    """The first thing that is wrong with a body, named as its sender wrote it; errors: pydantic's, as FastAPI gives them."""
    first = errors[0]
    kind, place = first["type"], [x for x in first["loc"] if x != "body"]
    param = "".join(f"[{x}]" if isinstance(x, int) else f".{x}" if at else str(x) for at, x in enumerate(place)) or None
    if kind == "none_required":
        return ApiError(400, f"{param} is not supported by this server", param, "unsupported_parameter")
    if kind == "extra_forbidden":
        return ApiError(400, f"{param} is unknown to this server, and nothing is ignored", param, "unknown_parameter")
    if param == "best_of" and kind == "less_than_equal":
        return ApiError(400, f"best_of above 1 is not supported by this server: got {first.get('input')!r}"[:200], param, "unsupported_parameter")
    if kind == "missing" and param is not None:
        return ApiError(400, f"{param} is missing", param, "missing_required_parameter")
    if param is None:
        return ApiError(400, "the body must be a JSON object, sent as Content-Type: application/json")
    given = repr(first.get("input"))
    given = given if len(given) <= 60 else given[:57] + "..."
    return ApiError(400, f"{param} is wrong: got {given}; {first['msg'][:1].lower()}{first['msg'][1:]}", param, "invalid_value")


class Trouble(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """Every error."""

    error: Trouble
