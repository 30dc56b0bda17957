"""An optimizer step as one CUDA graph: after a few plain steps it is captured, then replayed, which costs the host one launch instead of thousands."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sessa_deploy.errors import UserError
from sessa_deploy.kernels.replay import leave

PLAIN_STEPS = 3  # before one is captured: they compile, plan and allocate what stays, and are steps of the run like any other

Step = Callable[[Sequence[Tensor]], tuple[Tensor, Tensor]]


class Graphed:
    """`step`, a function of tensors of fixed shapes that gives two scalars on the device, run plainly at first and then as a graph's replay.

    Everything else that it reads and writes must stay where it is: weights, moments, the learning rate as a tensor. Gradients belong to the graph.
    """

    def __init__(self, step: Step, device: torch.device) -> None:
        self._step, self._device, self._plain = step, device, PLAIN_STEPS
        self._side = torch.cuda.Stream(device)  # where plain steps run too: what they allocate must not belong to the default stream
        leave(self._side)  # the memory of a layer's own graphs would be lost to this one
        self._graph: torch.cuda.CUDAGraph | None = None
        self._held: list[Tensor] = []
        self._given: tuple[Tensor, ...] = ()

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """What the step gives for these inputs. Raises UserError when it cannot be captured; torch.OutOfMemoryError passes."""
        if self._plain:
            self._plain -= 1
            return self._run_plainly(inputs)
        if self._graph is None:
            self._capture(inputs)
        for held, new in zip(self._held, inputs, strict=True):
            held.copy_(new)
        assert self._graph is not None
        self._graph.replay()
        first, second = (x.clone() for x in self._given)  # the next replay writes them anew
        return first, second

    def _run_plainly(self, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        current = torch.cuda.current_stream(self._device)
        self._side.wait_stream(current)
        with torch.cuda.stream(self._side):
            given = self._step(inputs)
        current.wait_stream(self._side)
        return given

    def _capture(self, inputs: Sequence[Tensor]) -> None:
        self._held = [x.clone() for x in inputs]
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()  # what plain steps used is not the graph's
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._side, capture_error_mode="thread_local"):
                self._given = self._step(self._held)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            why = " ".join(str(error).split())[:160]
            raise UserError("the training step cannot be captured as a CUDA graph", got=why, fix="leave --cuda-graph out") from None
        self._graph = graph
