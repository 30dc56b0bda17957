"""What a decode step must move through memory at least, and how fast the memory is: the bandwidth floor that latencies are read against."""

from __future__ import annotations

import time

import numpy as np

from sessa_deploy.config import SessaConfig
from sessa_deploy.contract import PRECISIONS, Weights, cache_entries, cache_row_shape
from sessa_deploy.cuda import Cuda, devices
from sessa_deploy.errors import SessaError
from sessa_deploy.runtime.sizes import matrix_bytes, other_bytes

_COPIES, _COPY_BYTES = 10, 1 << 30


def weight_bytes(config: SessaConfig, precision: str, batch: int = 1, weights: Weights | None = None) -> int:
    """Bytes of weights that a decode step of `batch` sequences reads once: all of them, but of the embedding only one row a sequence.

    weights: which matrices are read in 8 bits; None: none.
    """
    rows = batch * config.d_model * PRECISIONS[precision].itemsize
    return sum(matrix_bytes(config, precision, weights).values()) + other_bytes(config, precision) + rows


def row_bytes(config: SessaConfig, precision: str) -> int:
    """Bytes of one token's rows in the caches of all layers."""
    numbers = sum(int(np.prod(cache_row_shape(f, config.d_model, config.kv_heads, config.head_dim))) for _, f in cache_entries(config.n_layers))
    return numbers * PRECISIONS[precision].itemsize


def step_bytes(config: SessaConfig, precision: str, contexts: list[float], weights: Weights | None = None) -> float:
    """Bytes a decode step moves at least, for sequences with `contexts` cached tokens each: every weight once, every valid cache row once."""
    return weight_bytes(config, precision, len(contexts), weights) + sum(contexts) * row_bytes(config, precision)


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
