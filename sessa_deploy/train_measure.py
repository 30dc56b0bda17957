"""What a run asks of its text and its device: windows of tokens, the precision they are computed in, held-out bits, memory."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sessa_deploy.checkpoint import expected_shapes
from sessa_deploy.config import SessaConfig
from sessa_deploy.distributed.group import ALONE, Group
from sessa_deploy.errors import UserError
from sessa_deploy.train_options import TrainOptions

_LESS_MEMORY = "a smaller model, or a smaller --batch-size (with --accumulate) or --context"
_STATE_BYTES = 16  # of each parameter: float32 weight, gradient and AdamW's two moments


class Windows:
    """Token ids at any places of a text: of a tensor on the device, or of a file mapped into memory, of which only those places are read."""

    def __init__(self, tokens: Tensor | np.ndarray, device: torch.device) -> None:
        self.device, self.length = device, len(tokens)
        self._mapped = tokens if isinstance(tokens, np.memmap) else None
        self._held = None if self._mapped is not None else (torch.from_numpy(tokens) if isinstance(tokens, np.ndarray) else tokens).to(device)

    def __getitem__(self, at: Tensor) -> Tensor:
        """Ids, int64 on the device, in the shape of `at`, the places on the device."""
        if self._held is not None:
            return self._held[at].long()
        assert self._mapped is not None
        found = torch.from_numpy(self._mapped[at.cpu().numpy()].astype(np.int64))
        return found.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else found


def autocast(device: torch.device, precision: str, cache: bool = True) -> contextlib.AbstractContextManager[Any]:
    """The precision's context: bf16 autocast, or none. cache: keep weights that were cast for the whole block."""
    bf16 = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=cache) if bf16 else contextlib.nullcontext()


@torch.no_grad()
def held_out_bits(
    model: nn.Module, tokens: Tensor | np.ndarray | Windows, text_bytes: int, context: int, batch_size: int, precision: str = "fp32",
    stride: int | None = None, group: Group = ALONE,
) -> float:
    """Bits per byte of held-out text: the whole negative log-likelihood of tokens (N,) after the first, over the bytes of the text.

    Windows of `context` tokens advance by `stride` (default context // 2); only what is new in a window counts, so every token is
    predicted once, and from at least context - stride tokens wherever there are as many. The processes of a group share the windows.
    """
    stride = max(1, stride or context // 2)
    device = next(model.parameters()).device
    ids = tokens if isinstance(tokens, Windows) else Windows(tokens, device)
    last = ids.length - 1  # targets are tokens[1:]
    starts = [0, *range(stride, max(1, last - context + stride), stride)] if last > context else [0]
    total = torch.zeros((), dtype=torch.float64, device=device)
    for turn in range(-(-len(starts) // (batch_size * group.size))):
        first = (turn * group.size + group.rank) * batch_size
        mine = starts[first : first + batch_size]
        begin = torch.tensor(mine or [0], device=device)[:, None]
        at = begin + torch.arange(context, device=device)
        fresh = (at >= torch.where(begin > 0, begin + context - stride, 0)) & (at < last)
        if not mine:  # the processes of a sharded model run it as often as each other
            fresh.fill_(False)
        at = at.clamp(max=last - 1)
        with autocast(device, precision, cache=not group.many):
            logits = model(ids[at])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[at + 1].flatten(), reduction="none")
        total += torch.where(fresh.flatten(), loss.double(), 0.0).sum()
    return float(group.add(total)) / math.log(2.0) / text_bytes


def require_memory(options: TrainOptions, config: SessaConfig, device: torch.device, holders: int = 1) -> None:
    """UserError if what a run cannot do without exceeds the memory of its device: weights, gradients, moments, and what a micro-batch leaves of each layer.

    holders: processes that the parameters and what belongs to them are dealt out over.
    """
    one = expected_shapes(dataclasses.replace(config, n_layers=1))
    layer = sum(math.prod(shape) for name, shape in one.items() if name.startswith("layers."))
    parameters = sum(math.prod(shape) for name, shape in one.items()) + (config.n_layers - 1) * layer
    tokens = options.batch_size * options.context
    need = _STATE_BYTES * parameters // holders + tokens * (4 * config.vocab_size + 2 * config.d_model * config.n_layers)
    have = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > have:
        raise UserError("the run does not fit into memory", got=f"{parameters:,} parameters and micro-batches of {tokens:,} tokens: {_giga(need)} at least",
                        allowed=f"{_giga(have)}", fix=_LESS_MEMORY)


def _giga(count: int) -> str:
    return f"{min(count, 10**30) / 1e9:,.1f} GB"


@contextlib.contextmanager
def told_of_memory() -> Iterator[None]:
    """Turns a failed allocation, of whichever device, into one UserError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "DefaultCPUAllocator" not in text:
            raise
        raise UserError("out of memory", got=text[:120] or type(error).__name__, fix=_LESS_MEMORY) from None
