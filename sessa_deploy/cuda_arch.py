"""Which binary runs on which GPU: one rule, which the plugin's C++ gets through plugins/ops.py. Standard library only.

An architecture is a compute capability as an integer, 90 for 9.0.
"""

from __future__ import annotations

from collections.abc import Iterable

ARCHS = (80, 86, 87, 89, 90, 100, 120)  # that the kernels are tuned and compiled for
TEGRA = 87  # Jetson Orin: shares no binaries with the desktop GPUs of its major
ACCELERATED = 90  # from here on Triton compiles for sm_90a, sm_100a, sm_120a, which run on that very architecture alone


def serves(compiled: int, device: int) -> bool:
    """Whether a binary that Triton compiled for one architecture runs on a device of another.

    A binary runs on later minors of its major (CUDA programming guide, binary compatibility), though not across desktop GPUs and Tegra, and not where it
    was compiled for an architecture's own features.
    """
    if compiled == device:
        return True
    return compiled < ACCELERATED and compiled // 10 == device // 10 and compiled < device and TEGRA not in (compiled, device)


def mend(device: int, target: str = "") -> str:
    """What to do where a device has no binary: the command that makes it, or the other road. target: the word of `plugin build --for`."""
    if device in ARCHS:
        return f"sessa-deploy plugin build {f'--for {target} ' if target else ''}--arch {device}"
    return f"use --backend ort; the kernels are compiled for sm_{', '.join(map(str, ARCHS))}"


def nearest(compiled: Iterable[int], device: int) -> int | None:
    """The one of `compiled` whose binary a device takes: the latest that serves it; None without one."""
    return max((arch for arch in compiled if serves(arch, device)), default=None)
