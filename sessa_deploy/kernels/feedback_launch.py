"""Launching the pinned kernels with little host time: one workspace allocation, one compiled binary per launch table entry, raw addresses.

Triton's own call costs tens of microseconds, as much as a short kernel. Nothing here may change what is launched: a kernel's binary follows from
its launch table entry alone (`launch.py`), so it is compiled once from types and then called with addresses. Under the interpreter, tensors go in.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from sessa_deploy.cuda import resident_blocks
from sessa_deploy.kernels import launch

DTYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
TORCH_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "i32": torch.int32}
ALIGN = 256  # bytes between buffers of a workspace

EARLY = 0  # set by `start_early`

Options = dict[str, dict[str, Any]]
Address = int | Tensor


launch.triton_version()  # every kernel's module imports this one: another Triton is refused before anything of it is used
INTERPRETED = bool(triton.knobs.runtime.interpret)  # as the kernels' decorators, which look once; a knob costs a microsecond to read


def interpreted() -> bool:
    """Whether Triton runs its interpreter (TRITON_INTERPRET=1), on CPU tensors."""
    return INTERPRETED


@lru_cache(maxsize=64)
def arch_of(index: int) -> int:
    """Compute capability of a CUDA device as an integer, 90 for the interpreter (no device)."""
    if not torch.cuda.is_available():
        return 90
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


@lru_cache(maxsize=256)
def pinned(names: tuple[str, ...], device: torch.device, dtype: torch.dtype, variant: str) -> Options:
    """The pinned launch options of `names` on a device, for a storage dtype and a variant that all of them have."""
    arch = arch_of(device.index or 0)
    found = {name: launch.options(name, arch, DTYPE_NAMES[dtype], variant) for name in names}
    if INTERPRETED:  # which knows no dependent launch
        return {name: {k: v for k, v in o.items() if k != "PDL"} for name, o in found.items()}
    early = {name for name in names if 0 < EARLY <= launch.early(name, arch, DTYPE_NAMES[dtype], variant)}
    return {name: {**o, "launch_pdl": True} if name in early else o for name, o in found.items()}


def start_early(rows: int) -> None:
    """For benchmarks: from now on, kernels may start before their predecessors end as the plugin lets them in a batch of `rows` rows; 0: none does."""
    global EARLY
    EARLY = rows
    pinned.cache_clear()


@lru_cache(maxsize=256)
def solve_variant(device: torch.device, dtype: torch.dtype, width: int, side: str) -> str:
    """Which pinned tiles the solve takes for D columns; side is "fwd" or "bwd" (`launch.solve_variant`)."""
    return launch.solve_variant(arch_of(device.index or 0), DTYPE_NAMES[dtype], width, side)


def aligned(x: Tensor) -> Tensor:
    """x contiguous and on a 16-byte boundary, as every kernel expects; a copy only where it has to be."""
    x = x.contiguous()
    return x if x.data_ptr() % launch.ALIGNMENT == 0 else x.clone()


def address(x: Tensor) -> Address:
    """What a launch takes for a tensor."""
    return x if INTERPRETED else x.data_ptr()


class Workspace:
    """The buffers of a call in one allocation: {name: (elements, dtype)}, laid out once for all calls of a shape."""

    def __init__(self, buffers: dict[str, tuple[int, torch.dtype]]) -> None:
        self.buffers = buffers
        self.offsets: dict[str, int] = {}
        self.bytes = 0
        for name, (count, dtype) in buffers.items():
            self.offsets[name] = self.bytes
            self.bytes += -(-count * dtype.itemsize // ALIGN) * ALIGN

    def take(self, device: torch.device) -> tuple[dict[str, Address], Tensor]:
        """Addresses of the buffers, uninitialised, and their memory, to be kept until the launches are queued."""
        memory = torch.empty(self.bytes, dtype=torch.uint8, device=device)
        if INTERPRETED:
            return {n: memory[o : o + self.buffers[n][0] * self.buffers[n][1].itemsize].view(self.buffers[n][1]) for n, o in self.offsets.items()}, memory
        base = memory.data_ptr()
        return {n: base + o for n, o in self.offsets.items()}, memory


def workspace(device: torch.device, buffers: dict[str, tuple[int, torch.dtype]]) -> tuple[dict[str, Address], Tensor]:
    """`Workspace.take` for buffers used once."""
    return Workspace(buffers).take(device)


class Launcher:
    """Launches a kernel with one entry's options for a storage dtype, on the current stream of a device: a call takes (grid, *arguments)."""

    def __init__(self, kernel: Any, device: torch.device, dtype: torch.dtype, options: dict[str, Any]) -> None:
        self.kernel, self.device, self.index, self.options = kernel, device, device.index, options
        if not INTERPRETED:
            with torch.cuda.device(device):
                self._binary, self._launch = _compiled(kernel, dtype, options)

    @cached_property
    def resident(self) -> int:
        """How many programs the device holds at once."""
        if INTERPRETED:
            return launch.STEP_PROGRAMS
        with torch.cuda.device(self.device):
            return _resident(self._binary, self.device) or launch.STEP_PROGRAMS

    def __call__(self, grid: tuple[int, ...], *arguments: Any) -> None:
        if INTERPRETED:
            self.kernel[grid](*arguments, **self.options)
            return
        stream = torch._C._cuda_getCurrentRawStream(self.index)
        x, y, z = (*grid, 1, 1)[:3]
        if torch._C._cuda_getDevice() == self.index:
            self._launch(stream, x, y, z, *arguments)
        else:
            with torch.cuda.device(self.index):
                self._launch(stream, x, y, z, *arguments)


_LAUNCHERS: dict[tuple[Any, ...], Launcher] = {}


def _resident(binary: Any, device: torch.device) -> int:
    """Programs of a compiled kernel that the device holds at once; 0 if its driver does not say."""
    each = resident_blocks(binary.function, 32 * binary.metadata.num_warps, binary.metadata.shared)
    return each * torch.cuda.get_device_properties(device).multi_processor_count


def bind(kernel: Any, binary: Any, constants: list[Any]) -> Callable[..., None]:
    """A function of (stream, grid x, y, z, *arguments) that launches the loaded binary on the current device; constants: its constexprs in order.

    Raises ValueError if the kernel wants Triton's scratch memory.
    """
    run, function = binary.run, binary.function
    if binary.metadata.global_scratch_size or binary.metadata.profile_scratch_size:
        raise ValueError(f"sessa: {kernel.__name__} wants Triton's scratch memory, which its launch does not provide")
    # What CudaLauncher.__call__ passes on: cooperative and dependent launch, then metadata and three hooks' arguments beside two scratch buffers.
    first, launch_binary = (function, run.launch_cooperative_grid, run.launch_pdl), run.launch
    if launch.triton_version() == (3, 6):  # one function a signature, compiled for it
        fixed: tuple[Any, ...] = (*first, None, None, binary.packed_metadata, None, None, None)

        def call(stream: int, x: int, y: int, z: int, *arguments: Any) -> None:
            launch_binary(x, y, z, stream, *fixed, *arguments, *constants)

    else:  # 3.7: one function for all, which is told the signature
        fixed = (*first, binary.packed_metadata, None, None, None, None, None, run.arg_annotations, run.kernel_signature)

        def call(stream: int, x: int, y: int, z: int, *arguments: Any) -> None:
            launch_binary(x, y, z, stream, *fixed, (*arguments, *constants))

    return call


def _compiled(kernel: Any, dtype: torch.dtype, options: dict[str, Any]) -> tuple[Any, Callable[..., None]]:
    """The kernel's binary, loaded, and a function of (stream, grid x, y, z, *arguments) that launches it on the current device."""
    description = launch.kernel(kernel.__name__)
    types = [launch.resolve(p.type, DTYPE_NAMES[dtype]) for p in description.params]
    # Examples carry the types; with the table's do_not_specialize, values select nothing.
    examples = [TORCH_TYPES[t[1:]] if t.startswith("*") else 1.0 if t == "fp32" else 16 for t in types]
    binary = kernel.warmup(*examples, grid=(1,), **options)
    binary = binary.result() if hasattr(binary, "result") else binary
    return binary, bind(kernel, binary, [options[name] for name in description.constexprs])


def launcher(kernel: Any, device: torch.device, dtype: torch.dtype, options: dict[str, Any]) -> Launcher:
    """The launcher of `kernel` with these options, made once; it keeps them, whose identity is in the key."""
    key = (kernel.__name__, device.index, dtype, id(options))
    found = _LAUNCHERS.get(key)
    if found is None:
        found = _LAUNCHERS[key] = Launcher(kernel, device, dtype, options)
    return found
