"""The next greedy step begun before the tokens of the one before are known: the same tokens, lengths and errors. On backends that compute at once."""

from __future__ import annotations

import numpy as np
import pytest
from ahead import conversations
from batching import Plan, Toy, alone, check_alike, examples, plans, play
from hypothesis import given, settings
from hypothesis import strategies as st
from small_bundle import VERSIONS

from sessa_deploy.config import SessaConfig
from sessa_deploy.errors import UserError
from sessa_deploy.runtime.batcher import Batcher
from sessa_deploy.runtime.bundle import write_bundle
from sessa_deploy.runtime.requests import Request
from sessa_deploy.runtime.sampling import NotFinite, SamplingParams
from sessa_deploy.runtime.session import Session
from sessa_deploy.runtime.tokenizer import Tokenizer, byte_level_tokenizer

TOY = SessaConfig(d_model=8, n_layers=1, n_heads=2, vocab_size=257, max_context=64)
TOKENIZER = Tokenizer.from_json(byte_level_tokenizer())
ONE = np.ones(2, np.int32)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    files = {"model.onnx": b"unused", "tokenizer.json": byte_level_tokenizer().encode()}
    return write_bundle(tmp_path_factory.mktemp("toy") / "b", files, TOY, "fp32", VERSIONS)


def toy(batch=2, capacity=64, ahead=True, broken=(), **options) -> Toy:
    made = Broken(broken, TOY, batch, capacity, **options)
    made.looks_ahead = ahead
    return made


class Broken(Toy):
    """Logits that are NaN behind the tokens in `broken`."""

    def __init__(self, broken, *given, **options) -> None:
        super().__init__(*given, **options)
        self.broken = set(broken)

    def _feed(self, row, ids):
        logits = super()._feed(row, ids)
        return np.full_like(logits, np.nan) if self.broken.intersection(ids) else logits


@pytest.mark.parametrize("batch", [1, 3])
def test_conversations_are_the_same(bundle, batch):
    ahead, plain = (Session(bundle, toy(batch, 40, looking), chunk=4) for looking in (True, False))
    finishes = set()
    for seed in range(30):
        found = conversations(ahead, seed)
        assert found == conversations(plain, seed)
        finishes |= {one.finish for made, _, _ in found for one in made}
    assert finishes == {None, "stop", "length", "context"}


@settings(max_examples=examples(40), deadline=None)
@given(plans(257, 64, most=12), st.integers(1, 5), st.sampled_from([1, 4, 16]), st.booleans())
def test_every_request_gets_what_it_gets_alone_without(requests, slots, chunk, reuse):
    batcher = Batcher(toy(slots), TOKENIZER, chunk, queue=99, prefix_reuse=reuse)
    for plan, found in zip(requests, play(batcher, requests), strict=True):
        check_alike(found, alone(lambda: Batcher(toy(slots, ahead=False), TOKENIZER, chunk), plan.request), plan)


def test_a_request_that_comes_has_a_part_in_the_step_behind_the_one_under_way():
    """Nobody waits longer than that, and no step is begun while a prompt is read."""
    backend = toy(3)
    found = play(Batcher(backend, None, 4), [Plan(Request((1, 2), max_new_tokens=9)), Plan(Request((3,), max_new_tokens=5), 3)], poison=False)
    assert [len(one.tokens) for one in found] == [9, 5]
    assert backend.calls[:6] == [(0, [2]), (None, [1, 0, 0]), (None, [1, 0, 0]), (None, [1, 0, 0]), (1, [1]), (None, [1, 0, 0])]
    assert backend.calls[6:] == [(None, [1, 1, 0])] * 4


def test_no_step_is_begun_that_a_limit_or_the_capacity_forbids(bundle, monkeypatch):
    """Only stops that nobody can foresee leave one behind."""
    backend = toy(2, 12)
    begun: list[list[int]] = []
    begin = backend._begin_next
    monkeypatch.setattr(backend, "_begin_next", lambda one: (begun.append(one.new.tolist()), begin(one))[1])
    session = Session(bundle, backend, chunk=4)
    first, second = session.generate([[1], [2, 3]], [4, 7], stop_tokens=())
    assert (len(first.tokens), len(second.tokens)) == (4, 7) and backend.under_way == 0
    assert begun == [[1, 1]] * 2 + [[0, 1]] * 3, "of three steps and six the first is fed by the host"
    session.reset()
    assert session.generate([[1] * 10], stop_tokens=())[0].finish == "context" and backend.under_way == 0 and backend.length[0] == 12
    session.reset()
    unseen = session.generate([[1]], 6, stop_tokens=())[0].tokens
    session.reset()
    assert session.generate([[1]], 6, stop_tokens=unseen[2])[0].tokens == unseen[:3] and backend.under_way == 1
    assert backend.length[0] == 3  # the prompt and the tokens before the last


def test_nothing_is_begun_where_somebody_samples_or_asks_for_probabilities(bundle, monkeypatch):
    backend = toy(2)
    monkeypatch.setattr(backend, "begin_greedy", lambda *given: pytest.fail("begun"))
    session = Session(bundle, backend)
    assert len(session.generate([[1], [2]], 5, [SamplingParams(1.0, seed=0), SamplingParams()])[0].tokens) == 5
    play(Batcher(backend, None, 4), [Plan(Request((1,), max_new_tokens=9, logprobs=1)), Plan(Request((2,), max_new_tokens=4))])
    monkeypatch.undo()
    backend.looks_ahead = False
    monkeypatch.setattr(backend, "begin_greedy", lambda *given: pytest.fail("begun"))
    session.reset()
    assert len(session.generate([[1], [2]], 5)[0].tokens) == 5


def test_the_contract_of_steps_that_are_begun():
    backend, plain = toy(2, 8), toy(2, 8)
    ids = np.array([[3], [4]])
    with pytest.raises(UserError, match="no greedy step to end"):
        backend.end_greedy()
    assert not backend.begin_next(ONE)
    backend.begin_greedy(ids, ONE)
    assert backend.length.tolist() == [0, 0] and not backend.begin_next([0, 0]) and backend.begin_next(ONE) and not backend.begin_next(ONE)
    want = [plain.step_greedy(ids, ONE)]
    np.testing.assert_array_equal(backend.end_greedy(), want[0])
    assert backend.length.tolist() == [1, 1] and backend.under_way == 1
    want.append(plain.step_greedy(want[0][:, None], ONE))
    backend.step_row(1, np.array([9]))  # the sequence that is fed beside it has no part in it any more
    plain.rewind(1, 1)
    plain.step_row(1, np.array([9]))
    assert not backend.begin_next(ONE) and backend.begin_next([1, 0])
    assert backend.end_greedy()[0] == want[1][0] and backend.length.tolist() == plain.length.tolist() == [2, 2]
    want.append(plain.step_greedy(want[1][:, None], np.array([1, 0])))
    assert backend.end_greedy()[0] == want[2][0] and backend.length.tolist() == [3, 2]
    for change in (lambda: backend.reset([0]), lambda: backend.rewind(0, 0), lambda: backend.rest(0), lambda: backend.wake(0, 0),
                   lambda: backend.copy_row(1, 0, 1), lambda: backend.step_row(0, np.array([1])), lambda: backend.call_off(0)):
        backend.begin_greedy(ids, np.array([1, 0]))
        assert backend.under_way == 1
        change()
        assert backend.under_way == 0 and not backend.begin_next(ONE)
    for change in (lambda: backend.step(ids, ONE), lambda: backend.step_all(ids, ONE), lambda: backend.step_greedy(ids, ONE), backend.call_off):
        backend.begin_greedy(ids, ONE)
        change()
        assert backend.under_way == 0
    backend.begin_greedy(ids, ONE)
    with pytest.raises(UserError, match="vocabulary"):
        backend.step(ids + 300, ONE)
    assert backend.under_way == 1, "what is refused changes nothing"
    backend.reset()
    backend.step(np.ones((2, 7), int), 7 * ONE)
    backend.begin_greedy(ids, ONE)
    assert not backend.begin_next(ONE), "the caches are full"
    backend.end_greedy()
    with pytest.raises(UserError, match="context is full"):
        backend.begin_greedy(ids, ONE)


def test_logits_that_are_not_finite_are_told_of_with_the_token_they_are_behind(bundle):
    session = Session(bundle, toy(2))
    fine = session.generate([[1], [2]], 8, stop_tokens=())
    at = next(i for i, token in enumerate(fine[1].tokens) if token not in {*fine[0].tokens, *fine[1].tokens[:i]} and i > 2)
    for looking in (True, False):
        s = Session(bundle, toy(2, ahead=looking, broken=fine[1].tokens[at : at + 1]))
        chunks = []
        with pytest.raises(NotFinite):
            for chunk in s.stream([[1], [2]], 8, stop_tokens=()):
                chunks.append(chunk)
        assert [c.token for c in chunks if c.row == 1] == fine[1].tokens[: at + 1] and len(chunks) == 2 * (at + 1)
        assert s.backend.length.tolist() == [1 + at] * 2
        backend = toy(2, ahead=looking, broken=fine[1].tokens[at : at + 1])
        found = play(Batcher(backend, None, 4), [Plan(Request((1,), max_new_tokens=8, ignore_eos=True)), Plan(Request((2,), max_new_tokens=8))])
        assert found[0].tokens == fine[0].tokens and (found[1].tokens, found[1].finish) == (fine[1].tokens[: at + 1], "error")


@pytest.mark.parametrize("at", range(10))
def test_a_step_that_fails_ends_its_requests_and_leaves_the_next_ones_whole(at):
    want = alone(lambda: Batcher(toy(), None, 4), Request((5, 6), max_new_tokens=6))
    batcher = Batcher(toy(faults={at + 1: RuntimeError("no")}), None, 4)
    play(batcher, [Plan(Request((1, 2, 3), max_new_tokens=5)), Plan(Request((4,), max_new_tokens=5), 1)])
    assert play_more(batcher, Request((5, 6), max_new_tokens=6)) == want.tokens


def play_more(batcher: Batcher, request: Request) -> list[int]:
    events: list[int] = []
    batcher.submit(request, lambda event: events.append(event.token))
    while batcher.turn():
        pass
    return events
