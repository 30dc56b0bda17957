"""A folder like the one that lowering writes, without a compiler: real tiles, and binaries that nobody may launch.

For a builder, which launches nothing, and for a driver of a test's that writes launches down.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from sessa_deploy.kernels.launch import table
from sessa_deploy.plugins import lower

DATA = b"\x7fELF: no binary"


def write(archs: Sequence[int], folder: Path, weights: Sequence[str] | None = None) -> Path:
    """cubins.json, cubins.inc and the files for these architectures (see `lower.units`), behind what the folder holds; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / lower.MANIFEST
    cubins = [lower.Cubin(**c) for c in json.loads(manifest.read_text())["cubins"]] if manifest.is_file() else []
    for unit in lower.units(archs, weights=weights):
        description = table.kernel(unit.kernel)
        path = folder / f"{unit.stem}.cubin"
        path.write_bytes(DATA)
        named = (unit.kernel, unit.arch, unit.dtype, unit.variant)
        cubins.append(lower.Cubin(
            **asdict(unit), file=path.name, sha256=hashlib.sha256(DATA).hexdigest(), size=len(DATA), entry=unit.kernel,
            params=[{}] * (len(description.params) + len(lower.HIDDEN)), tiles=table.tiles(*named),
            num_warps=table.options(*named)["num_warps"], num_stages=1, registers=0, spill_bytes=0, global_scratch=description.scratch,
            shared=49168 if unit.variant == "64" else 0,  # some need more than a kernel has that does not ask for it
            vector_loads=1, scalar_loads=0, tuned=True, early_rows=table.early(*named), shared_share=table.shared_share(*named),
        ))  # fmt: skip
    (folder / lower.TABLE).write_text("".join(lower._rows(cubins)))
    manifest.write_text(json.dumps({"schema": lower.SCHEMA, "cubins": [asdict(c) for c in cubins]}))
    return folder
