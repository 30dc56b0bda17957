"""One model, stepped by many processes: replicas whose gradients are averaged (DistributedDataParallel), or parameters dealt out over them (FSDP2).

What a layer does in training, compiled or computed anew in the backward, is put around it here too; a model that asks for none of it is left as it is.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from sessa_deploy.distributed.group import Group


@dataclass
class Stepped:
    """A model and how its processes step it. model: what holds the parameters, by their plain names; call: what maps a micro-batch and its targets to
    the loss."""

    group: Group
    model: nn.Module
    call: Callable[[Tensor, Tensor], Tensor]
    sharded: bool = False

    def loss(self, inputs: Tensor, targets: Tensor, precision: contextlib.AbstractContextManager[Any]) -> Tensor:
        """Mean nats per token of a micro-batch (B,T) and its targets (B,T), the model run in a context of precision."""
        with precision:
            return self.call(inputs, targets)

    @contextlib.contextmanager
    def part(self, last: bool) -> Iterator[None]:
        """Around the forward and backward of a micro-batch: gradients travel with the last one of a step alone."""
        if self.sharded:
            self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
            yield
        elif isinstance(self.call, DistributedDataParallel) and not last:
            with self.call.no_sync():
                yield
        else:
            yield

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """Around what runs the model without a backward. FSDP leaves it to the backward to deal out again what belongs to no layer: until then those are
        other parameters, of which the optimizer has no moments to save."""
        self.model.eval()
        yield
        if self.sharded:
            self.model.reshard()  # type: ignore[operator]
        self.model.train()

    def clip(self, most: float) -> Tensor:
        """Scale the gradients so that their norm over all parameters is at most `most`; returns the norm before."""
        if not self.sharded:
            return nn.utils.clip_grad_norm_(self.model.parameters(), most)
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        whole = [g for g in grads if not dealt_out(g)]
        if whole:  # of parameters that every process holds, which FSDP leaves to us
            flat = torch.cat([g.flatten() for g in whole])
            self.group.add(flat).div_(self.group.size)
            for g, part in zip(whole, flat.split([g.numel() for g in whole]), strict=True):
                g.copy_(part.view_as(g))
        pieces: list[Tensor] = [g.to_local() if dealt_out(g) else g for g in grads]  # type: ignore[attr-defined]
        square = _square([piece for piece, g in zip(pieces, grads, strict=True) if dealt_out(g)], pieces[0])
        norm = (self.group.add(square) + _square(whole, pieces[0])).sqrt()
        torch._foreach_mul_(pieces, (most / (norm + 1e-6)).clamp(max=1.0))
        return norm


def dealt_out(x: Tensor) -> Any:
    """Whether the processes hold shares of a tensor: a DTensor, whose module takes a second to import and which whoever runs alone never sees."""
    return hasattr(x, "placements")


def _square(tensors: list[Tensor], like: Tensor) -> Tensor:
    """The sum of all squares, float32."""
    tensors = [x for x in tensors if x.numel()]  # a process may hold nothing of a short parameter
    if not tensors:
        return torch.zeros((), device=like.device)
    return torch.stack(torch._foreach_norm(tensors)).float().square().sum()


def change_layers(model: nn.Module, compiled: bool, recomputed: bool) -> None:
    """Let the layers and the loss of a model be compiled, and each of model.layers computed anew in the backward so that its activations need not be kept,
    where that is asked for. One layer is compiled for all of them: the time to compile does not grow with their number.

    Layers then give no rows of a cache: those of all layers together would be kept for nothing.
    """
    if not (compiled or recomputed):
        return
    step = torch.compile(_step) if compiled else _step
    for layer in model.layers:  # type: ignore[union-attr]
        layer.step = _without_rows(layer.step, step, recomputed)
    if compiled:
        nats: Callable[..., Tensor] = model.nats  # type: ignore[assignment]
        object.__setattr__(model, "nats", torch.compile(nats))


def _step(step: Callable[..., Any], x: Tensor, past_length: Any, past: Any, rope: Any) -> Tensor:
    y: Tensor = step(x, past_length, past, rope, False)[0]
    return y


def _without_rows(step: Callable[..., Any], changed: Callable[..., Tensor], recomputed: bool) -> Callable[..., Any]:
    def call(x: Tensor, past_length: Any, past: Any, rope: Any, rows: bool = False) -> tuple[Tensor, tuple[()]]:
        if not torch.is_grad_enabled():  # held-out text comes in other shapes, each of which would be compiled
            return _step(step, x, past_length, past, rope), ()
        if recomputed:  # nothing in a layer is random
            return checkpoint(changed, step, x, past_length, past, rope, use_reentrant=False, preserve_rng_state=False), ()
        return changed(step, x, past_length, past, rope), ()

    return call


def replicated(model: nn.Module, group: Group) -> Stepped:
    """Every process holds the whole model; gradients are averaged while the backward runs. Alone, the model as it is."""
    if not group.many:
        return Stepped(group, model, model)
    device = next(model.parameters()).device
    with warnings.catch_warnings():  # a group of two backends is asked which one is meant; the device says it
        warnings.simplefilter("ignore")
        wrapped = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None, broadcast_buffers=False, gradient_as_bucket_view=True)
    return Stepped(group, model, wrapped)


def sharded(model: nn.Module, group: Group, device: torch.device) -> Stepped:
    """Every process holds a share of each parameter, its gradient and its moments; a layer's are gathered while it runs. The model, on any device ("meta"
    where no process could hold it), is changed in place and has no values yet: see `fill`.

    Parameters without a dimension (a layer's gamma_bias) cannot be dealt out; every process holds them. Everything stays in the parameters' own type,
    also what travels: gamma in 16 bits would be another gamma.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")  # nothing is changed in place
    mesh = init_device_mesh(device.type, (group.size,))
    whole = {p for p in model.parameters() if p.dim() == 0}
    for layer in model.layers:  # type: ignore[union-attr]
        fully_shard(layer, mesh=mesh, ignored_params=whole)
        register_fsdp_forward_method(layer, "step")
    fully_shard(model, mesh=mesh, ignored_params=whole)
    model.to_empty(device=device)
    return Stepped(group, model, model, sharded=True)


@torch.no_grad()
def fill(model: nn.Module, group: Group, values: Mapping[str, Tensor] | None) -> None:
    """Give the parameters of a sharded model their values: those that process 0 has under their names, one parameter at a time."""
    for name, parameter in model.named_parameters():
        whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
        if group.chief:
            assert values is not None
            whole.copy_(values[name])
        dist.broadcast(whole, 0)
        parameter.copy_(placed(whole, parameter))


def placed(whole: Tensor, like: Tensor) -> Tensor:
    """A tensor that every process has whole as `like` is held: on its device, and dealt out where `like` is."""
    whole = whole.to(like.device, like.dtype)
    if not dealt_out(like):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)  # type: ignore[attr-defined]


def gathered(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """The whole parameters of a sharded model on the CPU, one gathered at a time; {} where they are not kept. All processes must call it."""
    found = {}
    for name, parameter in model.named_parameters():
        whole = parameter.detach()
        if dealt_out(whole):
            whole = whole.full_tensor()  # type: ignore[attr-defined]
        if keep:
            found[name] = whole.cpu()
    return found


def unmixed(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Optimizer groups such that none holds both parameters that are dealt out and parameters that are not: one step takes one kind."""
    found = []
    for group in groups:
        for kind in (True, False):
            members = [p for p in group["params"] if dealt_out(p) is kind]
            if members:
                found.append({**group, "params": members})
    return found
