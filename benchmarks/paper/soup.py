"""SymbolSoup: which pair of styles wrote the two blocks of letters hidden in noise. The published data set, and a stream of fresh examples.

    <bos> noise <sep1> block <sep2> noise <sep1> block <sep2> noise <sep> <label>

`official` makes the draws of the published generator in its order (LibratioAI/sessa, datasets/SymbolSoup.py, Apache-2.0), so that its files come out byte
for byte: `checksums` compares their SHA-256. `stream_batch` draws from the same distribution, a whole batch at a time.
"""

from __future__ import annotations

import hashlib
import math
import random
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from batches import Batch, Ints

LETTERS = "abcdefghijklmnop"
LEFT, RIGHT = 4, 5  # styles of each family; the label is their pair
CLASSES = LEFT * RIGHT
MOTIFS = tuple(LETTERS[i : i + k] for k in (3, 4, 5) for i in range(len(LETTERS) - k + 1))
MOTIF_CHANCE, FLIP_CHANCE, PREFERRED = 0.3, 0.03, 4.0
SPACE, NEWLINE, BOS, SEP1, SEP2, SEP, LABEL = range(16, 23)
FIRST_LABEL, VOCABULARY, PADDED = 23, 43, 48
MIN_TOKENS, MAX_TOKENS = 400, 600
SPLITS = {"train": 20000, "val": 2000, "test": 2000}
SHA256 = {
    "train": "0c4b6df8f984365cb284c8b516f4e43e05f63b4645b4618bedcbd555b490bda5",
    "val": "6e00675a5e79b4b5436bd3c069139480ff5ae77fe5fcc8b95e51ec971136f824",
    "test": "9ca2da7a4ccdb87502c21c0d078f823f5de505cc3b72905258bb3174b2d1a523",
    "labels": "49ce7f3870a128fb9c3cc72d5cfb209e4ba33a9d3b16f8c713fb6eabe5dd8763",
}


@dataclass(frozen=True)
class Style:
    """order: letters in the order in which they are drawn; weights: theirs; preferred: bigrams of four times the weight; motifs: weights of MOTIFS."""

    order: str
    weights: tuple[float, ...]
    preferred: frozenset[tuple[str, str]]
    motifs: tuple[float, ...]

    def after(self, letter: str | None) -> tuple[float, ...]:
        """Weights of the next letter, in `order`."""
        return tuple(w * PREFERRED if (letter, x) in self.preferred else w for x, w in zip(self.order, self.weights, strict=True))


def _styles(count: int, seed: int) -> list[Style]:
    rng, found = random.Random(seed), []
    for _ in range(count):
        letters = list(LETTERS)
        rng.shuffle(letters)
        first, second = letters[:4], letters[4:8]
        pairs = {(a, b) for i, a in enumerate(first) for b in (first[(i + 1) % 4], a)} | {(b, b) for b in second}
        pairs |= {pair for a, b in zip(first, second, strict=True) for pair in ((a, b), (b, a))}
        motifs = tuple(1.0 + 0.9 * len(set(m) & set(first)) + 0.5 * len(set(m) & set(second)) for m in MOTIFS)
        found.append(Style("".join(letters), (3.0,) * 4 + (2.0,) * 4 + (1.0,) * 8, frozenset(pairs), motifs))
    return found


STYLES = [*_styles(LEFT, 123), *_styles(RIGHT, 456)]  # left ones first


def _fitting(remaining: int) -> int:
    """How many of MOTIFS, which are in the order of their lengths, have at most `remaining` letters."""
    return sum(len(m) <= remaining for m in MOTIFS)


_CUMULATIVE = [{x: list(accumulate(s.after(x))) for x in (None, *LETTERS)} for s in STYLES]
_MOTIF_CUMULATIVE = [list(accumulate(s.motifs)) for s in STYLES]


def _lengths(rng: random.Random, low: int, high: int) -> tuple[int, int, tuple[int, int, int]]:
    """Letters of the left block, of the right block and of the three noise groups."""
    letters = rng.randint(max(5, math.ceil((low - 13) / 2)), max(5, (high - 13) // 2))
    least = max(3, int(0.3 * letters))
    noise = max(3, min(letters - 2, rng.randint(least, max(least, int(0.6 * letters)))))
    main = max(2, letters - noise)
    noise = letters - main
    left = rng.randint(1, main - 1)
    first = rng.randint(1, noise - 2)
    second = rng.randint(1, noise - first - 1)
    return left, main - left, (first, second, noise - first - second)


def _block(rng: random.Random, style: int, length: int) -> list[str]:
    found: list[str] = []
    order = STYLES[style].order
    while len(found) < length:
        remaining = length - len(found)
        if remaining >= 3 and rng.random() < MOTIF_CHANCE:
            known = _MOTIF_CUMULATIVE[style]
            count = _fitting(min(remaining, 5))
            found += MOTIFS[bisect_left(known, rng.random() * known[count - 1], 0, count)]
        else:
            known = _CUMULATIVE[style][found[-1] if found else None]
            found.append(order[bisect_left(known, rng.random() * known[-1])])
    return [rng.choice([x for x in LETTERS if x != letter]) if rng.random() < FLIP_CHANCE else letter for letter in found]


def official_rows(seed: int = 0, low: int = MIN_TOKENS, high: int = MAX_TOKENS) -> Iterator[tuple[str, str, int]]:
    """(split, text, class) one after another, as the published generator draws them with its defaults; class = 5 left + right."""
    rng = random.Random(seed)
    for split, count in SPLITS.items():
        classes = [c for c in range(CLASSES) for _ in range(count // CLASSES)]
        rng.shuffle(classes)
        for c in classes:
            yield split, _example(rng, c, low, high), c


def official(seed: int = 0) -> dict[str, list[tuple[str, int]]]:
    """split -> [(text, class)] of the whole data set; about ten seconds."""
    found: dict[str, list[tuple[str, int]]] = {split: [] for split in SPLITS}
    for split, text, c in official_rows(seed):
        found[split].append((text, c))
    return found


def _example(rng: random.Random, label: int, low: int, high: int) -> str:
    left, right, noise = _lengths(rng, low, high)
    blocks = [_block(rng, label // RIGHT, left), _block(rng, LEFT + label % RIGHT, right)]
    first, second = blocks if rng.random() < 0.5 else blocks[::-1]
    before, between, after = ([rng.choice(LETTERS) for _ in range(count)] for count in noise)
    parts = [before, "<sep1>", first, "<sep2>", between, "<sep1>", second, "<sep2>", after]
    return "\n".join(["<bos>", *(part if isinstance(part, str) else " ".join(part) for part in parts), "<sep> <label>"])


def checksums(found: dict[str, list[tuple[str, int]]]) -> dict[str, str]:
    """SHA-256 of the published files' bytes, by split, and of the file of labels."""
    sums = {split: hashlib.sha256(_table(["Text", "Answer"], ((text, f"CLASS_{c}") for text, c in rows))).hexdigest() for split, rows in found.items()}
    return sums | {"labels": hashlib.sha256(_table(["Label", "ClassId"], ((f"CLASS_{c}", str(c)) for c in range(CLASSES)))).hexdigest()}


def _table(head: Sequence[str], rows: Iterator[tuple[str, str]]) -> bytes:
    """Rows as csv writes them with tabs between: a text of several lines in quotes, lines ended by CRLF."""
    return "".join("\t".join(f'"{x}"' if "\n" in x else x for x in row) + "\r\n" for row in (head, *rows)).encode()


_MARKS = {"<bos>": BOS, "<sep1>": SEP1, "<sep2>": SEP2, "<sep>": SEP, "<label>": LABEL}


def encode(text: str) -> list[int]:
    """A text as tokens, white space included."""
    found: list[int] = []
    at = 0
    while at < len(text):
        if text[at] == "<":
            end = text.index(">", at) + 1
            found.append(_MARKS[text[at:end]])
            at = end
        else:
            found.append(SPACE if text[at] == " " else NEWLINE if text[at] == "\n" else ord(text[at]) - ord("a"))
            at += 1
    return found


def blocks_of(text: str) -> tuple[str, str]:
    """The letters of the two blocks, in the order of the text."""
    first, second = (part.split("<sep2>")[0] for part in text.split("<sep1>")[1:])
    return "".join(first.split()), "".join(second.split())


def as_batch(rows: Sequence[tuple[Sequence[int], int]]) -> Batch:
    """(tokens, class) rows, padded on the right; the label is asked for at <label>."""
    tokens = np.full((len(rows), max(len(ids) for ids, _ in rows)), NEWLINE, dtype=np.int64)
    for i, (ids, _) in enumerate(rows):
        tokens[i, : len(ids)] = ids
    at = np.array([[len(ids) - 1] for ids, _ in rows])
    return Batch(tokens, at, np.array([[FIRST_LABEL + c] for _, c in rows]))


def _probabilities() -> tuple[np.ndarray, np.ndarray]:
    """(9,17,16): chance of the next letter by style and last letter, row 16: none before; (9,3,39): of a motif where 3, 4, 5 or more letters remain."""
    step = np.zeros((len(STYLES), 17, 16))
    motif = np.zeros((len(STYLES), 3, len(MOTIFS)))
    for s, style in enumerate(STYLES):
        places = [LETTERS.index(x) for x in style.order]
        for row, letter in enumerate((*LETTERS, None)):
            step[s, row, places] = style.after(letter)
        for room in range(3):
            motif[s, room, : _fitting(3 + room)] = style.motifs[: _fitting(3 + room)]
    return step / step.sum(-1, keepdims=True), motif / motif.sum(-1, keepdims=True)


STEP, MOTIF = _probabilities()
_SPELT = np.full((len(MOTIFS), 5), -1)
for _i, _motif in enumerate(MOTIFS):
    _SPELT[_i, : len(_motif)] = [LETTERS.index(x) for x in _motif]
SIZES = np.array([len(m) for m in MOTIFS])


def draw_blocks(rng: np.random.Generator, styles: Ints, lengths: Ints) -> Ints:
    """(R, max length) letters of blocks by style and length, all at once; behind a block's length anything."""
    rows, longest = len(styles), int(lengths.max())
    step, motif = STEP.cumsum(-1), MOTIF.cumsum(-1)
    out = np.zeros((rows, longest), dtype=np.int64)
    last, inside, offset = np.full(rows, 16), np.full(rows, -1), np.zeros(rows, dtype=np.int64)
    for p in range(longest):
        remaining = np.maximum(lengths - p, 0)
        chance, pick = rng.random((2, rows))
        begins = (inside < 0) & (remaining >= 3) & (chance < MOTIF_CHANCE)
        room = np.clip(remaining - 3, 0, 2)
        inside = np.where(begins, (pick[:, None] > motif[styles, room]).sum(-1).clip(max=len(MOTIFS) - 1), inside)
        offset = np.where(begins, 0, offset)
        letter = np.where(inside >= 0, _SPELT[inside, np.minimum(offset, 4)], (pick[:, None] > step[styles, last]).sum(-1).clip(max=15))
        out[:, p] = last = letter
        offset += 1
        inside = np.where((inside >= 0) & (offset >= SIZES[inside]), -1, inside)
    flipped = (out + rng.integers(1, 16, out.shape)) % 16
    return np.where(rng.random(out.shape) < FLIP_CHANCE, flipped, out)


def stream_batch(seed: int, step: int, batch: int, low: int = MIN_TOKENS, high: int = MAX_TOKENS) -> Batch:
    """Batch number `step` of a run: fresh examples, a function of (seed, step)."""
    rng = np.random.default_rng([seed, step, 1])
    sizes = random.Random(int(rng.integers(2**63)))
    lengths = [_lengths(sizes, low, high) for _ in range(batch)]
    classes = rng.integers(0, CLASSES, batch)
    styles = np.concatenate([classes // RIGHT, LEFT + classes % RIGHT])
    letters = draw_blocks(rng, styles, np.array([left for left, _, _ in lengths] + [right for _, right, _ in lengths]))
    swap, rows = rng.random(batch) < 0.5, []
    noise = rng.integers(0, 16, (batch, max(sum(groups) for _, _, groups in lengths)))
    for i, (left, right, groups) in enumerate(lengths):
        blocks = [letters[i, :left], letters[batch + i, :right]]
        first, second = blocks[::-1] if swap[i] else blocks
        before, between, after = np.split(noise[i, : sum(groups)], [groups[0], groups[0] + groups[1]])
        parts: list[Sequence[int] | Ints] = [[BOS], before, [SEP1], first, [SEP2], between, [SEP1], second, [SEP2], after]
        ids = [x for part in parts for x in (*_spaced(part), NEWLINE)]
        rows.append(([*ids, SEP, SPACE, LABEL], int(classes[i])))
    return as_batch(rows)


def _spaced(letters: Sequence[int] | Ints) -> list[int]:
    found = np.full(2 * len(letters) - 1, SPACE)
    found[::2] = letters
    return found.tolist()
