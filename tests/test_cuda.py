"""The ctypes calls of cuda.py against a libcuda of our own, compiled here: argument widths, order, capture and errors, without a GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sessa_deploy import cuda as binding
from sessa_deploy.cuda import Cuda, Device
from sessa_deploy.errors import SessaError, UserError
from sessa_deploy.runtime import traffic

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler on this machine")

DRIVER = r"""
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
typedef uint64_t ptr; typedef void* handle; typedef int rc;
static int capturing, recorded, fail_alloc, graphs; static char stream_object, module_object, function_object, graph_object;
static void *slot[8]; /* what a captured launch copies */
static ptr live;
rc cuGetErrorName(rc code, char const** text) { *text = code == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_BAD"; return 0; }
rc cuGetErrorString(rc code, char const** text) { if (code == 500) return 1; *text = code == 2 ? "out of memory" : "bad"; return 0; }
int version = 12080;
rc cuDriverGetVersion(int* v) { *v = version; return 0; }
rc cuDeviceGetCount(int* n) { *n = 2; return 0; }
rc cuDeviceGetName(char* name, int room, int d) { strncpy(name, "NVIDIA H200", room); return room < 12; }
rc cuDeviceTotalMem_v2(size_t* n, int d) { *n = 141ull << 30; return 0; }
rc cuDeviceGet(int* d, int i) { *d = i; return i == 0 ? 0 : 101; }
rc cuDeviceGetAttribute(int* v, int what, int d) { *v = what == 75 ? 9 : what == 76 ? 0 : -1; return d != 0; }
rc cuDevicePrimaryCtxRetain(handle* c, int d) { *c = &live; return d != 0; }
rc cuCtxSetCurrent(handle c) { return c == &live ? 0 : 201; }
rc cuStreamCreate(handle* s, unsigned flags) { *s = &stream_object; return flags == 1 ? 0 : 1; }
int asked_priority;
rc cuStreamCreateWithPriority(handle* s, unsigned flags, int priority) { *s = &stream_object; asked_priority = priority; return flags == 1 ? 0 : 1; }
rc cuStreamDestroy_v2(handle s) { return s == &stream_object ? 0 : 400; }
rc cuStreamSynchronize(handle s) { return s == &stream_object && !capturing ? 0 : 400; }
rc cuEventCreate(handle* e, unsigned flags) { *e = calloc(1, 8); ++live; return flags == 2 ? 0 : 1; }
rc cuEventRecord(handle e, handle s) { ++*(long*)e; return s == &stream_object && !capturing ? 0 : 400; }
rc cuEventSynchronize(handle e) { return *(long*)e == 2 ? 0 : 400; }
rc cuEventDestroy_v2(handle e) { free(e); --live; return 0; }
rc cuMemGetInfo_v2(size_t* f, size_t* t) { *f = 5ull << 30; *t = 8ull << 30; return 0; }
rc cuMemAlloc_v2(ptr* p, size_t n) { if (n > 1ull << 32) return 2; *p = (ptr)calloc(1, n); ++live; return 0; }
rc cuMemFree_v2(ptr p) { free((void*)p); --live; return 0; }
rc cuMemAllocHost_v2(void** p, size_t n) { *p = calloc(1, n); ++live; return 0; }
rc cuMemFreeHost(void* p) { free(p); --live; return 0; }
rc cuMemcpyHtoDAsync_v2(ptr d, void const* s, size_t n, handle q) { if (q != &stream_object) return 400; memcpy((void*)d, s, n); return 0; }
rc cuMemcpyDtoHAsync_v2(void* d, ptr s, size_t n, handle q) { if (q != &stream_object) return 400; memcpy(d, (void*)s, n); return 0; }
rc cuMemcpyDtoDAsync_v2(ptr d, ptr s, size_t n, handle q) { if (q != &stream_object) return 400; memcpy((void*)d, (void*)s, n); return 0; }
struct plan { size_t sx, sy; unsigned skind; void const* shost; ptr s; handle sarray; size_t spitch; /* as cuda.h has CUDA_MEMCPY2D */
              size_t dx, dy; unsigned dkind; void* dhost; ptr d; handle darray; size_t dpitch; size_t width, height; };
rc cuMemcpy2DAsync_v2(struct plan const* p, handle q)
{
    if (q != &stream_object || p->skind != 2 || p->dkind != 2 || p->sx || p->sy || p->dx || p->dy || p->shost || p->dhost || p->sarray || p->darray) return 1;
    if (p->width > p->spitch || p->width > p->dpitch) return 1;
    for (size_t i = 0; i < p->height; ++i) memcpy((char*)p->d + i * p->dpitch, (char*)p->s + i * p->spitch, p->width);
    return 0;
}
rc cuOccupancyMaxActiveBlocksPerMultiprocessor(int* n, handle f, int threads, size_t shared)
{
    *n = 6;
    return f == &function_object && threads == 64 && shared == 5ull << 32 ? 0 : 1;
}
rc cuMemcpyDtoH_v2(void* d, ptr s, size_t n) { memcpy(d, (void*)s, n); return 0; }
rc cuMemsetD32Async(ptr d, unsigned v, size_t n, handle q) { for (size_t i = 0; i < n; ++i) ((unsigned*)d)[i] = v; return q == &stream_object ? 0 : 400; }
rc cuModuleLoadData(handle* m, void const* image) { *m = &module_object; return memcmp(image, "cubin\0x", 7) ? 200 : 0; }
rc cuModuleGetFunction(handle* f, handle m, char const* name) { *f = &function_object; return m == &module_object && !strcmp(name, "copy") ? 0 : 500; }
int share;
rc cuFuncSetAttribute(handle f, int what, int v) { return f == &function_object && (what == 8 && v == 50000 || what == 9 && v == (share = 30)) ? 0 : 1; }
struct attribute { int id; char pad[4]; int allowed; char rest[60]; };
struct config { unsigned grid[3], block[3], shared; handle stream; struct attribute* attributes; unsigned count; };
int early;
rc cuLaunchKernel(handle, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, handle, void**, void**);
rc cuLaunchKernelEx(struct config const* c, handle f, void** a, void** extra)
{
    if (c->count != 1 || c->attributes->id != 6 || c->attributes->allowed != 1) return 1;
    ++early;
    return cuLaunchKernel(f, c->grid[0], c->grid[1], c->grid[2], c->block[0], c->block[1], c->block[2], c->shared, c->stream, a, extra);
}
static void copy(void) { memcpy(*(void**)slot[1], *(void**)slot[0], *(int*)slot[2]); }
rc cuLaunchKernel(handle f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, handle q, void** a, void** extra)
{
    if (f != &function_object || gx != 7 || gy != 2 || gz != 3 || bx != 128 || by != 1 || bz != 1 || shared != 50000 || q != &stream_object || extra) return 1;
    if (*(void**)a[3] || *(void**)a[4]) return 1; /* hidden pointers */
    for (int i = 0; i < 3; ++i) { slot[i] = malloc(8); memcpy(slot[i], a[i], i < 2 ? 8 : 4); }
    if (capturing) recorded = 1; else copy();
    return 0;
}
rc cuStreamBeginCapture_v2(handle q, int mode) { capturing = 1; return q == &stream_object && mode == 1 ? 0 : 1; }
rc cuStreamEndCapture(handle q, handle* g) { graphs += capturing; *g = capturing ? &graph_object : 0; capturing = 0; return q == &stream_object ? 0 : 1; }
rc cuGraphInstantiateWithFlags(handle* x, handle g, unsigned long long flags) { *x = &recorded; return g == &graph_object && !flags ? 0 : 1; }
rc cuGraphDestroy(handle g) { --graphs; return g == &graph_object ? 0 : 1; }
rc cuGraphLaunch(handle x, handle q) { if (x != &recorded || q != &stream_object || !recorded) return 1; copy(); return 0; }
rc cuGraphExecDestroy(handle x) { return x == &recorded ? 0 : 1; }
uint64_t still_allocated(void) { return live; }
int still_described(void) { return graphs; }
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("driver")
    (folder / "cuda.c").write_text(DRIVER)
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-w", "-o", "libcuda.so", "cuda.c"], cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "libcuda.so"))


@pytest.fixture
def cuda(library: Any, monkeypatch: pytest.MonkeyPatch) -> Cuda:
    monkeypatch.setattr(binding, "open_driver", lambda: library)
    return Cuda()


def test_memory_kernels_and_graphs(cuda: Cuda, library: Any) -> None:
    assert cuda.arch == 90 and cuda.stream > 1 << 32 and cuda.memory() == (5 << 30, 8 << 30)
    host, a, b = cuda.allocate_host(64), cuda.allocate(64), cuda.allocate(64)
    ctypes.memmove(host, bytes(range(64)), 64)
    cuda.to_device(a, host, 64)
    kernel = cuda.kernel(b"cubin\0x", "copy", warps=4, shared=50000, params=5)
    cuda.launch(kernel, (7, 2, 3), (("ptr", a), ("ptr", b), ("i32", 40)))
    assert cuda.read(b, 64) == bytes(range(40)) + bytes(24)
    cuda.fill(b, 0x7FC00000, 16)
    assert cuda.read(b, 64) == b"\x00\x00\xc0\x7f" * 16
    graph = cuda.capture(lambda: cuda.launch(kernel, (7, 2, 3), (("ptr", a), ("ptr", b), ("i32", 64))))
    assert cuda.read(b, 4) == b"\x00\x00\xc0\x7f"  # captured, not run
    cuda.replay(graph)
    cuda.to_host(host, b, 64)
    assert ctypes.string_at(host, 64) == bytes(range(64))
    cuda.forget(graph)
    library.still_allocated.restype = ctypes.c_uint64
    assert library.still_allocated() == 3
    cuda.close()
    assert library.still_allocated() == 0
    cuda.close()  # nothing is freed twice


def test_a_kernel_that_waits_by_itself_starts_early_where_the_driver_knows_how(library: Any, cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same launch otherwise; a driver before CUDA 12.3 loses the attribute in a captured stream, and SESSA_PDL=0 turns it off as in the plugin."""
    version, early = (ctypes.c_int.in_dll(library, name) for name in ("version", "early"))

    def launched(cuda: Cuda, waits: bool) -> int:
        before, (a, b) = early.value, (cuda.allocate(64), cuda.allocate(64))
        cuda.fill(a, 7, 16)
        cuda.launch(cuda.kernel(b"cubin\0x", "copy", 4, 50000, 5, waits), (7, 2, 3), (("ptr", a), ("ptr", b), ("i32", 64)))
        assert cuda.read(b, 64) == b"\x07\x00\x00\x00" * 16
        cuda.close()
        return early.value - before

    assert [launched(cuda, True), launched(Cuda(), False)] == [1, 0]
    monkeypatch.setenv("SESSA_PDL", "0")
    assert launched(Cuda(), True) == 0
    monkeypatch.setenv("SESSA_PDL", "1")
    assert launched(Cuda(), True) == 1
    try:
        version.value = 12020
        assert launched(Cuda(), True) == 0
    finally:
        version.value = 12080


def test_an_event_is_waited_for_once_it_was_recorded(cuda: Cuda, library: Any) -> None:
    library.still_allocated.restype = ctypes.c_uint64
    before, (one, other) = library.still_allocated(), (cuda.event(), cuda.event())
    assert one != other and min(one, other) > 1 << 32 and library.still_allocated() == before + 2
    cuda.record(one)
    with pytest.raises(SessaError, match="cuEventSynchronize"):
        cuda.wait_event(one)
    cuda.record(one)  # this driver wants two
    cuda.wait_event(one)
    with pytest.raises(SessaError, match="cuEventSynchronize"):
        cuda.wait_event(other)
    cuda.close()
    assert library.still_allocated() == before


def test_copies_on_the_gpu(cuda: Cuda) -> None:
    """Rows of 5 bytes that lie 8 apart, to rows 11 apart; nothing between them is written."""
    source, target = cuda.allocate(64), cuda.allocate(64)
    cuda.write(source, bytes(range(1, 25)))
    cuda.copy(target + 2, 11, source, 8, 5, 3)
    found = cuda.read(target, 40)
    assert found == bytes(2) + bytes(6).join(bytes(range(start, start + 5)) for start in (1, 9, 17)) + bytes(11)
    cuda.copy(target, 0, source + 3, 0, 4, 1)
    assert cuda.read(target, 8) == bytes((4, 5, 6, 7)) + found[4:8]
    cuda.close()


def test_what_there_is(library: Any, cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    assert binding.driver_version() == "12.8"
    # the second GPU of this driver answers no question about itself
    assert binding.devices() == [Device(0, "NVIDIA H200", "sm_90", 141 << 30)]
    assert binding.used_memory() == 3 << 30
    kernel = cuda.kernel(b"cubin\0x", "copy", warps=2, shared=50000, params=5)
    assert binding.resident_blocks(kernel.handle, 64, 5 << 32) == 6
    assert binding.resident_blocks(kernel.handle, 32, 5 << 32) == 0  # the driver refused
    binding.prefer_shared(kernel.handle, 30)
    assert ctypes.c_int.in_dll(library, "share").value == 30
    binding.prefer_shared(kernel.handle, 101)  # refused, and nobody minds
    monkeypatch.setattr(binding, "open_driver", lambda: None)
    assert (binding.driver_version(), binding.devices(), binding.used_memory(), binding.resident_blocks(kernel.handle, 64, 0)) == (None, [], None, 0)
    binding.prefer_shared(kernel.handle, 30)
    cuda.close()


def test_bandwidth_counts_what_is_read_and_written(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten runs of four copies, the fastest counts; no memory is kept, and a GPU without room for it has no figure."""
    clock = iter(range(100))
    monkeypatch.setattr(binding, "open_driver", lambda: library)
    monkeypatch.setattr(traffic, "_COPY_BYTES", 1 << 20)
    monkeypatch.setattr(traffic.time, "perf_counter", lambda: next(clock) ** 2)
    assert traffic.copy_bandwidth() == 4 * 2 * 2**20  # the first run took a second, the others longer
    library.still_allocated.restype = ctypes.c_uint64
    assert library.still_allocated() == 0
    monkeypatch.setattr(traffic, "_COPY_BYTES", 1 << 33)
    assert traffic.copy_bandwidth() is None
    monkeypatch.setattr(binding, "open_driver", lambda: None)
    assert traffic.copy_bandwidth() is None


def test_a_stream_of_ones_own_has_the_priority_that_is_asked_for(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding, "open_driver", lambda: library)
    asked = ctypes.c_int.in_dll(library, "asked_priority")
    for priority in (-1, 0):
        assert binding.new_stream(priority) > 1 << 32 and asked.value == priority
    for driver in (None, SimpleNamespace(), SimpleNamespace(cuStreamCreateWithPriority=lambda *_: 2)):
        monkeypatch.setattr(binding, "open_driver", lambda driver=driver: driver)
        with pytest.raises(RuntimeError):
            binding.new_stream()


def test_errors_carry_the_drivers_words_and_a_failed_capture_ends(cuda: Cuda, library: Any) -> None:
    with pytest.raises(SessaError, match=r"cuMemAlloc_v2: CUDA_ERROR_OUT_OF_MEMORY \(2\), out of memory; fix: .*--max-batch"):
        cuda.allocate(1 << 33)
    with pytest.raises(SessaError, match=r"cuModuleLoadData: CUDA_ERROR_BAD \(200\), bad$"):
        cuda.kernel(b"other\0\0", "copy", 1, 0, 2)
    with pytest.raises(SessaError, match=r"cuModuleGetFunction: CUDA_ERROR_BAD \(500\), unknown error$"):
        cuda.kernel(b"cubin\0x", "absent", 1, 0, 2)
    with pytest.raises(UserError, match="too old: got no cuOfTomorrow; fix: install a newer NVIDIA driver"):
        cuda.call("cuOfTomorrow")

    for error in (SessaError("in the middle"), KeyboardInterrupt("in the middle")):

        def broken(error: BaseException = error) -> None:
            raise error

        with pytest.raises(type(error), match="in the middle"):
            cuda.capture(broken)
        cuda.wait()  # would fail inside a capture
    cuda.forget(cuda.capture(lambda: None))
    assert library.still_described() == 0  # what was captured so far is freed


def test_no_driver_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding, "open_driver", lambda: None)
    with pytest.raises(UserError, match=r"no CUDA driver.*--backend ort"):
        Cuda()


def test_addresses_fit_64_bits(tmp_path: Path) -> None:
    assert ctypes.sizeof(binding.Pointer) == ctypes.sizeof(binding.Handle) == 8
