"""From a checked body to the batcher's requests: what completions and chat have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sessa_deploy.errors import UserError
from sessa_deploy.runtime.requests import Request
from sessa_deploy.runtime.sampling import SamplingParams
from sessa_deploy.runtime.serve.engine import Engine
from sessa_deploy.runtime.serve.errors import ApiError
from sessa_deploy.runtime.serve.schema import Generation

_SEEDS = 2**64


@dataclass(frozen=True)
class Usage:
    """Tokens of one HTTP request, as OpenAI counts them."""

    prompt: int
    completion: int
    cached: int = 0

    def json(self) -> dict[str, object]:
        """OpenAI's usage object."""
        return {"prompt_tokens": self.prompt, "completion_tokens": self.completion, "total_tokens": self.prompt + self.completion,
                "prompt_tokens_details": {"cached_tokens": self.cached}}


def sampling(body: Generation) -> SamplingParams:
    """How a body asks for tokens to be drawn; temperature 1 unless it says another. Raises ApiError on what the sampler refuses."""
    values = {name: getattr(body, name) for name in ("top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")}
    top_k = 0 if body.top_k is None else max(body.top_k, 0)
    seed = None if body.seed is None else body.seed % _SEEDS  # a negative one has its two's complement
    try:
        return SamplingParams(temperature=1.0 if body.temperature is None else body.temperature, top_k=top_k, seed=seed,
                              **{name: value for name, value in values.items() if value is not None})
    except UserError as error:
        raise ApiError.of(error) from None


def requests(body: Generation, engine: Engine, prompts: Sequence[Sequence[int]], max_tokens: int, logprobs: int | None, prompt_logprobs: int | None = None,
             ends: Sequence[int] = ()) -> list[Request]:
    """One request a prompt and choice, the choices of one prompt side by side. Raises ApiError, naming what is wrong."""
    drawn, stops, bias = sampling(body), body.stops(), _bias(body, engine)
    if stops:
        engine.text("stop")
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options is allowed only with stream", "stream_options")
    ends = () if body.ignore_eos else tuple(ends)
    try:
        return [Request(tuple(prompt), drawn, max_tokens, stop=stops, stop_tokens=ends, choice=choice, logprobs=logprobs,
                        prompt_logprobs=prompt_logprobs, ignore_eos=bool(body.ignore_eos), logit_bias=bias)
                for prompt in prompts for choice in range(body.n or 1)]
    except UserError as error:
        raise ApiError.of(error, "prompt" if "prompt" in error.what else None) from None


def _bias(body: Generation, engine: Engine) -> dict[int, float]:
    found = {}
    for name, value in (body.logit_bias or {}).items():
        token = int(name) if name.isascii() and name.isdigit() and len(name) < 12 else -1
        if not 0 <= token < engine.config.vocab_size:
            raise ApiError(400, f"logit_bias is wrong: got {name[:40]!r}; allowed: token ids in 0..{engine.config.vocab_size - 1}, as text", "logit_bias")
        found[token] = value
    return found
