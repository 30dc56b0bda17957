"""Launching kernels with little host time: one workspace allocation, one compiled binary per options and types, raw addresses.

Triton's own call costs tens of microseconds, as much as a short kernel. Nothing here may change what is launched: a binary follows from its options alone,
so it is compiled once from types and then called with addresses. Under the interpreter, tensors go in. The standard library is enough to import this;
torch and Triton are imported where they are used.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cached_property, lru_cache, partial
from typing import TYPE_CHECKING, Any

from sessa_deploy.cuda import prefer_shared, resident_blocks
from sessa_deploy.cuda_arch import ARCHS
from sessa_deploy.errors import UserError
from sessa_deploy.kernels.launch import table
from sessa_deploy.kernels.launch.limits import ALIGNMENT, STEP_PROGRAMS, WORKSPACE_ALIGNMENT
from sessa_deploy.kernels.launch.spec import QUANTISED, resolve

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TRITON_VERSIONS = ((3, 6), (3, 7))  # `_bind` knows each one's launch, lowering each one's hidden parameters, the tables each one's spills
_NAMES = {"torch.float32": "fp32", "torch.float16": "fp16", "torch.bfloat16": "bf16"}
_TYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "i32": "int32", "i64": "int64", "i8": "int8", "fp8e4nv": "float8_e4m3fn"}

SHARE, EARLY = "shared_share", "launch_pdl"  # of the options: what the driver is told, and what a launch is; a binary is the same with and without
Options = dict[str, dict[str, Any]]
Address = Any  # an integer, or a tensor under the interpreter
Call = Callable[..., None]  # of (stream, grid x, y, z, address of Triton's global scratch or None, *arguments)


@lru_cache(maxsize=1)
def triton_version() -> tuple[int, int]:
    """(major, minor) of the installed Triton, one of TRITON_VERSIONS: what is asked before a kernel is compiled, launched or lowered.

    Binaries, and the private call that launches them, differ from minor to minor. Raises UserError for any other version, and without Triton.
    """
    try:
        import triton

        version = str(triton.__version__)
    except ModuleNotFoundError as error:
        version = "none installed" if error.name == "triton" else f"one that needs {error.name}"
    except ImportError as error:
        version = f"one that does not load ({error})"
    numbers = re.match(r"(\d+)\.(\d+)", version)
    found = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
    if found not in TRITON_VERSIONS:
        allowed = " and ".join(f"{major}.{minor}" for major, minor in TRITON_VERSIONS)
        first, (major, minor) = TRITON_VERSIONS[0], TRITON_VERSIONS[-1]
        fix = f"pip install 'triton>={first[0]}.{first[1]},<{major}.{minor + 1}'"
        raise UserError("the kernels cannot use this Triton", got=version, allowed=allowed, fix=fix)
    return found


@lru_cache(maxsize=1)
def interpreted() -> bool:
    """Whether Triton runs its interpreter (TRITON_INTERPRET=1), on CPU tensors. Looks once, as the kernels' decorators do."""
    triton_version()
    import triton

    return bool(triton.knobs.runtime.interpret)


@lru_cache(maxsize=64)
def arch_of(index: int) -> int:
    """Compute capability of a CUDA device as an integer, 90 for the interpreter (no device)."""
    import torch

    if not torch.cuda.is_available():
        return 90
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


@lru_cache(maxsize=8)
def dtype_name(dtype: torch.dtype) -> str:
    """"fp32", "fp16" or "bf16", as the tables call a storage type. KeyError for any other."""
    return _NAMES[str(dtype)]


@lru_cache(maxsize=8)
def weights_name(dtype: torch.dtype) -> str:
    """What the tables add to the storage dtype's name for weights of this type, see `spec.QUANTISED`; "" where they are of the storage type."""
    return next((kind for kind, weight in QUANTISED.items() if str(dtype) == f"torch.{_TYPES[weight]}"), "")


@lru_cache(maxsize=512)
def pinned(names: tuple[str, ...], device: torch.device, dtype: torch.dtype, variant: str, early: int = 0, weights: str = "") -> Options:
    """The pinned launch options of `names` on a device, for a storage dtype and a variant that all of them have. weights: of `weights_name`.

    early: rows (B T) of a batch for which kernels may start before their predecessors end, as far as the plugin lets them; 0: none does.
    """
    arch, kind = arch_of(device.index or 0), dtype_name(dtype) + weights
    found = {name: table.options(name, arch, kind, variant) for name in names}
    if interpreted():  # which knows no dependent launch
        return {name: {k: v for k, v in o.items() if k != "PDL"} for name, o in found.items()}
    ahead = {name for name in names if 0 < early <= table.early(name, arch, kind, variant)}
    shares = {name: table.shared_share(name, arch, kind, variant) for name in names}
    extra = {name: ({EARLY: True} if name in ahead else {}) | ({SHARE: shares[name]} if shares[name] else {}) for name in names}
    return {name: {**o, **extra[name]} for name, o in found.items()}


_VARIED: dict[tuple[Any, ...], tuple[dict[str, Any], dict[str, Any]]] = {}  # options, kept since their identity stands for them, and those made of them


def varied(options: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A kernel's options with changes: one object for each that is given, and that itself where nothing changes. The interpreter's have no EARLY and SHARE."""
    if interpreted():
        changes = {name: value for name, value in changes.items() if name not in (EARLY, SHARE)}
    if all(options.get(name) == value for name, value in changes.items()):
        return options
    return _VARIED.setdefault((id(options), *sorted(changes.items())), (options, {**options, **changes}))[1]


@lru_cache(maxsize=64)
def available(name: str, device: torch.device, dtype: torch.dtype, variant: str, weights: str = "") -> bool:
    """Whether a device has this variant, where its kernel may lack it (`Kernel.optional`). weights: of `weights_name`."""
    arch = max((a for a in ARCHS if a <= arch_of(device.index or 0)), default=0)
    return variant not in table.kernel(name).optional or table.has(name, arch, dtype_name(dtype) + weights, variant)


def aligned(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """x in `dtype`, contiguous and on a 16-byte boundary, as every kernel expects; a copy only where it has to be, and no call that changes nothing."""
    x = x if dtype is None or x.dtype == dtype else x.to(dtype)
    x = x if x.is_contiguous() else x.contiguous()
    return x if x.data_ptr() % ALIGNMENT == 0 else x.clone()


def spaced(x: Tensor) -> tuple[Tensor, int]:
    """x (B,T,D) with evenly spaced, aligned rows, and their distance in elements; a copy only where it has to be."""
    batch, tokens, width = x.shape
    across, row, one = x.stride()
    even = one == 1 and row % 8 == 0 and row >= width and (batch == 1 or across == tokens * row) and x.data_ptr() % ALIGNMENT == 0
    return (x, row) if even else (aligned(x), width)


def address(x: Tensor) -> Address:
    """What a launch takes for a tensor."""
    return x if interpreted() else x.data_ptr()


class Workspace:
    """The buffers of a call in one allocation: {name: (elements, dtype)}, laid out once for all calls of a shape."""

    def __init__(self, buffers: dict[str, tuple[int, torch.dtype]]) -> None:
        import torch

        self._empty, self._byte = torch.empty, torch.uint8
        self.buffers = buffers
        self.offsets: dict[str, int] = {}
        self.bytes = 0
        for name, (count, dtype) in buffers.items():
            self.offsets[name] = self.bytes
            self.bytes += -(-count * dtype.itemsize // WORKSPACE_ALIGNMENT) * WORKSPACE_ALIGNMENT

    def allocate(self, device: torch.device) -> Tensor:
        """Memory for the buffers, uninitialised, to be kept until the launches are queued."""
        return self._empty(self.bytes, dtype=self._byte, device=device)

    def at(self, memory: Tensor) -> dict[str, Address]:
        """Addresses of the buffers in what `allocate` gave."""
        if interpreted():
            return {n: memory[o : o + self.buffers[n][0] * self.buffers[n][1].itemsize].view(self.buffers[n][1]) for n, o in self.offsets.items()}
        base = memory.data_ptr()
        return {n: base + o for n, o in self.offsets.items()}

    def beyond(self, at: dict[str, Address], name: str, count: int) -> Address:
        """The address `count` elements further in a buffer, of those that `at` gave."""
        return at[name][count:] if interpreted() else at[name] + count * self.buffers[name][1].itemsize

    def take(self, device: torch.device) -> tuple[dict[str, Address], Tensor]:
        """(`at`, `allocate`) of one call."""
        memory = self.allocate(device)
        return self.at(memory), memory


def workspace(device: torch.device, buffers: dict[str, tuple[int, torch.dtype]]) -> tuple[dict[str, Address], Tensor]:
    """`Workspace.take` for buffers used once."""
    return Workspace(buffers).take(device)


class Launcher:
    """Launches a kernel with one set of options on the current stream of a device: a call takes (grid, *arguments), the arguments of types `examples`."""

    def __init__(self, kernel: Any, device: torch.device, examples: list[Any], options: dict[str, Any]) -> None:
        self.kernel, self.device, self.index, self.options = kernel, device, device.index, options
        self.interpreted = interpreted()
        if not self.interpreted:
            import torch

            self._current, self._stream, self._on = torch._C._cuda_getDevice, torch._C._cuda_getCurrentRawStream, torch.cuda.device
            with self._on(device):
                binary = kernel.warmup(*examples, grid=(1,), **{k: v for k, v in options.items() if k not in (SHARE, EARLY)})
                self._binary = binary.result() if hasattr(binary, "result") else binary
                self._scratch = self._binary.metadata.global_scratch_size
                self._bytes = partial(torch.empty, dtype=torch.uint8, device=device)
                self._launch = _bind(kernel, self._binary, [options[name] for name in kernel.arg_names[len(examples) :]], options.get(EARLY, False))
                if SHARE in options:  # behind what loads the binary: before it there is no function to wish for
                    prefer_shared(self._binary.function, options[SHARE])

    @cached_property
    def resident(self) -> int:
        """How many programs the device holds at once."""
        if self.interpreted:
            return STEP_PROGRAMS
        with self._on(self.device):
            return _resident(self._binary, self.device) or STEP_PROGRAMS

    def __call__(self, grid: tuple[int, ...], *arguments: Any) -> None:
        if self.interpreted:
            self.kernel[grid](*arguments, **self.options)
            return
        stream = self._stream(self.index)
        x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
        memory = self._bytes(x * y * z * self._scratch) if self._scratch else None  # kept until the launch is queued
        scratch = None if memory is None else memory.data_ptr()
        if self._current() == self.index:
            self._launch(stream, x, y, z, scratch, *arguments)
        else:
            with self._on(self.index):
                self._launch(stream, x, y, z, scratch, *arguments)


_LAUNCHERS: dict[tuple[Any, ...], Launcher] = {}  # each keeps its options, whose identity is in the key


def launcher(kernel: Any, device: torch.device, dtype: torch.dtype, options: dict[str, Any], weights: str = "") -> Launcher:
    """The launcher of a kernel of the tables with these options, made once. weights: of `weights_name`."""
    key = (kernel.__name__, device.index, dtype, weights, id(options))
    found = _LAUNCHERS.get(key)
    if found is None:
        import torch

        # Examples carry the types; with the table's do_not_specialize, values select nothing.
        types = [resolve(p.type, dtype_name(dtype) + weights) for p in table.kernel(kernel.__name__).params]
        examples = [getattr(torch, _TYPES[t[1:]]) if t.startswith("*") else 1.0 if t == "fp32" else 16 for t in types]
        found = _LAUNCHERS[key] = Launcher(kernel, device, examples, options)
    return found


def launch(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Launch a kernel that is in no table on the current stream of its first argument's device; types come from the arguments.

    Tensors: contiguous rows, 16-byte aligned. options: tiles and warps, one object for all calls alike, whose identity stands for them.
    """
    _untabled(kernel, arguments, options)(grid, *[x if x.__class__ is int or x.__class__ is float else address(x) for x in arguments])


def _untabled(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Launcher:
    """The launcher of a kernel that is in no table, for arguments of these types."""
    types = tuple([x.dtype for x in arguments if not (x.__class__ is int or x.__class__ is float)])
    key = (kernel.__name__, arguments[0].device.index, id(options), types)
    found = _LAUNCHERS.get(key)
    if found is None:
        # No integer selects a binary (do_not_specialize), and every pointer is promised 16-byte alignment.
        examples = [x.dtype if hasattr(x, "data_ptr") else 1.0 if isinstance(x, float) else 16 for x in arguments]
        found = _LAUNCHERS[key] = Launcher(kernel, arguments[0].device, examples, options)
    return found


class Pass:
    """A launch of a kernel that is in no table without its tensors: grid, numbers and options. A call takes the tensors, of the same types and device in all
    calls, as in `launch`, and looks nothing up: what is repeated for every layer of every step."""

    __slots__ = ("_grid", "_kernel", "_launcher", "_numbers", "_options")

    def __init__(self, kernel: Any, grid: tuple[int, ...], numbers: tuple[Any, ...], options: dict[str, Any]) -> None:
        self._kernel, self._numbers, self._options = kernel, numbers, options
        self._grid = (*grid, 1, 1)[:3]
        self._launcher: Launcher | None = None

    def __call__(self, *tensors: Tensor) -> None:
        run = self._launcher
        if run is None:
            run = self._launcher = _untabled(self._kernel, (*tensors, *self._numbers), self._options)
        run(self._grid, *[address(x) for x in tensors], *self._numbers)


def _bind(kernel: Any, binary: Any, constants: list[Any], early: bool) -> Call:
    """A function that launches the loaded binary on the current device; constants: its constexprs in order. early: before its predecessor has ended.

    Raises ValueError if the kernel wants the profiler's scratch memory.
    """
    run, function = binary.run, binary.function
    if binary.metadata.profile_scratch_size:
        raise ValueError(f"sessa: {kernel.__name__} wants scratch memory of Triton's profiler, which its launch does not provide")
    # What CudaLauncher.__call__ passes on: cooperative and dependent launch, then metadata and three hooks' arguments beside two scratch buffers.
    first, launch_binary = (function, run.launch_cooperative_grid, early), run.launch
    if triton_version() == (3, 6):  # one function a signature, compiled for it
        fixed: tuple[Any, ...] = (None, binary.packed_metadata, None, None, None)

        def call(stream: int, x: int, y: int, z: int, scratch: int | None, *arguments: Any) -> None:
            launch_binary(x, y, z, stream, *first, scratch, *fixed, *arguments, *constants)

    else:  # 3.7: one function for all, which is told the signature
        begun, fixed = (*first, binary.packed_metadata, None, None, None), (None, run.arg_annotations, run.kernel_signature)

        def call(stream: int, x: int, y: int, z: int, scratch: int | None, *arguments: Any) -> None:
            launch_binary(x, y, z, stream, *begun, scratch, *fixed, (*arguments, *constants))

    return call


def _resident(binary: Any, device: torch.device) -> int:
    """Programs of a compiled kernel that the device holds at once; 0 if its driver does not say."""
    import torch

    each = resident_blocks(binary.function, 32 * binary.metadata.num_warps, binary.metadata.shared)
    return each * torch.cuda.get_device_properties(device).multi_processor_count
