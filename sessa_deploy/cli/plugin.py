"""`sessa-deploy plugin`: build, find and check the TensorRT plugin library."""

from __future__ import annotations

import click

from sessa_deploy.cli.options import ARCHS, PATH, TARGET, TENSORRT_MAJOR


@click.group("plugin")
def command() -> None:
    """Build, find and check libsessa_plugin.so, which runs feedback attention inside TensorRT."""


_FOR = click.option("--for", "target", type=TARGET, help="TensorRT, or TensorRT for RTX [default: TensorRT, or the one that alone is installed].")
_MAJOR = click.option("--tensorrt", "major", type=TENSORRT_MAJOR, help="TensorRT major version [default: the installed one's].")


def _headers(target: str | None, major: int | None) -> int | None:
    """Major of the headers that fit: what was asked for, else that of the installed one; None where nothing says."""
    from sessa_deploy.errors import UserError
    from sessa_deploy.runtime.trt import api

    product = api.wanted(target)
    if major is not None and product.headers not in (None, major):
        raise UserError(f"{product.title} takes plugins of other headers", got=f"--tensorrt {major}", allowed=f"{product.headers}",
                        fix=f"--for {product.name} alone")
    return major or api.header_major(product, api.installed_version(product))


@command.command("build", short_help="Build the library; needs CMake and a C++ compiler.")
@_FOR
@click.option("--tensorrt", "major", type=TENSORRT_MAJOR, help="TensorRT major version [default: of --tensorrt-include, else the installed one's, else 11].")
@click.option("--tensorrt-include", type=PATH, help="Folder of NvInfer.h of that TensorRT [default: an installed one, else fetched].")
@click.option("--cuda-include", type=PATH, help="Folder of cuda_runtime_api.h [default: the toolkit's, else none is needed].")
@click.option("--cubins", type=PATH, help="Folder written by `python -m sessa_deploy.plugins.lower` [default: lower now; needs torch and triton].")
@click.option("--arch", "archs", type=ARCHS, help="Compute capabilities to lower for, e.g. 90,86 [default: all].")
@click.option("--out", type=PATH, help="Folder for the library [default: where `plugin path` looks].")
def build(
    target: str | None, major: int | None, tensorrt_include: str | None, cuda_include: str | None, cubins: str | None, archs: str | None, out: str | None,
) -> None:
    """Build the library with CMake and a C++ compiler; no CUDA compiler and no GPU are needed."""
    from pathlib import Path

    from sessa_deploy.files import check_folder
    from sessa_deploy.plugins import library

    if out is not None:
        check_folder(out, "--out", "the library's folder")

    def folder(text: str | None) -> Path | None:
        return Path(text) if text else None

    def say(line: str) -> None:
        click.echo(line, err=True)

    # headers that were named decide by themselves, unless a TensorRT was named too
    wanted = _headers(target, major) if target or major or not tensorrt_include else None
    click.echo(library.build(folder(tensorrt_include), folder(cuda_include), folder(cubins), archs, folder(out), say, wanted))


@command.command("path", short_help="Print where the library is.")
@_FOR
@_MAJOR
def path(target: str | None, major: int | None) -> None:
    """Print the path of the library that would be loaded."""
    from sessa_deploy.plugins import library

    click.echo(library.find(_headers(target, major)))


@command.command("check", short_help="Load the library and say what it offers.")
@click.argument("path", required=False, type=PATH)
@_FOR
@_MAJOR
def check(path: str | None, target: str | None, major: int | None) -> None:
    """Load the library at PATH (default: the one that would be used), without a GPU, and say what it offers."""
    from pathlib import Path

    from sessa_deploy.plugins import library

    wanted = _headers(target, major)
    seen = library.check(Path(path) if path else None, wanted)
    if wanted is not None and (path is None or target or major):
        library.require_major(seen, wanted)
    click.echo(f"{seen.path}: IPlugin{seen.interface}, headers of TensorRT {seen.major}, {seen.size / 2**20:.1f} MiB, loads")
