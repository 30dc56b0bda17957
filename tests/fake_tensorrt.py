"""TensorRT on host memory: a tensorrt module whose engines run model.onnx in ONNX Runtime, beside the driver of fake_cuda.py.

Only what the package touches exists, with the signatures of the real modules; version 8 and version 10 differ where the real ones do.
"""

from __future__ import annotations

import enum
import importlib.machinery
import json
import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from fake_cuda import SPLITS, HostCuda, fake_cubins, view

from sessa_deploy.contract import DOMAIN

__all__ = ["SPLITS", "HostCuda", "fake_cubins", "layer_list", "make"]


class DataType(enum.Enum):
    FLOAT, HALF, INT32, INT64, BOOL, BF16 = range(6)


_NUMPY = {DataType.FLOAT: np.float32, DataType.HALF: np.float16, DataType.INT32: np.int32, DataType.INT64: np.int64}


def layer_list(layers: Sequence[dict[str, Any]]) -> str:
    """The layers as the builder of TensorRT for RTX says them on its log: the names of plugins and inputs with the marks of profile and region."""
    lines = ["Layers:"]
    for i, layer in enumerate(layers):
        inputs = ", ".join(f"{{ Name: {x['Name']}, Dimensions: [-1,8,2], Format: (Linear) Row major linear format }}" for x in layer["Inputs"])
        name = f"{layer['Name']} [profile 1]_myl1_{i}"
        lines.append(f"Name: {name}, LayerType: {layer['LayerType']}, Inputs: [ {inputs}], Constants: [], Outputs: [], StreamId: 0")
    return "\n".join(lines)


def make(version: str, cuda: HostCuda, reject: Sequence[str] = (), copied: Sequence[str] = (), on_build: Callable[[Any], None] = lambda c: None,
         module: str = "tensorrt") -> Any:
    """A tensorrt module of `version`. reject: op types its parser refuses; copied: inputs that a fused region of its engines copies; on_build: called with
    the config. module "tensorrt_rtx": TensorRT for RTX, whose versions are 1.x."""
    rtx = module == "tensorrt_rtx"
    major = 11 if rtx else int(version.split(".")[0])
    trt: Any = types.ModuleType(module)
    trt.__spec__ = importlib.machinery.ModuleSpec(module, None)
    trt.calls = types.SimpleNamespace(network=None, config=None, contexts=[], caches=[], targets={})
    trt.__version__, trt.float32, trt.DataType = version, DataType.FLOAT, DataType

    def names(kind: str, *members: str) -> Any:
        return enum.IntEnum(kind, {m: i for i, m in enumerate(members)})

    trt.ILogger = type("ILogger", (), {"ERROR": "Severity.ERROR", "VERBOSE": "Severity.VERBOSE"})
    flags = ("FP16", "TF32", "OBEY_PRECISION_CONSTRAINTS") if major < 10 else ("TF32", "STRICT_NANS", "DISTRIBUTIVE_INDEPENDENCE")
    trt.BuilderFlag = names("BuilderFlag", *flags)
    trt.NetworkDefinitionCreationFlag = names("Creation", "EXPLICIT_BATCH") if major < 10 else names("Creation", "EXPLICIT_BATCH", "STRONGLY_TYPED")
    trt.TacticSource = names("TacticSource", "CUBLAS", "CUBLAS_LT", "CUDNN")
    trt.MemoryPoolType, trt.ProfilingVerbosity = names("Pool", "WORKSPACE"), names("Verbosity", "DETAILED")
    trt.LayerInformationFormat, trt.TensorIOMode = names("Format", "ONELINE", "JSON"), names("Mode", "NONE", "INPUT", "OUTPUT")
    trt.LayerType = names("LayerType", "ELEMENTWISE", "SHAPE", "CONSTANT", "CAST", "PLUGIN_V2")
    if major >= 10:
        trt.ExecutionContextAllocationStrategy = names("Strategy", "STATIC", "USER_MANAGED")
        trt.IProgressMonitor = type("IProgressMonitor", (), {})

    def layers(plugins: list[Any]) -> list[Any]:
        region = [{"Name": "__myl_CastAdd_myl1_3", "LayerType": "kgen", "Inputs": [{"Name": f"{n} [profile 1]"}]} for n in copied]
        return [{"Name": "body", "LayerType": "Other", "Inputs": []}, *plugins, *region]

    class Layer:
        num_outputs = 1

        def __init__(self, node: Any) -> None:
            self.name, self.node, self.precision, self.kinds = node.name, node, None, {}
            types_of = {"Shape": trt.LayerType.SHAPE, "Cast": trt.LayerType.CAST, "Constant": trt.LayerType.CONSTANT}
            self.type = types_of.get(node.op_type, trt.LayerType.ELEMENTWISE)

        def get_output(self, i: int) -> Any:
            return types.SimpleNamespace(name=self.node.output[i], dtype=DataType.FLOAT)

        def set_output_type(self, i: int, kind: Any) -> None:
            self.kinds[i] = kind

    class Network:
        def __init__(self, flags: int) -> None:
            self.flags, self.layers, self.path, self.model = flags, [], "", None
            trt.calls.network = self

        num_layers = property(lambda self: len(self.layers))

        def get_layer(self, i: int) -> Any:
            return self.layers[i]

    class Error:
        def __init__(self, index: int, op: str) -> None:
            self._index, self._op = index, op

        def node(self) -> int:
            return self._index

        def desc(self) -> str:
            return f"no importer for\n {self._op}"

    class Parser:
        def __init__(self, network: Network, log: Any) -> None:
            self.network, self.errors = network, []

        num_errors = property(lambda self: len(self.errors))

        def get_error(self, i: int) -> Error:
            return self.errors[i]

        def parse(self, data: bytes, path: str) -> bool:
            self.network.model, self.network.path = onnx.ModelProto.FromString(data), path
            self.errors = [Error(i, n.op_type) for i, n in enumerate(self.network.model.graph.node) if n.op_type in reject]
            self.network.layers = [Layer(n) for n in self.network.model.graph.node]
            return not self.errors

    class Profile(dict):
        def set_shape(self, name: str, low: Any, best: Any, high: Any) -> None:
            self[name] = [low, best, high]

    class Config:
        def __init__(self) -> None:
            self.flags, self.profiles, self.pools, self.cache, self.cleared = set(), [], {}, None, set()
            trt.calls.config = self

        def add_optimization_profile(self, profile: Profile) -> int:
            self.profiles.append(profile)
            return len(self.profiles) - 1

        def set_flag(self, flag: Any) -> None:
            self.flags.add(flag.name)

        def clear_flag(self, flag: Any) -> None:
            self.cleared.add(flag.name)

        def get_tactic_sources(self) -> int:
            return 0b111

        def set_tactic_sources(self, sources: int) -> None:
            self.sources = sources

        def set_memory_pool_limit(self, pool: Any, size: int) -> None:
            self.pools[pool.name] = size

        def create_timing_cache(self, data: bytes) -> Any:
            return None if data == b"damaged" else types.SimpleNamespace(data=data, serialize=lambda: b"timings")

        def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
            self.cache = cache
            return True

        def get_timing_cache(self) -> Any:
            return self.cache

    class Builder:
        def __init__(self, log: Any) -> None:
            self.log = log

        def create_network(self, flags: int) -> Network:
            return Network(flags)

        def create_builder_config(self) -> Config:
            return Config()

        def create_optimization_profile(self) -> Profile:
            return Profile()

        def build_serialized_network(self, network: Network, config: Config) -> Any:
            on_build(config)
            if "DISTRIBUTIVE_INDEPENDENCE" in config.flags and len(config.profiles) > 1:
                self.log.log(trt.ILogger.ERROR, "Distributive independence is not supported when multiple optimization profiles are used")
                return None
            ours = [n for n in network.model.graph.node if n.domain == DOMAIN]
            plugins = [{"Name": n.name, "LayerType": "Plugin", "Inputs": [{"Name": x} for x in n.input]} for n in ours]
            if rtx:
                self.log.log(trt.ILogger.VERBOSE, layer_list(layers(plugins)))
            return json.dumps({"model": network.path, "profiles": config.profiles, "plugins": plugins}).encode()

    class Context:
        def __init__(self, engine: Any) -> None:
            self.engine, self.shapes, self.addresses, self.profile = engine, {}, {}, {}
            trt.calls.contexts.append(self)

        def set_optimization_profile_async(self, index: int, stream: int) -> bool:
            assert major >= 10 or index not in self.engine.taken, "8.6 gives a profile to one context alone, and may end the process that asks for another"
            self.engine.taken.add(index)
            self.profile = self.engine.plan["profiles"][index]
            return stream == cuda.stream

        def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
            low, _, high = self.profile[name]
            self.shapes[name] = tuple(shape)
            return all(a <= x <= b for a, x, b in zip(low, shape, high, strict=True))

        def set_tensor_address(self, name: str, address: int) -> bool:
            assert address % 256 == 0, f"{name} is not aligned as TensorRT asks"
            self.addresses[name] = address
            return True

        def execute_async_v3(self, stream: int) -> bool:
            cuda.do(self._run)
            return True

        def _run(self) -> None:
            feeds = {}
            for name, shape in self.shapes.items():
                kind = _NUMPY[self.engine.get_tensor_dtype(name)]
                feeds[name] = view(self.addresses[name], kind, int(np.prod(shape))).reshape(shape)
            feeds["input_ids"] = feeds["input_ids"].astype(np.int64)
            for name, value in zip(self.engine.outputs, self.engine.session.run(self.engine.outputs, feeds), strict=True):
                view(self.addresses[name], value.dtype, value.size)[:] = value.reshape(-1)

    class Engine:
        num_io_tensors = property(lambda self: len(self.names))

        def __init__(self, plan: dict[str, Any]) -> None:
            import onnxruntime

            self.plan, self.session = plan, onnxruntime.InferenceSession(plan["model"], providers=["CPUExecutionProvider"])
            self.inputs, self.outputs = ([x.name for x in values] for values in (self.session.get_inputs(), self.session.get_outputs()))
            self.names = [*self.inputs, *self.outputs]
            self.taken: set[int] = set()
            self.kinds = {x.name: x.type for x in [*self.session.get_inputs(), *self.session.get_outputs()]}

        def get_tensor_name(self, i: int) -> str:
            return self.names[i]

        def get_tensor_mode(self, name: str) -> Any:
            return trt.TensorIOMode.INPUT if name in self.inputs else trt.TensorIOMode.OUTPUT

        def get_tensor_dtype(self, name: str) -> DataType:
            kinds = {"tensor(float)": DataType.FLOAT, "tensor(float16)": DataType.HALF, "tensor(int32)": DataType.INT32}
            return kinds.get(self.kinds[name], DataType.INT32 if major < 10 else DataType.INT64)

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            shapes = {x.name: x.shape for x in [*self.session.get_inputs(), *self.session.get_outputs()]}
            return tuple(n if isinstance(n, int) else -1 for n in shapes[name])

        def create_engine_inspector(self) -> Any:
            return types.SimpleNamespace(get_engine_information=lambda kind: json.dumps({"Layers": layers(self.plan["plugins"])}))

    class RuntimeCache:
        """Kernels compiled on a card."""

        def __init__(self) -> None:
            self.data = b""
            trt.calls.caches.append(self)

        def deserialize(self, blob: bytes) -> bool:
            self.data = bytes(blob) if bytes(blob).startswith(b"kernels") else b""
            return bool(self.data)

        def serialize(self) -> bytes:
            return self.data or b"kernels"

        def reset(self) -> bool:
            self.data = b""
            return True

    class RuntimeConfig:
        dynamic_shapes_kernel_specialization_strategy: Any = None

        def __init__(self) -> None:
            self.cache, self.strategy = None, None

        def create_runtime_cache(self) -> RuntimeCache:
            return RuntimeCache()

        def set_runtime_cache(self, cache: RuntimeCache | None = None) -> bool:
            self.cache = cache
            return True

        def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
            self.strategy = strategy

    def create_execution_context(self: Any, runtime_config: RuntimeConfig) -> Context:
        assert runtime_config.cache is not None and runtime_config.strategy == trt.ExecutionContextAllocationStrategy.USER_MANAGED
        assert runtime_config.dynamic_shapes_kernel_specialization_strategy == trt.DynamicShapesKernelSpecializationStrategy.EAGER
        return Context(self)

    def set_compute_capability(self: Any, compute_capability: Any, index: int) -> bool:
        trt.calls.targets[index] = compute_capability.name
        return index < self.num_compute_capabilities

    setattr(Engine, "device_memory_size" if major < 10 else "device_memory_size_v2", 1 << 12)
    if major < 10:
        Engine.create_execution_context_without_device_memory = lambda self: Context(self)  # type: ignore[attr-defined]
    else:
        Engine.create_execution_context = lambda self, strategy: Context(self)  # type: ignore[attr-defined]
        Context.set_device_memory = lambda self, memory, size: None  # type: ignore[attr-defined]
    if rtx:
        trt.NetworkDefinitionCreationFlag = names("Creation", "STRONGLY_TYPED")
        trt.TacticSource = names("TacticSource", "EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS")
        trt.ComputeCapability = names("ComputeCapability", "SM80", "SM86", "SM89", "SM120")
        trt.DynamicShapesKernelSpecializationStrategy = names("DynamicShapes", "LAZY", "EAGER", "NONE")
        Config.num_compute_capabilities, Config.set_compute_capability = 0, set_compute_capability  # type: ignore[attr-defined]
        Engine.create_execution_context = create_execution_context  # type: ignore[attr-defined]
        Engine.create_runtime_config = lambda self: RuntimeConfig()  # type: ignore[attr-defined]

    class Runtime:
        def __init__(self, log: Any) -> None: ...

        def deserialize_cuda_engine(self, data: bytes) -> Any:
            return Engine(json.loads(data))

    trt.Builder, trt.OnnxParser, trt.Runtime = Builder, Parser, Runtime
    # the names of the real classes, by which their signatures are compared
    trt.classes = {"Builder": Builder, "OnnxParser": Parser, "Runtime": Runtime, "INetworkDefinition": Network, "IBuilderConfig": Config, "ILayer": Layer,
                   "IOptimizationProfile": Profile, "ICudaEngine": Engine, "IExecutionContext": Context, "ParserError": Error,
                   "IRuntimeCache": RuntimeCache, "IRuntimeConfig": RuntimeConfig}  # fmt: skip
    return trt
