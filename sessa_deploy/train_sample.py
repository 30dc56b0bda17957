"""The held-out text that a run leaves in its checkpoint on request, for `validate` to judge 8-bit weights on, and what the card says of it."""

from __future__ import annotations

import numpy as np

from sessa_deploy.contract import SAMPLE_FILE
from sessa_deploy.data import Corpus
from sessa_deploy.runtime.tokenizer import Tokenizer

SAMPLE_BYTES = 1 << 16


def held_out_sample(corpus: Corpus, tokenizer: Tokenizer) -> str:
    """The first 64 KiB of the held-out text, in whole characters, without the separators between documents."""
    ids = corpus.held_out[: 4 * SAMPLE_BYTES]  # of bytes it takes as many tokens, and separators stand for none
    text, at = "", 0
    for end in [*np.flatnonzero(ids == corpus.separator).tolist(), len(ids)]:
        text += tokenizer.decode(ids[at:end].tolist(), skip_special=False)
        at = end + 1
        if len(text) > SAMPLE_BYTES:
            break
    return text.encode("utf-8", "replace")[:SAMPLE_BYTES].decode("utf-8", "ignore")


def sample_card(corpus: Corpus, data: str, licence: str | None) -> str:
    """The section of MODEL_CARD.md about the sample: where it is from, and under which licence."""
    names = ", ".join(f"`{name}`" for name in corpus.held_out_files[:8]) + (" ..." if len(corpus.held_out_files) > 8 else "")
    terms = licence or "not stated (train --data-licence): say here which it is before you publish the checkpoint"
    return (f"## {SAMPLE_FILE}\n\nThe beginning of the held-out text, at most 64 KiB, on which `sessa-deploy validate` judges weights in 8 bits; the "
            f"model was not trained on it. Source: `{data}`, of its files {names}. Licence: {terms}.\n")
