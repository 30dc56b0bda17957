"""The torch rungs of parity: the float64 oracle, the yardstick of rounding error, and the model at the bundle's precision.

The oracle shares as little as it can with what it judges: each sequence alone, whole, from an empty past, with the token-by-token recurrence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sessa_deploy.contract import (
    CACHE_FIELDS,
    INPUT_IDS,
    LOGITS,
    NEW_LENGTH,
    PAST_LENGTH,
    cache_entries,
    cache_row_shape,
    graph_outputs,
    past_name,
)
from sessa_deploy.export.parity.cases import Case, Cases
from sessa_deploy.export.parity.drive import Tensors, layer_name, poison_rows
from sessa_deploy.kernels import reference
from sessa_deploy.model import Ops, Rows, SessaCache, SessaLM, using_ops

ORACLE_OPS, PLAIN_OPS = Ops(reference.plain_causal, reference.recurrence), Ops(reference.plain_causal, reference.plain)
Headroom = dict[str, list[float]]


def to_numpy(x: Tensor) -> np.ndarray:
    """A tensor as numpy, bfloat16 widened to float32."""
    x = x.detach().cpu()
    return (x.float() if x.dtype == torch.bfloat16 else x).numpy()


@contextmanager
def record_headroom(model: SessaLM) -> Iterator[Headroom]:
    """Maxima per layer of |s| and |s * g| (the input of W_out, which no graph output shows) over everything this model runs inside the block."""
    found: Headroom = {"s": [0.0] * model.config.n_layers, "s*g": [0.0] * model.config.n_layers}
    hooks = []

    def watch(key: str, i: int, x: Tensor) -> None:
        peak = float(x.detach().abs().max()) if x.numel() else 0.0
        if not (peak <= found[key][i] or math.isnan(found[key][i])):  # a NaN is taken, and stays
            found[key][i] = peak

    def watched(i: int, original: Callable[..., Rows]) -> Callable[..., Rows]:
        def step(*args: Any) -> Rows:
            rows = original(*args)
            watch("s", i, rows.s)
            return rows

        return step

    try:
        for i, layer in enumerate(model.layers):
            hooks.append(layer.W_out.register_forward_pre_hook(lambda _, args, i=i: watch("s*g", i, args[0])))
            vars(layer.mixer)["step"] = watched(i, layer.mixer.step)  # on this mixer alone; a hook would not see `step`
        yield found
    finally:
        for hook in hooks:
            hook.remove()
        for layer in model.layers:
            vars(layer.mixer).pop("step", None)


@torch.no_grad()
def oracle(model: SessaLM, case: Case) -> Tensors:
    """Canonical float64 tensors of a case. model: float64."""
    config = model.config
    logits: list[np.ndarray] = []
    parts: dict[str, list[np.ndarray]] = {layer_name(i, f): [] for i, f in cache_entries(config.n_layers)}
    with using_ops(model, ORACLE_OPS):
        for ids in case.sequences():
            if not len(ids):
                logits.append(np.zeros((0, config.vocab_size)))
                continue
            count = torch.tensor([len(ids)], dtype=torch.int32)
            past = [torch.empty(1, 0, *cache_row_shape(f, config.d_model, config.kv_heads, config.head_dim), dtype=torch.float64)
                    for _, f in cache_entries(config.n_layers)]
            all_logits, *new = model.graph(torch.from_numpy(ids)[None], torch.zeros_like(count), count, past, all_logits=True)
            logits.append(to_numpy(all_logits)[0])
            for (i, field), rows in zip(cache_entries(config.n_layers), new, strict=True):
                parts[layer_name(i, field)].append(to_numpy(rows)[0])
    tensors = {name: np.concatenate(rows) for name, rows in parts.items()}
    tensors[LOGITS] = np.stack([logits[b][t] for _, b, t in case.logit_rows()])
    tensors["token"] = tensors[LOGITS].argmax(-1)
    return tensors


@torch.no_grad()
def choose_tokens(model: SessaLM, cases: Cases) -> Cases:
    """The cases with every generated token chosen greedily by the float64 model."""
    done = []
    for case in cases.cases:
        if case.generated is not None:
            caches = model.init_cache(case.batch, int(case.lengths.max()))
            for item in case.steps[: case.generated]:
                logits = model.prefill(torch.from_numpy(item.input_ids), caches, torch.from_numpy(item.new_length))
            tokens = [logits.argmax(-1)]
            for _ in case.steps[case.generated + 1 :]:
                tokens.append(model.decode_step(tokens[-1][:, None], caches).argmax(-1))
            case = case.with_generated(torch.stack(tokens, dim=1).numpy())
        done.append(case)
    return Cases(tuple(done), cases.seed, "oracle")


class TorchGraph:
    """SessaLM.graph as a GraphStep (see drive.py): numpy in the storage type in, numpy out. all_logits: logits (B,T,V)."""

    def __init__(self, model: SessaLM, all_logits: bool = False) -> None:
        self.model, self.dtype, self.all_logits = model, model.embedding.weight.dtype, all_logits

    @torch.no_grad()
    def __call__(self, feeds: Tensors) -> Tensors:
        ids, past_length, new_length = (torch.from_numpy(np.ascontiguousarray(feeds[n])) for n in (INPUT_IDS, PAST_LENGTH, NEW_LENGTH))
        past = [torch.from_numpy(feeds[past_name(i, f)]).to(self.dtype) for i, f in cache_entries(self.model.config.n_layers)]
        out = self.model.graph(ids, past_length, new_length, past, self.all_logits)
        return {name: to_numpy(x) for name, x in zip(graph_outputs(self.model.config.n_layers), out, strict=True)}


class TorchSession:
    """SessaLM.prefill on SessaCache as a SessionRunner (see drive.py)."""

    def __init__(self, model: SessaLM) -> None:
        self.model = model
        self.caches: list[SessaCache] = []

    def begin(self, batch: int, capacity: int, poison: bool) -> None:
        self.caches = self.model.init_cache(batch, capacity)
        for cache in self.caches if poison else ():
            for field in CACHE_FIELDS:
                store = np.empty(getattr(cache, field).shape, dtype=np.float32)
                poison_rows(store)
                getattr(cache, field).copy_(torch.from_numpy(store))

    @torch.no_grad()
    def step(self, input_ids: np.ndarray, new_length: np.ndarray) -> np.ndarray:
        return to_numpy(self.model.prefill(torch.from_numpy(input_ids), self.caches, torch.from_numpy(new_length)))

    @torch.no_grad()
    def step_all(self, input_ids: np.ndarray, new_length: np.ndarray) -> np.ndarray:
        return to_numpy(self.model.prefill(torch.from_numpy(input_ids), self.caches, torch.from_numpy(new_length), all_logits=True))

    def rows(self, sequence: int) -> dict[str, np.ndarray]:
        return {past_name(i, f): to_numpy(getattr(self.caches[i], f)[sequence]) for i, f in cache_entries(self.model.config.n_layers)}
