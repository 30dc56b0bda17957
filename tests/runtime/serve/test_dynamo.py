"""The worker for NVIDIA Dynamo over a fake of Dynamo's interface, whose signatures are the real ones': the text of a solo run, requests that move from a
worker that died at any token, refusals, full queues and clients that go. The real frontend: test_live.py."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
import inspect
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_dynamo
import pytest
from numpy_model import NumpyBackend
from served import CONFIG, MODEL, SlowBackend, bundle, let_wait

from sessa_deploy.errors import UserError
from sessa_deploy.runtime.batcher import Batcher
from sessa_deploy.runtime.bundle import Bundle
from sessa_deploy.runtime.sampling import SamplingParams
from sessa_deploy.runtime.serve import dynamo
from sessa_deploy.runtime.serve.dynamo_requests import Chunks, Served, asked, shortest
from sessa_deploy.runtime.session import Session
from sessa_deploy.runtime.tokenizer import Tokenizer

PROMPT = list(b"ab c")
NUMBERS = itertools.count()


@pytest.fixture(autouse=True)
def _fake(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in fake_dynamo.modules():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return bundle(tmp_path_factory.mktemp("dynamo") / "tiny")


@pytest.fixture
def worker(made: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A coroutine function with a started engine -> what it gives, run to its end; backend: the engine's; the rest: Options."""

    def run(work: Callable[[Any], Any], backend: Any = None, **options: Any) -> Any:
        backend = backend or NumpyBackend(MODEL, 2)
        monkeypatch.setattr(dynamo, "open_slots", lambda *args: backend)

        async def whole() -> Any:
            engine = dynamo.engine_class()(dynamo.Options(made, files=tmp_path / "files", **options))
            await engine.start(1)
            try:
                return await work(engine)
            finally:
                await engine.cleanup()
                await engine.cleanup()

        return asyncio.run(whole())

    return run


def request(prompt: list[int] = PROMPT, max_tokens: int | None = 24, **options: Any) -> dict[str, Any]:
    """As the frontend sends it: every option there, those not given None, floats as float32."""
    sampling = dict.fromkeys(("n", "best_of", "presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "top_k", "min_p",
                              "use_beam_search", "length_penalty", "seed", "include_stop_str_in_output", "guided_decoding"))
    stops = {"max_tokens": max_tokens, **dict.fromkeys(("stop", "stop_token_ids", "stop_token_ids_visible", "min_tokens", "ignore_eos", "max_thinking_tokens")),
             "stop_token_ids_hidden": [256]}
    output = dict.fromkeys(("logprobs", "prompt_logprobs", "skip_special_tokens", "formatted_prompt", "return_tokens_as_token_ids"))
    beside: dict[str, Any] = {}
    for name, value in options.items():
        next((group for group in (sampling, stops, output) if name in group), beside)[name] = value
    return {"model": "tiny", "token_ids": list(prompt), "sampling_options": sampling, "stop_conditions": stops, "output_options": output,
            "eos_token_ids": [256], "annotations": [], "routing": {}, **beside}


async def answer(engine: Any, given: dict[str, Any], most: int | None = None) -> list[dict[str, Any]]:
    """The chunks, or the first `most` of them."""
    chunks, stream = [], engine.generate(given, fake_dynamo.Context(f"request-{next(NUMBERS)}"))
    async for chunk in stream:
        chunks.append(chunk)
        if len(chunks) == most:
            await stream.aclose()
            break
    return chunks


def text(chunks: list[dict[str, Any]]) -> str:
    return "".join(chunk["text"] for chunk in chunks)


def solo(made: Bundle, count: int, stop: tuple[str, ...] = (), **sampling: Any) -> Any:
    with Session(made, NumpyBackend(MODEL, 2), max_batch=2) as session:
        return session.generate([PROMPT], count, SamplingParams(**sampling), stop=stop)[0]


def test_an_answer_is_that_of_a_solo_run(worker: Callable[..., Any], made: Bundle) -> None:
    wanted = solo(made, 24, temperature=0.7, top_p=0.9, seed=5)
    chunks = worker(lambda engine: answer(engine, request(temperature=0.699999988079071, top_p=0.8999999761581421, seed=5)))
    assert text(chunks) == wanted.text and [token for chunk in chunks for token in chunk["token_ids"]] == wanted.tokens
    last = chunks[-1]
    assert last["finish_reason"] == wanted.finish and all("finish_reason" not in chunk for chunk in chunks[:-1])
    assert last["completion_usage"] == {"prompt_tokens": 4, "completion_tokens": len(wanted.tokens), "total_tokens": 4 + len(wanted.tokens),
                                        "prompt_tokens_details": {"cached_tokens": 0}}


def told(served: Served, batcher: Batcher, given: dict[str, Any]) -> list[dict[str, Any]]:
    """The chunks of a request, each told as early as may be."""
    job, events = asked(given, served), []
    batcher.submit(job.request, events.append)
    while batcher.turn():
        pass
    chunks, found = Chunks(job, served), []
    for event in events:
        chunks.add(event)
        chunk = chunks.take()
        found += [chunk] if chunk is not None else []
    assert chunks.done
    return found


def test_a_request_that_moves_at_any_chunk_goes_on_as_it_would_have(made: Bundle) -> None:
    """As the frontend does it where a worker dies: the tokens told so far behind the prompt, the last trace link, fewer tokens to go."""
    options = {"temperature": 1.5, "seed": 11, "presence_penalty": 0.5, "frequency_penalty": 0.25}
    whole = solo(made, 30, **options)  # bytes at random: many are the beginning of a character of several
    stop = whole.text[len(whole.text) // 2 :][:3]
    served, batcher = Served.of(made, 96), Batcher(NumpyBackend(MODEL, 2), Tokenizer.of(made))
    for stops in ((), (stop,), (stop, whole.text[5:9], whole.text[2:3] + "?")):
        wanted = solo(made, 30, stops, **options)
        chunks = told(served, batcher, request(max_tokens=30, stop=list(stops) or None, **options))
        assert text(chunks) == wanted.text and len(chunks) > 2
        for first in range(1, len(chunks)):
            tokens = [token for chunk in chunks[:first] for token in chunk["token_ids"]]
            again = request([*PROMPT, *tokens], 30 - len(tokens), stop=list(stops) or None, **options, migration_link=chunks[first - 1]["worker_trace_link"])
            rest = told(served, batcher, again)
            assert text(chunks[:first]) + text(rest) == wanted.text, first
            assert rest[-1]["completion_usage"]["prompt_tokens"] == 4 and rest[-1]["completion_usage"]["completion_tokens"] == len(wanted.tokens)


def test_what_another_tracer_put_there_is_no_position(worker: Callable[..., Any], made: Bundle) -> None:
    for link in ({"trace_id": "a" * 32, "span_id": "b" * 16}, {"trace_id": "", "span_id": "5e55ade9zzzzzzzz"}, None):
        chunks = worker(lambda engine, link=link: answer(engine, request(temperature=0.0, migration_link=link)))
        assert text(chunks) == solo(made, 24).text


def test_log_probabilities_stand_beside_their_tokens(worker: Callable[..., Any]) -> None:
    for chunk in worker(lambda engine: answer(engine, request(temperature=0.0, logprobs=2))):
        assert len(chunk["token_ids"]) == len(chunk["log_probs"]) == len(chunk["top_logprobs"]) == len(chunk["tokens"])
        for token, value, top in zip(chunk["token_ids"], chunk["log_probs"], chunk["top_logprobs"], strict=True):
            assert [entry["rank"] for entry in top] == [1, 2] and (top[0]["token_id"], top[0]["logprob"]) == (token, value)


REFUSED: list[dict[str, Any]] = [
    {"n": 2}, {"best_of": 3}, {"use_beam_search": True}, {"length_penalty": 2.0}, {"include_stop_str_in_output": True}, {"guided_decoding": {"regex": "a"}},
    {"min_tokens": 2}, {"max_thinking_tokens": 5}, {"stop_token_ids_visible": [3]}, {"skip_special_tokens": False}, {"return_tokens_as_token_ids": True},
    {"prompt_logprobs": 0}, {"multi_modal_data": {"image_url": []}}, {"prompt_embeds": "x"}, {"temperature": -1.0}, {"top_p": 2.0}, {"min_p": 1.0},
    {"repetition_penalty": -1.0}, {"presence_penalty": 3.0}, {"max_tokens": 93}, {"stop": [""]},
]


@pytest.mark.parametrize("option", REFUSED, ids=lambda option: next(iter(option)))
def test_what_cannot_be_done_is_refused_by_name(worker: Callable[..., Any], option: dict[str, Any]) -> None:
    with pytest.raises(fake_dynamo.InvalidArgument, match=next(iter(option)).replace("max_tokens", "max_tokens is 93.*together.*96")):
        worker(lambda engine: answer(engine, request(**option)))


def test_prompts_that_do_not_fit_or_are_none(worker: Callable[..., Any]) -> None:
    for prompt in ([97] * 97, [], [300]):
        with pytest.raises(fake_dynamo.InvalidArgument):
            worker(lambda engine, prompt=prompt: answer(engine, request(prompt, None)))
    chunks = worker(lambda engine: answer(engine, request([97] * 90, None, ignore_eos=True, stop_token_ids_hidden=None)))
    assert sum(len(chunk["token_ids"]) for chunk in chunks) == 6 and chunks[-1]["finish_reason"] == "length"


def test_full_queues_and_clients_that_go(worker: Callable[..., Any]) -> None:
    slow = SlowBackend(1)

    async def crowd(engine: Any) -> None:
        slow.open.clear()
        context = fake_dynamo.Context("first")
        first = asyncio.ensure_future(all_of(engine.generate(request(max_tokens=90), context)))
        waiting = [asyncio.ensure_future(answer(engine, request())) for _ in range(2)]
        while engine._batcher.stats().accepted < 3 or engine._batcher.stats().queued > 2:
            await asyncio.sleep(0.005)
        with pytest.raises(fake_dynamo.HttpError) as full:
            await answer(engine, request())
        assert full.value.code == 429
        let_wait(engine._batcher, 60)
        context.stopped = True
        await engine.abort(context)
        slow.open.set()
        assert (await first)[-1]["finish_reason"] == "cancelled"
        for late in waiting:
            with pytest.raises(fake_dynamo.HttpError) as expired:
                await late
            assert expired.value.code == 503
        assert len(await answer(engine, request(max_tokens=40, temperature=0.0), most=1)) == 1  # this one's stream is closed after a chunk
        assert text(await answer(engine, request(temperature=0.0)))
        engine._batcher.drain(5.0)
        with pytest.raises(fake_dynamo.Disconnected):
            await answer(engine, request())

    worker(crowd, slow, queue=2, queue_timeout=50.0)


def test_what_a_worker_that_ends_cuts_off_goes_to_another(worker: Callable[..., Any], made: Bundle) -> None:
    slow, options = SlowBackend(1), {"temperature": 0.7, "seed": 3}
    slow.pause = 0.03
    told: list[dict[str, Any]] = []

    async def ending(engine: Any) -> None:
        async def read() -> None:
            async for chunk in engine.generate(request(max_tokens=80, ignore_eos=True, stop_token_ids_hidden=None, **options), fake_dynamo.Context()):
                told.append(chunk)

        reading = asyncio.ensure_future(read())
        while len(told) < 3:
            await asyncio.sleep(0.005)
        await asyncio.to_thread(engine._batcher.drain, 0.0)
        with pytest.raises(fake_dynamo.Disconnected):
            await reading

    worker(ending, slow)
    tokens = [token for chunk in told for token in chunk["token_ids"]]
    assert all("finish_reason" not in chunk for chunk in told) and len(tokens) < 80
    again = request([*PROMPT, *tokens], 80 - len(tokens), ignore_eos=True, stop_token_ids_hidden=None, **options, migration_link=told[-1]["worker_trace_link"])
    rest = worker(lambda engine: answer(engine, again))
    with Session(made, NumpyBackend(MODEL, 2), max_batch=2) as session:
        assert text(told) + text(rest) == session.generate([PROMPT], 80, SamplingParams(**options), [])[0].text


def test_a_step_that_fails_sends_its_request_elsewhere_and_no_other(worker: Callable[..., Any]) -> None:
    slow = SlowBackend(1)

    async def broken(engine: Any) -> None:
        slow.broken = True
        for kind in (fake_dynamo.Disconnected, fake_dynamo.Disconnected, fake_dynamo.EngineShutdown):  # the third in a row: readiness is red
            with pytest.raises(kind, match="fell off"):
                await answer(engine, request())
        slow.broken = False
        assert text(await answer(engine, request(temperature=0.0)))

    worker(broken, slow)


async def all_of(stream: Any) -> list[Any]:
    return [chunk async for chunk in stream]


def test_a_prompt_begins_with_the_models_first_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(CONFIG, bos_token_id=256)
    begun = bundle(tmp_path / "bos", config=config)
    for first, given, wanted in ((True, PROMPT, [256, *PROMPT]), (True, [256, *PROMPT], [256, *PROMPT]), (False, PROMPT, PROMPT)):
        backend = NumpyBackend(MODEL, 1)
        backend.config = config
        monkeypatch.setattr(dynamo, "open_slots", lambda *args, backend=backend: backend)

        async def one(first: bool = first, given: list[int] = given) -> Any:
            engine = dynamo.engine_class()(dynamo.Options(begun, files=tmp_path / "files", first=first))
            await engine.start(1)
            try:
                return await answer(engine, request(given, 3, temperature=0.0, ignore_eos=True))
            finally:
                await engine.cleanup()

        assert asyncio.run(one())[-1]["completion_usage"]["prompt_tokens"] == len(wanted)


def test_the_command_line(made: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    options, config = dynamo.parse([str(made.path), "--slots", "3", "--discovery-backend", "file", "--files", str(tmp_path / "f"), "--endpoint", "dyn://a.b.c"])
    assert (options.slots, options.name, options.first, config.component, config.endpoint) == (3, "tiny", True, "b", "c")
    engine, settings = dynamo.engine_class().of(options, config)
    assert settings.model_name == str(tmp_path / "f") and settings.served_model_name == "tiny" and settings.endpoint_types == "chat,completions"
    payload = asyncio.run(engine.health_check_payload())
    assert payload["token_ids"] == [0]
    plain = bundle(tmp_path / "plain", template=None)
    assert dynamo.parse([str(plain.path)])[1].endpoint_types == "completions"
    for wrong in (["--slots", "0"], ["--slots", "x"], ["--queue", "-1"], ["--queue-timeout", "nan"], ["--threads", "100000"], ["--endpoint", "a.b"],
                  ["--discovery-backend", "y"], ["--nonsense"], ["--backend", "cpu"]):
        assert dynamo.main([str(made.path), *wrong]) == 2, wrong
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1, said
    assert dynamo.main([str(tmp_path / "nowhere")]) == 2
    monkeypatch.setitem(sys.modules, "dynamo.common.backend", None)
    with pytest.raises(UserError, match=r"sessa-deploy\[dynamo\]"):
        dynamo.engine_class()


def test_float32_is_told_by_its_shortest_number() -> None:
    assert shortest(0.699999988079071) == 0.7 and shortest(1.100000023841858) == 1.1 and shortest(0.5) == 0.5


@pytest.mark.parametrize("module", fake_dynamo.NAMES)
def test_the_fake_has_the_signatures_of_the_real_one(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "dynamo"]:
        monkeypatch.delitem(sys.modules, name)
    try:
        real = importlib.import_module(module)
    except ImportError as error:
        pytest.skip(f"ai-dynamo is not installed: {error}")
    for name in fake_dynamo.NAMES[module]:
        mine, theirs = getattr(fake_dynamo, name), getattr(real, name)
        if dataclasses.is_dataclass(mine):
            assert {field.name for field in dataclasses.fields(mine)} <= {field.name for field in dataclasses.fields(theirs)}
        functions = [(mine, theirs)] if inspect.isfunction(mine) else [
            (function, getattr(theirs, what)) for what, function in inspect.getmembers(mine, callable) if what in vars(mine) and not what.startswith("__")]
        for function, other in functions:
            assert [*inspect.signature(function).parameters] == [*inspect.signature(other).parameters], function
