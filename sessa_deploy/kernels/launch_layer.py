"""The kernels of a layer around its attentions as data; see launch_kernels.py. Standard library only."""

from __future__ import annotations

from sessa_deploy.kernels.launch_kernels import Kernel, Param, integers, pointers

_MODULE = "sessa_deploy.kernels.layer"
WIDTHS = (1024, 2048, 4096)  # a row is padded to the next of these
ROWS = (1, 16, 64)  # rows (B T) up to which a product takes small tiles; beyond the last: "any"
_TILES = ("BM", "BN", "BK", "KS", "AHEAD", "PDL")
_WIDTHS = tuple(map(str, WIDTHS))
_HALF = ("fp16", "bf16")  # a float32 engine keeps TensorRT's own layers
_PRODUCTS = (*(str(r) for r in ROWS), "any")
_FEW = _PRODUCTS[:-1]  # short enough to gain from an early start
_EARLY_ROWS = ROWS[-1]
_SIZES = (Param("rows", "i32"), Param("depth", "i32", True))

LAYER_KERNELS: dict[str, Kernel] = {
    k.name: k
    for k in (
        Kernel("layer_rotary", _MODULE, (Param("past_length", "*i32"), *pointers("limbs", "cos", "sin", type="*fp32"), *integers("tokens", "pairs")),
               ("BD", "PDL"), ("any",), dtypes=("fp32",), scalar_loads=16, wide=False, early=("any",), early_rows=_EARLY_ROWS),
        Kernel("layer_norm", _MODULE, (*pointers("x", "weight", "bias", "out"), Param("width", "i32", True), Param("eps", "fp32")),
               ("BD", "PDL"), _WIDTHS, dtypes=_HALF, early=_WIDTHS, early_rows=_EARLY_ROWS),
        Kernel("layer_norm_enter", _MODULE,
               (*pointers("x", "norm_weight", "norm_bias", "weight", "bias", "out"), Param("depth", "i32", True), Param("eps", "fp32")),
               ("BN", "BK", "PDL"), _WIDTHS, dtypes=_HALF, scalar_loads=16, early=_WIDTHS),
        Kernel("layer_linear", _MODULE, (*pointers("x", "weight", "bias", "out"), *_SIZES, *integers("columns")), _TILES, _PRODUCTS, dtypes=_HALF,
               scalar_loads=8, early=_FEW, early_rows=1),
        Kernel("layer_logits", _MODULE, (*pointers("x", "weight"), *pointers("out", type="*fp32"), *_SIZES, *integers("columns")), _TILES, _PRODUCTS,
               dtypes=_HALF, scalar_loads=8, early=_FEW, early_rows=_EARLY_ROWS),
        Kernel("layer_tail", _MODULE, (*pointers("s", "h", "weight", "bias", "x", "out"), *_SIZES), _TILES, _PRODUCTS, dtypes=_HALF,
               scalar_loads=32, early=_FEW),
        Kernel("layer_out", _MODULE, (*pointers("x", "weight", "bias"), *pointers("add", type="*fp32"), *pointers("out"), *_SIZES), _TILES, _PRODUCTS,
               dtypes=_HALF, scalar_loads=32, early=_FEW, early_rows=1),
        Kernel("layer_enter", _MODULE, (*pointers("x", "weight", "bias", "out"), *_SIZES), _TILES, _PRODUCTS[1:], dtypes=_HALF,
               scalar_loads=16, early=_FEW[1:], early_rows=_EARLY_ROWS),
        Kernel("layer_project_gain", _MODULE,
               (*pointers("h", "weight", "bias_q", "bias_k", "bias_v", "bias_fb"), *pointers("cos", "sin", "gain", type="*fp32"), Param("gain_bias", "*fp32"),
                *pointers("q", "k", "v", "q_b", "k_b"), Param("gamma", "*fp32"), *_SIZES, Param("kv_width", "i32"), *integers("units"),
                Param("gamma_max", "fp32")),
               _TILES, _PRODUCTS, dtypes=_HALF, scalar_loads=80, early=_FEW, early_rows=_EARLY_ROWS),
    )
}  # fmt: skip


def product_variant(rows: int) -> str:
    """The variant of a matrix product for `rows` rows."""
    return next((str(r) for r in ROWS if rows <= r), "any")
