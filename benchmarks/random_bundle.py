"""A bundle of a model with random weights, for timing: 125M, 350M, 1.1B, or any width and depth. Needs torch and the exporter; a GPU, where there is one,
draws the weights.

    python benchmarks/random_bundle.py --size 350M --out /tmp/m350 --precision fp16 [--max-context 32768]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from sessa_deploy.config import SessaConfig

if TYPE_CHECKING:
    from sessa_deploy.model import SessaLM

SIZES = {"125M": (768, 12, 12), "350M": (1024, 24, 16), "1.1B": (2048, 24, 16)}  # d_model, layers, heads
VOCABULARY = 50304


def config_of(size: str, layers: int | None = None, vocabulary: int = VOCABULARY, max_context: int = 32768) -> SessaConfig:
    """The config of one of SIZES; layers: another depth."""
    width, depth, heads = SIZES[size]
    return SessaConfig(d_model=width, n_layers=layers or depth, n_heads=heads, vocab_size=vocabulary, max_context=max_context)


def random_model(config: SessaConfig, seed: int = 0) -> SessaLM:
    """A model on the CPU with random weights."""
    import torch

    from sessa_deploy.model import SessaLM

    torch.manual_seed(seed)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = SessaLM(config)
    return model.cpu()


def write_bundle(model: SessaLM, out: Path, precision: str, weights: str | None = None) -> None:
    """The model as a bundle without a tokenizer, straight from memory. weights: the form of its matrices in 8 bits."""
    import torch

    from sessa_deploy.contract import DEFAULT_OPSET, MODEL_FILE, WEIGHT_FORMATS, Weights
    from sessa_deploy.export.to_onnx import export_onnx
    from sessa_deploy.runtime.bundle import BundleWriter

    opset = WEIGHT_FORMATS[weights].opset if weights else DEFAULT_OPSET
    with BundleWriter(out) as writer:
        export_onnx(model, writer.folder / MODEL_FILE, precision, opset, weights=weights)
        writer.commit(model.config, precision, {"torch": torch.__version__}, opset, Weights(weights) if weights else None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="350M")
    parser.add_argument("--layers", type=int, help="another depth at the size's width")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--max-context", type=int, default=32768)
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--weights", choices=("int8", "fp8"), help="matrices in 8 bits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--keep-checkpoint", type=Path, help="also leave the checkpoint here")
    args = parser.parse_args()

    import torch

    begun = time.perf_counter()
    model = random_model(config_of(args.size, args.layers, args.vocabulary, args.max_context), args.seed)
    if args.keep_checkpoint:
        from sessa_deploy.checkpoint_save import save_checkpoint

        save_checkpoint(model, args.keep_checkpoint)
    drawn = time.perf_counter()
    write_bundle(model, args.out, args.precision, args.weights)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    seconds = f"weights {drawn - begun:.1f} s, export {time.perf_counter() - drawn:.1f} s"
    print(f"{args.out}: {count:.0f}M parameters, {args.precision}, {seconds}, torch {torch.__version__}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
