"""TensorRT as a backend: its engine, contexts and profiles in a session of runtime/device. numpy, tensorrt and the CUDA driver only."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from sessa_deploy.contract import ALL_LOGITS_RANK, FEW_ROWS, INPUT_IDS, LOGITS, NEW_LENGTH, PAST_LENGTH, STEP_ROWS, graph_inputs, graph_outputs
from sessa_deploy.cuda import Cuda, devices
from sessa_deploy.errors import SessaError, UserError
from sessa_deploy.files import write_whole
from sessa_deploy.plugins import library
from sessa_deploy.process import command
from sessa_deploy.runtime.bundle import Bundle
from sessa_deploy.runtime.device.backend import DeviceBackend
from sessa_deploy.runtime.device.buffers import Buffers, Extent
from sessa_deploy.runtime.device.kernels import images
from sessa_deploy.runtime.report import note
from sessa_deploy.runtime.trt import api as trt_api
from sessa_deploy.runtime.trt import plan as trt_plan


class TrtBackend(DeviceBackend):
    """A bundle's TensorRT engine on the first GPU.

    batch, capacity: up to what the engine was built for (capacity None takes that). graph: replay decode steps as a CUDA graph; False enqueues them
    one by one, for comparison. plugin: path of the plugin library, found by itself by default. kernels: where the decode kernels come from, the
    plugin library by default. Which TensorRT runs it is decided by the bundle's engines, this GPU and what is installed. Raises UserError if TensorRT,
    the plugin or a fitting engine is missing, or a plan's checksum does not match.
    """

    name = "trt"
    engine_name = "TensorRT"
    row_alignment = 256  # of an engine's inputs
    _cache: Any = None  # of kernels compiled on this card
    _prefill_row: int | None
    _prefill_behind: int | None
    _prefill_tokens: int
    draft_rows: tuple[int, ...]

    def __init__(self, bundle: Bundle, batch: int = 1, capacity: int | None = None, graph: bool = True, plugin: Path | None = None,
                 kernels: Path | None = None, cuda: Any = None) -> None:
        self._few_rows: dict[int, Any] = {}  # number of rows -> context
        here = _archs() if cuda is None else [cuda.arch]
        product = product_here(bundle, here)
        for arch in here[:1]:
            trt_api.check_target(product, arch)
        self._trt = trt_api.load(product.name)
        plugin = library.load(self._trt, plugin, trt_api.interface(self._trt))
        cuda = Cuda() if cuda is None else cuda
        with self._opening(cuda):
            sm = f"sm_{cuda.arch}"
            folder, self.info = trt_plan.choose(bundle, self._trt.__version__, sm, product.name)
            super().__init__(bundle.config, batch, self.info.capacity if capacity is None else capacity, graph)
            self._cuda = cuda
            _check_limits(bundle, self.info, self.batch, self.capacity)
            self.best_chunk = self.info.max_prompt
            self._log = trt_api.logger(self._trt)
            plan = trt_plan.read_plan(bundle, folder, self.info)
            self._cuda.enter()
            self._runtime = self._trt.Runtime(self._log)
            self.engine = self._runtime.deserialize_cuda_engine(plan)
            if self.engine is None:
                raise UserError("TensorRT cannot load the engine", got=self._reasons(), fix=command("build", bundle.path, "--force"))
            kinds = self._kinds(bundle)
            self.all_logits = len(self.engine.get_tensor_shape(LOGITS)) == ALL_LOGITS_RANK
            self._buffers = Buffers(self._cuda, bundle.config, bundle.precision, self.batch, self.info.capacity, self.info.max_prompt, str(kinds[INPUT_IDS]),
                                    images(kernels or plugin, self._cuda.arch), self.all_logits)  # fmt: skip
            gpu = next((d.name for d in devices()), "gpu")
            self._cache_file = trt_api.cache_file("runtime", gpu, sm, self._trt.__version__)
            self._kept = self._cache_file.read_bytes() if product.compiles and self._cache_file.is_file() else None
            self._config, self._cache = trt_api.runtime_config(self._trt, self.engine, self._kept)
            size = trt_api.scratch_size(self.engine)
            scratch = self._cuda.allocate(size)
            # whose cache addresses that context has, what its new rows lie behind, and how many its shapes are for
            self._prefill_row, self._prefill_behind, self._prefill_tokens = None, None, self.info.max_prompt
            self._scratch = scratch, size
            self._prefill, self._decode = (self._context(*of) for of in ((trt_plan.PREFILL, self.info.max_prompt), (trt_plan.DECODE, 1)))

    def expect_rows(self, rows: int) -> None:
        most = min(rows, STEP_ROWS, self._own().chunk)
        self._cuda.enter()
        if trt_api.shares_profiles(self._trt):
            self.recorded_tokens, self.most_rows = most, STEP_ROWS
        else:
            if self.info.rows_profile == trt_plan.ROWS and not self._few_rows:  # one context for all such steps, and so one size
                self.padded_rows = min(most, FEW_ROWS)
            self.most_rows = most = max(1, self.padded_rows)
        super().expect_rows(rows)
        if self.padded_rows and self.draft_rows:
            self.draft_rows = (self.padded_rows,)
        sizes = {most, *self.draft_rows} - {1}
        if most == 1 or any(self._few(size) is None for size in sizes):  # steps enqueued piece by piece take many times as long
            self.most_rows = 1
            self.draft_rows = ()
            note("prompt lookup drafts nothing, as this engine has no fast steps of several rows; fix: sessa-deploy build BUNDLE --force")

    def _run(self, step: Extent) -> None:
        context = self._decode
        few = self._few(step.tokens) if step.row is None and step.tokens > 1 and self._records(step.tokens) else None
        if few is not None:
            context = few
        elif step.tokens > 1 or step.row is not None:
            context = self._prefill
            if step.row != self._prefill_row:
                self._prefill_row = -1  # nobody's, should that fail halfway
                self._bind(context, step)
                self._prefill_behind, self._prefill_tokens = step.behind, step.tokens
                self._prefill_row = step.row  # last: what Ctrl-C leaves undone is bound anew
            elif step.tokens != self._prefill_tokens:
                self._prefill_tokens = -1
                if not context.set_input_shape(INPUT_IDS, (step.batch, step.tokens)):
                    raise self._failure(f"a prefill step of {step.tokens} tokens")
                self._prefill_tokens = step.tokens
            if step.behind != self._prefill_behind:
                self._prefill_behind = -1
                self._address(context, self._own().new_addresses(step))
                self._prefill_behind = step.behind
        if not context.execute_async_v3(self._cuda.stream):
            raise self._failure("a step")

    def _few(self, tokens: int) -> Any:
        """The context of steps of so many rows, which a CUDA graph may be of: its shapes never change. None where TensorRT gives none; such steps are then
        enqueued piece by piece."""
        if tokens not in self._few_rows:
            self._few_rows[tokens] = None  # not asked for again, should that be refused
            with contextlib.suppress(SessaError):
                self._few_rows[tokens] = self._context(self.info.rows_profile, tokens)
        if self._few_rows[tokens] is None:
            self.recorded_tokens, self.padded_rows = 1, 0
        return self._few_rows[tokens]

    def _release(self) -> None:
        self._keep_kernels()
        self._few_rows = {}
        self._prefill = self._decode = self._cache = self._config = self.engine = self._runtime = None

    def _keep_kernels(self) -> None:
        """Write the kernels that were compiled on this card to where the next session finds them; one that cannot be written is compiled again."""
        if self._cache is None:
            return
        data = bytes(self._cache.serialize())
        if data != self._kept:
            with contextlib.suppress(OSError, UserError):
                self._cache_file.parent.mkdir(parents=True, exist_ok=True)
                write_whole(self._cache_file, data)

    def _context(self, profile: int, tokens: int) -> Any:
        """A context of a profile, for steps of all sequences over that many tokens."""
        context = trt_api.context(self._trt, self.engine, profile, self._cuda.stream, *self._scratch, self._log, self._config)
        self._cuda.wait()
        self._bind(context, Extent(self.batch, tokens))
        return context

    def _bind(self, context: Any, step: Extent) -> None:
        """Tell a context all shapes and addresses of a step."""
        buffers = self._own()
        for name, shape in buffers.shapes(step).items():
            if not context.set_input_shape(name, shape):
                raise self._failure(f"the shape {shape} of {name}")
        self._address(context, buffers.addresses(step))

    def _address(self, context: Any, addresses: dict[str, int]) -> None:
        for name, address in addresses.items():
            if not context.set_tensor_address(name, address):
                raise self._failure(f"the address of {name}")

    def _kinds(self, bundle: Bundle) -> dict[str, str | None]:
        """numpy's type names of all inputs and outputs, checked against the contract."""
        inputs, outputs = trt_api.inputs_and_outputs(self.engine, self._trt)
        layers = bundle.config.n_layers
        kinds = {n: trt_api.numpy_dtype(self._trt, self.engine.get_tensor_dtype(n)) for n in [*inputs, *outputs]}
        storage = {"fp32": "float32", "fp16": "float16", "bf16": None}[bundle.precision]
        wanted: dict[str, tuple[str | None, ...]] = dict.fromkeys([*graph_inputs(layers), *graph_outputs(layers)], (storage,))
        wanted |= {INPUT_IDS: ("int32", "int64"), PAST_LENGTH: ("int32",), NEW_LENGTH: ("int32",), LOGITS: ("float32",)}
        wrong = [n for n, allowed in wanted.items() if n not in kinds or kinds[n] not in allowed] + [n for n in kinds if n not in wanted]
        if wrong:
            got = ", ".join(f"{n}: {kinds.get(n, 'absent')}" for n in wrong[:5])
            raise UserError("the engine's inputs and outputs are not what the manifest's config says", got=got, fix=command("build", bundle.path, "--force"))
        return kinds

    def _failure(self, what: str) -> SessaError:
        return SessaError(f"TensorRT refused {what}: {self._reasons()}; fix: sessa-deploy build BUNDLE --force, or use --backend ort")

    def _reasons(self) -> str:
        return " / ".join(self._log.lines[-3:]) or "no reason given"


def product_here(bundle: Bundle, archs: list[int] | None = None) -> trt_api.Product:
    """Which TensorRT is to run a bundle on this machine, by its engines, the first GPU (archs None: asked now) and what is installed."""
    here = _archs() if archs is None else archs
    installed = [p.name for p in trt_api.PRODUCTS if trt_api.importable(p)]
    return trt_api.wanted(trt_plan.product_for(bundle, here[0] if here else None, installed) if installed else None)


def _archs() -> list[int]:
    return [int(d.arch.removeprefix("sm_")) for d in devices()]


def _check_limits(bundle: Bundle, info: trt_plan.EngineInfo, batch: int, capacity: int) -> None:
    mend = command("build", bundle.path)
    if batch > info.max_batch:
        raise UserError("the engine was built for fewer sequences", got=f"max_batch {batch}", allowed=f"1..{info.max_batch}", fix=f"{mend} --max-batch {batch}")
    if capacity > info.capacity:
        raise UserError("the engine was built for a shorter context", got=f"a capacity of {capacity} tokens", allowed=f"1..{info.capacity}",
                        fix=f"{mend} --max-context {capacity}")
