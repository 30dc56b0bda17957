"""Operations as data: what C++ reads is what ops.py says, both languages judge alike, and the README lists what there is."""

from __future__ import annotations

import ctypes
import itertools
import math
import random
import re
import shutil
import subprocess
from pathlib import Path

import plugin_harness as ph
import pytest

from sessa_deploy import contract, cuda_arch
from sessa_deploy.errors import UserError
from sessa_deploy.kernels.launch import limits, table
from sessa_deploy.plugins import library, lower, ops
from sessa_deploy.runtime.device import kernels as device_kernels

ARCHS = (75, 80, 86, 87, 88, 89, 90, 100, 101, 103, 110, 120, 121)
compiled = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on this machine")


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """rules.cpp, built: the library's own source without TensorRT, with the binary of a kernel that lacks tiles."""
    folder = tmp_path_factory.mktemp("rules")
    (folder / "cubins.inc").write_text('SESSA_CUBIN(0, "x", "causal_step_partial", 80, "fp16", "64", "e", 4, 0, 0, 1, 0, 0, {"BLOCK_R", 16})\n'
                                       'SESSA_CUBIN(0, "x", "causal_step_combine", 80, "fp16", "any", "e", 4, 0, 0, 1, 0, 0, {"BLOCK_S", 128})\n')
    files = [str(ph.HERE / "rules.cpp"), *(str(ph.SOURCES / "src" / n) for n in ("causal.cpp", "rows.cpp", "driver.cpp"))]
    command = ["g++", "-std=c++17", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", *ph.include_flags(folder), *files, "-ldl", "-o"]
    subprocess.run([*command, str(folder / "rules.so")], check=True)
    found = ctypes.CDLL(str(folder / "rules.so"))
    found.rules_takes.argtypes = [ctypes.c_int32, ctypes.c_int32, ctypes.c_float]
    found.rules_name.restype = ctypes.c_char_p
    return found


def test_which_binary_serves_which_device() -> None:
    """Later minors of a major, but no Tegra with a desktop GPU, and no binary of sm_90a, sm_100a, sm_120a anywhere else."""
    served = {a: [b for b in ARCHS if cuda_arch.serves(a, b)] for a in ARCHS}
    assert served[75] == [75] and served[80] == [80, 86, 88, 89] and served[86] == [86, 88, 89] and served[87] == [87] and served[89] == [89]
    assert all(served[a] == [a] for a in ARCHS if a >= 90)
    assert cuda_arch.nearest(cuda_arch.ARCHS, 89) == 89 and cuda_arch.nearest((80, 86, 87), 89) == 86
    assert cuda_arch.nearest((80, 86), 87) is None and cuda_arch.nearest((100,), 103) is None and cuda_arch.nearest((), 90) is None


@compiled
def test_both_languages_have_one_rule_of_binaries(rules: ctypes.CDLL) -> None:
    for a, b in itertools.product(ARCHS, ARCHS):
        assert bool(rules.rules_serves(a, b)) == cuda_arch.serves(a, b), (a, b)


def test_everyone_who_looks_for_a_binary_asks_that_rule(tmp_path: Path) -> None:
    """Lowering leaves out what an earlier binary serves, the runtime takes it: from the same table of pairs."""
    import fake_tensorrt

    folder = fake_tensorrt.fake_cubins(tmp_path)
    text = (folder / "cubins.json").read_text()
    for made, device in itertools.product(cuda_arch.ARCHS, ARCHS):
        (folder / "cubins.json").write_text(text.replace('"arch": 90', f'"arch": {made}'))
        if cuda_arch.serves(made, device):
            assert device_kernels.images(folder, device)[device_kernels.END].entry == device_kernels.END
        else:
            fix = f"sessa-deploy plugin build --arch {device}$" if device in cuda_arch.ARCHS else "use --backend ort; the kernels are compiled for sm_80, 86, "
            with pytest.raises(UserError, match=f"no binary of decode_append for this GPU: got sm_{device} in .*; fix: {fix}"):
                device_kernels.images(folder, device)
        if device in cuda_arch.ARCHS and made != device:
            unit = lower.Unit("decode_append", device, "fp32", "any")
            alike = table.options("decode_append", made, "fp32", "any") == table.options("decode_append", device, "fp32", "any")
            assert (lower.served_by(unit, [made, device]) == made) == (alike and cuda_arch.serves(made, device))


def test_a_binary_without_its_tile_is_named(tmp_path: Path) -> None:
    import fake_tensorrt

    folder = fake_tensorrt.fake_cubins(tmp_path)
    text = (folder / "cubins.json").read_text()
    (folder / "cubins.json").write_text(text.replace('"SPLITS"', '"PIECES"'))
    with pytest.raises(UserError, match="binary of decode_end has no tile SPLITS"):
        device_kernels.images(folder, 90)


@compiled
def test_a_tile_that_is_missing_is_an_error_in_the_library_too(rules: ctypes.CDLL) -> None:
    """Not -1, which would flow into a grid or a workspace's size."""
    text = ctypes.create_string_buffer(256)
    assert rules.rules_workspace(text) == 0
    said = "causal_step_partial for sm_80, fp16, variant 64 has no tile TILES: the kernels in this library are of another version"
    assert text.value.decode().startswith(said)


@compiled
def test_memory_of_tensor_descriptors_is_aligned_or_refused(rules: ctypes.CDLL) -> None:
    """A copy by a descriptor that begins elsewhere reads other bytes than were written."""
    text = ctypes.create_string_buffer(256)
    for address in (0, 16, 1 << 20 | 64, 1 << 20 | 127):
        rules.rules_descriptors(ctypes.c_int64(address), text)
        assert text.value.decode().endswith("in memory that is null or not 128-byte aligned"), address
    for address in (128, 1 << 20, 1 << 20 | 384):
        rules.rules_descriptors(ctypes.c_int64(address), text)
        assert "would need a grid of 0 x 1 x 1" in text.value.decode(), address


def test_tables_are_deterministic_and_the_same_for_everyone(tmp_path: Path) -> None:
    paths = ops.write(tmp_path)
    before = [p.stat().st_mtime_ns for p in paths]
    assert [p.name for p in paths] == ["ops.inc", "limits.h"] and paths == ops.write(tmp_path) and before == [p.stat().st_mtime_ns for p in paths]
    assert paths[0].read_text() == ops.ops_inc() and paths[1].read_text() == ops.limits_h()
    assert tuple(re.findall(r'SESSA_OP\(\w+, "(\w+)"', ops.ops_inc())) == library.OPS == contract.ENGINE_OPS
    assert len({o.identifier for o in ops.OPS}) == len(ops.OPS) and len({field for _, field, _ in ops.SIZES.values()}) == len(ops.SIZES)
    for one in ops.OPS:
        assert one.inputs[0].kind == "storage" and set("".join(x.shape for x in (*one.inputs, *one.outputs))) <= set(ops.SIZES)
        letters = set("".join(x.shape for x in one.inputs))
        assert set("".join(x.shape for x in one.outputs)) <= letters, "an output's dimension comes from an input"
        assert set().union(*(x.letters for x in one.limits)) <= letters | set("TP"), one.name


def test_constants_are_the_kernels_own() -> None:
    """The numbers stand in limits.py; what the kernels' specs and tiles say agrees with them."""
    assert tuple(sorted(int(v) for v in table.kernel("feedback_step_partial").variants)) == limits.FEEDBACK_WIDTHS
    assert limits.FEEDBACK_MAX_WIDTH == contract.MAX_WIDTH and limits.FEEDBACK_MULTIPLE == contract.WIDTH_MULTIPLE
    assert max(table.tiles("layer_rotary", a, "fp32", "any")["BD"] for a in cuda_arch.ARCHS) == limits.ROTARY_MAX_PAIRS


GOOD = {"B": 2, "T": 3, "P": 5, "D": 768, "H": 12, "K": 4, "C": 64, "N": 3 * 768 + 2 * 256, "E": 2 * 768, "J": 32, "I": 1, "R": 4}
BAD = (-1, 0, 1, 3, 7, 8, 9, 15, 16, 20, 24, 96, 128, 136, 144, 256, 264, 4096, 4112, 65535, 65536, 65552, 70000, 1 << 30, 1 << 31)


@compiled
def test_both_languages_refuse_the_same_sizes_in_the_same_words(rules: ctypes.CDLL) -> None:
    rng, text = random.Random(0), ctypes.create_string_buffer(256)
    cases = [GOOD, *({**GOOD, letter: value} for letter in GOOD for value in BAD)]
    cases += [{letter: rng.choice((*BAD, GOOD[letter], GOOD[letter])) for letter in GOOD} for _ in range(500)]
    refused, said = 0, set()
    for index, op in enumerate(ops.OPS):
        assert rules.rules_name(index).decode() == op.name and op.refusal(GOOD) is None
        for sizes in cases:
            rules.rules_check(index, ph.Shape(*(sizes[letter] for letter in ops.SIZES)), text)
            mine = op.refusal(sizes)
            assert text.value.decode() == (mine or ""), (op.name, sizes)
            refused += mine is not None
            said.add((op.name, (mine or "").split(":")[0]))
    assert rules.rules_name(len(ops.OPS)) == b""
    assert refused > 1000 and {(o.name, x.what) for o in ops.OPS for x in o.limits} <= said


def test_refusals_in_words() -> None:
    feedback, causal, project = (ops.op(n) for n in (contract.FEEDBACK_OP, contract.CAUSAL_OP, contract.PROJECT_GAIN_OP))
    assert feedback.refusal({"D": 4112}) == "width D: got 4112; allowed: a multiple of 16 up to 4096"
    assert causal.refusal({"H": 3, "K": 2, "C": 64}) == "heads Hq: got 3; allowed: a multiple of Hkv up to 65535"
    assert project.refusal({**GOOD, "N": 5}) == "rows of weight: got 5; allowed: 3 D + 2 Hkv d = 2816"
    with pytest.raises(KeyError, match="no operation 'SessaEnter'; known: SessaFeedbackAttention"):
        ops.op("SessaEnter")


@compiled
def test_both_languages_take_the_same_attributes(rules: ctypes.CDLL) -> None:
    values = (0.0, -0.0, 1e-45, 1e-5, 0.999, 1.0, 1.0000001, 2.0, 3e38, -1e-5, -1.0, math.inf, -math.inf, math.nan)
    for index, op in enumerate(ops.OPS):
        for at, attribute in enumerate(op.attributes):
            for value in values:
                assert bool(rules.rules_takes(index, at, value)) == attribute.takes(value), (op.name, attribute.name, value)
    assert [a.takes(0.0) for a in (ops.SCALE, ops.EPSILON, ops.GAMMA_MAX)] == [True, False, False]
    assert [a.takes(2.0) for a in (ops.SCALE, ops.EPSILON, ops.GAMMA_MAX)] == [True, True, False]


def test_every_attribute_is_refused_by_its_own_name() -> None:
    names = {o.name: o.attribute_names for o in ops.OPS}
    assert names[contract.FEEDBACK_OP] == names[contract.CAUSAL_OP] == ("scale", "storage")
    assert names[contract.NORM_OP] == ("epsilon", "storage") and names[contract.ROTARY_OP] == ("storage",)
    assert names[contract.NORM_ENTER_OP] == names[contract.LAST_LOGITS_OP] == ("epsilon", "storage", "weights")
    assert names[contract.PROJECT_GAIN_OP] == ("gamma_max", "storage", "weights")
    assert all(names[o] == ("storage", "weights") for o in (contract.LINEAR_HEADS_OP, contract.LOGITS_OP, contract.TAIL_OP, contract.MIXER_OP))
    assert ops.op(contract.NORM_OP).node_attributes(10, epsilon=1e-5) == {"epsilon": 1e-5, "storage": 10}
    for op, attribute, value in ((contract.NORM_OP, "epsilon", 0.0), (contract.NORM_ENTER_OP, "epsilon", 1e-60), (contract.PROJECT_GAIN_OP, "gamma_max", 1.5),
                                 (contract.FEEDBACK_OP, "scale", -1.0)):  # fmt: skip
        with pytest.raises(UserError, match=f"attribute {attribute} of {op} is out of range: got .*; allowed: a "):
            ops.op(op).node_attributes(1, **{attribute: value})
    with pytest.raises(TypeError, match="SessaMixer has no attribute scale; it has storage, weights"):
        ops.op(contract.MIXER_OP).node_attributes(1, scale=0.5)


def test_a_matrix_of_weights_may_be_bytes() -> None:
    """Half as many elements of the storage type, and its scales behind all other operands; of ops without a matrix there is no such form."""
    for op in ops.OPS:
        matrix = [x for x in op.inputs if x.name == "weight" and len(x.shape) == 2]
        if not matrix:
            assert op.quantised is None
            with pytest.raises(UserError, match=f"attribute weights of {op.name} is out of range: got 3; allowed: 0"):
                op.form(3)
            continue
        rows, width = matrix[0].shape
        for format in contract.WEIGHT_FORMATS.values():
            packed = op.form(format.onnx)
            assert packed == op.quantised and packed.quantised is None and packed.name == op.name and packed.outputs == op.outputs
            assert packed.inputs[-1] == ops.Operand("weight_scale", rows, "float32") and len(packed.inputs) == len(op.inputs) + 1
            changed = [(mine, theirs) for mine, theirs in zip(op.inputs, packed.inputs, strict=False) if mine != theirs]
            assert changed == [(matrix[0], ops.Operand("weight", rows + width.lower(), "storage"))]
            assert op.node_attributes(10, weights=format.onnx) == {"storage": 10, "weights": format.onnx}
        assert op.form() is op and "weights" not in op.node_attributes(10)
        with pytest.raises(UserError, match=f"attribute weights of {op.name} is out of range: got 2; allowed: 0, 3, 17"):
            op.node_attributes(10, weights=2)


def test_the_readme_lists_what_there_is() -> None:
    """Every operation with its operands in order, its attribute and its limits' numbers, as people read them."""
    text = (ph.SOURCES / "README.md").read_text(encoding="utf-8")
    assert max(len(line) for line in text.splitlines()) <= 160 and f"`state` = {ops.STATE_VERSION}" in text
    for one in ops.OPS:
        rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith(f"| {one.name} |")]
        listed = next((line for line in text.splitlines() if line.startswith(f"- {one.name}: ")), "")
        at = text.index(f"- {one.name}: ") if listed else text.index(f"| {one.name} |")
        names = re.findall(r"\b[a-z_]+\b", text[at : at + 900])
        positions = iter(names)
        assert all(x.name in positions for x in one.inputs), one.name
        assert one.quantised is None or "| weight_scale | (N) | f32 |" in text
        if one.name not in (contract.FEEDBACK_OP, contract.CAUSAL_OP):
            own, stated = [a.name for a in one.attributes], [row[3].strip() for row in rows if len(row) == 4]
            assert stated == (own or [""]), one.name
            assert all(x.name in rows[0][2] for x in one.outputs), one.name
    for attribute in ops.ATTRIBUTES:
        of = ", ".join(o.name for o in ops.OPS if attribute in o.attributes)
        assert f"| {attribute.name} | {'the two attentions' if attribute == ops.SCALE else of} | float |" in text


def test_cmake_writes_the_tables_before_anything_else(tmp_path: Path) -> None:
    """A Python without sessa_deploy is an error with words, before the kernels are lowered."""
    if shutil.which("cmake") is None or shutil.which("g++") is None:
        pytest.skip("no cmake or no g++")
    headers = tmp_path / "include"
    headers.mkdir()
    (headers / "NvInferVersion.h").write_text("#define NV_TENSORRT_MAJOR 10\n")
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    command = ["cmake", "-S", str(ph.SOURCES), "-B", str(tmp_path / "build"), f"-DTENSORRT_INCLUDE_DIR={headers}", f"-DSESSA_PYTHON={fake}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0 and "the operations' tables could not be written" in done.stderr and "Lowering" not in done.stdout
