"""A bundle's graph to a TensorRT engine in the same bundle. onnx, numpy, tensorrt and the CUDA driver; no torch.

One plan holds three optimisation profiles, prefill (1..max_prompt tokens), decode (one token) and rows (2..16, to verify drafts), all with caches of the
whole capacity. With more than one profile no TensorRT takes the flag DISTRIBUTIVE_INDEPENDENCE, which would promise that a sequence's bits do not depend
on the others of its batch. Our kernels keep that promise without it (plugins/README.md, Numbers), so it holds where they compute the layers: between the
plugins of such a graph stands nothing that sums. Products left to TensorRT (`--layers tensorrt`, float32) are its own to round, the same for the same batch.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sessa_deploy import contract
from sessa_deploy.checks import integer
from sessa_deploy.cuda import Cuda, devices, driver_version
from sessa_deploy.errors import SessaError, UserError
from sessa_deploy.export.engine.graph import PreparedGraph
from sessa_deploy.export.engine.prepare import (
    FLOAT32,
    PLUGIN,
    Target,
    all_logits,
    check_layers,
    check_precision,
    check_weights,
    plugin_nodes,
    prepare,
    unavailable,
)
from sessa_deploy.export.trt import check as trt_check
from sessa_deploy.export.trt import limits as trt_limits
from sessa_deploy.export.trt import parser as trt_parser
from sessa_deploy.export.trt.limits import DEFAULT_PROMPT, Machine, Recipe, Shapes
from sessa_deploy.files import write_whole
from sessa_deploy.plugins import library
from sessa_deploy.runtime.bundle import Bundle, add_files, hash_file
from sessa_deploy.runtime.device.buffers import check_rows
from sessa_deploy.runtime.device.kernels import images
from sessa_deploy.runtime.trt import api as trt_api
from sessa_deploy.runtime.trt import plan as trt_plan

Progress = Callable[[str, int, int], None]  # (what is being done, steps done, steps in all or 0)
_POLL = 0.1  # seconds


@dataclass(frozen=True)
class Built:
    """bundle: with the engine in it; folder: the engine's, inside the bundle; fresh: False where the engine was there already.

    notes: which roads were taken that nobody asked for, and why, one line each.
    """

    bundle: Bundle
    folder: str
    info: trt_plan.EngineInfo
    fresh: bool
    notes: tuple[str, ...] = ()


def build_engine(
    bundle: Bundle | str | Path, max_batch: int = 1, max_context: int | None = None, max_prompt: int = DEFAULT_PROMPT, workspace: int | None = None,
    opt_level: int | None = None, precision: str | None = None, plugin: Path | None = None, force: bool = False, verbose: bool = False,
    progress: Progress | None = None, layers: str | None = None, target: str | None = None, archs: Sequence[int] | None = None,
) -> Built:
    """Build the engine of a bundle, for this machine's first GPU unless `archs` says otherwise, and put it into the bundle by rename.

    max_batch sequences of max_context tokens (None: the model's own), prompts in chunks of max_prompt. workspace: bytes TensorRT may take for scratch
    (None: what it likes). opt_level: 0..5. precision: refused unless it is the graph's own, which the graph alone decides. plugin: the library's path.
    layers: who computes what stands around the attentions, "plugin" or "tensorrt"; None: the plugin, where it has the kernels.
    The plugin computes 16-bit layers only; of float32 ones, where nothing is asked for, the rotary tables. What is asked for and cannot be had is refused;
    which default was taken and why is in Built.notes. target: "tensorrt" or "rtx" (None: TensorRT, or the one that alone is installed). archs: compute
    capabilities to build for, [86] for 8.6, on a machine that may have no GPU; TensorRT for RTX alone takes them (None: this GPU's, without one all).
    An engine whose key is the same is kept unless `force`. KeyboardInterrupt ends the build and leaves the bundle as it was.
    Raises UserError on what is missing, does not fit or is refused; SessaError if TensorRT fails.
    """
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    shapes = trt_limits.shapes_for(bundle.config, max_batch, max_context, max_prompt)
    workspace, opt_level = _check_options(workspace, opt_level, layers)
    product = trt_api.wanted(target)
    targets = _targets(product, archs, 0 if bundle.weights is None else contract.WEIGHT_FORMATS[bundle.weights.format].arch)
    check_weights(bundle, "a TensorRT engine", layers, targets)
    trt = trt_api.load(product.name)
    _check_precision(trt, bundle, precision)
    check_rows(bundle.config, bundle.precision)
    engine = _target(trt)
    if layers == PLUGIN and bundle.precision == "fp32":
        raise unavailable(bundle, engine, FLOAT32)
    plugin = library.load(trt, plugin, trt_api.interface(trt))
    for arch in targets:
        images(plugin, arch)
    plugin_sha256, machine = hash_file(plugin), this_machine(trt, targets)
    takes = list(targets) or [int(machine.arch.removeprefix("sm_"))]
    bundle.require_engine_weights("a TensorRT engine", takes)
    recipe = Recipe(shapes, machine, workspace, opt_level, layers or PLUGIN, targets).keyed(bundle, plugin_sha256)
    folder = trt_plan.engine_folder(machine.arch, machine.tensorrt, bundle.precision)
    present = _present(bundle, folder)
    if present is not None and present.key == recipe.key and layers in (None, present.layers) and not force:
        return Built(bundle, folder, present, fresh=False)
    prepared, taken, notes = prepare(bundle, engine, layers)
    names = [n for n in (contract.MODEL_FILE, contract.MODEL_DATA_FILE) if n in bundle]
    weights = sum(bundle.file(n).stat().st_size for n in names)
    if machine.total:  # the memory of a GPU that is elsewhere is not known
        trt_limits.require_memory(bundle.config, bundle.precision, weights, shapes, machine.free, tuple(prepared.inlined), all_logits(prepared.model))
    begun = time.monotonic()
    plan = _build(trt, bundle, prepared, recipe, verbose, progress or (lambda what, done, of: None))
    info = trt_plan.EngineInfo(
        key=recipe.key, plan_sha256=hashlib.sha256(plan).hexdigest(), plan_size=len(plan), tensorrt=machine.tensorrt, arch=machine.arch, gpu=machine.gpu,
        driver=machine.driver, precision=bundle.precision, max_batch=shapes.max_batch, capacity=shapes.capacity, max_prompt=shapes.max_prompt,
        plugin_sha256=plugin_sha256, seconds=round(time.monotonic() - begun, 1), inlined=prepared.inlined, layers=taken,
        product=product.name, archs=takes, profiles=trt_plan.profiles(shapes.max_batch, shapes.max_prompt),
        plugins=plugin_nodes(prepared.model),
    )  # fmt: skip
    written = add_files(bundle, {f"{folder}/{trt_plan.PLAN_FILE}": plan, f"{folder}/{trt_plan.ENGINE_FILE}": info.to_json()})
    return Built(written, folder, info, fresh=True, notes=tuple(notes))


def this_machine(trt: Any, targets: tuple[int, ...] = ()) -> Machine:
    """The first GPU, its free memory, and the versions; no GPU is needed where `targets` says what to build for. Raises UserError where it is."""
    found = devices()
    if targets:
        free, total = _free_memory() if found else (0, 0)
        gpu = found[0].name if found else "built ahead of time"
        return Machine(gpu, trt_plan.place(trt_api.of(trt).name, targets), free, total, trt.__version__, driver_version() or "unknown")
    if not found:
        raise UserError("there is no CUDA GPU here", got="no device from the driver", allowed="the GPU that will run the engine", fix="build on that machine")
    free, total = _free_memory()
    return Machine(found[0].name, found[0].arch, free, total, trt.__version__, driver_version() or "unknown")


def timing_cache_file(machine: Machine) -> Path:
    """Where tactic timings for this GPU and this TensorRT are kept."""
    return trt_api.cache_file("timing", machine.gpu, machine.arch, machine.tensorrt)


def parse(trt: Any, network: Any, log: Any, prepared: PreparedGraph, path: Path) -> Any:
    """Read the graph into `network`; path: of model.onnx, beside which its data file lies. Raises UserError with every parser error.

    Returns the parser, which owns the network's weights and must live until the engine is built.
    """
    parser = trt.OnnxParser(network, log)
    if parser.parse(prepared.model.SerializeToString(), str(path)):
        return parser
    errors = trt_api.parser_errors(parser, [n.name for n in prepared.model.graph.node]) or log.lines[-3:] or ["no reason given"]
    raise UserError(f"TensorRT's parser refused the graph ({len(errors)} error{'s' if len(errors) > 1 else ''})", got=" / ".join(errors),
                    fix="sessa-deploy export CHECKPOINT --out BUNDLE --opset 17, and report what remains")  # fmt: skip


def add_profiles(builder: Any, config: Any, bundle: Bundle, shapes: Shapes) -> None:
    """The profiles of `trt_plan.profiles`, in the order of its PREFILL, DECODE and ROWS. Raises SessaError if TensorRT refuses one."""
    model, batches = bundle.config, (1, shapes.max_batch, shapes.max_batch)
    for name, tokens in trt_plan.profiles(shapes.max_batch, shapes.max_prompt).items():
        profile = builder.create_optimization_profile()
        profile.set_shape(contract.INPUT_IDS, *map(tuple, tokens))
        for length in (contract.PAST_LENGTH, contract.NEW_LENGTH):
            profile.set_shape(length, *((b,) for b in batches))
        for layer, field in contract.cache_entries(model.n_layers):
            row = contract.cache_row_shape(field, model.d_model, model.kv_heads, model.head_dim)
            profile.set_shape(contract.past_name(layer, field), *((b, shapes.capacity, *row) for b in batches))
        if config.add_optimization_profile(profile) < 0:
            raise SessaError(f"TensorRT refused the optimisation profile {name} of {tokens[-1][1]} tokens; fix: lower --max-prompt or --max-context")


def keep_float32(trt: Any, network: Any, types: Mapping[str, int]) -> int:
    """8.6 only: pin every layer whose output the graph keeps in float32 to float32; returns how many. The FP16 flag alone would let it round them.

    types: value name -> ONNX element type; a tensor that the parser made on its own goes by the type it says it has.
    """
    skipped = {getattr(trt.LayerType, n) for n in ("SHAPE", "CONSTANT", "CAST", "PLUGIN_V2") if hasattr(trt.LayerType, n)}
    pinned = 0
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        outputs = [layer.get_output(j) for j in range(layer.num_outputs)]
        single = contract.PRECISIONS["fp32"].onnx
        kept = [j for j, x in enumerate(outputs) if x is not None and types.get(x.name, single if x.dtype == trt.float32 else None) == single]
        if layer.type in skipped or not kept:
            continue
        layer.precision = trt.float32
        for j in kept:
            layer.set_output_type(j, trt.float32)
        pinned += 1
    return pinned


def _build(trt: Any, bundle: Bundle, prepared: PreparedGraph, recipe: Recipe, verbose: bool, progress: Progress) -> bytes:
    """The plan's bytes, checked by the engine inspector."""
    log = trt_api.logger(trt, verbose)
    progress("reading the graph", 0, 0)
    builder = trt.Builder(log)
    network = trt_api.create_network(trt, builder)
    parser = parse(trt, network, log, prepared, bundle.model)
    config = builder.create_builder_config()
    add_profiles(builder, config, bundle, recipe.shapes)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    trt_api.compute_capabilities(trt, config, recipe.targets)
    trt_api.plain_tactics(trt, config)
    trt_api.set_flag(trt, config, "TF32", on=False)  # fp32 means float32
    trt_api.set_flag(trt, config, "STRICT_NANS")  # 10 and later: a poisoned row stays one
    if recipe.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, recipe.workspace)
    if recipe.opt_level is not None:
        config.builder_optimization_level = recipe.opt_level
    if not trt_api.strongly_typed(trt) and bundle.precision == "fp16":
        trt_api.set_flag(trt, config, "FP16")
        trt_api.set_flag(trt, config, "OBEY_PRECISION_CONSTRAINTS")
        keep_float32(trt, network, prepared.types)
    cache_file = timing_cache_file(recipe.machine)
    timings = _load_timings(config, cache_file) if trt_api.of(trt).timings else None
    plan = _in_thread(trt, lambda: builder.build_serialized_network(network, config), config, progress)
    if plan is None:
        raise SessaError(f"TensorRT could not build the engine: {' / '.join(log.lines[-4:]) or 'no reason given'}; "
                         "fix: lower --max-batch, --max-context or --max-prompt, or raise --workspace")  # fmt: skip
    del parser
    if timings is not None:
        _save_timings(config, cache_file)
    data = bytes(plan)
    progress("checking the engine", 0, 0)
    engine = None
    if not trt_api.of(trt).ahead:  # else the GPU that loads it need not be here
        engine = trt.Runtime(log).deserialize_cuda_engine(data)
        if engine is None:
            raise SessaError(f"TensorRT cannot load the engine it built: {' / '.join(log.lines[-3:])}; fix: sessa-deploy plugin check")
    plugins = {n.name for n in prepared.model.graph.node if n.domain == contract.DOMAIN}
    trt_check.require_caches_in_place(trt_api.layer_information(trt, engine, log), prepared.direct, plugins)
    return data


def _in_thread(trt: Any, work: Callable[[], Any], config: Any, progress: Progress) -> Any:
    """Run `work` beside the main thread, which draws progress and hears Ctrl-C; TensorRT releases Python's lock while it builds."""
    cancel, over, result = threading.Event(), threading.Event(), list[tuple[Any, BaseException | None]]()
    state: tuple[str, int, int] = ("building the engine", 0, 0)

    def step(phase: str, done: int, of: int) -> bool:
        nonlocal state
        state = (phase, done, of)
        return not cancel.is_set()

    def run() -> None:
        try:
            result.append((work(), None))
        except BaseException as error:
            result.append((None, error))
        finally:
            over.set()

    monitor = trt_api.watch(trt, config, step)
    try:
        threading.Thread(target=run, name="sessa-build", daemon=True).start()
        while not over.wait(_POLL):  # an event: an interrupted Thread.join takes the thread for ended
            progress(*state)
    except (KeyboardInterrupt, SystemExit):
        cancel.set()
        if monitor is not None:  # the builder stops at its next step; without a monitor the caller ends the process
            over.wait(30.0)
        raise
    value, error = result[0]
    if error is not None:
        raise error
    return value


def _target(trt: Any) -> Target:
    """This TensorRT, as what a graph is prepared for."""
    ours = "its kernels are the tuned ones" if trt_api.strongly_typed(trt) else f"TensorRT {trt.__version__} would compute them in float32"
    interface = (trt_api.interface(trt),)
    return Target(f"TensorRT {trt.__version__}", "TensorRT", trt_limits.LAYERS[1], f"{ours}; --layers tensorrt gives TensorRT's own",
                  complaints=lambda model: trt_parser.complaints(model, interface, contract.ENGINE_OPS))


def _present(bundle: Bundle, folder: str) -> trt_plan.EngineInfo | None:
    try:
        return trt_plan.engines(bundle).get(folder)
    except UserError:  # a description that cannot be read is replaced
        return None


def _check_options(workspace: int | None, opt_level: int | None, layers: str | None) -> tuple[int | None, int | None]:
    check_layers(trt_limits.LAYERS, layers)
    low, high = trt_limits.OPT_LEVELS
    return (None if workspace is None else integer("--workspace", workspace, 1, allowed="MiB, at least 1"),
            None if opt_level is None else integer("--opt-level", opt_level, low, high, allowed=f"{low}..{high}"))


def _targets(product: trt_api.Product, archs: Sequence[int] | None, least: int) -> tuple[int, ...]:
    """Compute capabilities to build for, ascending; none: this machine's GPU, whatever it is. least: the oldest that the weights run on, where all that the
    product takes are meant. Raises UserError on those that the product does not take."""
    if not product.ahead:
        if archs:
            ahead = next(p for p in trt_api.PRODUCTS if p.ahead)
            raise UserError(f"{product.title} builds for this machine's GPU alone", got=f"--arch {','.join(map(str, archs))}", allowed="no --arch",
                            fix=f"--for {ahead.name} ({ahead.title}: {', '.join(f'sm_{t}' for t in ahead.targets)}), or build on that machine")
        return ()
    here = [int(d.arch.removeprefix("sm_")) for d in devices()[:1]]
    for arch in archs or here:
        trt_api.check_target(product, arch)
    return tuple(sorted(set(archs or here or (t for t in product.targets if t >= least))))


def _check_precision(trt: Any, bundle: Bundle, asked: str | None) -> None:
    mend = bundle.export_hint(" --precision")
    if asked is not None and trt_api.strongly_typed(trt):
        what = f"TensorRT {trt.__version__} networks are strongly typed: the exported graph decides the precision, the build cannot"
        raise UserError(what, got=f"--precision {asked}", allowed=f"none; this graph is {bundle.precision}", fix=f"{mend} {asked}")
    check_precision(bundle, asked)
    if bundle.weights is not None and contract.WEIGHT_FORMATS[bundle.weights.format].opset > contract.DEFAULT_OPSET and not trt_api.strongly_typed(trt):
        raise UserError(f"TensorRT {trt.__version__} takes no weights in {bundle.weights.format}", got=str(bundle.path), allowed="int8",
                        fix=bundle.export_hint(" --precision fp16 --weights int8"))
    if bundle.precision == "bf16" and not trt_api.strongly_typed(trt):
        raise UserError(f"TensorRT {trt.__version__} has no bfloat16", got=str(bundle.path), allowed="fp32 or fp16", fix=f"{mend} fp16")


def _free_memory() -> tuple[int, int]:
    cuda = Cuda()
    try:
        return cuda.memory()
    finally:
        cuda.close()


def _load_timings(config: Any, path: Path) -> Any:
    """Give the builder the timings kept from earlier builds; damaged ones are passed over. What is returned must live until the engine is built."""
    try:
        data = path.read_bytes()
    except OSError:
        data = b""
    cache = config.create_timing_cache(data)
    if cache is None and data:
        cache = config.create_timing_cache(b"")
    if cache is not None and not config.set_timing_cache(cache, False) and data:
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _save_timings(config: Any, path: Path) -> None:
    """Keep the timings; a folder that cannot be written costs time only."""
    cache = config.get_timing_cache()
    if cache is None:
        return
    with contextlib.suppress(OSError, UserError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, bytes(cache.serialize()))
