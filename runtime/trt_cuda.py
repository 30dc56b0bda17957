"""What the TensorRT backend needs of the CUDA driver beyond copies: memory, one stream, kernels from cubins, captured graphs. ctypes only."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

from sessa_deploy.errors import SessaError
from sessa_deploy.runtime.driver import open_driver

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
_CAPTURE_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
_ATTRIBUTE_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_STATIC_SHARED = 48 << 10
_OUT_OF_MEMORY = 2
_MAJOR, _MINOR = 75, 76

Pointer, Handle = ctypes.c_uint64, ctypes.c_void_p
Argument = tuple[str, int]  # ("ptr", address) or ("i32", value)


class Kernel:
    """A loaded kernel: its function handle, warps, dynamic shared memory in bytes, and how many hidden pointers follow its arguments."""

    def __init__(self, handle: int, warps: int, shared: int, params: int) -> None:
        self.handle, self.warps, self.shared, self.params = handle, warps, shared, params


class Cuda:
    """GPU `index` in its primary context (the one TensorRT uses too) with one stream. Addresses and sizes are in bytes.

    Every method raises SessaError when the driver reports an error; memory that runs out names what to lower.
    """

    def __init__(self, index: int = 0) -> None:
        library = open_driver()
        if library is None:
            raise SessaError("there is no CUDA driver; fix: use --backend ort")
        self._cuda, self._context, self._stream = library, Handle(), Handle()
        self._memory: dict[int, bool] = {}  # address -> whether it is on the host
        device = ctypes.c_int()
        self.call("cuDeviceGet", ctypes.byref(device), index)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)
        self.enter()
        self.call("cuStreamCreate", ctypes.byref(self._stream), _NON_BLOCKING)
        major, minor = ctypes.c_int(), ctypes.c_int()
        self.call("cuDeviceGetAttribute", ctypes.byref(major), _MAJOR, device)
        self.call("cuDeviceGetAttribute", ctypes.byref(minor), _MINOR, device)
        self.arch = 10 * major.value + minor.value

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

    def wait(self) -> None:
        """Wait for everything enqueued."""
        self.call("cuStreamSynchronize", self._stream)

    def kernel(self, image: bytes, entry: str, warps: int, shared: int, params: int) -> Kernel:
        """Load a kernel from a cubin that takes `params` parameters, hidden ones included."""
        module, function = Handle(), Handle()
        self.call("cuModuleLoadData", ctypes.byref(module), image)
        self.call("cuModuleGetFunction", ctypes.byref(function), module, entry.encode())
        if shared > _STATIC_SHARED:
            self.call("cuFuncSetAttribute", function, _ATTRIBUTE_SHARED, shared)
        return Kernel(int(function.value or 0), warps, shared, params)

    def launch(self, kernel: Kernel, grid: tuple[int, int, int], arguments: Sequence[Argument]) -> None:
        """Enqueue a kernel with these arguments; what it takes beyond them are null pointers (Triton's unused scratch)."""
        slots: list[Any] = [Pointer(v) if kind == "ptr" else ctypes.c_int32(v) for kind, v in arguments]
        slots += [Pointer(0) for _ in range(kernel.params - len(slots))]
        values = (ctypes.c_void_p * len(slots))(*(ctypes.addressof(slot) for slot in slots))
        self.call("cuLaunchKernel", Handle(kernel.handle), *grid, 32 * kernel.warps, 1, 1, kernel.shared, self._stream, values, None)

    def capture(self, enqueue: Callable[[], None]) -> int:
        """What `enqueue` puts on the stream, as an executable graph; nothing of it runs now."""
        graph, executable = Handle(), Handle()
        self.call("cuStreamBeginCapture_v2", self._stream, _CAPTURE_THREAD_LOCAL)
        try:
            enqueue()
        finally:
            code = self._cuda.cuStreamEndCapture(self._stream, ctypes.byref(graph))
        self._check("cuStreamEndCapture", code)
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
        """Free all memory that was allocated here, and the stream."""
        self.enter()
        self.wait()
        for address, host in self._memory.items():
            self.call("cuMemFreeHost" if host else "cuMemFree_v2", Handle(address) if host else Pointer(address))
        self._memory.clear()
        self.call("cuStreamDestroy_v2", self._stream)

    def call(self, name: str, *arguments: Any) -> None:
        """Call a driver function by name. Raises SessaError with the driver's words if it fails."""
        self._check(name, getattr(self._cuda, name)(*arguments))

    def _check(self, name: str, code: int) -> None:
        if code == 0:
            return
        text = ctypes.c_char_p()
        self._cuda.cuGetErrorString(code, ctypes.byref(text))
        what = f"the CUDA driver refused {name}: {(text.value or b'unknown error').decode()} ({code})"
        raise SessaError(what + ("; fix: build with a smaller --max-batch or --max-context" if code == _OUT_OF_MEMORY else ""))
