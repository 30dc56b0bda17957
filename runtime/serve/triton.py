"""The model that a Triton Inference Server runs: its python backend imports TritonPythonModel from the model.py that `export-triton` writes.

Requests of one model share a batcher. execute() hands them over and returns; one thread sends what the batcher gives, all that is there of a request in
one response, and looks whether the client has gone. Decoupled: responses of many requests interleave.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sessa_deploy.errors import UserError
from sessa_deploy.runtime.batcher import Batcher
from sessa_deploy.runtime.bundle import Bundle
from sessa_deploy.runtime.engines import open_slots
from sessa_deploy.runtime.requests import Event, NotAccepting, QueueFull, Request
from sessa_deploy.runtime.sampling import SamplingParams
from sessa_deploy.runtime.tokenizer import Tokenizer

BUNDLE_DIR = "bundle"  # beside model.py
_log = logging.getLogger(__name__)
_LOOK = 0.1  # seconds between two looks at whether a client has gone
_OWN = "triton_"  # parameters that the server itself puts beside a request
_FINISH = {"stop": "stop", "length": "length", "context": "length"}  # the runtime's words in OpenAI's


@dataclass(frozen=True)
class Tensor:
    """An input or output: its name, Triton's type without TYPE_, its shape (-1: any), and what it is."""

    name: str
    type: str
    dims: tuple[int, ...]
    what: str


INPUTS = (
    Tensor("text_input", "STRING", (1,), "the prompt as text; or input_ids"),
    Tensor("input_ids", "INT32", (-1,), "the prompt as token ids"),
    Tensor("max_tokens", "INT32", (1,), "new tokens at most; 16"),
    Tensor("temperature", "FP32", (1,), "0 takes the most likely token; 1"),
    Tensor("top_k", "INT32", (1,), "keep the k most likely; 0 keeps all"),
    Tensor("top_p", "FP32", (1,), "keep the smallest set of this probability; 1"),
    Tensor("min_p", "FP32", (1,), "drop tokens below this share of the most likely; 0"),
    Tensor("repetition_penalty", "FP32", (1,), "1"),
    Tensor("presence_penalty", "FP32", (1,), "0"),
    Tensor("frequency_penalty", "FP32", (1,), "0"),
    Tensor("seed", "UINT64", (1,), "the same seed draws the same tokens"),
    Tensor("stop", "STRING", (-1,), "strings that end the answer, not shown"),
    Tensor("stop_tokens", "INT32", (-1,), "token ids that do"),
    Tensor("ignore_eos", "BOOL", (1,), "go on behind the model's end token"),
    Tensor("logprobs", "INT32", (1,), "log probabilities, with that many most likely tokens"),
    Tensor("stream", "BOOL", (1,), "several responses; else one with the whole answer"),
)
OUTPUTS = (
    Tensor("text_output", "STRING", (1,), "what became certain of the answer"),
    Tensor("token_ids", "INT32", (-1,), "the tokens, a stop token included"),
    Tensor("finish_reason", "STRING", (1,), "empty while it goes on; stop or length"),
    Tensor("logprobs", "FP32", (-1,), "of each token, where asked for"),
    Tensor("top_token_ids", "INT32", (-1, -1), "(tokens, logprobs) the most likely in each place, where asked for"),
    Tensor("top_logprobs", "FP32", (-1, -1), "theirs"),
)
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed")
_KINDS: dict[str, type] = {"STRING": str, "INT32": int, "UINT64": int, "FP32": float, "BOOL": bool}


def read_inputs(tensors: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """The values of a request's tensors by name: Python's own, a list where more than one is allowed. Raises UserError on a wrong shape or on text that
    is no UTF-8."""
    found: dict[str, Any] = {}
    for known in INPUTS:
        if known.name not in tensors:
            continue
        values = np.asarray(tensors[known.name]).reshape(-1).tolist()
        if known.dims == (1,) and len(values) != 1:
            raise UserError(f"{known.name} has the wrong shape", got=f"{len(values)} values", allowed="one")
        if known.type == "STRING":
            values = [_text(known.name, value) for value in values]
        elif known.type == "FP32":  # the shortest number that is this float32: 0.7, and not 0.699999988079071
            values = [float(str(np.float32(value))) for value in values]
        values = [_KINDS[known.type](value) for value in values]
        found[known.name] = values[0] if known.dims == (1,) else values
    return found


def _text(name: str, value: Any) -> str:
    try:
        return value.decode("utf-8") if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is no text", got=str(error), allowed="UTF-8") from None


class _Answer:
    """One request: what the batcher has given of it and was not sent yet."""

    def __init__(self, utils: Any, sender: Any) -> None:
        self._utils, self._sender = utils, sender
        self._held: list[Event] = []
        self.handle: Any = None
        self.stream = self.done = False

    def give(self, events: Sequence[Event]) -> None:
        """Send what is to be sent now, and the end with the last."""
        self._held += events
        last = self._held[-1]
        if last.finish is None and not self.stream:
            return
        if last.finish in (None, *_FINISH):
            self._send(self._utils.InferenceResponse(_tensors(self._utils, self._held)), last.finish is not None)
        elif last.finish == "cancelled":
            self.fail("the request was ended", "CANCELLED")
        else:
            self.fail(last.error or "the request failed", "UNAVAILABLE" if last.expired else "INTERNAL")
        self._held = []

    def fail(self, what: str, code: str) -> None:
        """Answer with an error, and end."""
        error = self._utils.TritonError(what, getattr(self._utils.TritonError, code))
        self._send(self._utils.InferenceResponse(output_tensors=[], error=error), True)

    def look(self) -> None:
        """Give the request up where its client has gone."""
        if not self.done and self.handle is not None and self._sender.is_cancelled():
            self.handle.cancel()

    def _send(self, response: Any, final: bool) -> None:
        if not self.done:
            self.done = final
            self._sender.send(response, flags=self._utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if final else 0)


def _tensors(utils: Any, events: Sequence[Event]) -> list[Any]:
    drawn = [event for event in events if event.token is not None]
    found: dict[str, NDArray[Any]] = {
        "text_output": np.array(["".join(event.text for event in events).encode("utf-8")], dtype=object),
        "token_ids": np.array([event.token for event in drawn], dtype=np.int32),
        "finish_reason": np.array([_FINISH.get(events[-1].finish or "", "").encode()], dtype=object),
    }
    if drawn and all(event.logprob is not None for event in drawn):
        found["logprobs"] = np.array([event.logprob for event in drawn], dtype=np.float32)
        shape = (len(drawn), len(drawn[0].top))
        found["top_token_ids"] = np.array([token for event in drawn for token, _ in event.top], dtype=np.int32).reshape(shape)
        found["top_logprobs"] = np.array([value for event in drawn for _, value in event.top], dtype=np.float32).reshape(shape)
    return [utils.Tensor(name, value) for name, value in found.items()]


class TritonPythonModel:
    """Triton's python backend makes one for each instance of the model, in a process of its own."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the bundle beside model.py. Raises UserError, which the server reports, where it is not what was exported or the engine does not open."""
        import triton_python_backend_utils

        self._utils = triton_python_backend_utils
        if args.get("model_instance_kind") == "GPU":
            _take_gpu(args["model_instance_device_id"])
        set_to = {name: entry["string_value"] for name, entry in json.loads(args["model_config"]).get("parameters", {}).items()}
        bundle = Bundle.open(Path(args["model_repository"]) / args["model_version"] / BUNDLE_DIR)
        number = {name: int(set_to[name]) for name in ("slots", "capacity", "queue", "threads") if set_to.get(name)}
        self._config = bundle.config
        self._tokenizer = Tokenizer.of(bundle)
        backend = open_slots(bundle, set_to.get("backend", "auto"), number.get("slots"), number.get("capacity"), number.get("threads"))
        self._batcher = Batcher(backend, self._tokenizer, queue=number.get("queue", 256), queue_timeout=float(set_to.get("queue_timeout", 30.0)))
        self._backend = backend
        self._events: deque[tuple[_Answer, Event]] = deque()
        self._came, self._ending = threading.Event(), False
        self._open: set[_Answer] = set()
        self._sending = threading.Thread(target=self._deliver, name="sessa-triton", daemon=True)
        self._batcher.start()
        self._sending.start()

    def execute(self, requests: Sequence[Any]) -> None:
        """Hand requests to the batcher; each is answered through its own sender, a wrong one with what is wrong."""
        for asked in requests:
            answer = _Answer(self._utils, asked.get_response_sender())
            try:
                request, answer.stream = self._request(asked)
                self._open.add(answer)
                answer.handle = self._batcher.submit(request, lambda event, answer=answer: self._post(answer, event))  # type: ignore[misc]
            except (QueueFull, NotAccepting) as error:
                self._refuse(answer, str(error), "UNAVAILABLE")
            except UserError as error:
                self._refuse(answer, str(error), "INVALID_ARG")

    def finalize(self) -> None:
        """Let running requests end for a while, then let go of everything."""
        self._batcher.drain(30.0)
        self._ending = True
        self._came.set()
        self._sending.join(5.0)
        self._batcher.close()
        self._backend.close()

    def _request(self, asked: Any) -> tuple[Request, bool]:
        """(the batcher's request, whether it is streamed). Raises UserError naming what is wrong."""
        beside = sorted(name for name in json.loads(asked.parameters() or "{}") if not name.startswith(_OWN))
        if beside:
            raise UserError("no such input", got=", ".join(beside)[:200], allowed=", ".join(tensor.name for tensor in INPUTS))
        given = read_inputs({tensor.name(): tensor.as_numpy() for tensor in asked.inputs()})
        text, ids = given.get("text_input"), given.get("input_ids")
        if (text is None) == (ids is None):
            raise UserError("a request has one prompt", got="both text_input and input_ids" if text is not None else "neither text_input nor input_ids",
                            allowed="one of them")
        if text is not None and self._tokenizer is None:
            raise UserError("text_input needs a tokenizer, and this model has none", allowed="input_ids")
        if ids is None:
            assert self._tokenizer is not None and text is not None
            ids = self._tokenizer.encode_first(text, self._config.bos_token_id)
        sampling = SamplingParams(**{"temperature": 1.0, **{name: given[name] for name in _SAMPLING if name in given}})
        request = Request(tuple(ids), sampling, given.get("max_tokens", 16), stop=tuple(given.get("stop", ())),
                          stop_tokens=tuple(given.get("stop_tokens", ())), logprobs=given.get("logprobs"), ignore_eos=given.get("ignore_eos", False))
        return request, given.get("stream", False)

    def _post(self, answer: _Answer, event: Event) -> None:
        self._events.append((answer, event))
        self._came.set()

    def _refuse(self, answer: _Answer, what: str, code: str) -> None:
        self._open.discard(answer)
        answer.fail(what, code)

    def _deliver(self) -> None:
        while not self._ending or self._events:
            self._came.wait(_LOOK)
            self._came.clear()
            together: dict[_Answer, list[Event]] = {}
            while self._events:
                answer, event = self._events.popleft()
                together.setdefault(answer, []).append(event)
            for answer in dict.fromkeys((*together, *tuple(self._open))):
                try:
                    if answer in together:
                        answer.give(together[answer])
                    answer.look()
                except Exception:  # the server's own, of a request that it has let go of: the others go on
                    _log.exception("a response could not be sent")
                    answer.done = True
                    answer.handle.cancel()
                if answer.done:
                    self._open.discard(answer)


def _take_gpu(device: str) -> None:
    """Let this process see its instance's GPU alone: `device` counts those that it sees now. Before anything has asked for one."""
    seen = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    os.environ["CUDA_VISIBLE_DEVICES"] = seen[int(device)] if seen else device
