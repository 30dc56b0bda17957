"""The real TensorRT has every name we use, so that the fake of the other tests does not flatter us. No GPU is needed to look.

SESSA_TRT8_PYTHON, SESSA_LEAN_PYTHON: interpreters that can import tensorrt 8.6 and TensorRT 11's lean bindings (which have no builder).
"""

from __future__ import annotations

import enum
import importlib.util
import inspect
import json
import os
import subprocess
import sys
import types

import fake_tensorrt
import pytest

RUNTIME = """
ILogger.log Runtime.deserialize_cuda_engine get_plugin_registry DataType.FLOAT DataType.HALF DataType.INT32 DataType.BOOL float32
ICudaEngine.num_io_tensors ICudaEngine.get_tensor_name ICudaEngine.get_tensor_mode ICudaEngine.get_tensor_dtype ICudaEngine.create_engine_inspector
IExecutionContext.set_optimization_profile_async IExecutionContext.set_input_shape IExecutionContext.set_tensor_address IExecutionContext.execute_async_v3
TensorIOMode.INPUT LayerInformationFormat.JSON ProfilingVerbosity.DETAILED MemoryPoolType.WORKSPACE BuilderFlag.TF32 IPluginRegistry.load_library
ITimingCache.serialize IOptimizationProfile.set_shape
"""
ONLY_8 = """
ICudaEngine.device_memory_size ICudaEngine.create_execution_context_without_device_memory IExecutionContext.device_memory BuilderFlag.FP16
BuilderFlag.OBEY_PRECISION_CONSTRAINTS NetworkDefinitionCreationFlag.EXPLICIT_BATCH TacticSource.CUDNN LayerType.SHAPE LayerType.CONSTANT LayerType.CAST
LayerType.PLUGIN_V2 Builder.create_network Builder.create_builder_config Builder.create_optimization_profile Builder.build_serialized_network
IBuilderConfig.add_optimization_profile IBuilderConfig.profiling_verbosity IBuilderConfig.get_tactic_sources IBuilderConfig.set_tactic_sources
IBuilderConfig.set_memory_pool_limit IBuilderConfig.builder_optimization_level IBuilderConfig.set_flag IBuilderConfig.clear_flag
IBuilderConfig.create_timing_cache IBuilderConfig.set_timing_cache IBuilderConfig.get_timing_cache EngineInspector.get_engine_information
OnnxParser.parse OnnxParser.num_errors OnnxParser.get_error ParserError.node ParserError.desc INetworkDefinition.num_layers INetworkDefinition.get_layer
ILayer.precision ILayer.set_output_type ILayer.get_output ILayer.num_outputs ILayer.type ITensor.name ITensor.dtype
"""
ONLY_11 = """
ICudaEngine.device_memory_size_v2 ICudaEngine.create_execution_context ExecutionContextAllocationStrategy.USER_MANAGED IExecutionContext.set_device_memory
DataType.INT64 DataType.BF16 IProgressMonitor.phase_start IProgressMonitor.step_complete IProgressMonitor.phase_finish
"""
LOOK = """
import sys, {module} as trt
def has(name):
    here = trt
    for part in name.split("."):
        if not hasattr(here, part):
            return False
        here = getattr(here, part)
    return True
print(trt.__version__, [name for name in sys.argv[1:] if not has(name)])
"""


def names(variable: str, module: str, wanted: str) -> str:
    python = os.environ.get(variable)
    if not python:
        pytest.skip(f"needs a Python with {module}, named in {variable}")
    done = subprocess.run([python, "-c", LOOK.format(module=module), *wanted.split()], capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.trt
def test_tensorrt_8_has_every_name() -> None:
    assert names("SESSA_TRT8_PYTHON", "tensorrt", RUNTIME + ONLY_8).endswith(" []")


@pytest.mark.trt
def test_tensorrt_11s_runtime_has_every_name() -> None:
    assert names("SESSA_LEAN_PYTHON", "tensorrt_lean_bindings", RUNTIME + ONLY_11).endswith(" []")


REAL = """
import json, re, sys, tensorrt_rtx_bindings as trt
def signatures(member):  # [fewest, most] arguments of each overload, self left out; none: not a function
    found = []
    for line in (member.__doc__ or "").splitlines():
        said = re.match(r"(?:\\d+\\. )?\\w+\\((self: .*)\\) -> ", line)
        if said:
            inside = re.sub(r"<[^<>]*>|\\[[^\\[\\]]*\\]", "", said[1])
            names = [part for part in inside.split(", ")[1:] if ":" in part]
            found.append([sum("=" not in part for part in names), len(names)])
    return found
print(json.dumps({"module": dir(trt), "classes": {c: {n: signatures(getattr(getattr(trt, c), n)) for n in dir(getattr(trt, c))} for c in sys.argv[1:]}}))
"""
OF_8_ALONE = {"set_output_type"}


def test_the_fake_of_tensorrt_for_rtx_answers_as_the_real_one() -> None:
    """Every name of the fake is the real module's, every enumeration's member too, and what takes arguments takes as many."""
    if importlib.util.find_spec("tensorrt_rtx_bindings") is None:
        pytest.skip("needs TensorRT for RTX: pip install 'sessa-deploy[rtx]'")
    fake = fake_tensorrt.make("1.7.1.116", fake_tensorrt.HostCuda(), module="tensorrt_rtx")
    kinds = {n: v for n, v in vars(fake).items() if inspect.isclass(v) and issubclass(v, enum.Enum)}
    classes = {**fake.classes, **{n: v for n, v in vars(fake).items() if n in ("ILogger", "IProgressMonitor")}}
    done = subprocess.run([sys.executable, "-c", REAL, *classes, *kinds], capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    real = json.loads(done.stdout)
    ours = {n for n in vars(fake) if not n.startswith("__")} - {"calls", "classes"}
    assert ours <= set(real["module"]), ours - set(real["module"])
    for name, kind in kinds.items():
        assert {m.name for m in kind} <= set(real["classes"][name]), name
    compared = 0
    for name, cls in fake.classes.items():
        for member, value in vars(cls).items():
            if member.startswith("_") or member in OF_8_ALONE:
                continue
            assert member in real["classes"][name], f"{name}.{member}"
            if isinstance(value, types.FunctionType):
                takes = len(inspect.signature(value).parameters) - 1
                overloads = real["classes"][name][member]
                assert any(least <= takes <= most for least, most in overloads), f"{name}.{member}: fake {takes}, real {overloads}"
                compared += 1
    assert compared > 30
