"""A bundle of a model with random weights, for timing: 125M, 350M, or any width and depth. Needs torch and the exporter.

    python benchmarks/random_bundle.py --size 350M --out /tmp/m350 --precision fp16 [--max-context 32768]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

SIZES = {"125M": (768, 12, 12), "350M": (1024, 24, 16)}  # d_model, layers, heads
VOCABULARY = 50304


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="350M")
    parser.add_argument("--layers", type=int, help="another depth at the size's width")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--max-context", type=int, default=32768)
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--keep-checkpoint", type=Path, help="also leave the checkpoint here")
    args = parser.parse_args()

    import torch

    from sessa_deploy.checkpoint_save import save_checkpoint
    from sessa_deploy.config import SessaConfig
    from sessa_deploy.export.to_onnx import export_bundle
    from sessa_deploy.model import SessaLM

    width, layers, heads = SIZES[args.size]
    torch.manual_seed(args.seed)
    begun = time.perf_counter()
    config = SessaConfig(d_model=width, n_layers=args.layers or layers, n_heads=heads, vocab_size=args.vocabulary, max_context=args.max_context)
    model = SessaLM(config)
    with tempfile.TemporaryDirectory(dir=args.out.parent) as scratch:
        checkpoint = args.keep_checkpoint or Path(scratch) / "checkpoint"
        save_checkpoint(model, checkpoint)
        saved = time.perf_counter()
        export_bundle(checkpoint, args.out, args.precision)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    seconds = f"weights {saved - begun:.1f} s, export {time.perf_counter() - saved:.1f} s"
    print(f"{args.out}: {count:.0f}M parameters, {args.precision}, {seconds}, torch {torch.__version__}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
