"""A chat template's road from a checkpoint into its bundle, and what its sandbox renders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from command import call
from hypothesis import HealthCheck, given
from hypothesis import settings as settings_of
from hypothesis import strategies as st
from templated import END, SETTINGS, TEMPLATE, rendered, templated_checkpoint

from sessa_deploy.checkpoint_template import read_template
from sessa_deploy.config import SessaConfig
from sessa_deploy.errors import UserError
from sessa_deploy.export.to_onnx import export_bundle
from sessa_deploy.runtime.bundle import Bundle
from sessa_deploy.runtime.template import ChatTemplate, TemplateError
from sessa_deploy.runtime.tokenizer import byte_level_tokenizer

USER = [{"role": "user", "content": "a"}]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return templated_checkpoint(tmp_path / "c")


@pytest.mark.parametrize("where", ["jinja", "text", "named"])
def test_a_template_goes_along_checksummed_and_renders(tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str) -> None:
    checkpoint, out = templated_checkpoint(tmp_path / "c", where), tmp_path / "b"
    assert call("export", checkpoint, "--out", out) == 0
    bundle = Bundle.open(out)
    assert bundle.names() == ["chat_template.jinja", "model.onnx", "tokenizer.json", "tokenizer_config.json"]
    assert bundle.read("chat_template.jinja").decode() == TEMPLATE
    template = ChatTemplate.of(bundle)
    assert template is not None and template.special == {"bos_token": "^", "eos_token": END}
    asked = [{"role": "system", "content": " be kind "}, {"role": "user", "content": "Grüße"}]
    assert template.render(asked) == rendered(("system", "be kind"), ("user", "Grüße"))
    assert template.render(USER, add_generation_prompt=False) == rendered(("user", "a")).removesuffix("<assistant>")
    with pytest.raises(TemplateError, match="a conversation begins with the user"):
        template.render([{"role": "assistant", "content": "x"}])
    capsys.readouterr()
    for path, said in ((checkpoint, "chat_template.jinja" if where == "jinja" else "tokenizer_config.json"), (out, "chat_template.jinja")):
        assert call("inspect", path, "--json") == 0
        assert json.loads(capsys.readouterr().out)["chat_template"] == said
        assert call("inspect", path) == 0
        assert f"chat template │ {said}" in " ".join(capsys.readouterr().out.split())
    (out / "chat_template.jinja").write_text(TEMPLATE + " ")
    with pytest.raises(UserError, match=r"chat_template\.jinja"):
        Bundle.open(out)


def test_a_file_comes_before_the_settings_and_the_model_s_own_ends_stand_in(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ broken", "eos_token": None}))
    template = ChatTemplate.of(Bundle.open(export_bundle(checkpoint, tmp_path / "b")))
    assert template is not None and template.text == TEMPLATE and template.special == {"eos_token": END}
    assert template.render(USER).startswith("<user>a"), "a bos_token that nobody names is nothing"


def test_without_a_template_nothing_changes(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "chat_template.jinja").unlink()
    bundle = Bundle.open(export_bundle(checkpoint, tmp_path / "b"))
    assert bundle.names() == ["model.onnx", "tokenizer.json"] and ChatTemplate.of(bundle) is None


def test_without_a_tokenizer_there_is_no_chat(checkpoint: Path, tmp_path: Path) -> None:
    import torch

    from sessa_deploy.checkpoint import save_checkpoint
    from sessa_deploy.config import SessaConfig
    from sessa_deploy.model import SessaLM

    torch.manual_seed(0)
    (checkpoint / "tokenizer.json").unlink()
    save_checkpoint(SessaLM(SessaConfig(d_model=16, n_layers=1, n_heads=2, vocab_size=31)), checkpoint)
    notes: list[str] = []
    assert Bundle.open(export_bundle(checkpoint, tmp_path / "b", note=notes.append)).names() == ["model.onnx"]
    assert len(notes) == 1 and "without a tokenizer there is no chat" in notes[0]


def settings(**keys: object) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        (folder / "chat_template.jinja").unlink()
        (folder / "tokenizer_config.json").write_text(json.dumps({**SETTINGS, **keys}))

    return write


def file(content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / "chat_template.jinja").write_bytes(content)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "an open block": (file(b"{% for m in messages %}x"), "line 1"), "an open expression": (settings(chat_template="a\n{{ b"), "line 2"),
    "a tag nobody knows": (file(b"{% frobnicate %}"), "frobnicate"), "no UTF-8": (file(b"\xff"), "UTF-8"),
    "a name nobody gives": (file(b"{{ nothing.more }}"), "nothing"), "always refuses": (file(b"{{ raise_exception('never') }}"), "never"),
    "leaves the sandbox": (file(b"{{ messages.__class__.__mro__ }}"), "unsafe"), "changes what it is given": (file(b"{{ messages.append(1) }}"), "unsafe"),
    "counts for ever": (file(b"{% for i in range(10 ** 9) %}{% endfor %}"), "Range too big"),
    "includes a file": (file(b"{% include '/etc/passwd' %}"), "loader"),
    "a number": (settings(chat_template=3), "int"), "templates without a default": (settings(chat_template=[{"name": "rag", "template": "x"}]), "rag"),
    "no object": (lambda f: (f / "tokenizer_config.json").write_text("[]"), "JSON object"),
    "no JSON": (lambda f: (f / "tokenizer_config.json").write_text("{"), "JSON"),
    "too large": (file(b"a" * ((1 << 20) + 1)), "too large"),
    "a folder": (lambda f: ((f / "chat_template.jinja").unlink(), (f / "chat_template.jinja").mkdir()), "folder"),
    "an unset setting": (lambda f: (f / "special_tokens_map.json").write_text("3"), "JSON object"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_template_is_refused_by_export_and_inspect(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str) -> None:
    spoil, word = BROKEN[what]
    spoil(checkpoint)
    assert call("export", checkpoint, "--out", tmp_path / "b") == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and word in said and sorted(x.name for x in tmp_path.iterdir()) == ["c"], said
    assert call("inspect", checkpoint) == 2
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(("text", "wanted"), [
    ("{% if true %}\n  x\n{% endif %}\n", "  x\n"),  # trimmed and stripped blocks, and one last newline less
    ("{{ {'b': '<é>', 'a': 1} | tojson }}", '{"b": "<é>", "a": 1}'),
    ("{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}x{% break %}{% endfor %}y", "y"),
    ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "a"),
    ("{{ strftime_now('%Y') | int > 2000 }}", "True"), ("{% if tools %}t{% endif %}{% if documents is none %}d{% endif %}", "d"),
    ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "1"),
    ("{{ bos_token }}{{ nobody }}|", "|"),
])
def test_what_hugging_face_s_templates_count_on(text: str, wanted: str) -> None:
    assert ChatTemplate(text).render(USER) == wanted


@settings_of(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.sampled_from(["chat_template.jinja", "tokenizer_config.json", "special_tokens_map.json"]),
       st.binary(max_size=80) | st.text("{}%# '\"|.()[]=+-*/,:abforinmesgcotld10\n", max_size=80).map(str.encode))
def test_whatever_stands_there_is_taken_or_refused_in_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    for other in ("chat_template.jinja", "tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / other).unlink(missing_ok=True)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    (tmp_path / name).write_bytes(content)
    try:
        found = read_template(tmp_path, SessaConfig(16, 1, 2, 257), byte_level_tokenizer().encode())
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert found == {} or set(found) == {"chat_template.jinja", "tokenizer_config.json"}


def test_a_template_may_want_a_system_message(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "chat_template.jinja").write_text("{% if messages[0].role != 'system' %}{{ raise_exception('first a system message') }}{% endif %}x")
    assert ChatTemplate.of(Bundle.open(export_bundle(checkpoint, tmp_path / "b"))) is not None
