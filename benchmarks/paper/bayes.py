"""The ceiling of SymbolSoup: the Bayes-optimal reader, by the exact likelihood of both blocks with motifs and flips summed out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import soup
from numpy.typing import NDArray

Array = NDArray[np.float64]
# Accuracy on the published test split of 2000 (standard error 0.0085), computed by `accuracy` once; and what simpler readers reach there.
CEILING = 0.824
YARDSTICKS = {"chance": 0.05, "linear, letters of the sequence": 0.323, "linear, letters of the blocks": 0.491, "linear, bigrams of the sequence": 0.430,
              "linear, bigrams of each block": 0.552, "linear, bigrams of the blocks": 0.587, "Bayes-optimal": CEILING}
_SCALE = 12.0  # a letter's chance times this is near 1: likelihoods of 300 letters stay inside float64


def log_likelihoods(block: str) -> Array:
    """(9,) log chance, up to one constant a letter, of a block's letters under each style: left styles first.

    a[p, c]: chance of the first p letters with c the last unflipped one (16: none yet). A letter: a[p+1, c'] += (1 - pi) sum_c a[p, c] P(c'|c) E(o_p|c'); a
    motif of k letters that still fits: a[p+k, last] += pi sum_c a[p, c] w prod_q E(o_{p+q}|m_q). pi = 0.3 where 3 letters or more remain, else 0.
    """
    seen = np.array([soup.LETTERS.index(x) for x in block])
    count, styles = len(seen), len(soup.STYLES)
    emit = np.full((16, 16), soup.FLIP_CHANCE / 15)
    np.fill_diagonal(emit, 1 - soup.FLIP_CHANCE)
    emit = _SCALE * emit[:, seen]  # (16,L): of what is seen at p, by the letter meant
    motifs = [np.array([soup.LETTERS.index(x) for x in m]) for m in soup.MOTIFS]
    whole = np.zeros((count, len(motifs)))  # chance of what is seen from p on, had a motif begun there
    for i, motif in enumerate(motifs):
        k = len(motif)
        if count >= k:
            whole[: count - k + 1, i] = np.prod([emit[x, q : count - k + 1 + q] for q, x in enumerate(motif)], axis=0)
    last = np.array([m[-1] for m in motifs])
    a = np.zeros((count + 1, styles, 17))
    a[0, :, 16] = 1.0
    for p in range(count):
        remaining = count - p
        begin = soup.MOTIF_CHANCE if remaining >= 3 else 0.0
        a[p + 1, :, :16] += (1 - begin) * np.einsum("sc,scd->sd", a[p], soup.STEP) * emit[:, p]
        if begin:
            mass = begin * a[p].sum(-1)[:, None] * soup.MOTIF[:, min(remaining - 3, 2)] * whole[p]  # (S,M)
            for k in (3, 4, 5):
                these = np.flatnonzero(np.equal(soup.SIZES, k))
                if k <= remaining:
                    a[p + k, :, last[these]] += mass[:, these].T  # each motif of a length ends in a letter of its own
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(a[count].sum(-1)))


def posterior(first: str, second: str) -> Array:
    """(20,) chance of every class, given the two blocks in the order of the text."""
    one, two = log_likelihoods(first), log_likelihoods(second)
    left, right = one[: soup.LEFT], one[soup.LEFT :]
    straight = left[:, None] + two[None, soup.LEFT :]
    crossed = two[: soup.LEFT, None] + right[None, :]
    score = np.logaddexp(straight, crossed).ravel()
    chance = np.exp(score - score.max())
    return np.asarray(chance / chance.sum())


def accuracy(rows: Sequence[tuple[str, int]]) -> tuple[float, float]:
    """(accuracy, mean posterior of its choice) of the Bayes-optimal reader on (text, class) rows; where they agree it is calibrated."""
    chances = [posterior(*soup.blocks_of(text)) for text, _ in rows]
    right = [int(p.argmax()) == label for p, (_, label) in zip(chances, rows, strict=True)]
    return float(np.mean(right)), float(np.mean([p.max() for p in chances]))
