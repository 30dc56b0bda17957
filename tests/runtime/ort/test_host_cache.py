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


_ACTS = st.sampled_from(["step", "step", "step", "alone", "copy", "rest", "wake", "reset"])


@settings(max_examples=80, deadline=None)
@given(st.integers(2, 5), st.integers(70, 400), st.lists(st.tuples(st.integers(0, 10**6), _ACTS, st.integers(1, 90)), max_size=25))
def test_any_sequences_step_together_while_others_rest(batch, capacity, acts):
    """Rows of every sequence, resting ones too, against lists, over poison; a step sees those that take part and no others."""
    cache, length = HostCache(CONFIG, batch, capacity, np.dtype(np.float32)), np.zeros(batch, np.int32)
    resting, lists = np.zeros(batch, np.int32), [[[] for _ in range(batch)] for _ in range(8)]
    for seed, act, tokens in acts:
        rng = np.random.default_rng(seed)
        kept, b, other = np.maximum(length, resting), int(rng.integers(batch)), int(rng.integers(batch))
        room = np.flatnonzero((length < capacity) & (resting == 0))
        active = rng.permutation(room)[: int(rng.integers(1, batch + 1))] if act == "step" else room[:1]
        if act in ("step", "alone") and len(active):
            new = np.zeros(batch, np.int32)
            new[active] = np.minimum(rng.integers(1, tokens + 1, len(active)), capacity - length[active])
            order = cache.pack(np.sort(active), kept).copy() if len(active) > 1 else active
            assert set(order) == set(active)
            first = 0 if len(active) > 1 else int(cache.where[active[0]])
            cache.poison(kept)
            views = cache.views(first, first + len(order), length)
            assert len(order) == 1 or views[0].shape[1] == (bucket(length[active].max(), capacity) if length[active].any() else 0)
            for e, view in enumerate(views):
                assert view.flags.c_contiguous and all(np.array_equal(view[i, : length[b]], cache.rows(e, b, length[b])) for i, b in enumerate(order))
            rows = fresh(rng, len(order), int(new.max()))
            cache.append(first, length, new, rows, kept)
            for e in range(8):
                for i, b in enumerate(order):
                    lists[e][b] += list(rows[e][i, : new[b]])
            length += new
        elif act == "copy" and b != other:
            count = int(rng.integers(kept[b] + 1))
            length[other] = resting[other] = 0
            cache.copy_row(b, other, count, np.maximum(length, resting))
            length[other] = count
            for e in range(8):
                lists[e][other] = list(lists[e][b][:count])
        elif act == "rest":
            resting[b], length[b] = kept[b], 0
        elif act in ("wake", "reset"):
            length[b], resting[b] = int(rng.integers(kept[b] + 1)) if act == "wake" else 0, 0
            for e in range(8):
                del lists[e][b][length[b] :]
            cache.shrink(np.maximum(length, resting))
        cache.poison(np.maximum(length, resting))
        for e in range(8):
            for b in range(batch):
                np.testing.assert_array_equal(cache.rows(e, b, len(lists[e][b])), np.array(lists[e][b]).reshape(-1, *cache.rows(e, b, 0).shape[1:]))


def test_what_rests_costs_a_step_nothing():
    cache, rng, kept = HostCache(CONFIG, 4, 5000, np.dtype(np.float32)), np.random.default_rng(0), np.zeros(4, np.int32)
    for sequence, count in ((1, 4000), (0, 50), (2, 30), (3, 20)):
        new = np.where(np.arange(4) == sequence, count, 0).astype(np.int32)
        cache.append(int(cache.where[sequence]), kept.copy(), new, fresh(rng, 1, count), kept.copy())
        kept += new
    active = np.array([0, 2, 3])
    order = cache.pack(active, kept)
    assert cache.views(0, 3, kept)[0].shape[:2] == (3, 64) and sorted(order) == [0, 2, 3]
    before = cache.bytes_moved
    cache.append(0, kept, np.array([1, 0, 1, 1], np.int32), fresh(rng, 3, 1), kept)
    assert cache.bytes_moved - before == 3 * cache.row_bytes
    before = cache.bytes_moved
    cache.append(int(cache.where[1]), kept, np.array([0, 200, 0, 0], np.int32), fresh(rng, 1, 200), kept)
    assert cache.bytes_moved - before == 200 * cache.row_bytes and cache.pitch == 64


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
