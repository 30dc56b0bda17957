"""Sessa, deployable: checkpoint -> model -> ONNX -> engine -> session -> tokens.

Importing this package is cheap: torch is imported only when a name that needs it is first used.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if not os.path.isdir(os.path.join(__path__[0], "runtime")):  # imported out of a clone, where the other rooms lie beside this folder
    __path__.append(os.path.dirname(__path__[0]))

__version__ = "0.1.0"

_LAZY = {
    "SessaConfig": "sessa_deploy.config",
    "SessaError": "sessa_deploy.errors",
    "UserError": "sessa_deploy.errors",
    "ParityError": "sessa_deploy.errors",
    "SessaCache": "sessa_deploy.model",
    "SessaLayer": "sessa_deploy.model",
    "SessaLM": "sessa_deploy.model",
    "SessaMixer": "sessa_deploy.model",
    "load_checkpoint": "sessa_deploy.checkpoint",
    "save_checkpoint": "sessa_deploy.checkpoint",
    "feedback_attention": "sessa_deploy.kernels.ops",
    "causal_attention": "sessa_deploy.kernels.ops",
}
__all__ = [
    "ParityError",
    "SessaCache",
    "SessaConfig",
    "SessaError",
    "SessaLM",
    "SessaLayer",
    "SessaMixer",
    "UserError",
    "__version__",
    "causal_attention",
    "feedback_attention",
    "load_checkpoint",
    "save_checkpoint",
]

if TYPE_CHECKING:
    from sessa_deploy.checkpoint import load_checkpoint, save_checkpoint
    from sessa_deploy.config import SessaConfig
    from sessa_deploy.errors import ParityError, SessaError, UserError
    from sessa_deploy.kernels.ops import causal_attention, feedback_attention
    from sessa_deploy.model import SessaCache, SessaLayer, SessaLM, SessaMixer


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sessa_deploy.errors import packages_named

    with packages_named():
        return getattr(importlib.import_module(_LAZY[name]), name)
