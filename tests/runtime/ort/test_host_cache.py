"""Host caches against lists of rows, and what moves."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sessa_deploy.config import SessaConfig
from sessa_deploy.errors import UserError
from sessa_deploy.runtime.ort.host_cache import HostCache, bucket

CONFIG = SessaConfig(d_model=8, n_layers=2, n_heads=4, n_kv_heads=1, vocab_size=4)


def fresh(rng, batch, tokens):
    return [rng.normal(size=(batch, tokens, *shape)).astype(np.float32) for _ in range(2) for shape in ((1, 2), (1, 2), (8,), (8,))]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 300), st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 90), st.booleans()), max_size=12))
def test_random_appends_and_resets_against_lists(batch, capacity, steps):
    cache, length, lists = HostCache(CONFIG, batch, capacity, np.dtype(np.float32)), np.zeros(batch, np.int32), [[[] for _ in range(batch)] for _ in range(8)]
    for seed, tokens, forget in steps:
        rng = np.random.default_rng(seed)
        new = np.minimum(rng.integers(0, tokens + 1, batch), capacity - length).astype(np.int32)
        if new.any():
            active = np.flatnonzero(new)
            first, last = active[0], active[-1] + 1
            rows = fresh(rng, last - first, int(new.max()))
            cache.append(first, length, new, rows)
            for e in range(8):
                for b in range(first, last):
                    lists[e][b] += list(rows[e][b - first, : new[b]])
            length += new
        if forget:
            b = int(rng.integers(batch))
            length[b] = 0
            for e in range(8):
                lists[e][b] = []
            cache.shrink(length)
        cache.poison(length)
        for e in range(8):
            for b in range(batch):
                np.testing.assert_array_equal(cache.rows(e, b, length[b]), np.array(lists[e][b]).reshape(-1, *cache.rows(e, b, 0).shape[1:]))
        views = cache.views(0, batch, length)
        assert all(v.flags.c_contiguous and v.shape[:2] == (batch, length[0] if batch == 1 else cache.pitch) for v in views)
        assert all(np.array_equal(v[b, : length[b]], cache.rows(e, b, length[b])) for e, v in enumerate(views) for b in range(batch))


def test_one_sequence_moves_new_rows_and_nothing_else():
    cache, length, rng = HostCache(CONFIG, 1, 5000, np.dtype(np.float32)), np.zeros(1, np.int32), np.random.default_rng(0)
    assert cache.row_bytes == 2 * (2 + 2 + 8 + 8) * 4
    for tokens in (3000, *[1] * 40):
        before = cache.bytes_moved
        cache.append(0, length, np.array([tokens], np.int32), fresh(rng, 1, tokens))
        length += tokens
        assert cache.bytes_moved - before == tokens * cache.row_bytes
        assert all(np.shares_memory(view, flat) for view, flat in zip(cache.views(0, 1, length), cache._flat, strict=True))


def test_a_batch_moves_a_few_rows_for_each_new_one():
    batch, capacity = 3, 3000
    cache, length, rng = HostCache(CONFIG, batch, capacity, np.dtype(np.float32)), np.zeros(batch, np.int32), np.random.default_rng(0)
    new, moves, ladder = np.ones(batch, np.int32), [], set()
    for _ in range(capacity):
        before = cache.bytes_moved
        cache.append(0, length, new, fresh(rng, batch, 1))
        length += new
        moves.append((cache.bytes_moved - before) // cache.row_bytes)
        ladder.add(cache.pitch)
    assert len(ladder) < 20 and sum(m != batch for m in moves) == len(ladder) - 1, "only a new bucket moves old rows"
    assert sum(moves) < 6 * batch * capacity


def test_the_ladder_of_buckets():
    ladder = sorted({bucket(n, 10**6) for n in range(1, 20000)})
    assert ladder[:5] == [64, 128, 192, 256, 320] and all(b % 64 == 0 for b in ladder)
    assert all(b < 1.25 * a + 64 or b == a + 64 for a, b in itertools.pairwise(ladder))
    assert bucket(100, 70) == 70 and bucket(64, 1000) == 64


def test_a_cache_that_cannot_exist_is_refused():
    with pytest.raises(UserError, match="GiB"):
        HostCache(CONFIG, 1000, 10**15, np.dtype(np.float32))
