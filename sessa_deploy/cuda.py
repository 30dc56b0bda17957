"""The one binding of the CUDA driver: which GPUs there are; memory, copies, kernels from cubins and captured graphs on one of them. ctypes only.

No toolkit and no other library is needed. Addresses and sizes are in bytes.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sessa_deploy.errors import SessaError, UserError

_LIBRARIES = ("libcuda.so.1", "libcuda.so")
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_PREFERRED_SHARED = 9  # CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
_ON_DEVICE = 2  # CU_MEMORYTYPE_DEVICE
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
_NO_TIMING = 2  # CU_EVENT_DISABLE_TIMING
_CAPTURE_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
_ATTRIBUTE_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_STATIC_SHARED = 48 << 10
_OUT_OF_MEMORY = 2
_DEPENDENT = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_DEPENDENT_SINCE = 12030  # first driver that keeps the attribute in a captured stream

Pointer, Handle = ctypes.c_uint64, ctypes.c_void_p
Argument = tuple[str, int]  # ("ptr", address) or ("i32", value)


@dataclass(frozen=True)
class Device:
    """One GPU: its index, name, architecture ("sm_90") and memory in bytes."""

    index: int
    name: str
    arch: str
    memory: int


@dataclass(frozen=True)
class Kernel:
    """A loaded kernel: its function handle, warps, dynamic shared memory in bytes, and how many parameters it takes, hidden pointers included."""

    handle: int
    warps: int
    shared: int
    params: int
    early: bool = False  # whether it waits for the kernel before it by itself


class _LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute of the driver API."""

    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("allowed", ctypes.c_int), ("rest", ctypes.c_char * 60)]


class _LaunchConfig(ctypes.Structure):
    """CUlaunchConfig of the driver API."""

    _fields_ = [("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint), ("stream", ctypes.c_void_p),
                ("attributes", ctypes.POINTER(_LaunchAttribute)), ("count", ctypes.c_uint)]  # fmt: skip


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
            found.append(Device(index, name.value.decode(errors="replace"), f"sm_{10 * major.value + minor.value}", memory.value))
    return found


def used_memory(index: int = 0) -> int | None:
    """Bytes of GPU `index`'s memory in use, by every process and by this one's context, which stays; None where there is no GPU.

    Raises SessaError when the driver reports an error.
    """
    if not devices():
        return None
    gpu = Cuda(index)
    try:
        free, total = gpu.memory()
    finally:
        gpu.close()
    return total - free


def resident_blocks(function: int, threads: int, shared: int) -> int:
    """Blocks of a loaded kernel that one multiprocessor of the current device holds at once; 0 if the driver does not say.

    function: its handle. threads: of a block. shared: dynamic shared memory of a block in bytes.
    """
    occupancy = getattr(open_driver(), "cuOccupancyMaxActiveBlocksPerMultiprocessor", None)
    blocks = ctypes.c_int()
    if occupancy is None or occupancy(ctypes.byref(blocks), Handle(function), threads, ctypes.c_size_t(shared)) != 0:
        return 0
    return blocks.value


def new_stream(priority: int = 0) -> int:
    """A stream in the current context that nobody else has, for the life of the process. Raises RuntimeError where the driver gives none.

    priority: negative goes first; the driver brings it within what the GPU has.
    """
    stream = ctypes.c_void_p()
    create = getattr(open_driver(), "cuStreamCreateWithPriority", None)
    if create is None or create(ctypes.byref(stream), _NON_BLOCKING, priority) or not stream.value:
        raise RuntimeError("sessa: the driver gives no stream")
    return stream.value


def prefer_shared(function: int, percent: int) -> None:
    """Ask the driver to set apart `percent` of a multiprocessor's shared memory while a loaded kernel runs. A wish: a driver without it goes without.

    function: its handle.
    """
    attribute = getattr(open_driver(), "cuFuncSetAttribute", None)
    if attribute is not None:
        attribute(Handle(function), _PREFERRED_SHARED, percent)


class Cuda:
    """GPU `index` in its primary context (the one that the CUDA runtime, and so TensorRT and ONNX Runtime, use too) with one stream of its own.

    A thread calls `enter` before other methods. `arch` is 90 for sm_90. Raises UserError where there is no driver; every method raises SessaError
    with the driver's words when it reports an error, and memory that runs out names what to lower.
    """

    def __init__(self, index: int = 0) -> None:
        library = open_driver()
        if library is None:
            raise UserError("there is no CUDA driver, or no GPU that it can use", fix="use --backend ort; sessa-deploy doctor says what is missing")
        self._cuda, self._context, self._stream = library, Handle(), Handle()
        self._memory: dict[int, bool] = {}  # address -> whether it is on the host
        self._events: list[int] = []
        self._closed = False
        device = ctypes.c_int()
        self.call("cuDeviceGet", ctypes.byref(device), index)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)
        self.enter()
        self.call("cuStreamCreate", ctypes.byref(self._stream), _NON_BLOCKING)
        major, minor = ctypes.c_int(), ctypes.c_int()
        self.call("cuDeviceGetAttribute", ctypes.byref(major), _MAJOR, device)
        self.call("cuDeviceGetAttribute", ctypes.byref(minor), _MINOR, device)
        self.arch = 10 * major.value + minor.value
        version = ctypes.c_int()
        self.call("cuDriverGetVersion", ctypes.byref(version))
        # as plugins/src/driver.cpp asks
        self._dependent = os.environ.get("SESSA_PDL") != "0" and version.value >= _DEPENDENT_SINCE and hasattr(library, "cuLaunchKernelEx")

    @property
    def stream(self) -> int:
        """The stream's handle, as TensorRT takes it."""
        return int(self._stream.value or 0)

    def enter(self) -> None:
        """Make the context current in this thread."""
        self.call("cuCtxSetCurrent", self._context)

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes of the GPU."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def allocate(self, size: int) -> int:
        """Address of `size` fresh bytes on the GPU, 256-byte aligned, contents undefined."""
        address = Pointer()
        self.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(size, 1)))
        self._memory[address.value] = False
        return address.value

    def allocate_host(self, size: int) -> int:
        """Address of `size` page-locked bytes on the host, which kernels may use as it is (unified addressing)."""
        address = Handle()
        self.call("cuMemAllocHost_v2", ctypes.byref(address), ctypes.c_size_t(max(size, 1)))
        self._memory[int(address.value or 0)] = True
        return int(address.value or 0)

    def to_device(self, target: int, source: int, size: int) -> None:
        """Enqueue a copy from the host."""
        self.call("cuMemcpyHtoDAsync_v2", Pointer(target), Handle(source), ctypes.c_size_t(size), self._stream)

    def to_host(self, target: int, source: int, size: int) -> None:
        """Enqueue a copy to the host."""
        self.call("cuMemcpyDtoHAsync_v2", Handle(target), Pointer(source), ctypes.c_size_t(size), self._stream)

    def copy(self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, height: int) -> None:
        """Enqueue a copy on the GPU: `height` pieces of `width` bytes that lie a pitch apart on either side."""
        if height == 1:
            self.call("cuMemcpyDtoDAsync_v2", Pointer(target), Pointer(source), ctypes.c_size_t(width), self._stream)
            return
        plan = _Copy2D(srcMemoryType=_ON_DEVICE, srcDevice=source, srcPitch=source_pitch, dstMemoryType=_ON_DEVICE, dstDevice=target,
                       dstPitch=target_pitch, WidthInBytes=width, Height=height)
        self.call("cuMemcpy2DAsync_v2", ctypes.byref(plan), self._stream)

    def fill(self, target: int, word: int, count: int) -> None:
        """Enqueue `count` 32-bit words at `target`."""
        if count:
            self.call("cuMemsetD32Async", Pointer(target), ctypes.c_uint(word), ctypes.c_size_t(count), self._stream)

    def read(self, source: int, size: int) -> bytes:
        """`size` bytes from the GPU, after everything enqueued before."""
        self.wait()
        data = ctypes.create_string_buffer(max(size, 1))
        self.call("cuMemcpyDtoH_v2", data, Pointer(source), ctypes.c_size_t(size))
        return data.raw[:size]

    def write(self, target: int, data: bytes) -> None:
        """`data` to the GPU, after everything enqueued before; there when this returns."""
        self.call("cuMemcpyHtoDAsync_v2", Pointer(target), data, ctypes.c_size_t(len(data)), self._stream)
        self.wait()

    def wait(self) -> None:
        """Wait for everything enqueued."""
        self.call("cuStreamSynchronize", self._stream)

    def event(self) -> int:
        """A mark that `record` sets and `wait_event` waits for; it keeps no time."""
        event = Handle()
        self.call("cuEventCreate", ctypes.byref(event), _NO_TIMING)
        self._events.append(int(event.value or 0))
        return self._events[-1]

    def record(self, event: int) -> None:
        """Enqueue an event: it is over once everything enqueued before it is."""
        self.call("cuEventRecord", Handle(event), self._stream)

    def wait_event(self, event: int) -> None:
        """Wait for what was enqueued before an event was recorded last, and for nothing behind it."""
        self.call("cuEventSynchronize", Handle(event))

    def kernel(self, image: bytes, entry: str, warps: int, shared: int, params: int, early: bool = False) -> Kernel:
        """Load a kernel from a cubin that takes `params` parameters, hidden ones included. early: it waits for the kernel before it by itself."""
        module, function = Handle(), Handle()
        self.call("cuModuleLoadData", ctypes.byref(module), image)
        self.call("cuModuleGetFunction", ctypes.byref(function), module, entry.encode())
        if shared > _STATIC_SHARED:
            self.call("cuFuncSetAttribute", function, _ATTRIBUTE_SHARED, shared)
        return Kernel(int(function.value or 0), warps, shared, params, early and self._dependent)

    def launch(self, kernel: Kernel, grid: tuple[int, int, int], arguments: Sequence[Argument]) -> None:
        """Enqueue a kernel with these arguments; what it takes beyond them are null pointers (Triton's unused scratch).

        One that waits by itself may be in place when the kernel before it ends.
        """
        slots: list[Any] = [Pointer(v) if kind == "ptr" else ctypes.c_int32(v) for kind, v in arguments]
        slots += [Pointer(0) for _ in range(kernel.params - len(slots))]
        values = (ctypes.c_void_p * len(slots))(*(ctypes.addressof(slot) for slot in slots))
        if kernel.early:
            attribute = _LaunchAttribute(id=_DEPENDENT, allowed=1)
            config = _LaunchConfig(grid=grid, block=(32 * kernel.warps, 1, 1), shared=kernel.shared, stream=self._stream, attributes=ctypes.pointer(attribute),
                                   count=1)
            self.call("cuLaunchKernelEx", ctypes.byref(config), Handle(kernel.handle), values, None)
        else:
            self.call("cuLaunchKernel", Handle(kernel.handle), *grid, 32 * kernel.warps, 1, 1, kernel.shared, self._stream, values, None)

    def capture(self, enqueue: Callable[[], None]) -> int:
        """What `enqueue` puts on the stream, as an executable graph; nothing of it runs now."""
        graph, executable = Handle(), Handle()
        try:
            self.call("cuStreamBeginCapture_v2", self._stream, _CAPTURE_THREAD_LOCAL)
            enqueue()
        except BaseException:  # ended all the same: a stream that is left capturing takes nothing else
            self._cuda.cuStreamEndCapture(self._stream, ctypes.byref(graph))
            if graph.value:
                self._cuda.cuGraphDestroy(graph)
            raise
        self.call("cuStreamEndCapture", self._stream, ctypes.byref(graph))
        try:
            self.call("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
        finally:
            self.call("cuGraphDestroy", graph)
        return int(executable.value or 0)

    def replay(self, graph: int) -> None:
        """Enqueue a captured graph."""
        self.call("cuGraphLaunch", Handle(graph), self._stream)

    def forget(self, graph: int) -> None:
        """Free a captured graph."""
        self.call("cuGraphExecDestroy", Handle(graph))

    def close(self) -> None:
        """Free all memory that was allocated here, and the stream; the primary context stays for the libraries that share it."""
        if self._closed:
            return
        self._closed = True
        self.enter()
        self.wait()
        for address, host in self._memory.items():
            self.call("cuMemFreeHost" if host else "cuMemFree_v2", Handle(address) if host else Pointer(address))
        self._memory.clear()
        for event in self._events:
            self.call("cuEventDestroy_v2", Handle(event))
        self._events.clear()
        self.call("cuStreamDestroy_v2", self._stream)

    def call(self, name: str, *arguments: Any) -> None:
        """Call a driver function by name. Raises SessaError with the driver's words if it fails, or if the driver is too old to have it."""
        function = getattr(self._cuda, name, None)
        if function is None:
            raise UserError("the CUDA driver is too old", got=f"no {name}", fix="install a newer NVIDIA driver, or use --backend ort")
        self._check(name, function(*arguments))

    def _check(self, name: str, code: int) -> None:
        if code == 0:
            return
        said = []
        for get in (self._cuda.cuGetErrorName, self._cuda.cuGetErrorString):
            text = ctypes.c_char_p()
            get(code, ctypes.byref(text))
            said.append((text.value or b"unknown error").decode())
        what = f"the CUDA driver refused {name}: {said[0]} ({code}), {said[1]}"
        raise SessaError(what + ("; fix: lower --max-batch or --max-context, or the batch or capacity of the session" if code == _OUT_OF_MEMORY else ""))
