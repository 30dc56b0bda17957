"""How far back a layer reaches: columns of K = (I - B)^-1, B[t,j] = gamma_t alpha[t,j], measured on the real routing of a text (arXiv 2604.18580, section 2).

K[t,tau] = ds_t / df_tau at fixed routing is one number a pair, so feature d of the feedback op's input may carry source d: one call gives a column a feature,
exactly, on every backend. Beside it stand the forward attention's weights, the value path K alpha_fwd, the Transformer's 1/(t+1), and, by central
differences in float64, the influence of inputs end to end.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from sessa_deploy import influence_curves as curves
from sessa_deploy.checkpoint import load_checkpoint
from sessa_deploy.checkpoint_layout import locate
from sessa_deploy.checkpoint_tokenizer import read_tokenizer
from sessa_deploy.checks import integer
from sessa_deploy.config import Note, SessaConfig
from sessa_deploy.contract import MANIFEST_FILE
from sessa_deploy.errors import UserError
from sessa_deploy.influence_curves import Array
from sessa_deploy.kernels.ops import causal_attention, feedback_attention
from sessa_deploy.model import Ops, SessaLM, using_ops
from sessa_deploy.runtime.tokenizer import Tokenizer

SCHEMA_VERSION = 1
DEFAULT_SOURCES, DEFAULT_CONTEXT = 16, 2048
PROBES, EPSILON = 8, 1e-5
_BLOCK = 256  # rows of routing weights at a time
_TOGETHER = 16384  # tokens of a batch of probes
Progress = Callable[[float, float], None]


@dataclass(frozen=True)
class Routing:
    """What one layer's mixer was given for one text. q (T,Hq,d), k (T,Hkv,d): forward branch, rotated. q_b, k_b (T,D), gamma (T,): feedback branch."""

    q: Tensor
    k: Tensor
    q_b: Tensor
    k_b: Tensor
    gamma: Tensor


@torch.no_grad()
def record_routing(model: SessaLM, input_ids: Tensor) -> list[Routing]:
    """The routing of every layer in a forward pass of input_ids (1,T), from an empty past."""
    forward: list[tuple[Tensor, Tensor]] = []
    feedback: list[tuple[Tensor, Tensor, Tensor]] = []

    def causal(q: Tensor, k: Tensor, *rest: Any) -> Tensor:
        forward.append((q[0], k[0]))
        return causal_attention(q, k, *rest)

    def solve(q: Tensor, k: Tensor, gamma: Tensor, *rest: Any) -> Tensor:
        feedback.append((q[0], k[0], gamma[0]))
        return feedback_attention(q, k, gamma, *rest)

    with using_ops(model, Ops(causal, solve)):
        model(input_ids)
    return [Routing(*a, *b) for a, b in zip(forward, feedback, strict=True)]


@torch.no_grad()
def solve_columns(q_b: Tensor, k_b: Tensor, gamma: Tensor, columns: Tensor) -> Tensor:
    """K @ columns, (T,N) in the storage type of q_b, by calls of the op with D columns each. q_b, k_b: (T,D); gamma: (T,); columns: (T,N)."""
    width, found = q_b.shape[1], []
    for first in range(0, columns.shape[1], width):
        part = columns[:, first : first + width]
        f = torch.zeros_like(q_b)
        f[:, : part.shape[1]] = part
        found.append(feedback_attention(q_b[None], k_b[None], gamma[None], f[None])[0, :, : part.shape[1]])
    return torch.cat(found, dim=1)


def one_hot(sources: Sequence[int], tokens: int, like: Tensor) -> Tensor:
    """(T,N) with a one at sources[n] in column n."""
    columns = like.new_zeros(tokens, len(sources))
    columns[list(sources), list(range(len(sources)))] = 1.0
    return columns


def _weights(q: Tensor, k: Tensor, strict: bool) -> Iterator[tuple[int, Tensor]]:
    """(first row, softmax weights (H,rows,T) in float64) of q (T,H,d), k (T,Hkv,d), block by block; strict: over j < t, with a first row of zeros."""
    tokens, heads, width = q.shape
    k = k.double().repeat_interleave(heads // k.shape[1], dim=1)
    column = torch.arange(tokens, device=q.device)
    for first in range(0, tokens, _BLOCK):
        rows = q[first : first + _BLOCK].double()
        at = column[first : first + _BLOCK, None]
        masked = column >= at if strict else column > at
        scores = torch.einsum("thd,jhd->htj", rows, k) * width**-0.5
        weights = torch.softmax(scores.masked_fill(masked, -torch.inf), dim=-1)
        yield first, torch.nan_to_num(weights, nan=0.0) if strict and first == 0 else weights


@torch.no_grad()
def forward_columns(routing: Routing, sources: Sequence[int]) -> Tensor:
    """(T,N) float64: the forward attention's weight of each source, averaged over heads."""
    return torch.cat([w[:, :, list(sources)].mean(0) for _, w in _weights(routing.q, routing.k, strict=False)])


@torch.no_grad()
def spread(routing: Routing) -> dict[str, Any]:
    """c2 = max_t max_j t alpha[t,j], eta = max|gamma| c2, beta = 1 - eta where the bound of Theorem 8 binds (eta < 1), else null; and the effective
    support 1 / sum_j alpha[t,j]^2: at log-spaced t, smallest, mean and largest."""
    largest, squares = [], []
    for _, weights in _weights(routing.q_b[:, None], routing.k_b[:, None], strict=True):
        largest.append(weights[0].amax(-1))
        squares.append(weights[0].square().sum(-1))
    top, square = torch.cat(largest).cpu().numpy(), torch.cat(squares).cpu().numpy()
    support = 1.0 / square[1:]
    c2 = float((np.arange(len(top)) * top).max())
    gain = float(routing.gamma.abs().max())
    at = curves.log_spaced(1, len(top) - 1, 32)
    return {"c2": c2, "gamma_max": gain, "eta": gain * c2, "beta": 1.0 - gain * c2 if gain * c2 < 1 else None,
            "support": {"min": float(support.min()), "mean": float(support.mean()), "max": float(support.max()), "targets": at,
                        "values": [float(support[t - 1]) for t in at]}}


def _numpy(x: Tensor) -> Array:
    return x.detach().double().cpu().numpy()


def measure_layer(routing: Routing, layer: int, sources: Sequence[int], lags: Sequence[int]) -> dict[str, Any]:
    """One layer's entry of the report, plain values: gamma, spread, and for each source its column of K with slopes, fits and verdict, and beside it
    `forward` (attention's weights), `value_path` (K alpha_fwd) and `transformer` (1/(t+1)) at the same lags."""
    tokens = len(routing.gamma)
    direct = one_hot(sources, tokens, routing.q_b)
    forward = forward_columns(routing, sources)
    solved = _numpy(solve_columns(routing.q_b, routing.k_b, routing.gamma, torch.cat([direct, forward.to(direct.dtype)], dim=1)))
    forward_curves, uniform = _numpy(forward), _even(tokens)
    gamma, found = _numpy(routing.gamma), []
    for n, source in enumerate(sources):
        entry = curves.describe(solved[:, n], source, lags)
        for name, curve in (("forward", forward_curves[:, n]), ("value_path", solved[:, len(sources) + n]), ("transformer", uniform)):
            entry[name] = curves.at_lags(curve, source, lags)
        found.append(entry)
    return {"layer": layer, "gamma": {"min": float(gamma.min()), "mean": float(gamma.mean()), "max": float(gamma.max())}, **spread(routing),
            "sources": found}


def _even(tokens: int) -> Array:
    curve: Array = 1.0 / (1.0 + np.arange(tokens, dtype=np.float64))
    return curve


def even_attention(tokens: int) -> dict[str, Any]:
    """The entry of a Transformer layer that attends evenly, J[t,0] = 1/(t+1), for a text of `tokens` tokens."""
    return curves.describe(_even(tokens), 0, curves.default_lags(tokens))


@torch.no_grad()
def end_to_end(
    forward: Callable[[Tensor], Tensor], x: Tensor, sources: Sequence[int], probes: int = PROBES, eps: float = EPSILON, seed: int = 0,
    progress: Progress | None = None, tangents: bool = False,
) -> Array:
    """||J[t,tau]||_F (T,N), J = dy_t / dx_tau with the routing free to move, of forward: (B,T,D) -> (B,T,E), any causal model's stack.

    x: (1,T,D), best float64: central differences with x_tau +- eps v, v ~ N(0, I), so that E ||dy_t||^2 / (2 eps)^2 = ||J[t,tau]||_F^2 ("probes" draws).
    tangents: J v by forward-mode differentiation instead, for a model that computes in float32 whatever it is given, where such differences would drown.
    """
    tokens, width = x.shape[1:]
    generator = torch.Generator().manual_seed(seed)
    together = max(1, min(probes, _TOGETHER // (2 * tokens)))
    found = np.zeros((tokens, len(sources)))
    for n, source in enumerate(sources):
        for first in range(0, probes, together):
            count = min(together, probes - first)
            v = torch.randn(count, width, generator=generator, dtype=torch.float64).to(x)
            step = torch.zeros_like(x).repeat(count, 1, 1)
            step[:, source] = v
            change = _tangent(forward, x, step) if tangents else (forward(x + eps * step) - forward(x - eps * step)) / (2 * eps)
            found[:, n] += _numpy(change.double().square().sum(dim=(0, 2)))
            if progress is not None:
                progress(n * probes + first + count, len(sources) * probes)
    return np.sqrt(found / probes)


def _tangent(forward: Callable[[Tensor], Tensor], x: Tensor, step: Tensor) -> Tensor:
    """J step (B,T,E) at x (1,T,D) for steps (B,T,D)."""
    with forward_ad.dual_level():
        y = forward(forward_ad.make_dual(x.expand_as(step).contiguous(), step))
        change = forward_ad.unpack_dual(y).tangent
    return torch.zeros_like(y) if change is None else change


def stack(model: SessaLM, first: int = 0, last: int | None = None) -> Callable[[Tensor], Tensor]:
    """(B,T,D) -> (B,T,D): the layers first..last-1 (all by default) of a model, without embeddings and final norm."""

    def through(x: Tensor) -> Tensor:
        for layer in list(model.layers)[first:last]:
            x = layer(x)
        return x

    return through


def measure(
    model: SessaLM, input_ids: Sequence[int], sources: int | None = None, lags: Sequence[int] | None = None, layer: int | None = None,
    deep: bool = False, seed: int = 0, progress: Progress | None = None,
) -> dict[str, Any]:
    """The report of one text, plain values for JSON: schema_version, context, layers (see `measure_layer`), and with `deep` end_to_end.

    input_ids: T >= 2 tokens. sources: how many, 16 or as many as there are by default, the first at 0, the rest log-spaced. lags: those to list, by default
    log-spaced. layer: this one alone. deep: ||dy_t / dx_tau||_F of the layers' stack (of that layer alone where one is named), in float64 on the CPU: the
    model is copied there. Raises UserError on counts, lags, tokens or a layer out of range.
    """
    config, tokens = model.config, len(input_ids)
    if tokens < 2:
        raise UserError("the text is too short to look back in", got=f"tokens: {tokens}", allowed="2 or more", fix="give a longer text")
    wrong = next((token for token in input_ids if not 0 <= token < config.vocab_size), None)
    if wrong is not None:
        raise UserError("a token is outside the vocabulary", got=wrong, allowed=f"0..{config.vocab_size - 1}")
    places = curves.source_positions(min(DEFAULT_SOURCES, tokens - 1) if sources is None else sources, tokens)
    listed = curves.default_lags(tokens) if lags is None else curves.check_lags(lags, tokens)
    if layer is not None:
        integer("the layer", layer, 0, config.n_layers - 1, fix=f"one of the checkpoint's {config.n_layers} layers, counted from 0")
    ids = torch.tensor([list(input_ids)], device=model.embedding.weight.device)
    found = [measure_layer(routing, i, places, listed) for i, routing in enumerate(record_routing(model, ids)) if layer in (None, i)]
    report: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "context": tokens, "layers": found}
    if deep:
        copy = SessaLM(config)
        copy.load_state_dict(model.state_dict())
        copy.to_precision("fp64").eval()
        before, judged = (stack(copy, 0, 0), stack(copy)) if layer is None else (stack(copy, 0, layer), stack(copy, layer, layer + 1))
        with torch.no_grad():
            x = before(copy.embedding(ids.cpu()))
        columns = end_to_end(judged, x, places, seed=seed, progress=progress)
        report["end_to_end"] = {"layer": layer, "norm": "frobenius", "probes": PROBES, "eps": EPSILON,
                                "sources": [curves.describe(columns[:, n], source, listed) for n, source in enumerate(places)]}
    return report


def refuse_bundle(path: str | Path) -> None:
    """Raise UserError where `path` is a bundle or an ONNX graph: what this measures is computed inside the graph."""
    path = Path(path)
    inside = path.name == MANIFEST_FILE or path.suffix == ".onnx"
    if inside or os.path.lexists(path / MANIFEST_FILE):
        kind = "an ONNX graph" if path.suffix == ".onnx" else "a bundle"
        raise UserError(f"influence reads a checkpoint and not {kind}, whose graph gives out neither q_b nor gamma", got=path,
                        allowed="a checkpoint: a folder with config.json and model.safetensors, or a state dict (.safetensors, .pt)",
                        fix="name the checkpoint it was exported from: sessa-deploy influence CHECKPOINT")


def text_ids(
    path: str | Path, config: SessaConfig, prompt: str | None = None, ids: Sequence[int] | None = None, context: int | None = None, seed: int = 0,
    note: Note | None = None,
) -> list[int]:
    """The tokens to measure on: those given, a prompt by the checkpoint's tokenizer behind the model's first token, or uniform ids of a seed.

    At most `context` of them; random ones are exactly that many, by default the model's max_context, 2048 at most. note: hears where a text is shorter than
    the context that was asked for. Raises UserError on a checkpoint without a tokenizer, or on a context below 2.
    """
    if context is not None:
        integer("the context", context, 2)
    if ids is None and prompt is None:
        length = min(config.max_context, DEFAULT_CONTEXT) if context is None else context
        found: Sequence[int] = np.random.default_rng(seed).integers(0, config.vocab_size, max(2, length)).tolist()
        return list(found)
    if ids is None:
        assert prompt is not None
        content = read_tokenizer(locate(path).folder, config, note)
        if content is None:
            raise UserError("the checkpoint has no tokenizer", got=f"{path} with a vocabulary of {config.vocab_size}",
                            fix="put its tokenizer.json beside the weights, or give token ids with --tokens FILE")
        ids = Tokenizer.from_json(content.decode("utf-8"), str(path)).encode_first(prompt, config.bos_token_id)
    if context is not None and len(ids) < context and note is not None:
        note(f"the text has {len(ids)} tokens, fewer than the context of {context}: all are measured")
    return list(ids[:context])


def load(path: str | Path, config_file: str | Path | None = None, device: str | torch.device = "cpu", note: Note | None = None) -> SessaLM:
    """A checkpoint's model in float32. Raises UserError like `load_checkpoint`, and on a bundle."""
    refuse_bundle(path)
    return load_checkpoint(path, None if config_file is None else SessaConfig.load(config_file, note), device, note=note)
