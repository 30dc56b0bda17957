"""What weights in 8 bits are worth: the model with them beside the model with the checkpoint's own, float32, on text.

Exactness is the ladder's affair, which ties the bundle to the weights that it stores; here those are held against what they were made from. Bits per byte
are `runtime.scoring.score`'s, so that `sessa-deploy score` on either bundle gives the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sessa_deploy.checkpoint import load_checkpoint
from sessa_deploy.checkpoint_layout import locate
from sessa_deploy.checks import check_tokens
from sessa_deploy.config import SessaConfig
from sessa_deploy.contract import CACHE_FIELDS, SAMPLE_FILE, TOKENIZER_FILE, WEIGHT_FORMATS, cache_entries, past_name
from sessa_deploy.errors import UserError
from sessa_deploy.export.graph.quantise import HEAD, quantised, rounded
from sessa_deploy.export.parity.models import to_numpy
from sessa_deploy.files import write_whole
from sessa_deploy.model import SessaLM
from sessa_deploy.reading import read_json, read_plain
from sessa_deploy.runtime.backend import Backend
from sessa_deploy.runtime.bundle import Bundle
from sessa_deploy.runtime.sampling import last_rows, log_probabilities
from sessa_deploy.runtime.scoring import score
from sessa_deploy.runtime.session import Session
from sessa_deploy.runtime.sizes import bounded_chunk
from sessa_deploy.runtime.tokenizer import Tokenizer

SAMPLE_BYTES = 1 << 16  # of a text that are read
_TEXTS_FILE = "worth.json"
_LAYER_TOKENS = 1024  # on which each layer alone is judged
_CHUNK = 512


class TorchBackend(Backend):
    """One sequence through several models of one shape at once, on the CPU; what comes out is the first one's, and `others` holds what the rest gave.

    others: logits (T,V) float32 of the last step, of every model but the first.
    """

    name = "torch"
    all_logits = True

    def __init__(self, models: Sequence[SessaLM], capacity: int) -> None:
        super().__init__(models[0].config, 1, capacity)
        self.models = tuple(models)
        self.caches = [model.init_cache(1, self.capacity) for model in models]
        self.best_chunk = bounded_chunk(_CHUNK, len(self.models), self.config.vocab_size)
        self.others: list[NDArray[np.float32]] = []

    @torch.no_grad()
    def _forward_all(self, ids: NDArray[np.int64], new: NDArray[np.int32]) -> NDArray[np.float32]:
        found = []
        for model, caches in zip(self.models, self.caches, strict=True):
            for cache in caches:  # to where the base class says that the sequence is
                cache.reset()
                cache.length += int(self.length[0])
                cache._at_most = int(self.length[0])
            found.append(to_numpy(model.prefill(torch.from_numpy(ids), caches, torch.from_numpy(new), all_logits=True)).astype(np.float32))
        self.others = [logits[0] for logits in found[1:]]
        return found[0]

    def _forward(self, ids: NDArray[np.int64], new: NDArray[np.int32]) -> NDArray[np.float32]:
        return last_rows(self._forward_all(ids, new), new)

    def cached(self, row: int) -> dict[str, NDArray[np.generic]]:
        end = self.held(row)
        return {past_name(i, f): to_numpy(getattr(self.caches[0][i], f)[row, :end]).copy() for i, f in cache_entries(self.config.n_layers)}

    def poison(self) -> None:
        for caches in self.caches:
            for cache in caches:
                for field in CACHE_FIELDS:
                    getattr(cache, field)[0, int(self.kept()[0]) :] = torch.nan


@dataclass
class _Tally:
    """Sums over the scored tokens of one model beside the original: KL and log-likelihood in nats, equal greedy tokens, and how many there were."""

    kl: float = 0.0
    worst: float = 0.0
    likelihood: float = 0.0
    agree: int = 0
    tokens: int = 0

    def add(self, original: NDArray[np.float64], own: NDArray[np.float64], targets: NDArray[np.int64]) -> None:
        """original, own: log-probabilities (N,V)."""
        kl = (np.exp(original) * (original - own)).sum(axis=-1)
        self.kl += float(kl.sum())
        self.worst = max(self.worst, float(kl.max()))
        self.likelihood += float(own[np.arange(len(targets)), targets].sum())
        self.agree += int((original.argmax(-1) == own.argmax(-1)).sum())
        self.tokens += len(targets)


def texts_for(checkpoint: str | Path, given: Mapping[str, str] | None) -> dict[str, str]:
    """Name -> text that the weights are to be judged on: those that are given, or the checkpoint's own sample; the first 64 KiB of each.

    Raises UserError where there is neither.
    """
    if given:
        return {name: _first(text) for name, text in given.items()}
    path = locate(checkpoint).folder / SAMPLE_FILE
    if not path.is_file():
        raise UserError("weights in 8 bits are judged on text", got=f"no --text, and no {SAMPLE_FILE} beside the checkpoint",
                        allowed="text that the model was not trained on", fix="add --text FILE (train --keep-sample leaves one in the checkpoint)")
    try:
        return {SAMPLE_FILE: _first(read_plain(path, 1 << 26).decode("utf-8"))}
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8", got=str(error), fix="give another text with --text FILE") from None


def _first(text: str) -> str:
    return text.encode("utf-8", "surrogatepass")[:SAMPLE_BYTES].decode("utf-8", "ignore")


def require_tokenizer(bundle: Bundle) -> None:
    """Raise UserError where no text can be read for lack of a tokenizer."""
    if TOKENIZER_FILE not in bundle:
        raise UserError("weights in 8 bits are judged on text, and the bundle has no tokenizer", got=str(bundle.path),
                        allowed=f"a bundle with {TOKENIZER_FILE}", fix="export again, with the tokenizer.json of the model in the checkpoint")


def check_texts(bundle: Bundle, texts: Mapping[str, str]) -> None:
    """Raise UserError, before any rung has run, on a text in which nothing would be scored, or whose tokens are not the model's."""
    require_tokenizer(bundle)
    tokenizer, config = Tokenizer(bundle.file(TOKENIZER_FILE)), bundle.config
    for name, text in texts.items():
        ids = tokenizer.encode_first(text, config.bos_token_id)
        if not text or len(ids) < 2:  # nothing precedes the first
            raise UserError("the text is too short to judge weights on", got=f"{name}, {len(text)} characters", allowed="2 tokens or more",
                            fix="name a longer text with --text FILE")
        check_tokens(ids, config.vocab_size)


def save_texts(texts: Mapping[str, str], folder: Path) -> None:
    """Leave the texts for the rung."""
    write_whole(folder / _TEXTS_FILE, json.dumps(dict(texts)) + "\n", what="the texts", sync=False)


def load_texts(folder: Path) -> dict[str, str]:
    """What save_texts left. Raises UserError if it is absent or damaged."""
    found = read_json(folder / _TEXTS_FILE)
    if not isinstance(found, dict) or not all(isinstance(x, str) for x in found.values()):
        raise UserError(f"{folder / _TEXTS_FILE} holds no texts", got=type(found).__name__, fix="validate again")
    return found


def measure(bundle: Bundle, checkpoint: Path, config: SessaConfig | None, texts: Mapping[str, str], progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Figures of a bundle's 8-bit weights beside the checkpoint's own, as plain values.

    format, kept; texts, tokens, bytes; original_bits_per_byte, bits_per_byte, loss_percent; kl (nats a token), kl_max, agreement (share of equal greedy
    tokens); layers: name, kl and loss_percent of every layer in 8 bits alone, on `layer_tokens` tokens, the costliest first.
    """
    if bundle.weights is None:
        raise UserError("the bundle has no weights in 8 bits", got=str(bundle.path))
    original = load_checkpoint(checkpoint, config)
    eight = {name: rounded(original.state_dict()[name], bundle.weights.format) for name in quantised(original.config, bundle.weights)}
    steps, done = len(texts) + 1, 0

    def read(models: Sequence[SessaLM], given: Any) -> tuple[list[_Tally], Any]:
        backend, tallies = TorchBackend(models, bundle.config.max_context), [_Tally() for _ in models]

        def seen(targets: NDArray[np.int64], logits: NDArray[np.float32]) -> None:
            first = log_probabilities(logits)
            for tally, own in zip(tallies, [first, *(log_probabilities(x) for x in backend.others)], strict=True):
                tally.add(first, own, targets)

        with Session(bundle, backend) as session:
            found = score(session, given, seen=seen,
                          progress=lambda at, of: progress(int(1000 * (done + at / of)), 1000 * steps))
        return tallies, found

    whole, bytes_read, before = _Tally(), 0, 0.0
    model = _with(original, eight)
    for text in texts.values():
        (first, own), found = read((original, model), text)
        whole = _Tally(whole.kl + own.kl, max(whole.worst, own.worst), whole.likelihood + own.likelihood, whole.agree + own.agree, whole.tokens + own.tokens)
        before, bytes_read, done = before + first.likelihood, bytes_read + (found.bytes or 0), done + 1
    with Session(bundle, TorchBackend((original,), bundle.config.max_context)) as session:
        piece = session.encode(next(iter(texts.values())))[:_LAYER_TOKENS]
    groups: dict[str, dict[str, Tensor]] = {}
    for name, weight in eight.items():
        groups.setdefault("lm_head" if name == HEAD else ".".join(name.split(".")[:2]), {})[name] = weight
    tallies, _ = read((original, *(_with(original, group) for group in groups.values())), piece)
    layers = [{"name": name, "kl": tally.kl / tally.tokens, "loss_percent": _loss(tallies[0].likelihood, tally.likelihood)}
              for name, tally in zip(groups, tallies[1:], strict=True)]
    return {
        **bundle.weights.to_dict(), "texts": list(texts), "tokens": whole.tokens, "bytes": bytes_read,
        "original_bits_per_byte": _bits(before, bytes_read), "bits_per_byte": _bits(whole.likelihood, bytes_read),
        "loss_percent": _loss(before, whole.likelihood), "kl": whole.kl / whole.tokens, "kl_max": whole.worst, "agreement": whole.agree / whole.tokens,
        "layers": sorted(layers, key=lambda x: -float(x["kl"])), "layer_tokens": tallies[0].tokens,
    }


def _with(model: SessaLM, changed: Mapping[str, Tensor]) -> SessaLM:
    """A model of the same tensors but those that are changed; a tied head that is changed leaves the embedding alone."""
    with torch.device("meta"):
        other = SessaLM(model.config)
        if HEAD in changed:
            other.lm_head.weight = torch.nn.Parameter(torch.empty_like(other.lm_head.weight))
    other.load_state_dict({**model.state_dict(), **changed}, strict=True, assign=True)
    return other.eval()


def _bits(likelihood: float, size: int) -> float:
    return float(-likelihood / (np.log(2.0) * size)) if size else np.nan


def _loss(before: float, after: float) -> float:
    """Percent more bits for the same text."""
    return 100.0 * (after / before - 1.0) if before else (np.inf if after else 0.0)


def bound(bundle: Bundle, max_loss: float | None) -> float:
    """The bound that holds for a bundle, in percent. Raises UserError on one for a bundle without weights in 8 bits, or that is no number >= 0."""
    if bundle.weights is None:
        if max_loss is not None:
            raise UserError("--max-loss is about weights in 8 bits", got=f"{bundle.path}, which has none", fix="leave --max-loss out")
        return 0.0
    if max_loss is not None and not 0.0 <= max_loss < np.inf:
        raise UserError("max_loss is out of range", got=max_loss, allowed="percent >= 0, and finite")
    return WEIGHT_FORMATS[bundle.weights.format].max_loss if max_loss is None else float(max_loss)
