"""Prompt lookup: the tokens of plain decoding, greedy or drawn with a seed, on every backend; where drafts are made, what they cost, how they end."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from batching import Toy
from drafting import PROMPTS, WORDS, DraftsItself, close_to_plain, settled
from numpy_model import NumpyBackend, NumpyModel

from sessa_deploy.cli import main
from sessa_deploy.config import SessaConfig
from sessa_deploy.errors import UserError
from sessa_deploy.runtime.bundle import Bundle, write_bundle
from sessa_deploy.runtime.device.backend import DeviceBackend
from sessa_deploy.runtime.lookup import MOST_DRAFTED, Drafter, DraftStats
from sessa_deploy.runtime.ort.backend import OrtBackend
from sessa_deploy.runtime.sampling import NotFinite, SamplingParams
from sessa_deploy.runtime.session import Session
from sessa_deploy.runtime.tokenizer import byte_level_tokenizer

FEW = SessaConfig(d_model=8, n_layers=1, n_heads=2, vocab_size=6, max_context=64)
COST = (0.2, 0.05)
SOURCE = list(b"for item in items:\n    total += item.value\nfor item in items:\n    count += item.number\nfor item in items:\n    ")


class Context(DraftsItself, Toy):
    """A toy with all logits whose next token depends on the last few alone, so that its texts repeat themselves. sharp: how sure it is; broken: tokens
    behind which there are no finite logits. fed: tokens a step."""

    all_logits = True

    def __init__(self, config: SessaConfig, capacity: int | None = None, order: int = 1, sharp: float = 3.0, seed: int = 0,
                 broken: tuple[int, ...] = ()) -> None:
        super().__init__(config, 1, capacity)
        self.order, self.sharp, self.seed, self.broken, self.fed = order, sharp, seed, broken, []

    def _after(self, tokens: list[int]) -> np.ndarray:
        if tokens[-1] in self.broken:
            return np.full(self.config.vocab_size, np.nan, np.float32)
        state = np.random.default_rng([self.seed, *tokens[-self.order :]])
        return (self.sharp * state.normal(size=self.config.vocab_size)).astype(np.float32)

    def _forward_all(self, ids, new):
        self._enter()
        self.fed.append(int(new[0]))
        del self.rows[0][int(self.length[0]) :]
        found = []
        for token in ids[0, : new[0]].tolist():
            self.rows[0].append(token)
            found.append(self._after(self.rows[0]))
        return np.array(found)[None]

    def _forward(self, ids, new):
        return self._forward_all(ids, new)[:, -1]


class AllLogits(NumpyBackend):
    """The oracle with the logits of every token."""

    all_logits = True

    def _forward_all(self, ids, new):
        before, found = self.length.copy(), []
        try:
            for at in range(int(new[0])):
                found.append(super()._forward(ids[:, at : at + 1], np.ones(1, np.int32)))
                self.length += 1
        finally:
            self.length[:] = before
        return np.stack(found, 1)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[SessaConfig], Bundle]:
    made: dict[int, Bundle] = {}

    def get(config: SessaConfig) -> Bundle:
        if config.vocab_size not in made:
            files = {"model.onnx": b"unused"} | ({"tokenizer.json": byte_level_tokenizer().encode()} if config is WORDS else {})
            made[config.vocab_size] = write_bundle(tmp_path_factory.mktemp("b") / "b", files, config, "fp32", {})
        return made[config.vocab_size]

    return get


@pytest.fixture(autouse=True, params=["waiting", "ahead", "itself"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether the toy looks ahead, and whether it then makes drafts itself: the next one is on its way before the tokens of a step are shown."""
    monkeypatch.setattr(Context, "looks_ahead", request.param != "waiting")
    monkeypatch.setattr(Context, "itself", request.param == "itself")
    return str(request.param)


def pair(bundle: Callable[[SessaConfig], Bundle], config: SessaConfig = WORDS, most: int = 8, **toy: Any) -> tuple[Session, Session]:
    """A session that looks up and one that does not, on two toys alike."""
    return tuple(Session(bundle(config), Context(config, **toy), lookup=n) for n in (most, 0))  # type: ignore[return-value]


# The tokens are those of plain decoding


@pytest.mark.parametrize("most", [1, 4, MOST_DRAFTED])
def test_greedy_texts_are_those_of_plain_decoding(bundle, most):
    saved = 0
    for seed in range(12):
        drafting, plain = pair(bundle, most=most, seed=seed)
        prompt = np.random.default_rng(seed).integers(0, 257, 3 + 4 * seed).tolist()
        found, expected = drafting.generate([prompt], 120)[0], plain.generate([prompt], 120)[0]
        assert (found.tokens, found.text, found.finish) == (expected.tokens, expected.text, expected.finish)
        stats = drafting.drafts
        assert stats.tokens == len(found.tokens) - 1 and stats.tokens == stats.steps + stats.accepted - (stats.tokens < stats.steps + stats.accepted)
        assert stats.accepted <= stats.drafted and max(drafting.backend.fed[1:]) <= most + 1
        saved += stats.tokens - stats.steps
        settled(drafting)
    assert saved > 300 * most / (most + 1), "texts that repeat themselves take fewer steps"


@pytest.mark.parametrize("params", [
    SamplingParams(1.0, seed=3), SamplingParams(0.6, top_k=20, seed=4), SamplingParams(1.3, top_p=0.7, min_p=0.02, seed=5),
    SamplingParams(0.8, repetition_penalty=1.2, presence_penalty=0.4, frequency_penalty=0.2, seed=6), SamplingParams(0.0, repetition_penalty=1.05),
])
def test_a_seed_draws_what_it_draws_without_drafts(bundle, params, eager):
    drafted = 0
    for seed in range(4):
        drafting, plain = pair(bundle, seed=seed, sharp=4.0)
        assert drafting.generate([SOURCE], 150, params)[0] == plain.generate([SOURCE], 150, params)[0]
        drafted += drafting.drafts.drafted
    assert drafted > 5


def test_drawn_tokens_have_the_distribution_of_plain_decoding(bundle, eager):
    """Chi-square over the whole words of three tokens that unseeded draws give, against their exact probabilities, in a place where drafts are made."""
    prompt = [1, 2, 0, 3, 1, 2, 1, 4, 1, 2, 2, 5, 1, 2, 3, 0, 1, 2, 4, 1, 1, 2, 5, 2, 1, 2]  # whatever comes next, it came before
    drafting, _ = pair(bundle, FEW, sharp=1.2)
    toy: Any = drafting.backend
    exact: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        step = {}
        for word, chance in exact.items():
            weight = np.exp(toy._after([*prompt, *word]).astype(np.float64))
            step |= {(*word, token): chance * p for token, p in enumerate(weight / weight.sum())}
        exact = step
    rounds, seen, drafted = 1500, Counter(), 0
    for number in range(rounds):
        drafting.reset()
        word = drafting.generate([prompt], 3, SamplingParams(1.0, seed=number), stop_tokens=())[0].tokens
        seen[tuple(word)] += 1
        drafted += drafting.drafts.drafted
    assert drafted == rounds
    likely = [word for word, chance in exact.items() if chance * rounds >= 5]
    chances = np.array([exact[word] for word in likely])
    counts = np.array([seen[word] for word in likely])
    others, rest = rounds - counts.sum(), rounds * (1 - chances.sum())
    chi = float(((counts - rounds * chances) ** 2 / (rounds * chances)).sum() + (others - rest) ** 2 / rest)
    assert len(likely) > 30 and chi < len(likely) + 5 * np.sqrt(2 * len(likely)), (chi, len(likely))


# Where drafts are made


def drafted(tokens: list[int], prompt: int, most: int = 8, cost: tuple[float, float] = COST) -> tuple[int, int]:
    """(drafted tokens, accepted ones) where a text is what is drawn."""
    text = tokens[:prompt]
    drafter, made, taken, at = Drafter(text, most, cost), 0, 0, prompt
    while at < len(tokens):
        draft = drafter.draft(len(tokens) - at)
        right = next((i for i, token in enumerate(draft) if token != tokens[at + i]), len(draft))
        made, taken = made + len(draft), taken + right
        text += tokens[at : at + right + 1]
        at += right + 1
    return made, taken


def test_nothing_is_drafted_where_nothing_repeats():
    rng = np.random.default_rng(0)
    assert drafted(rng.integers(0, 257, 3000).tolist(), 500) == (0, 0)
    # What repeats but never goes on alike costs a few drafts until that is known.
    traps = [t for i in range(400) for t in (1, 2, 3, 4, 5, 6, 7, 8, 1000 + i)]
    made, taken = drafted(traps, 90)
    assert taken > 1900
    short = [t for i in range(400) for t in (1, 2, 3, 1000 + i)]
    made, taken = drafted(short, 4)
    assert made - taken < 0.02 * len(short)


def test_drafting_stops_and_begins_again_by_itself():
    """A text that repeats itself, one that does not, and the first again."""
    rng = np.random.default_rng(1)
    loop, noise = list(range(20)) * 10, rng.integers(0, 257, 1000).tolist()
    alone, both = drafted(loop, 40), drafted([*loop, *noise, *loop], 40)
    assert alone[1] > 140 and alone[0] == alone[1]
    assert both[0] - both[1] <= 2 * MOST_DRAFTED and both[1] > 2 * alone[1]
    # The same tokens give the same drafts, however they came.
    one, other = list(SOURCE), []
    drafters = Drafter(one, 8, COST), Drafter(other, 8, COST)
    for token in SOURCE:
        other.append(token)
        drafters[1].draft(8)
    assert drafters[0].draft(8) == drafters[1].draft(8) != []


def test_a_gpu_drafts_only_where_a_step_of_several_rows_pays():
    """One token that comes as it did last in two of three cases is worth 1.6 steps: more than a step of two rows takes on a CPU, less than on a GPU."""
    rng = np.random.default_rng(2)
    text = [t for _ in range(400) for t in (1, 2, 3, 4 if rng.random() < 0.8 else int(rng.integers(1000, 10**6)), int(rng.integers(1000, 10**6)))]
    made, taken = drafted(text, 100, MOST_DRAFTED)
    assert made > 200 and taken > 0.5 * made
    made, _ = drafted(text, 100, MOST_DRAFTED, DeviceBackend.draft_cost)
    assert made < 40
    # A text that says whole passages again is drafted there too, and most of it in long drafts.
    made, taken = drafted(list(range(40)) * 8, 80, MOST_DRAFTED, DeviceBackend.draft_cost)
    assert made == taken > 200


@pytest.mark.parametrize("length", [1, 2, 5, 6, 7, 255, 256, 257, 258, 261, 262, 263, 700])
def test_a_long_prompt_is_remembered_whole(length, eager):
    rng = np.random.default_rng(length)
    head = rng.integers(0, 200, length).tolist()
    text = [*head, 201, 202, 203, 204, 205, 206, 207, 208, *rng.integers(0, 200, 400).tolist(), 201, 202, 203, 204, 205, 206]
    made = Drafter(text, 2, (0.0, 0.0))
    assert made.draft(2) == [207, 208] and made.draft(1) == [207] and made.draft(0) == []
    text += [*rng.integers(0, 200, 600).tolist(), 201, 202, 203, 204, 205, 206]  # and what came later by itself, all at once
    assert made.draft(1) == [text[len(head) + 414]], "the last time counts"


def test_a_draft_goes_round_a_loop_that_is_shorter_than_it():
    draft = Drafter([1, 2, 3] * 6, 8, COST).draft(8)
    assert len(draft) > 5 and draft == [1, 2, 3, 1, 2, 3, 1, 2][: len(draft)]


# How generation ends


@pytest.mark.parametrize("capacity", [30, 31, 32, 33, 34, 35, 64])
@pytest.mark.parametrize("limit", [None, 1, 2, 7])
def test_the_capacity_and_the_limit_end_where_they_do_without_drafts(bundle, capacity, limit):
    drafting, plain = pair(bundle, FEW, capacity=capacity)
    prompt = [1, 2, 3, 4] * 7
    limit = None if limit is None else min(limit, capacity + 1 - len(prompt))
    assert drafting.generate([prompt], limit, stop_tokens=()) == plain.generate([prompt], limit, stop_tokens=())
    settled(drafting)
    if limit is None and capacity == 64:
        assert drafting.drafts.accepted > 10


def test_stops_inside_an_accepted_draft(bundle):
    """Every token, and every piece of text, of a text that was said before ends it where it does without drafts; the conversation goes on behind it."""
    drafting, plain = pair(bundle, seed=2)
    text = plain.generate([SOURCE], 80, stop_tokens=())[0].tokens
    prompt, inside = [*SOURCE, *text, SOURCE[-1]], 0  # what follows depends on the last token alone
    shown = plain.tokenizer.decode(text)
    ends = [{"stop_tokens": token} for token in dict.fromkeys(text)]
    ends += [{"stop_tokens": (), "stop": [shown[at : at + 4]]} for at in range(0, len(shown) - 4, 5)]
    for end in ends:
        for s in (drafting, plain):
            s.reset()
        found, expected = (s.generate([prompt], 80, **end) for s in (drafting, plain))
        assert found == expected and found[0].finish == "stop"
        inside += drafting.backend.fed[-1] > 1 and drafting.drafts.tokens < drafting.drafts.steps + drafting.drafts.drafted
        settled(drafting)
        assert drafting.generate([[5]], 9) == plain.generate([[5]], 9)
    assert inside > 10, "the end stood in a draft, with more of it behind"


def test_a_stream_may_be_dropped_at_any_token(bundle):
    """The conversation then holds what was shown, whether it stood in a draft or not, and goes on as a plain one does."""
    drafting, plain = pair(bundle, seed=2)
    for shown in range(1, 40):
        results = []
        for s in (drafting, plain):
            s.reset()
            stream = s.stream([SOURCE], 60, stop_tokens=())
            chunks = [next(stream) for _ in range(shown)]
            assert s.tokens() == [*SOURCE, *(chunk.token for chunk in chunks)]
            if shown % 2:
                stream.close()
            more = s.generate([[] if shown % 3 else [7, 8]], 20, stop_tokens=())
            settled(s)
            results.append((chunks, more, s.tokens()))
            with pytest.raises((UserError, StopIteration)):
                next(stream)
        assert results[0] == results[1]
    drafting.reset()
    next(drafting.stream([SOURCE], 60))
    logits = drafting.decode([3])
    np.testing.assert_array_equal(logits[0], drafting.backend._after(drafting.tokens()))


def test_a_conversation_of_many_turns(bundle):
    drafting, plain = pair(bundle, seed=4)
    for turn, prompt in enumerate(["def a(x):\n", SOURCE, "\n", [1], "for item in items:\n    total", SOURCE[:30]]):
        params = SamplingParams() if turn % 2 else SamplingParams(0.7, seed=turn)
        assert drafting.generate([prompt], 30, params) == plain.generate([prompt], 30, params)
        assert drafting.tokens() == plain.tokens()
        settled(drafting)


def test_logits_that_are_not_finite_matter_only_where_they_are_drawn_from(bundle, eager):
    for params in (SamplingParams(), SamplingParams(0.5, seed=1)):
        prompt = [1, 2, 3, 9, 1, 2, 3, 9, 1, 2, 3]
        drafting = Session(bundle(WORDS), Context(WORDS, seed=1, broken=(9,)), lookup=8)
        plain = Session(bundle(WORDS), Context(WORDS, seed=1), lookup=0)
        drafting.prefill([prompt])
        expected = plain.generate([prompt], 5, params)[0].tokens
        assert 9 not in expected
        drafting.reset()
        assert drafting.generate([prompt], 5, params)[0].tokens == expected
        with pytest.raises(NotFinite):
            drafting.generate([[9]], 5, params)
        assert drafting.tokens()[-1] == 9


# On real graphs


def test_on_the_oracle(tmp_path, tiny: NumpyModel):
    made = write_bundle(tmp_path / "b", {"model.onnx": b"unused"}, tiny.config, "fp32", {})
    session = Session(made, AllLogits(tiny, 1), lookup=4)
    for prompt in ([1, 2, 3] * 6, list(range(40, 53))):
        session.reset()
        assert session.generate([prompt], 20, stop_tokens=())[0].tokens == tiny.greedy(prompt, 20)
    assert session.drafts.steps


def test_on_onnx_runtime(all_logits_bundle, tiny_bundle, eager):
    drafting = Session(all_logits_bundle, OrtBackend(all_logits_bundle, threads=1), lookup=5)
    plain = Session(tiny_bundle, OrtBackend(tiny_bundle, threads=1))
    assert close_to_plain(drafting, plain, PROMPTS, 40) == 0
    params = SamplingParams(0.8, seed=3)
    for s in (drafting, plain):
        s.reset()
    assert drafting.generate([PROMPTS[3]], 40, params)[0].tokens == plain.generate([PROMPTS[3]], 40, params)[0].tokens


@pytest.mark.parametrize("given", [{"lookup": 4, "batch": 2}, {"lookup": 16}, {"lookup": -1}, {"lookup": True}, {"lookup": "4"}])
def test_what_is_refused(bundle, given):
    class Two(Context):
        def __init__(self, config: SessaConfig) -> None:
            Toy.__init__(self, config, given.get("batch", 1))

    with pytest.raises(UserError) as caught:
        Session(bundle(WORDS), Two(WORDS), lookup=given["lookup"])
    assert "\n" not in str(caught.value) and "lookup" in str(caught.value)


def call(capfd: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    code = 0
    try:
        main([str(arg) for arg in args])
    except SystemExit as done:
        code = int(done.code or 0)
    return code, *capfd.readouterr()


def test_the_command_line(all_logits_bundle: Bundle, tiny_bundle: Bundle, tmp_path: Path, capfd: pytest.CaptureFixture[str], eager: None) -> None:
    run = ["--prompt-ids", "1 2 3 1 2 3 1 2 3", "--max-new-tokens", "20", "--backend", "ort", "--threads", "1"]
    code, out, err = call(capfd, "run", tiny_bundle.path, *run, "--lookup", 4)
    assert code == 2 and out == "" and err.count("\n") == 1 and "--all-logits" in err and "prompt lookup needs the logits" in err
    code, plain, _ = call(capfd, "run", all_logits_bundle.path, *run, "--json")
    assert code == 0 and "lookup" not in json.loads(plain)
    code, out, err = call(capfd, "run", all_logits_bundle.path, *run, "--json", "--lookup", 4)
    found = json.loads(out)
    assert code == 0 and found["tokens"] == json.loads(plain)["tokens"] and " tokens a step, " in err
    stats = found["lookup"]
    assert stats["tokens"] == 19 and stats["tokens_per_step"] == 19 / stats["steps"] and stats["drafted"] > 0
    code, out, err = call(capfd, "run", all_logits_bundle.path, *run, "--prompt", "abcabc", "--lookup", 4)
    assert code == 0 and "1 at once; lookup: " in err and out.count("==> ") == 2
    (tmp_path / "text").write_text("abcd" * 8)
    bench = ["bench", all_logits_bundle.path, "--backend", "ort", "--threads", "1", "--prompt-tokens", 16, "--window", 12, "--steps", 2, "--seconds", 0]
    code, out, err = call(capfd, *bench, "--lookup", 6, "--prompt-file", tmp_path / "text", "--json", "-")
    found = json.loads(out)
    assert code == 0 and found["lookup"]["most"] == found["settings"]["lookup"] == 6 and found["lookup"]["ratio"] > 0 and " x" in err
    assert found["lookup"]["tokens"] % 12 == 0
    code, _, err = call(capfd, *bench[:-6], "--prompt-tokens", 60, "--window", 2, "--prompt-file", tmp_path / "text")
    assert code == 2 and "shorter than the prompt" in err
    code, _, err = call(capfd, *bench, "--batch", 2, "--lookup", 6)
    assert code == 2 and "one sequence" in err


def test_figures_of_nothing() -> None:
    assert DraftStats().to_dict() == {"steps": 0, "tokens": 0, "drafted": 0, "accepted": 0, "acceptance": None, "tokens_per_step": None}
    assert str(DraftStats()) == "no step" and "2.00 tokens a step, 3 of 4" in str(DraftStats(3, 6, 4, 3))
