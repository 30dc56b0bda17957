"""The forward attention of a layer in training where it is no single operator: PyTorch's graph of it, which holds none of its tensors.

What its backward reads is given to the caller, whose node saves it beside the rest. So it goes when that node's backward is through, and where activations are
checkpointed or offloaded; a graph that held it would keep the largest of them, and be computed again for itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks

from sessa_deploy.kernels import ops


class _Begin(torch.autograd.Function):
    """Tensors at the beginning of a graph, of which gradients are taken: leaves would be held by it. Behind it there is only `token`, never reached."""

    @staticmethod
    def forward(ctx, token, *tensors):  # type: ignore[no-untyped-def]
        return tuple([x.detach() for x in tensors])


class _Held:
    """Where a graph finds what its forward saved: the graph refers to this, and this to no graph."""

    def __init__(self) -> None:
        self.tensors: Sequence[Tensor] = ()

    def __call__(self, at: int) -> Tensor:
        return self.tensors[at]


class Graph:
    """What `attention_graph` leaves for its backward."""

    def __init__(self, begin: Sequence[Tensor], o: Tensor, held: _Held) -> None:
        self._begin, self._end, self._held = [get_gradient_edge(x) for x in begin], [get_gradient_edge(o)], held

    def backward(self, do: Tensor, saved: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Gradients of q, k and v for that of o, as often as they are wanted."""
        before, self._held.tensors = self._held.tensors, saved  # one backward may run inside another that waits
        try:
            return torch.autograd.grad(self._end, self._begin, [do], retain_graph=True)
        finally:
            self._held.tensors = before


def attention_graph(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, tuple[Tensor, ...], Graph]:
    """`ops.causal_attention` of q (B,T,Hq,d) and k, v (B,T,Hkv,d) inside an autograd function: o (B,T,Hq,d), what the function has to save, and the graph."""
    saved, held = list[Tensor](), _Held()

    def save(x: Tensor) -> int:
        saved.append(x.detach())
        return len(saved) - 1

    with torch.enable_grad(), saved_tensors_hooks(save, held):
        begin = _Begin.apply(torch.empty(0, requires_grad=True), q, k, v)
        o = ops.causal_attention(*begin)
    found = tuple(saved)
    saved.clear()  # PyTorch keeps `save`
    return o.detach(), found, Graph(begin, o, held)
