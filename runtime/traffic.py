"""What a decode step must move through memory at least, and how fast the memory is: the bandwidth floor that latencies are read against."""

from __future__ import annotations

import time

import numpy as np

from sessa_deploy.config import SessaConfig
from sessa_deploy.contract import PRECISIONS, cache_entries, cache_row_shape
from sessa_deploy.cuda import Cuda, devices
from sessa_deploy.errors import SessaError

_FLOAT32 = 4
_COPIES, _COPY_BYTES = 10, 1 << 30


def weight_bytes(config: SessaConfig, precision: str, batch: int = 1) -> int:
    """Bytes of weights that a decode step of `batch` sequences reads once: all of them, but of the embedding only one row a sequence."""
    width, kv_width = config.d_model, config.kv_heads * config.head_dim
    matrices = 2 * width + width + 2 * kv_width + 2 * width + width  # rows of W_in, q, k and v, fb, W_out
    stored = 2 * width + matrices * (width + 1) + (width * width if config.n_heads > 1 else 0)  # LayerNorm, weights and biases, out_proj
    numbers = config.n_layers * stored + 2 * width + config.vocab_size * width + batch * width
    gain = config.n_layers * (width + 1)  # gamma's own, float32 in every precision (float64 in fp64)
    item = PRECISIONS[precision].itemsize
    return numbers * item + gain * max(item, _FLOAT32)


def row_bytes(config: SessaConfig, precision: str) -> int:
    """Bytes of one token's rows in the caches of all layers."""
    numbers = sum(int(np.prod(cache_row_shape(f, config.d_model, config.kv_heads, config.head_dim))) for _, f in cache_entries(config.n_layers))
    return numbers * PRECISIONS[precision].itemsize


def step_bytes(config: SessaConfig, precision: str, contexts: list[float]) -> float:
    """Bytes a decode step moves at least, for sequences with `contexts` cached tokens each: every weight once, every valid cache row once."""
    return weight_bytes(config, precision, len(contexts)) + sum(contexts) * row_bytes(config, precision)


def copy_bandwidth() -> float | None:
    """Bytes a second, read and written, of a long copy on the first GPU, by its own driver; None where there is no GPU or no room for it."""
    if not devices():
        return None
    cuda = Cuda()
    try:
        source, target = cuda.allocate(_COPY_BYTES), cuda.allocate(_COPY_BYTES)
        best = float("inf")
        for _ in range(_COPIES):
            cuda.wait()
            start = time.perf_counter()
            for _ in range(4):
                cuda.copy(target, _COPY_BYTES, source, _COPY_BYTES, _COPY_BYTES, 1)
            cuda.wait()
            best = min(best, time.perf_counter() - start)
        return 4 * 2 * _COPY_BYTES / best
    except SessaError:
        return None
    finally:
        cuda.close()
