"""The Sessa layer and language model, one set of equations for training, prefill, decode and the exported graph.

Parameter names inside a layer are the official ones. `step` is the whole of a layer as a function of its cached rows; `forward`,
`prefill`, `decode_step` and the exported graph all call it, so they cannot differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sessa_deploy import fused_layer
from sessa_deploy.config import SessaConfig
from sessa_deploy.contract import CACHE_FIELDS, PRECISIONS, cache_row_shape
from sessa_deploy.errors import UserError
from sessa_deploy.kernels.ops import causal_attention, feedback_attention
from sessa_deploy.kernels.route import is_eager
from sessa_deploy.kernels.training import rows as new_rows
from sessa_deploy.kernels.training.loss import mean_nats
from sessa_deploy.rope import rope_tables, rotate, tables_at, tables_from_zero

Rope = tuple[Tensor, Tensor] | None


class Rows(NamedTuple):
    """Rows of one layer's cache: k_f (rotated), v_f (B,N,Hkv,d); k_b, s (B,N,D)."""

    k_f: Tensor
    v_f: Tensor
    k_b: Tensor
    s: Tensor


NO_ROWS: Rows = ()  # type: ignore[assignment]  # where nobody asks for them


class Ops(NamedTuple):
    """The two ops that a mixer calls: the kernels', or others of the same arguments where implementations are compared."""

    causal: Callable[..., Tensor] = causal_attention
    feedback: Callable[..., Tensor] = feedback_attention

    def attend(self, q: Tensor, k_f: Tensor, v_f: Tensor, past_length: Tensor | None, past: Rows | None) -> Tensor:
        """The forward attention o (B,T,Hq,d) of q (B,T,Hq,d) and k_f, v_f (B,T,Hkv,d), rotated."""
        old_k_f, old_v_f = (None, None) if past is None else past[:2]
        return self.causal(q, k_f, v_f, old_k_f, old_v_f, past_length)

    def solve(self, q_b: Tensor, k_b: Tensor, gamma: Tensor, f: Tensor, past_length: Tensor | None, past: Rows | None) -> Tensor:
        """The feedback branch s (B,T,D) of q_b, k_b, f (B,T,D) and gamma (B,T)."""
        old_k_b, old_s = (None, None) if past is None else past[2:]
        return self.feedback(q_b, k_b, gamma, f, old_k_b, old_s, past_length)


KERNELS = Ops()


class SessaCache:
    """The decode cache of one layer: k_f, v_f (B,capacity,Hkv,d), k_b, s (B,capacity,D) and length (B,) int32.

    Rows from length[b] on are undefined. Fixed capacity; only new rows are ever written.
    """

    def __init__(
        self, batch_size: int, capacity: int, d_model: int, n_kv_heads: int, head_dim: int, device: torch.device | str | None, dtype: torch.dtype
    ) -> None:
        for name, value in (("batch_size", batch_size), ("capacity", capacity)):
            if value < 1:
                raise UserError(f"{name} of a cache is out of range", got=value, allowed="an integer >= 1")
        self.capacity = capacity
        for name in CACHE_FIELDS:
            shape = (batch_size, capacity, *cache_row_shape(name, d_model, n_kv_heads, head_dim))
            setattr(self, name, torch.empty(shape, device=device, dtype=dtype))
        self.length = torch.zeros(batch_size, dtype=torch.int32, device=device)
        self._at_most = 0  # host-side bound of length, so that a device is asked only when the cache may be full

    k_f: Tensor
    v_f: Tensor
    k_b: Tensor
    s: Tensor

    def past(self) -> Rows:
        """The rows a step may need: up to the longest sequence on a CPU, the whole capacity elsewhere (lengths are then read on the device)."""
        extent = int(self.length.max()) if self.length.device.type == "cpu" else self.capacity
        return Rows(*(getattr(self, name)[:, :extent] for name in CACHE_FIELDS))

    @property
    def empty(self) -> bool:
        """Whether nothing was appended since the start or the last reset, by what the host knows; False while a CUDA graph is captured, which
        may be replayed behind any past."""
        return self._at_most == 0 and not (self.length.is_cuda and torch.cuda.is_current_stream_capturing())

    def require(self, tokens: int, new_length: Tensor | None = None) -> None:
        """Raise UserError unless every sequence has room for its new rows (`tokens`, or new_length[b] where given)."""
        if self._at_most + tokens <= self.capacity:
            return
        wanted = self.length + (tokens if new_length is None else new_length)
        self._at_most = int(self.length.max())
        if int(wanted.max()) > self.capacity:
            row = int(wanted.argmax())
            raise UserError("the context is full", got=f"{int(self.length[row])} cached and {int(wanted[row] - self.length[row])} new tokens in sequence {row}",
                            allowed=f"at most {self.capacity} in all", fix="init_cache with a larger capacity")

    @torch.no_grad()
    def append(self, rows: Rows, new_length: Tensor | None = None) -> None:
        """Write the first new_length[b] of the T given rows of each sequence at length[b] and advance; all T where new_length is None."""
        batch, tokens = rows.s.shape[:2]
        self.require(tokens, new_length)
        if new_rows.appends(rows):
            new_rows.append_rows(rows, [getattr(self, name) for name in CACHE_FIELDS], self.length, new_length)
        elif batch == 1 and self.length.device.type == "cpu":
            start, count = int(self.length[0]), tokens if new_length is None else int(new_length[0])
            for name, new in zip(CACHE_FIELDS, rows, strict=True):
                getattr(self, name)[:, start : start + count] = new[:, :count]
        else:
            step = torch.arange(tokens, device=self.length.device)
            slot = (self.length[:, None] + step).long()  # (B,T)
            if new_length is not None:
                # Rows that are not kept are aimed at a kept slot's own value: written twice alike, nothing else touched.
                last = (new_length[:, None] - 1).clamp(min=0).long()
                step = torch.minimum(step[None].expand(batch, tokens), last)
                slot = torch.minimum(slot, self.length[:, None] + last).long().clamp(max=self.capacity - 1)
            index = torch.arange(batch, device=slot.device)[:, None]
            for name, new in zip(CACHE_FIELDS, rows, strict=True):
                store = getattr(self, name)
                if new_length is not None:
                    new = new[index, step.long()]
                    empty = (new_length == 0).view(-1, *(1,) * (new.dim() - 1))
                    new = torch.where(empty, store[index, slot], new)
                store[index, slot] = new
        self.length += tokens if new_length is None else new_length.to(self.length.dtype)
        self._at_most = min(self._at_most + tokens, self.capacity)

    def reset(self) -> None:
        """Forget every token."""
        self.length.zero_()
        self._at_most = 0


class SessaMixer(nn.Module):
    """Forward attention f, then the feedback solve (I - diag(gamma) A) s = f (arXiv 2604.18580, section 3)."""

    ops: Ops = KERNELS

    def __init__(self, d_model: int, n_heads: int, n_kv_heads: int | None = None, gamma_max: float = 0.999, use_forward_rope: bool = True) -> None:
        super().__init__()
        config = SessaConfig(d_model=d_model, n_layers=1, n_heads=n_heads, vocab_size=1, n_kv_heads=n_kv_heads, gamma_max=gamma_max,
                             use_forward_rope=use_forward_rope)
        self.d_model, self.n_heads, self.n_kv_heads, self.head_dim = d_model, n_heads, config.kv_heads, config.head_dim
        self.gamma_max, self.use_forward_rope = gamma_max, use_forward_rope
        kv_width = self.n_kv_heads * self.head_dim
        self.q_proj = nn.Linear(d_model, d_model)
        self.k_proj = nn.Linear(d_model, kv_width)
        self.v_proj = nn.Linear(d_model, kv_width)
        self.proj_fb = nn.Linear(d_model, 2 * d_model)
        self.out_proj = nn.Identity() if n_heads == 1 else nn.Linear(d_model, d_model, bias=False)
        self.gamma_bias = nn.Parameter(torch.tensor(1.0))
        self.gamma_ctx = nn.Linear(d_model, 1, bias=False)

    def gain(self, a: Tensor) -> Tensor:
        """gamma (B,T) = gamma_max * tanh(gamma_bias + a . w_gamma), float32 at least: bfloat16 would round 0.999 to 1."""
        work = torch.float64 if a.dtype == torch.float64 else torch.float32
        raw = (a.to(work) * self.gamma_ctx.weight.to(work)).sum(-1)  # a sum, not a matmul: autocast leaves it alone
        return self.gamma_max * torch.tanh(self.gamma_bias.to(work) + raw)

    def step(self, a: Tensor, past_length: Tensor | None, past: Rows | None, rope: Rope) -> Rows:
        """New rows for activations a (B,T,D) behind the given past. None, None: no past."""
        batch, tokens, width = a.shape
        q = self.q_proj(a).view(batch, tokens, self.n_heads, self.head_dim)
        k_f = self.k_proj(a).view(batch, tokens, self.n_kv_heads, self.head_dim)
        v_f = self.v_proj(a).view(batch, tokens, self.n_kv_heads, self.head_dim)
        if rope is not None:
            q, k_f = rotate(q, *rope), rotate(k_f, *rope)
        f = self.out_proj(self.ops.attend(q, k_f, v_f, past_length, past).reshape(batch, tokens, width))
        q_b, k_b = self.proj_fb(a).split(width, dim=-1)
        return Rows(k_f, v_f, k_b, self.ops.solve(q_b, k_b, self.gain(a), f, past_length, past))

    def forward(self, a: Tensor) -> Tensor:
        """s (B,T,D) of activations a (B,T,D), from an empty past."""
        return self.step(a, None, None, self.rope(a, None)).s

    def rope(self, x: Tensor, past_length: Tensor | None, past: Rows | None = None) -> Rope:
        """cos and sin tables for the T rows of x behind past_length (0 where None), or None when this mixer does not rotate."""
        if not self.use_forward_rope:
            return None
        return rope_of(x, self.head_dim, past_length, 0 if past is None else past.s.shape[1])


def rope_of(x: Tensor, head_dim: int, past_length: Tensor | None, capacity: int) -> tuple[Tensor, Tensor]:
    """cos and sin (B or 1,T,1,d/2) for the T rows of x (B,T,D) behind past_length <= capacity (0 where None), as precise as x."""
    batch, tokens = x.shape[:2]
    kept = x.is_cuda and x.dtype != torch.float64 and is_eager(x)
    if past_length is None and kept:
        return tables_from_zero(tokens, head_dim, x.device)
    at = positions(batch, tokens, x.device, past_length)
    return tables_at(at, capacity + tokens, head_dim) if kept else rope_tables(at, head_dim, x.dtype)


def positions(batch: int, tokens: int, device: torch.device, past_length: Tensor | None) -> Tensor:
    """Position (B,T) of each new row: past_length[b] + t."""
    row = torch.arange(tokens, device=device)[None]
    return row.expand(batch, tokens) if past_length is None else past_length.to(row.dtype)[:, None] + row


class SessaLayer(nn.Module):
    """y = x + (s * g) W_out^T + b_out with a, g = split(LayerNorm(x) W_in^T + b_in), s = mixer(GELU(a)).

    x and y: (B,T,D). Raises UserError on sizes that do not fit (see SessaConfig).
    """

    def __init__(
        self, d_model: int, n_heads: int, n_kv_heads: int | None = None, gamma_max: float = 0.999, use_forward_rope: bool = True,
        layer_norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(d_model, eps=layer_norm_eps)
        self.W_in = nn.Linear(d_model, 2 * d_model)
        self.mixer = SessaMixer(d_model, n_heads, n_kv_heads, gamma_max, use_forward_rope)
        self.W_out = nn.Linear(d_model, d_model)

    def step(self, x: Tensor, past_length: Tensor | None, past: Rows | None, rope: Rope, rows: bool = True) -> tuple[Tensor, Rows]:
        """y (B,T,D) and the layer's new rows, for x behind the given past (None, None: no past). rows: whether they are wanted; if not, () may be given."""
        ops, kind = self.mixer.ops, type(self.mixer)  # a mixer of the caller's own keeps its equations; a copied one's ops are equal
        weights = fused_layer.applies(self, x) if ops == KERNELS and kind.step is SessaMixer.step and kind.gain is SessaMixer.gain else None
        if weights is not None and fused_layer.trains(self, x, weights, past):
            whole = fused_layer.whole(self, x, rope, weights, rows) if past is None else None
            if whole is not None:
                return whole[0], Rows(*whole[1:]) if rows else NO_ROWS
            weights = None
        if weights is not None:
            head = fused_layer.head(self, x, rope, weights)
            f = self.mixer.out_proj(ops.attend(head.q, head.k, head.v, past_length, past).reshape(x.shape))
            s = ops.solve(head.q_b, head.k_b, head.gamma, f, past_length, past)
            return fused_layer.tail(self, s, head, rope, weights), Rows(head.k, head.v, head.k_b, s)
        a, g = self.W_in(self.ln(x)).split(x.shape[-1], dim=-1)
        new = self.mixer.step(F.gelu(a), past_length, past, rope)
        return x + self.W_out(new.s * g), new

    def forward(self, x: Tensor) -> Tensor:
        """y (B,T,D) of a whole sequence x (B,T,D)."""
        return self.step(x, None, None, self.mixer.rope(x, None), False)[0]

    def init_cache(self, batch_size: int, capacity: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> SessaCache:
        """An empty cache for `batch_size` sequences of at most `capacity` tokens, by default on the layer's device in its dtype."""
        weight, mixer = self.W_in.weight, self.mixer
        return SessaCache(batch_size, capacity, mixer.d_model, mixer.n_kv_heads, mixer.head_dim, device or weight.device, dtype or weight.dtype)

    def prefill(self, x: Tensor, cache: SessaCache, new_length: Tensor | None = None) -> Tensor:
        """y (B,T,D) for x (B,T,D) behind what the cache holds, appending to it. Also onto a cache that is not empty.

        new_length (B,) in 0..T: how many rows of each sequence count; the others may hold anything and y there is unspecified.
        Raises UserError when the cache has no room; nothing is written then.
        """
        if x.shape[0] != len(cache.length):
            raise UserError("batch size differs from the cache's", got=x.shape[0], allowed=len(cache.length))
        cache.require(x.shape[1], new_length)
        if new_length is not None:
            x = torch.where(valid_rows(x.shape[1], new_length)[..., None], x, 0.0)
        if cache.empty:
            y, new = self.step(x, None, None, self.mixer.rope(x, None))
        else:
            length, past = cache.length.clone(), cache.past()
            y, new = self.step(x, length, past, self.mixer.rope(x, length, past))
        cache.append(new, new_length)
        return y

    def decode_step(self, x_t: Tensor, cache: SessaCache) -> Tensor:
        """y_t (B,1,D) for one new token x_t (B,1,D) of each sequence, appending to the cache."""
        if x_t.dim() != 3 or x_t.shape[1] != 1:
            raise UserError("decode_step takes one token", got=tuple(x_t.shape), allowed="(B,1,D)", fix="use prefill for more")
        return self.prefill(x_t, cache)


def valid_rows(tokens: int, new_length: Tensor) -> Tensor:
    """Mask (B,T): row t of sequence b counts when t < new_length[b]."""
    return torch.arange(tokens, device=new_length.device) < new_length[:, None]


class SessaLM(nn.Module):
    """tokens -> embedding -> N layers -> LayerNorm -> lm_head. Logits are float32 (float64 in a float64 model)."""

    def __init__(self, config: SessaConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.layers: Sequence[SessaLayer] = nn.ModuleList(  # type: ignore[assignment]
            SessaLayer(config.d_model, config.n_heads, config.n_kv_heads, config.gamma_max, config.use_forward_rope, config.layer_norm_eps)
            for _ in range(config.n_layers)
        )
        self.norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.reset_parameters()
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embedding.weight

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        """Normal weights of the given deviation, zero biases; what writes into the residual stream is scaled by (2 N)^-1/2."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(0.0, std * (2 * self.config.n_layers) ** -0.5 if name.endswith("W_out") else std)
                if module.bias is not None:
                    module.bias.zero_()
        self.embedding.weight.normal_(0.0, std)

    def to_precision(self, precision: str) -> SessaLM:
        """Cast in place to "fp32", "fp16", "bf16" or "fp64" storage; gamma's parameters stay float32 (float64 in fp64). Returns self."""
        if precision not in PRECISIONS:
            raise UserError("no such precision", got=precision, allowed=", ".join(PRECISIONS))
        storage = getattr(torch, PRECISIONS[precision].torch)
        gains = [(layer.mixer.gamma_bias.data, layer.mixer.gamma_ctx.weight.data) for layer in self.layers]
        self.to(storage)
        if storage != torch.float64:  # from the values before the cast: a rounded gamma_bias would stay rounded
            for layer, (bias, weight) in zip(self.layers, gains, strict=True):
                layer.mixer.gamma_bias.data, layer.mixer.gamma_ctx.weight.data = bias.float(), weight.float()
        return self

    def graph(
        self, input_ids: Tensor, past_length: Tensor | None, new_length: Tensor | None, past: Sequence[Tensor] | None, all_logits: bool = False
    ) -> tuple[Tensor, ...]:
        """The exported function: (logits, *new rows in contract.cache_entries order) of input_ids (B,T) behind the given past.

        past_length, new_length: (B,) int32; past: flat tensors in contract.cache_entries order. None: no past; every row counts.
        logits (B,V) of row new_length - 1, or (B,T,V) with all_logits. New rows are zero from new_length[b] on.
        """
        x, out = self.body(input_ids, past_length, new_length, past)
        if not all_logits:
            if new_length is None:
                x = x[:, -1]
            else:
                last = (new_length.to(torch.int64) - 1).clamp(min=0)[:, None, None].expand(-1, 1, x.shape[-1])
                x = torch.gather(x, 1, last).squeeze(1)
        logits = self.lm_head(self.norm(x))
        return logits if logits.dtype == torch.float64 else logits.float(), *out

    def body(
        self, input_ids: Tensor, past_length: Tensor | None, new_length: Tensor | None, past: Sequence[Tensor] | None, rows: bool = True
    ) -> tuple[Tensor, list[Tensor]]:
        """`graph` up to the last layer: its y (B,T,D), and the new rows, which may be left out where `rows` is False."""
        x = self.embedding(input_ids)
        tokens, first = input_ids.shape[1], self.layers[0].mixer
        rope = None
        if first.use_forward_rope:
            rope = rope_of(x, first.head_dim, past_length, 0 if past is None else past[3].shape[1])
        valid = None if new_length is None else valid_rows(tokens, new_length)
        out: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            old = None if past is None else Rows(*past[4 * i : 4 * i + 4])
            x, new = layer.step(x, past_length, old, rope, rows)
            for field in new:
                out.append(field if valid is None else torch.where(valid.view(*valid.shape, *(1,) * (field.dim() - 2)), field, torch.zeros_like(field)))
        return x, out

    def forward(self, input_ids: Tensor, targets: Tensor | None = None) -> Tensor:
        """logits (B,T,V) of input_ids (B,T), from an empty past; with targets (B,T) in 0..V-1 the mean of their nats in place of the logits, a float32
        scalar for training, which keeps no logits in float32 (float64 in a float64 model)."""
        if targets is None:
            return self.graph(input_ids, None, None, None, all_logits=True)[0]
        return self.nats(self.body(input_ids, None, None, None, rows=False)[0], targets)

    def nats(self, x: Tensor, targets: Tensor) -> Tensor:
        """Mean nats of targets (B,T) behind the last layer's y (B,T,D)."""
        return mean_nats(self.lm_head(self.norm(x)), targets)

    def init_cache(self, batch_size: int, capacity: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> list[SessaCache]:
        """One empty cache a layer."""
        return [layer.init_cache(batch_size, capacity, device, dtype) for layer in self.layers]

    def prefill(self, input_ids: Tensor, caches: Sequence[SessaCache], new_length: Tensor | None = None, all_logits: bool = False) -> Tensor:
        """logits (B,V) of each sequence's last counted token ((B,T,V) with all_logits), appending input_ids (B,T) to the caches."""
        caches[0].require(input_ids.shape[1], new_length)
        if caches[0].empty:
            logits, *new = self.graph(input_ids, None, new_length, None, all_logits)
        else:
            past = [x for cache in caches for x in cache.past()]
            logits, *new = self.graph(input_ids, caches[0].length.clone(), new_length, past, all_logits)
        for i, cache in enumerate(caches):
            cache.append(Rows(*new[4 * i : 4 * i + 4]), new_length)
        return logits

    def decode_step(self, input_ids: Tensor, caches: Sequence[SessaCache], new_length: Tensor | None = None) -> Tensor:
        """logits (B,V) for one new token (B,1) of each sequence; new_length[b] = 0 leaves a finished sequence as it is."""
        return self.prefill(input_ids, caches, new_length)


@contextmanager
def using_ops(model: SessaLM, ops: Ops) -> Iterator[None]:
    """Let this model, and no other, call these implementations of its two ops inside the block."""
    before = [layer.mixer.ops for layer in model.layers]
    try:
        for layer in model.layers:
            layer.mixer.ops = ops
        yield
    finally:
        for layer, own in zip(model.layers, before, strict=True):
            layer.mixer.ops = own
