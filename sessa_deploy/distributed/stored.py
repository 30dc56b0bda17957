"""torch.distributed.checkpoint as states.py uses it: one kind of error, an index in which nothing is executed. Slow to import, hence by those who use it."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

_METADATA = ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING", "ChunkStorageMetadata", "MetadataIndex",
             "StorageMeta")
_KNOWN = frozenset({
    *(("torch.distributed.checkpoint.metadata", name) for name in _METADATA), ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"), ("torch", "Size"), ("pathlib", "PosixPath"), ("pathlib._local", "PosixPath"), ("collections", "OrderedDict"),
    ("builtins", "set"),
})


class StoredError(Exception):
    """Why tensors could not be written or read, in a line."""


def write(folder: Path, values: dict[str, Tensor], alone: bool) -> None:
    """Write tensors into a folder, all processes together; each piece by one that holds it. Raises StoredError in all of them where one fails."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save(values, checkpoint_id=str(folder), no_dist=alone)
    except (CheckpointException, OSError) as error:
        raise StoredError(_reason(error)) from None


def read(folder: Path, values: dict[str, Tensor], alone: bool) -> None:
    """Fill the given tensors from what `write` wrote, with any number of processes. Raises StoredError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(values, storage_reader=_Reader(str(folder)), no_dist=alone)
    except (Exception, CheckpointException) as error:  # a damaged or foreign file may raise anything, and nothing in it is executed
        raise StoredError(_reason(error)) from None


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return f"{type(error).__name__}: {text.splitlines()[0][:120]}"


class _Reader(dcp.FileSystemReader):
    """The library's reader, but for its index, a pickle."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index of the tensors' pieces."""
        with open(Path(self.path) / ".metadata", "rb") as file:
            found: Metadata = _Index(file).load()
        found.storage_meta = found.storage_meta or StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


class _Index(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN and not (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            raise pickle.UnpicklingError(f"{module}.{name} in the index")
        return super().find_class(module, name)
