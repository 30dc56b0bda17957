"""The CUDA driver through ctypes: which GPUs there are, and copies on one of them. No toolkit and no other library is needed."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

from sessa_deploy.errors import SessaError

_LIBRARIES = ("libcuda.so.1", "libcuda.so")
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_ON_DEVICE = 2  # CU_MEMORYTYPE_DEVICE


@dataclass(frozen=True)
class Device:
    """One GPU: its index, name, architecture ("sm_90") and memory in bytes."""

    index: int
    name: str
    arch: str
    memory: int


class _Copy2D(ctypes.Structure):
    """CUDA_MEMCPY2D of the driver API."""

    _fields_ = [
        *((f"{side}{name}", kind) for side in ("src", "dst") for name, kind in (
            ("XInBytes", ctypes.c_size_t), ("Y", ctypes.c_size_t), ("MemoryType", ctypes.c_uint), ("Host", ctypes.c_void_p),
            ("Device", ctypes.c_uint64), ("Array", ctypes.c_void_p), ("Pitch", ctypes.c_size_t))),
        ("WidthInBytes", ctypes.c_size_t), ("Height", ctypes.c_size_t),
    ]


def open_driver() -> Any | None:
    """libcuda, initialised, or None where there is no driver or no GPU it can use."""
    for name in _LIBRARIES:
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        return library if library.cuInit(0) == 0 else None
    return None


def driver_version() -> str | None:
    """The CUDA version the driver supports ("12.8"), or None."""
    library, version = open_driver(), ctypes.c_int()
    if library is None or library.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def devices() -> list[Device]:
    """The GPUs the driver shows, none where there is no driver."""
    library, count = open_driver(), ctypes.c_int()
    if library is None or library.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    found = []
    for index in range(count.value):
        handle, name, memory = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_size_t()
        major, minor = ctypes.c_int(), ctypes.c_int()
        codes = (library.cuDeviceGet(ctypes.byref(handle), index), library.cuDeviceGetName(name, len(name), handle),
                 library.cuDeviceTotalMem_v2(ctypes.byref(memory), handle), library.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, handle),
                 library.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, handle))
        if not any(codes):
            found.append(Device(index, name.value.decode(errors="replace"), f"sm_{major.value}{minor.value}", memory.value))
    return found


class HostMemory:
    """Copies between addresses of this process; what `DeviceMemory` does on a GPU. Addresses and sizes are in bytes."""

    def copy(self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, height: int) -> None:
        """Copy `height` pieces of `width` bytes that lie a pitch apart on either side."""
        for row in range(height):
            ctypes.memmove(target + row * target_pitch, source + row * source_pitch, width)

    def read(self, source: int, size: int) -> bytes:
        """`size` bytes from `source` to the host."""
        return ctypes.string_at(source, size)

    def write(self, target: int, data: bytes) -> None:
        """`data` from the host to `target`."""
        ctypes.memmove(target, data, len(data))

    def used(self) -> int:
        """Bytes of the device's memory in use; 0 where there is no device."""
        return 0

    def finish(self) -> None:
        """Wait for the copies."""
        return


class DeviceMemory(HostMemory):
    """Copies on GPU `index`, in its primary context, the one the CUDA runtime uses too. Raises SessaError when the driver reports an error."""

    def __init__(self, index: int = 0) -> None:
        library = open_driver()
        if library is None:
            raise SessaError("there is no CUDA driver; fix: use --backend ort")
        self._cuda, self._context = library, ctypes.c_void_p()
        handle = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(handle), index)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), handle)

    def copy(self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, height: int) -> None:
        self._enter()
        if height == 1:
            self._call("cuMemcpyDtoDAsync_v2", ctypes.c_uint64(target), ctypes.c_uint64(source), ctypes.c_size_t(width), None)
            return
        plan = _Copy2D(srcMemoryType=_ON_DEVICE, srcDevice=source, srcPitch=source_pitch, dstMemoryType=_ON_DEVICE, dstDevice=target,
                       dstPitch=target_pitch, WidthInBytes=width, Height=height)
        self._call("cuMemcpy2DAsync_v2", ctypes.byref(plan), None)

    def read(self, source: int, size: int) -> bytes:
        self._enter()
        data = ctypes.create_string_buffer(size)
        self._call("cuMemcpyDtoH_v2", data, ctypes.c_uint64(source), ctypes.c_size_t(size))
        return data.raw

    def write(self, target: int, data: bytes) -> None:
        self._enter()
        self._call("cuMemcpyHtoD_v2", ctypes.c_uint64(target), data, ctypes.c_size_t(len(data)))

    def used(self) -> int:
        """Bytes of the GPU's memory in use, by every process."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._enter()
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return total.value - free.value

    def finish(self) -> None:
        self._enter()
        self._call("cuCtxSynchronize")

    def _enter(self) -> None:
        self._call("cuCtxSetCurrent", self._context)

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._cuda, name)(*arguments)
        if code != 0:
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorString(code, ctypes.byref(text))
            raise SessaError(f"the CUDA driver refused {name}: {(text.value or b'unknown error').decode()} ({code})")
