"""The passes of a layer's regions for one shape and one set of types: grids and numbers, worked out once for every layer and step alike."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sessa_deploy.kernels.launch.jit import Pass
from sessa_deploy.kernels.launch.limits import WORKSPACE_ALIGNMENT
from sessa_deploy.kernels.launch.passes import ROWS, cdiv, more, tiles
from sessa_deploy.kernels.training import elementwise
from sessa_deploy.kernels.training.form import Form, layout


class Memory:
    """One allocation for tensors of fixed shapes, from which their views are made where they are needed: an allocation costs the host as much as a launch."""

    def __init__(self, parts: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        self._parts: dict[str, tuple[torch.dtype, tuple[int, ...], tuple[int, ...], int]] = {}
        self.bytes = 0
        for name, (shape, dtype) in parts.items():
            stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
            self._parts[name] = (dtype, tuple(shape), stride, self.bytes // dtype.itemsize)
            self.bytes += -(-math.prod(shape) * dtype.itemsize // WORKSPACE_ALIGNMENT) * WORKSPACE_ALIGNMENT
        self.names, self._types = tuple(parts), tuple({dtype for _, dtype in parts.values()})

    def allocate(self, device: torch.device) -> Tensor:
        """Memory for them, uninitialised."""
        return torch.empty(self.bytes, dtype=torch.uint8, device=device)

    def views(self, memory: Tensor) -> list[Tensor]:
        """The tensors, in the order in which they were named."""
        typed = {dtype: memory.view(dtype) for dtype in self._types}
        begin = {dtype: x.storage_offset() for dtype, x in typed.items()}
        return [typed[dtype].as_strided(shape, stride, begin[dtype] + at) for dtype, shape, stride, at in self._parts.values()]

    def view(self, memory: Tensor, name: str) -> Tensor:
        """One of them."""
        dtype, shape, stride, at = self._parts[name]
        typed = memory.view(dtype)
        return typed.as_strided(shape, stride, typed.storage_offset() + at)


class Plan:
    """What calls of one shape (B,T,D) share.

    period: rows of the rotary tables, 0 for none; types: that of activations, then those of x, of the norm's weight and bias, which select binaries, and of
    the products' weights; others: how many parameters of products there are beside the projections' and W_in's.
    """

    def __init__(self, form: Form, shape: tuple[int, ...], period: int, device: torch.device, types: tuple[torch.dtype, ...], others: int = 0) -> None:
        batch, tokens, width = shape = tuple(shape)
        n, d8, kv = batch * tokens, width // 8, form.kv_heads * form.head_dim
        self.shape, self.rows, self.width, self.device = shape, n, width, device
        self.dtype, self.x_dtype = types[:2]
        self.y_dtype = torch.promote_types(*types[:2])
        self.heads = [form.heads, form.kv_heads, form.kv_heads]
        self.heads_shape = (batch, tokens, sum(self.heads), form.head_dim)
        self.q_shape = (batch, tokens, form.heads, form.head_dim)
        self.qkv_shape = (n, (form.heads + 2 * form.kv_heads) * form.head_dim)
        self.fuses: dict[Any, bool] = {}  # of `ops.fuses`
        inner = sum(self.heads) * form.head_dim
        self.parts = [inner, width, width]  # columns of the products of a: q, k and v in one, the feedback branch's q and k
        self.joined = sum(self.parts)
        self.split = [width, kv, kv, 2 * width]  # the same by their weights
        self.shapes = [(2 * width, width), (2 * width,), (width, width), (width,), (width, width)][: 2 + others]  # W_in, its bias, W_out, its bias, out_proj
        self.sizes_of = [math.prod(x) for x in self.shapes]
        self.casts = types[4] != self.dtype
        dtype, f32, each = self.dtype, torch.float32, ((n, width), self.dtype)
        copied = self.joined * (width + 1) + (sum(self.sizes_of) if self.casts else 0)
        # see regions.Entered
        self.entered = {"y": each, "stats": ((2, n), f32), "h": ((n, 2 * width), dtype), "a": each, "gamma": (shape[:2], f32), "qkv": ((n, inner), dtype),
                        "q_b": (shape, dtype), "k_b": (shape, dtype), "copy": ((copied,), dtype)}  # fmt: skip
        norm, flat, turn, turned, residual = tiles("row", width), tiles("flat"), tiles("turn"), inner - kv, tiles("residual")
        by_rows = (cdiv(n, flat["BT"]),)
        self.norm = Pass(elementwise.fused_norm, (cdiv(n, norm["BT"]),), (n, d8, form.eps), norm)
        self.gelu_gain = Pass(elementwise.fused_gelu_gain, by_rows, (n, d8, form.gamma_max), flat)
        turns = (n, period, form.head_dim // 8, turned // 8, inner // 8)
        self.rotate = Pass(elementwise.fused_rotate, (cdiv(n, turn["BT"]), cdiv(turned, turn["BD"])), turns, turn) if period else None
        self.gate = Pass(elementwise.fused_gate, (*by_rows, cdiv(width, flat["BD"])), (n, d8, 2 * d8), flat)
        self.residual = Pass(elementwise.fused_residual, (cdiv(n * width, residual["BT"]),), (n * d8,), residual)

        columns = layout(width, kv)
        first, total8 = columns.first, columns.total // 8
        self.chunks, self.total, self.sizes = cdiv(n, ROWS), columns.total, list(columns.sizes)
        gate, flat, add = more("gate sums", ROWS=ROWS), more("flat sums", ROWS=ROWS), tiles("total")
        gather, norm = more("gather", TURN=period > 0, ROWS=ROWS), more("row sums", width, ROWS=ROWS)
        by_chunks = (self.chunks, cdiv(width, gate["BD"]))
        self.gate_grad = Pass(elementwise.fused_gate_grad, by_chunks, (n, d8, 2 * d8, total8, (first.in_bias + width) // 8), gate)
        back = (n, period or 1, form.head_dim // 8, d8, kv // 8, total8)
        self.gather = Pass(elementwise.fused_gather, (self.chunks, 3 * cdiv(width, gather["BD"]) + 2 * cdiv(kv, gather["BD"])), back, gather)
        by_chunks = (self.chunks, cdiv(width, flat["BD"]))
        self.gelu_gain_grad = Pass(elementwise.fused_gelu_gain_grad, by_chunks, (n, d8, total8, first.in_bias // 8, form.gamma_max), flat)
        self.norm_grad = Pass(elementwise.fused_norm_grad, (self.chunks,), (n, d8, total8, first.norm_weight // 8), norm)
        self.add = Pass(elementwise.fused_total, (cdiv(columns.total, add["BD"]),), (self.chunks, total8), add)


planned = lru_cache(maxsize=256)(Plan)
