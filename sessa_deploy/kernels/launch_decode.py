"""The runtime's own kernels around a decode step as data; see launch_kernels.py. Standard library only."""

from __future__ import annotations

from sessa_deploy.kernels.launch_kernels import Kernel, Param, integers, pointers

_MODULE = "sessa_deploy.kernels.decode_io"
_LENGTHS = (Param("past_length", "*i32"), Param("new_length", "*i32"))
_ANY = ("any",)

# They see words and float32 logits only, whatever the storage type: one binary an architecture.
DECODE_KERNELS: dict[str, Kernel] = {
    k.name: k
    for k in (
        Kernel("decode_append", _MODULE, (Param("table", "*i64"), *_LENGTHS, *integers("tokens", "capacity")),
               ("BLOCK",), _ANY, dtypes=("fp32",), scalar_loads=6),
        Kernel("decode_argmax", _MODULE, (Param("logits", "*fp32"), *pointers("best", type="*fp32"), *pointers("where", type="*i32"), *integers("vocabulary")),
               ("SPLITS", "BLOCK"), _ANY, dtypes=("fp32",), scalar_loads=64, wide=False),
        Kernel("decode_finish", _MODULE, (*pointers("best", type="*fp32"), *pointers("where", type="*i32"), *_LENGTHS, Param("ids", "*i32")),
               ("SPLITS",), _ANY, dtypes=("fp32",), scalar_loads=4),
    )
}  # fmt: skip
