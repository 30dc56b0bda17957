"""The figures of weights in 8 bits beside the checkpoint's own, against plain torch in float64; texts and bounds that they are judged by."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parity_fixtures import lively_model
from torch import Tensor

from sessa_deploy.checkpoint import save_checkpoint
from sessa_deploy.config import SessaConfig
from sessa_deploy.contract import MODEL_FILE, SAMPLE_FILE, TOKENIZER_FILE, Weights
from sessa_deploy.errors import UserError
from sessa_deploy.export.graph.quantise import HEAD, matrices, rounded
from sessa_deploy.export.parity import validate, worth
from sessa_deploy.model import SessaLM
from sessa_deploy.runtime.bundle import Bundle, write_bundle
from sessa_deploy.runtime.tokenizer import byte_level_tokenizer

CONFIG = SessaConfig(d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=257, max_context=128)
TIED = dataclasses.replace(CONFIG, tie_word_embeddings=True, bos_token_id=256)
TEXTS = {"one": "def held_out(text):\n    return text.split()\n", "two": "class Other:\n    pass\n"}
KEPT = ("layers.0.W_out.weight", "layers.1.mixer.k_proj.weight")
Make = Callable[..., tuple[Bundle, Path, SessaLM]]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """(config, weights) -> a bundle whose graph nobody reads, its checkpoint and the model, whose matrices have outliers, so that 8 bits cost something."""

    def made(config: SessaConfig = CONFIG, weights: Weights | None = None, text: bytes | None = None) -> tuple[Bundle, Path, SessaLM]:
        folder, model = tmp_path_factory.mktemp("worth"), lively_model(config)
        with torch.no_grad():
            model.layers[0].W_in.weight[:, 3] *= 60
            model.layers[1].mixer.proj_fb.weight[:, 5] *= 200
        checkpoint = save_checkpoint(model, folder / "checkpoint")
        if text is not None:
            (checkpoint / SAMPLE_FILE).write_bytes(text)
        files = {MODEL_FILE: b"unread", TOKENIZER_FILE: byte_level_tokenizer().encode()}
        return write_bundle(folder / "bundle", files, config, "fp32", {}, weights=weights), checkpoint, model

    return made


def figures(original: SessaLM, changed: dict[str, Tensor], texts: list[list[int]], bytes_scored: int) -> dict[str, float]:
    """What `measure` says of whole texts that one window holds, by its definitions: KL from the original to the other, in nats a token."""
    state = original.state_dict()
    other = SessaLM(dataclasses.replace(original.config, tie_word_embeddings=False)).double()
    other.load_state_dict({name: changed.get(name, state[name if name in state else "embedding.weight"]).double() for name in other.state_dict()})
    truth = SessaLM(original.config).double()
    truth.load_state_dict({name: x.double() for name, x in state.items()})
    kl, agree, nats = [], [], torch.zeros(2, dtype=torch.float64)
    for ids in texts:
        p, q = (m(torch.tensor([ids]))[0, :-1].log_softmax(-1) for m in (truth, other))
        kl.append((p.exp() * (p - q)).sum(-1))
        agree.append((p.argmax(-1) == q.argmax(-1)).double())
        nats += torch.stack([-x[torch.arange(len(x)), torch.tensor(ids[1:])].sum() for x in (p, q)])
    bits = nats / bytes_scored / torch.log(torch.tensor(2.0, dtype=torch.float64))
    return {"kl": float(torch.cat(kl).mean()), "kl_max": float(torch.cat(kl).max()), "agreement": float(torch.cat(agree).mean()),
            "original_bits_per_byte": float(bits[0]), "bits_per_byte": float(bits[1]), "loss_percent": 100 * float(nats[1] / nats[0] - 1)}


@torch.no_grad()
@pytest.mark.parametrize(("config", "weights"), [(CONFIG, Weights("int8", KEPT)), (TIED, Weights("fp8")), (CONFIG, Weights("fp8", (HEAD,)))])
def test_every_figure_is_what_it_is_called(make: Make, config: SessaConfig, weights: Weights) -> None:
    """Over two texts together, and of each layer alone on the first; matrices that are kept cost nothing."""
    bundle, checkpoint, model = make(config, weights)
    found = worth.measure(bundle, checkpoint, None, TEXTS, lambda done, of: None)
    head = [] if config.bos_token_id is None else [config.bos_token_id]
    ids = [[*head, *text.encode()] for text in TEXTS.values()]
    scored = sum(len(one) - 1 for one in ids)
    state = model.state_dict() | {HEAD: model.lm_head.weight}
    eight = {name: rounded(state[name], weights.format) for name in matrices(config) if name not in weights.kept}
    wanted = figures(model, eight, ids, scored)
    assert {key: found[key] for key in wanted} == pytest.approx(wanted, rel=1e-3)
    assert (found["tokens"], found["bytes"], found["texts"]) == (scored, scored, [*TEXTS])
    assert found["kl"] > 1e-3 and 0 < found["agreement"] <= 1, "the case tells one definition from another"
    groups = {name: {n: x for n, x in eight.items() if n.startswith(name)} for name in ("layers.0.", "layers.1.", "lm_head.")}
    alone = {name.removesuffix("."): figures(model, group, ids[:1], len(ids[0]) - 1) for name, group in groups.items() if group}
    assert {x["name"] for x in found["layers"]} == set(alone) and found["layer_tokens"] == len(ids[0]) - 1
    for layer in found["layers"]:
        assert [layer["kl"], layer["loss_percent"]] == pytest.approx([alone[layer["name"]][key] for key in ("kl", "loss_percent")], rel=2e-3, abs=1e-4)
    assert [x["name"] for x in found["layers"]] == sorted(alone, key=lambda name: -alone[name]["kl"]), "the costliest first"


def test_the_bound_that_holds(make: Make) -> None:
    for form, most in (("int8", 0.5), ("fp8", 1.0)):
        bundle = make(weights=Weights(form))[0]
        assert worth.bound(bundle, None) == most and worth.bound(bundle, 0.0) == 0.0 and worth.bound(bundle, 7) == 7.0
        for wrong in (-0.1, float("nan"), float("inf")):
            with pytest.raises(UserError, match="max_loss is out of range"):
                worth.bound(bundle, wrong)


def test_which_texts(make: Make) -> None:
    """What is given, in place of the checkpoint's own; of either the first 64 KiB, in whole characters."""
    long = "ab" + "\u20ac" * 30_000
    _, checkpoint, _ = make(text=long.encode())
    assert worth.texts_for(checkpoint, TEXTS) == TEXTS
    cut = "ab" + "\u20ac" * ((65_536 - 2) // 3)
    assert worth.texts_for(checkpoint, None) == worth.texts_for(checkpoint, {}) == {SAMPLE_FILE: cut}
    assert worth.texts_for(checkpoint, {"given": long}) == {"given": cut}


@pytest.mark.parametrize(("text", "says"), [
    (b"", "held_out.txt, 0 characters"), (b"x", "held_out.txt, 1 characters"), (b"\xff\xfe", "is not UTF-8"), (b"vocabulary", "outside the vocabulary"),
])  # fmt: skip
def test_a_text_that_gives_nothing_to_judge_is_refused_before_any_rung_runs(make: Make, text: bytes, says: str) -> None:
    small = dataclasses.replace(CONFIG, vocab_size=100) if "vocabulary" in says else CONFIG
    bundle, checkpoint, _ = make(small, Weights("int8"), text)

    def launch(*given: Any) -> None:
        raise AssertionError("a rung ran")

    with pytest.raises(UserError, match=says) as refused:
        validate(bundle.path, checkpoint, ["ort"], launch=launch)
    assert "\n" not in str(refused.value)
