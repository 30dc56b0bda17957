"""`sessa-deploy plugin`: build, find and check the TensorRT plugin library."""

from __future__ import annotations

import click

from sessa_deploy.cli.options import ARCHS, PATH, TENSORRT_MAJOR


@click.group("plugin")
def command() -> None:
    """Build, find and check libsessa_plugin.so, which runs feedback attention inside TensorRT."""


@command.command("build", short_help="Build the library; needs CMake and a C++ compiler.")
@click.option("--tensorrt-include", type=PATH, help="Folder of NvInfer.h, TensorRT 8.6, 10 or 11 [default: an installed one, else fetched].")
@click.option("--cuda-include", type=PATH, help="Folder of cuda_runtime_api.h [default: the toolkit's, else none is needed].")
@click.option("--cubins", type=PATH, help="Folder written by `python -m sessa_deploy.plugins.lower` [default: lower now; needs torch and triton].")
@click.option("--arch", "archs", type=ARCHS, help="Compute capabilities to lower for, e.g. 90,86 [default: all].")
@click.option("--out", type=PATH, help="Folder for the library [default: where `plugin path` looks].")
def build(tensorrt_include: str | None, cuda_include: str | None, cubins: str | None, archs: str | None, out: str | None) -> None:
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

    click.echo(library.build(folder(tensorrt_include), folder(cuda_include), folder(cubins), archs, folder(out), say))


@command.command("path", short_help="Print where the library is.")
@click.option("--tensorrt", "major", type=TENSORRT_MAJOR, help="TensorRT major version [default: the installed one's].")
def path(major: int | None) -> None:
    """Print the path of the library that would be loaded."""
    from sessa_deploy.plugins import library

    click.echo(library.find(major))


@command.command("check", short_help="Load the library and say what it offers.")
@click.argument("path", required=False, type=PATH)
@click.option("--tensorrt", "major", type=TENSORRT_MAJOR, help="TensorRT major version [default: the installed one's].")
def check(path: str | None, major: int | None) -> None:
    """Load the library at PATH (default: the one that would be used), without a GPU, and say what it offers."""
    from pathlib import Path

    from sessa_deploy.plugins import library

    seen = library.check(Path(path) if path else None, major)
    versions = "TensorRT 10 and 11" if seen.interface == "V3" else "TensorRT 8.6"
    click.echo(f"{seen.path}: IPlugin{seen.interface} for {versions}, {seen.size / 2**20:.1f} MiB, loads")
