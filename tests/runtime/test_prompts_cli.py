"""Many prompts, JSON, chat and score, as a user calls them."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys

import pytest
from templated import END, TEMPLATE, rendered
from test_run_cli import call

from sessa_deploy.runtime.bundle import write_bundle
from sessa_deploy.runtime.sampling import SamplingParams
from sessa_deploy.runtime.scoring import score
from sessa_deploy.runtime.session import Session

KEYS = ["index", "prompt", "text", "tokens", "finish", "first_token_ms", "tokens_per_second"]


@pytest.fixture(scope="module")
def bare(tiny_bundle, tmp_path_factory):
    """The tiny bundle without a tokenizer."""
    files = {"model.onnx": tiny_bundle.model}
    return write_bundle(tmp_path_factory.mktemp("bare") / "b", files, tiny_bundle.config, "fp32", tiny_bundle.versions)


def alone(bundle, prompt, tokens, **params):
    return Session(bundle, "ort", threads=1).generate([prompt], tokens, SamplingParams(**params))[0]


def stdin(monkeypatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


def test_prompts_of_every_kind_in_the_order_given(tiny_bundle, tmp_path, capfd, monkeypatch):
    (tmp_path / "p.txt").write_bytes("größe\r\n".encode())
    stdin(monkeypatch, b"from a pipe\n")
    args = ("--prompt-ids", "1, 2 3", "--prompt", "def f", "--prompt-file", tmp_path / "p.txt", "--prompt", "-", "--prompt-ids", "[7]")
    prompts = [[1, 2, 3], "def f", "größe\r\n", "from a pipe\n", [7]]
    code, out, err = call(capfd, "run", tiny_bundle.path, *args, "--max-new-tokens", 9, "--temperature", 0.9, "--seed", 4, "--json", "--threads", 1)
    assert code == 0 and "5 prompts" in err and err.count("\n") == 1
    rows = [json.loads(line) for line in out.splitlines()]
    assert [list(row) for row in rows] == [KEYS] * 5 and [row["index"] for row in rows] == list(range(5)) and [row["prompt"] for row in rows] == prompts
    for row, prompt in zip(rows, prompts, strict=True):
        single = alone(tiny_bundle, prompt, 9, temperature=0.9, seed=4)
        assert (row["tokens"], row["text"], row["finish"]) == (single.tokens, single.text, "length")
        assert row["first_token_ms"] > 0 and row["tokens_per_second"] > 0


def test_texts_of_several_prompts_stand_under_headers(tiny_bundle, capfd):
    code, out, _ = call(capfd, "run", tiny_bundle.path, "--prompt", "def\nf", "--prompt", "x" * 100, "--capacity", 120, "--max-new-tokens", 4)
    first, second = alone(tiny_bundle, "def\nf", 4), Session(tiny_bundle, "ort", capacity=120, threads=1).generate(["x" * 100], 4)[0]
    assert code == 0 and out == f"==> 1 of 2: def f <==\n{first.text}\n\n==> 2 of 2: {'x' * 57}... <==\n{second.text}\n"


def test_more_prompts_than_fit_into_one_batch(tiny_bundle, capfd):
    args = [part for i in range(11) for part in ("--prompt-ids", str(i))]
    code, out, err = call(capfd, "run", tiny_bundle.path, *args, "--json", "-")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [row["index"] for row in rows] == list(range(11)) and "8 at once" in err
    assert all(len(row["tokens"]) == 64 and row["finish"] == "length" for row in rows), "each as far as its own room goes"
    assert rows[10]["tokens"] == alone(tiny_bundle, [10], 64).tokens


def test_one_prompt_as_json_and_by_ids(tiny_bundle, bare, all_logits_bundle, capfd):
    single = alone(tiny_bundle, [1, 2], 5)
    for bundle in (tiny_bundle, bare, all_logits_bundle):
        code, out, err = call(capfd, "run", bundle.path, "--prompt-ids", "1 2", "--max-new-tokens", 5, "--json")
        row = json.loads(out)
        assert code == 0 and row["tokens"] == single.tokens and row["text"] == (None if bundle is bare else single.text) and "2 prompt tokens" in err
    assert call(capfd, "run", bare.path, "--prompt-ids", "1,2", "--max-new-tokens", 5)[1] == " ".join(map(str, single.tokens)) + "\n"
    assert json.loads(call(capfd, "run", bare.path, "--prompt-ids", "1,2", "--max-new-tokens", 1, "--json")[1])["tokens_per_second"] is None
    for args in (("--prompt", "x"), ("--prompt-ids", "1", "--stop", "x")):
        code, out, err = call(capfd, "run", bare.path, *args)
        assert code == 2 and out == "" and "tokenizer.json" in err and err.count("\n") == 1


BAD = [("--prompt-ids", ""), ("--prompt-ids", "1 x"), ("--prompt-ids", "-1"), ("--prompt-ids", "1.5"), ("--prompt-ids", "9" * 400), ("--prompt-ids", "257"),
       ("--prompt-ids", ","), ("--prompt-file", "/absent/file"), ("--prompt-file", "/"), ("--prompt-file", ""), ("--prompt-file", "a\0b"), ("--prompt", ""),
       ("--prompt", "x" * 65)]


@pytest.mark.parametrize("bad", BAD, ids=lambda pair: " ".join(map(ascii, pair))[:40])
def test_a_bad_prompt_among_good_ones_is_refused_before_any_work(tiny_bundle, capfd, bad):
    code, out, err = call(capfd, "run", tiny_bundle.path, "--prompt", "good", *bad, "--json")
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1


def test_standard_input_holds_one_prompt(tiny_bundle, capfd, monkeypatch):
    code, _, err = call(capfd, "run", tiny_bundle.path, "--prompt", "-", "--prompt-file", "-")
    assert code == 2 and "standard input" in err
    stdin(monkeypatch, b"\xff")
    code, _, err = call(capfd, "run", tiny_bundle.path, "--prompt-file", "-")
    assert code == 2 and "UTF-8" in err and err.count("\n") == 1


def test_chat_continues_one_text_on_its_caches(tiny_bundle, capfd, monkeypatch):
    session = Session(tiny_bundle, "ort", threads=1)
    first = session.generate("def f", 4)[0].text
    second = session.generate(["x" if first.endswith("\n") else "\nx"], 4)[0].text
    more = session.generate([[]], 4)[0].text
    stdin(monkeypatch, b"def f\n\nx\r\n/more\n/reset\n/more\ndef f\n/quit\nnever")
    code, out, err = call(capfd, "chat", tiny_bundle.path, "--max-new-tokens", 4, "--backend", "ort", "--threads", 1)
    assert code == 0 and out == f"{first}\n{second}\n{more}\n{first}\n" and err == ""


@pytest.fixture(scope="module")
def templated(tiny_bundle, tmp_path_factory):
    """The tiny bundle with a chat template."""
    files = {"model.onnx": tiny_bundle.model, "tokenizer.json": tiny_bundle.file("tokenizer.json"), "chat_template.jinja": TEMPLATE.encode(),
             "tokenizer_config.json": json.dumps({"bos_token": "^", "eos_token": END}).encode()}
    return write_bundle(tmp_path_factory.mktemp("templated") / "b", files, tiny_bundle.config, "fp32", tiny_bundle.versions)


def test_chat_puts_the_template_around_its_turns(templated, tiny_bundle, capfd, monkeypatch):
    session = Session(templated, "ort", capacity=120, threads=1)
    encode = session.tokenizer.encode
    first = session.generate([encode(rendered(("user", "a")))], 4, stop_tokens=[256])[0].text
    session.reset()
    again = [("user", "a"), ("assistant", first), ("user", "b")]
    second = session.generate([encode(rendered(*again))], 4, stop_tokens=[256])[0].text
    more = session.generate([[]], 4, stop_tokens=[256])[0].text
    stdin(monkeypatch, b"a\nb\n/more\n/reset\na\n" + b"y" * 200 + b"\n")
    code, out, err = call(capfd, "chat", templated.path, "--capacity", 120, "--max-new-tokens", 4, "--backend", "ort", "--threads", 1)
    assert code == 0 and out == f"{first}\n{second}\n{more}\n{first}\n" and err.count("\n") == 1 and "this turn's included" in err
    stdin(monkeypatch, b"a\n")
    _, plain, _ = call(capfd, "chat", templated.path, "--plain", "--max-new-tokens", 4, "--backend", "ort", "--threads", 1)
    assert plain == alone(tiny_bundle, "a", 4).text + "\n"


def test_chat_says_when_the_context_is_full_and_goes_on_after_reset(tiny_bundle, capfd, monkeypatch):
    stdin(monkeypatch, b"abc\n" + b"y" * 30 + b"\n/more\n/reset\nabc\n")
    code, out, err = call(capfd, "chat", tiny_bundle.path, "--capacity", 20, "--max-new-tokens", 10, "--seed", 1, "--temperature", 0.5)
    lines = out.splitlines(keepends=True)
    assert code == 0 and "error: the context is full: got 13 tokens of conversation" in err and "/reset" in err and err.count("\n") == 2
    assert "note: the context is full (20 tokens)" in err and len(lines) >= 3
    assert out.startswith(alone(tiny_bundle, "abc", 10, temperature=0.5, seed=1).text + "\n")


def test_what_chat_says_into_a_full_or_closed_output_is_no_turn_to_go_on_from(tiny_bundle):
    program = [sys.executable, "-c", "from sessa_deploy.cli import main; main()", "chat", str(tiny_bundle.path), "--max-new-tokens", "2", "--threads", "1"]
    for shell, code in (('"$@" >/dev/full', 2), ('"$@" >&-', 2), ('"$@" | true; exit ${PIPESTATUS[0]}', 0)):
        done = subprocess.run(["bash", "-c", shell, "-", *program], input="hi\nthere\n", capture_output=True, text=True, check=False)
        assert done.returncode == code and done.stderr.count("\n") == bool(code) and ("standard output" in done.stderr) == bool(code), (shell, done)


@pytest.mark.parametrize("args", [("--max-new-tokens", 0), ("--top-p", 2), ("--seed", -1), ("--capacity", 0), ("--stop", ""), ("--threads", 0), ("--nope",)])
def test_chat_refuses_bad_options_in_one_line(tiny_bundle, capfd, monkeypatch, args):
    stdin(monkeypatch, b"a\n")
    code, out, err = call(capfd, "chat", tiny_bundle.path, *args)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and out == ""


def test_chat_needs_text(bare, capfd, monkeypatch):
    stdin(monkeypatch, b"a\n")
    code, _, err = call(capfd, "chat", bare.path)
    assert code == 2 and "tokenizer.json" in err and err.count("\n") == 1


def test_an_interrupt_stops_the_answer_and_not_the_program(tiny_bundle):
    command = [sys.executable, "-c", "from sessa_deploy.cli import main; main()", "chat", str(tiny_bundle.path), "--capacity", "20000", "--max-new-tokens",
               "19000", "--threads", "1"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        child.stdin.write(b"abc\n")
        child.stdin.flush()
        assert os.read(child.stdout.fileno(), 1)  # it answers
        child.send_signal(signal.SIGINT)
        line = child.stderr.readline()
        assert line.startswith(b"note: stopped") and child.poll() is None
        out, err = child.communicate(b"/help\n/quit\n", timeout=200)
        assert child.returncode == 0 and out.count(b"\n") >= 1 and b"/reset begins anew" in err and b"Traceback" not in err


def test_score_prints_and_writes_json(tiny_bundle, all_logits_bundle, bare, tmp_path, capfd, monkeypatch):
    text = "def f(x):\n" * 9
    (tmp_path / "t.txt").write_text(text)
    expected = score(Session(tiny_bundle, "ort", threads=1), text)
    for bundle in (tiny_bundle, all_logits_bundle):
        stdin(monkeypatch, text.encode())
        for where, flag in ((tmp_path / "t.txt", ("--json",)), ("-", ("--json", "-"))):
            code, out, err = call(capfd, "score", bundle.path, "--text", where, *flag, "--backend", "ort", "--threads", 1)
            found = json.loads(out)
            assert code == 0 and found["log_likelihood"] == pytest.approx(expected.log_likelihood, rel=1e-6) and found["tokens"] == found["bytes"] == 89
            assert found["bits_per_byte"] == pytest.approx(expected.bits_per_byte) and found["perplexity"] == pytest.approx(expected.perplexity)
            assert "2 windows of 64 tokens, 32 tokens apart" in err and "first token is not scored" in err and err.count("\n") == 2
    code, out, _ = call(capfd, "score", tiny_bundle.path, "--text", tmp_path / "t.txt")
    assert code == 0 and [line.split(":")[0] for line in out.splitlines()] == ["log-likelihood", "bits per byte", "perplexity", "tokens"]
    (tmp_path / "ids").write_text("1 2 3\n4\n")
    code, out, _ = call(capfd, "score", bare.path, "--ids", tmp_path / "ids", "--json")
    assert code == 0 and json.loads(out)["bits_per_byte"] is None and json.loads(out)["tokens"] == 3


@pytest.mark.parametrize("args", [(), ("--text", "/absent"), ("--text", "t", "--ids", "t"), ("--text", "t", "--stride", 0), ("--text", "t", "--stride", 65),
                                  ("--text", "t", "--capacity", 0), ("--text", "t", "--threads", 0), ("--text", "empty"), ("--ids", "t"), ("--text", "bytes")])
def test_score_refuses_bad_input_in_one_line(tiny_bundle, tmp_path, capfd, monkeypatch, args):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t").write_text("text")
    (tmp_path / "empty").write_text("")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    code, out, err = call(capfd, "score", tiny_bundle.path, *args)
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1


def test_bench_measures_a_bundle_with_all_logits(all_logits_bundle, capfd):
    args = ("--prompt-tokens", 8, "--window", 4, "--steps", 2, "--seconds", 0, "--json", "-")
    code, out, err = call(capfd, "bench", all_logits_bundle.path, *args)
    assert code == 0 and json.loads(out)["inter_token_ms"]["count"] >= 2, err


def test_validate_judges_no_empty_text_and_reads_standard_input_once(tiny_bundle, tmp_path, capfd):
    (tmp_path / "empty").write_bytes(b"")
    for texts, words in ((("--text", tmp_path / "empty"), "the text is empty"), (("--text", "-", "--text", "-"), "standard input is given twice")):
        code, out, err = call(capfd, "validate", tiny_bundle.path, "--checkpoint", tmp_path, *texts)
        assert code == 2 and words in err and err.count("\n") == 1 and out == ""
