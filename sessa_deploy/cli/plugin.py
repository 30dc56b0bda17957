"""`sessa-deploy plugin`: build, find and check the libraries of our operations, for TensorRT and for ONNX Runtime on CUDA."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from sessa_deploy.cli.options import ARCHS, PATH, TARGET, TENSORRT_MAJOR

if TYPE_CHECKING:
    from sessa_deploy.plugins.library import Checked


@click.group("plugin")
def command() -> None:
    """Build, find and check the libraries that run a Sessa layer on a GPU: libsessa_plugin.so inside TensorRT, libsessa_ort.so inside ONNX Runtime."""


_FOR = click.option("--for", "target", type=TARGET,
                    help="TensorRT, TensorRT for RTX or ONNX Runtime [default: TensorRT, or TensorRT for RTX where that alone is installed].")  # fmt: skip
_MAJOR = click.option("--tensorrt", "major", type=TENSORRT_MAJOR, help="TensorRT major version [default: the installed one's].")


def _headers(target: str | None, major: int | None) -> int | None:
    """Major of TensorRT's headers that fit: what was asked for, else that of the installed one; None where nothing says, and for ONNX Runtime."""
    from sessa_deploy.errors import UserError
    from sessa_deploy.runtime.trt import api

    if target == "ort":
        if major is not None:
            raise UserError("the library for ONNX Runtime has no TensorRT major", got=f"--tensorrt {major}", allowed="--for ort alone")
        return None
    product = api.wanted(target)
    if major is not None and product.headers not in (None, major):
        raise UserError(f"{product.title} takes plugins of other headers", got=f"--tensorrt {major}", allowed=f"{product.headers}",
                        fix=f"--for {product.name} alone")
    return major or api.header_major(product, api.installed_version(product))


def _product(target: str | None) -> str:
    return "ort" if target == "ort" else "tensorrt"


@command.command("build", short_help="Build the library; needs CMake and a C++ compiler.")
@_FOR
@click.option("--tensorrt", "major", type=TENSORRT_MAJOR, help="TensorRT major version [default: of --tensorrt-include, else the installed one's, else 11].")
@click.option("--tensorrt-include", type=PATH, help="Folder of NvInfer.h of that TensorRT [default: an installed one, else fetched].")
@click.option("--cuda-include", type=PATH, help="Folder of cuda_runtime_api.h [default: the toolkit's, else none is needed].")
@click.option("--onnxruntime-include", type=PATH, help="Folder of onnxruntime_c_api.h, of 1.18 or later [default: an installed one, else fetched].")
@click.option("--cubins", type=PATH, help="Folder written by `python -m sessa_deploy.plugins.lower` [default: lower now; needs torch and triton].")
@click.option("--arch", "archs", type=ARCHS, help="Compute capabilities to lower for, e.g. 90,86 [default: all].")
@click.option("--out", type=PATH, help="Folder for the library [default: where `plugin path` looks].")
def build(
    target: str | None, major: int | None, tensorrt_include: str | None, cuda_include: str | None, onnxruntime_include: str | None, cubins: str | None,
    archs: str | None, out: str | None,
) -> None:  # fmt: skip
    """Build the library with CMake and a C++ compiler; no CUDA compiler and no GPU are needed."""
    from sessa_deploy.errors import UserError
    from sessa_deploy.files import check_folder
    from sessa_deploy.plugins import library

    if out is not None:
        check_folder(out, "--out", "the library's folder")
    for name, given, fits, allowed in (
        ("--onnxruntime-include", onnxruntime_include, target == "ort", "--for ort"),
        ("--tensorrt-include", tensorrt_include, target != "ort", "--for tensorrt or rtx"),
        ("--cuda-include", cuda_include, target != "ort", "--for tensorrt or rtx"),
    ):
        if given is not None and not fits:
            raise UserError(f"{name} is of another library", got=f"--for {target}" if target else "no --for", allowed=allowed)

    def folder(text: str | None) -> Path | None:
        return Path(text) if text else None

    def say(line: str) -> None:
        click.echo(line, err=True)

    # headers that were named decide by themselves, unless a TensorRT was named too
    wanted = _headers(target, major) if target or major or not tensorrt_include else None
    made = library.build(folder(tensorrt_include), folder(cuda_include), folder(cubins), archs, folder(out), say, wanted, _product(target),
                         folder(onnxruntime_include))  # fmt: skip
    click.echo(made)


@command.command("path", short_help="Print where the library is.")
@_FOR
@_MAJOR
def path(target: str | None, major: int | None) -> None:
    """Print the path of the library that would be loaded."""
    from sessa_deploy.plugins import library

    click.echo(library.find(_headers(target, major), _product(target)))


@command.command("check", short_help="Load the library and say what it offers.")
@click.argument("path", required=False, type=PATH)
@_FOR
@_MAJOR
def check(path: str | None, target: str | None, major: int | None) -> None:
    """Load the library at PATH (default: the one that would be used), without a GPU, and say what it offers; one for ONNX Runtime is registered with the
    installed one."""
    from sessa_deploy.plugins import library

    given = Path(path) if path else None
    if target == "ort" or (target is None and major is None and given is not None and given.name == library.ORT_LIBRARY):
        _headers("ort", major)
        seen = library.check(given, product="ort")
        click.echo(f"{seen.path}: C API of ONNX Runtime 1.{seen.major} and later, {_offers(seen)}; {_registered(seen.path)}")
        return
    wanted = _headers(target, major)
    seen = library.check(given, wanted)
    if wanted is not None and (path is None or target or major):
        library.require_major(seen, wanted)
    click.echo(f"{seen.path}: IPlugin{seen.interface}, headers of TensorRT {seen.major}, {_offers(seen)}")


def _offers(seen: Checked) -> str:
    return f"{len(seen.ops)} operations, sm_{', '.join(map(str, seen.archs))}, {seen.size / 2**20:.1f} MiB, loads"


def _registered(path: Path) -> str:
    """Register a library with the installed ONNX Runtime and say so, or that there is none."""
    from sessa_deploy.errors import MissingPackage, install_command
    from sessa_deploy.plugins import library
    from sessa_deploy.runtime.ort import session

    try:
        runtime = session.load()
    except MissingPackage:
        return f"no ONNX Runtime is here to take it ({install_command('onnxruntime', 'cuda')})"
    library.register(runtime.SessionOptions(), path)
    return f"ONNX Runtime {runtime.__version__} takes it"
