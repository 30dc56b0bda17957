"""What the plugin launches, without a GPU: the library runs on a libcuda of our own that writes every launch down; the kernels' Python side is its measure."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plugin_harness as ph
import pytest
from layer_calls import layer_calls, matrix
from plugin_harness import Built, headed, sizes

from sessa_deploy.plugins import ops

pytest.importorskip("torch")
pytest.importorskip("triton")
pytestmark = [pytest.mark.trt, pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler on this machine")]

EACH, MULTIPROCESSORS = 6, 132  # what the driver below says of every kernel and of its device
DRIVER = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
typedef void* handle; typedef int rc;
static char contexts[4096]; int current;
struct function { char name[64]; unsigned asked; int share, most; };
static struct { char const* name; int params; } const known[] = { KERNELS {0, 0} };
rc cuCtxGetCurrent(handle* c) { *c = contexts + current; return 0; }
rc cuCtxGetDevice(int* d) { *d = 3; return 0; }
rc cuDeviceGetAttribute(int* v, int what, int d) { *v = what == 75 ? 9 : what == 76 ? 0 : what == 16 ? MULTIPROCESSORS : -1; return d != 3; }
rc cuModuleLoadData(handle* m, void const* image) { *m = (handle)image; return memcmp(image, "\x7f" "ELF", 4) ? 200 : 0; }
rc cuModuleGetFunction(handle* f, handle m, char const* name)
{
    struct function* made = calloc(1, sizeof(struct function));
    strncpy(made->name, name, 63);
    printf("load %s\n", name);
    *f = made;
    return 0;
}
rc cuFuncSetAttribute(handle f, int what, int v)
{
    if (what == 9) ((struct function*)f)->share = v; /* refused all the same: it is a wish */
    return what == 8 ? 0 : 1;
}
rc cuFuncSetCacheConfig(handle f, int what) { ((struct function*)f)->most = what == 1; return 1; }
#ifdef EACH
rc cuOccupancyMaxActiveBlocksPerMultiprocessor(int* n, handle f, int threads, size_t shared)
{
    *n = EACH;
    ((struct function*)f)->asked = threads + 65536 * (unsigned)(shared / 16);
    return 0;
}
#endif
static rc note(struct function* f, unsigned const* grid, unsigned const* block, unsigned shared, void** a, int early, handle q)
{
#ifdef EACH
    if (f->asked != block[0] + 65536 * (shared / 16)) return 1; /* occupancy was asked of another launch */
#endif
    int i = 0, p;
    if (f->most != (shared > 49152)) return 2; /* as Triton wishes where it launches them */
    while (known[i].name && strcmp(known[i].name, f->name)) ++i;
    if (!known[i].name || block[1] != 1 || block[2] != 1) return 1;
    printf("%s %u %u %u %u %d %d %llx", f->name, grid[0], grid[1], grid[2], block[0], early, f->share, (unsigned long long)q);
    for (p = 0; p <= known[i].params; ++p) printf(" %llx", *(unsigned long long*)a[p]);
    printf("\n");
    return 0;
}
rc cuLaunchKernel(handle f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, handle q, void** a, void** extra)
{
    unsigned grid[3] = {gx, gy, gz}, block[3] = {bx, by, bz};
    return extra ? 1 : note(f, grid, block, shared, a, 0, q);
}
struct attribute { int id; char pad[4]; int allowed; char rest[60]; };
struct config { unsigned grid[3], block[3], shared; handle stream; struct attribute* attributes; unsigned count; };
rc cuLaunchKernelEx(struct config const* c, handle f, void** a, void** extra)
{
    if (c->count != 1 || c->attributes->id != 6 || c->attributes->allowed != 1 || extra) return 1;
    return note(f, c->grid, c->block, c->shared, a, 1, c->stream);
}
#ifdef SIDE
static size_t made = 0x100;
rc cuStreamCreateWithPriority(handle* q, unsigned flags, int priority) { *q = (handle)++made; return flags != 1; }
rc cuEventCreate(handle* e, unsigned flags) { *e = (handle)++made; return flags != 2; }
rc cuEventRecord(handle e, handle q) { printf("record %llx %llx\n", (unsigned long long)e, (unsigned long long)q); return 0; }
rc cuStreamWaitEvent(handle q, handle e, unsigned flags) { printf("wait %llx %llx\n", (unsigned long long)q, (unsigned long long)e); return flags; }
#endif
rc cuDriverGetVersion(int* v) { *v = 13000; return 0; }
rc cuGetErrorName(rc code, char const** text) { *text = "bad"; return 0; }
"""
RUN = """
import ctypes, json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import plugin_harness as ph
library, harness = Path(sys.argv[2]), ph.load_harness(Path(sys.argv[3]))
storage, last = int(sys.argv[4]), None
for op, weights, shape in json.loads(sys.stdin.read()):
    ctypes.c_int.in_dll(ctypes.CDLL("libcuda.so.1"), "current").value += (op, weights) != last # a context of its own, where nothing is loaded
    last = op, weights
    plugin, shape = ph.create((0, library, harness), op, storage, weights=weights), ph.Shape(*shape)
    op = ph.at(op, weights)
    assert plugin and harness.harness_shape(plugin, op, storage, shape) == 0
    print("shaped", flush=True)
    assert harness.harness_enqueue(plugin, op, storage, shape, ph.Pointers(*(ph.operand(i) for i in range(20))), None) == 0
    assert harness.harness_workspace(plugin, op, storage, shape) >= 0 # the last: to 8.6's plugins it may tell shapes
    print("next", flush=True)
"""


EVENTS = ("record", "wait")
# kernel, grid, (threads, percent of shared memory wished for), started early, arguments that are no pointers, and those
Launch = tuple[str, tuple[int, ...], tuple[int, int], bool, list[float], list[int]]


def read(line: str) -> Launch:
    """A launch as the driver wrote it."""
    from sessa_deploy.kernels.launch import table

    name, x, y, z, threads, early, share, _stream, *words, scratch = line.split()
    kinds = [p.type for p in table.kernel(name).params]
    assert len(words) == len(kinds)
    assert int(scratch, 16) % 128 == 0 and (int(scratch, 16) > 0) == (table.kernel(name).scratch > 0), name
    scalars, pointers = list[float](), list[int]()
    for kind, word in zip(kinds, words, strict=True):
        raw = int(word, 16).to_bytes(8, "little")
        if kind.startswith("*"):
            pointers.append(int(word, 16))
        else:
            scalars += struct.unpack({"fp32": "<f4x", "i32": "<i4x", "i64": "<q"}[kind], raw)
    return name, (int(x), int(y), int(z)), (int(threads), int(share)), early == "1", scalars, pointers


def numbered(calls: list[Launch], operands: Sequence[int]) -> list[Launch]:
    """The launches of one operation with its pointers numbered, first these of its operands, then others as they appear: which kernel takes what from which."""
    seen = {p: i for i, p in enumerate(operands)}
    return [(*call[:5], [seen.setdefault(p, len(seen)) for p in call[5]]) for call in calls]


def launches(
    monkeypatch: pytest.MonkeyPatch, storage: int, weights: int, held: int, batch: int, tokens: int, capacity: int, width: int, heads: int, kv_heads: int
) -> list[Any]:
    """(operation, its attribute `weights`, its sizes, how many inputs are known, the launches of the Python side) for one shape of a layer, on a device that
    holds `held` programs.

    tokens 1: decode steps; more: prefill (capacity 0, which only feedback attention is asked for) and chunks. In float32 only the attentions have kernels.
    """
    import torch

    from sessa_deploy.kernels.causal import prefill as causal_prefill
    from sessa_deploy.kernels.causal import step as causal_step
    from sessa_deploy.kernels.causal import step_rows as causal_rows
    from sessa_deploy.kernels.engine import last, layer, layer_many, layer_rows, mixer_rows
    from sessa_deploy.kernels.engine import mixer as mixer_step
    from sessa_deploy.kernels.feedback import forward as feedback_fwd
    from sessa_deploy.kernels.feedback import step as feedback_step
    from sessa_deploy.kernels.feedback import step_rows as feedback_rows
    from sessa_deploy.kernels.launch import jit, table
    from sessa_deploy.kernels.launch.limits import ROWS_HEADS, ROWS_WIDTHS
    from sessa_deploy.kernels.route import steps_rows

    noted: list[Launch] = []
    rows = [0]  # of the operation

    class Writer:
        resident = held

        def __init__(self, kernel: Any, device: Any, dtype: Any, options: dict[str, Any], weights: str = "") -> None:
            self.name, self.each = kernel.__name__, (32 * options["num_warps"], options[jit.SHARE])
            # whether kernels start early the Python side leaves to the plugin: the rule is the number of rows and that the binary can
            self.early = bool(options.get("PDL")) and rows[0] <= options["early rows"]

        def __call__(self, grid: tuple[int, ...], *arguments: Any) -> None:
            kinds = [p.type for p in table.kernel(self.name).params]
            scalars = [float(x) for kind, x in zip(kinds, arguments, strict=True) if not kind.startswith("*")]
            pointers = [x.data_ptr() if isinstance(x, torch.Tensor) else int(x) for kind, x in zip(kinds, arguments, strict=True) if kind.startswith("*")]
            noted.append((self.name, (*grid, 1, 1)[:3], self.each, self.early, scalars, pointers))

    def pinned(names: tuple[str, ...], device: Any, dtype: Any, variant: str, early: int = 0, weights: str = "") -> dict[str, Any]:
        kind = jit.dtype_name(dtype) + weights
        extra = {name: {jit.SHARE: table.shared_share(name, 90, kind, variant), "early rows": table.early(name, 90, kind, variant)} for name in names}
        found = {name: {**table.options(name, 90, kind, variant), **extra[name]} for name in names}
        # a step's attentions alone start early only where the Python side says behind what
        return {name: {**o, "PDL": o["PDL"] and early > 0} if name in ("mixer_step_partial", "mixer_rows_partial") else o for name, o in found.items()}

    for module in (causal_prefill, causal_rows, causal_step, feedback_fwd, feedback_rows, feedback_step, last, layer, layer_many, layer_rows, mixer_rows,
                   mixer_step):  # fmt: skip
        monkeypatch.setattr(module, "launcher", Writer)
        monkeypatch.setattr(module, "pinned", pinned)
    kept: list[torch.Tensor] = []  # workspaces and widened weights, so that no other tensor takes their place
    take = jit.Workspace.take

    def taken(self: Any, device: Any) -> Any:
        addresses, memory = take(self, device)
        kept.append(memory)
        return addresses, memory

    monkeypatch.setattr(jit.Workspace, "take", taken)
    widen = layer.widen
    monkeypatch.setattr(layer, "widen", lambda *w: kept.append(widen(*w)) or kept[-1])  # type: ignore[func-returns-value]
    monkeypatch.setattr(feedback_fwd, "plan_of", feedback_fwd.planner(feedback_fwd.Plan))  # a plan keeps its launchers
    n, d = batch * tokens, width // heads

    def half(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype={ph.HALF: torch.float16, ph.BFLOAT: torch.bfloat16}.get(storage, torch.float32))

    def floats(*shape: int) -> torch.Tensor:
        return torch.zeros(shape)

    length = torch.zeros(batch, dtype=torch.int32)
    around = layer_calls(lambda *shape, wide=False, scale=1.0: floats(*shape) if wide else half(*shape), batch, tokens, heads, kv_heads, d, weights)
    calls: list[tuple[Any, ...]] = [(call.op, call.shape, call.compute, *call.inputs) for call in around]
    past_b, (q_b, k_b, f) = [half(batch, capacity, width) for _ in range(2)], [half(batch, tokens, width) for _ in range(3)]
    square, row = matrix(half(width, width), weights), half(width)
    past, q, gamma = [half(batch, capacity, kv_heads, d) for _ in range(2)], half(batch, tokens, heads, d), floats(batch, tokens)
    k, v = [half(batch, tokens, kv_heads, d) for _ in range(2)]

    few_b, few_f = (steps_rows(q, capacity) and x <= most for x, most in ((width, ROWS_WIDTHS[-1]), (d, ROWS_HEADS[-1])))

    def feedback(f: torch.Tensor) -> None:
        if tokens == 1:
            feedback_step.step(q_b, k_b, gamma, f, *past_b, length)
        elif few_b:
            feedback_rows.step(q_b, k_b, gamma, f, *past_b, length)
        else:
            feedback_fwd.forward(q_b, k_b, gamma, f, *past_b, length, need_lse=False)

    def causal() -> torch.Tensor:
        return (causal_step.step if tokens == 1 else causal_rows.step if few_f else causal_prefill.prefill)(q, k, v, *past, length)

    def mixer(behind: bool = False) -> None:
        if tokens == 1:
            rest = q_b[:, 0], gamma[:, 0], *past_b, length, batch, square.scale, behind
            mixer_step.step(q[:, 0], k[:, 0], v[:, 0], *past, square.weight, row, *rest)
        elif few_b and few_f:
            mixer_rows.step(q, k, v, *past, square.weight, row, q_b, k_b, gamma, *past_b, length, batch * tokens, scale=square.scale, behind=behind)
        else:
            o = causal()  # kept until the end, so that no other tensor takes its place
            feedback(layer.linear(o.view(n, width), square.weight, row, scale=square.scale).view(batch, tokens, width))
            # Around causal attention the plugin launches what of feedback attention needs no f, on a stream of its own: the packing of a past before it.
            solve = next((i for i, (name, *_) in enumerate(noted) if name.startswith("feedback_solve")), 0)
            noted[:solve] = sorted(noted[:solve], key=lambda x: (x[0] != "feedback_pack", not x[0].startswith("causal_"), not x[0].startswith("feedback_")))

    calls.append((ph.FEEDBACK, sizes(batch, tokens, capacity, width), lambda: feedback(f)))
    if capacity:
        calls.append((ph.CAUSAL, headed(batch, tokens, capacity, d, heads, kv_heads), causal))
        if tokens == 1 or (few_b and few_f):  # right behind the projections, where its attentions may start early; then once more, behind itself
            calls.append(next(call for call in calls if call[0] == ph.At.ProjectGain))
            calls.append((ph.At.Mixer, sizes(batch, tokens, capacity, width, heads, kv_heads, d), lambda: mixer(True)))
        calls.append((ph.At.Mixer, sizes(batch, tokens, capacity, width, heads, kv_heads, d), mixer))
    found = []
    for op, shape, call, *inputs in calls if storage != ph.FLOAT else [x for x in calls if x[0] in (ph.FEEDBACK, ph.CAUSAL)]:
        if weights and ops.OPS[op].quantised is None:
            continue
        noted.clear()
        rows[0] = batch if op == ph.At.LastLogits else batch * tokens
        call()
        found.append((op, weights, list(shape), len(inputs), numbered(noted, [x.data_ptr() for x in inputs])))
    return found


def driven(launching: Built, storage: int, calls: list[Any], says: bool, folder: Path, loads: bool = False) -> list[list[str]]:
    """What each of the calls (operation, weights, sizes) has the driver write down once it knows its shapes. says: the driver knows occupancy, and gives
    more streams. loads: with the binaries that are then still loaded."""
    from sessa_deploy.kernels.launch import table

    _, library, harness = launching
    kernels = "".join(f'{{"{k.name}", {len(k.params)}}}, ' for k in table.kernels().values())
    defines = f"#define MULTIPROCESSORS {MULTIPROCESSORS}\n#define KERNELS {kernels}\n" + (f"#define EACH {EACH}\n#define SIDE\n" if says else "")
    (folder / "cuda.c").write_text(defines + DRIVER)
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-w", "-o", "libcuda.so.1", "cuda.c"], cwd=folder, check=True)
    environment = {**os.environ, "LD_LIBRARY_PATH": f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}"}
    environment.pop("SESSA_PDL", None)
    command = [sys.executable, "-u", "-c", RUN, str(ph.HERE), str(library), harness._name, str(storage)]  # -u: what C and Python print stays in order
    done = subprocess.run(command, input=json.dumps(calls), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    parts = [part.partition("shaped\n")[2].splitlines() for part in done.stdout.split("next\n")]
    return [[line for line in part if loads or not line.startswith("load ")] for part in parts]


SHAPES = [
    (1, 1, 4096, 1024, 16, 16), (32, 1, 2048, 1024, 16, 16), (16, 1, 96, 192, 6, 2), (17, 1, 96, 192, 6, 2),  # steps
    (3, 5, 1, 768, 12, 12), (1, 16, 4096, 2048, 16, 16), (32, 2, 700, 256, 8, 2), (1, 9, 50, 4096, 32, 8),  # several rows; the last has no kernels for them
    (1, 70, 1, 64, 2, 2), (2, 100, 0, 256, 4, 1), (1, 513, 0, 2048, 16, 4),  # prefill
    (2, 130, 300, 1024, 16, 4), (3, 17, 4096, 192, 8, 2), (1, 64, 65, 4096, 32, 8), (1, 9300, 40, 1024, 16, 4),  # chunks, the last with wide tiles
    (1, 34000, 40, 64, 2, 1), (1, 34000, 500, 64, 2, 1),  # and in panels, whose rows are no whole tiles of scores by descriptors in the second
    (2, 4096, 8, 64, 2, 1), (1, 8191, 8, 64, 2, 1), (3, 4095, 8, 64, 2, 1),  # scores by descriptors, and just too few rows for them
    (1, 1025, 8, 320, 5, 5), (3, 1100, 9, 1040, 13, 1), (2, 256, 9, 96, 3, 1),  # products by tensor descriptors, and just too few rows for them
    (3, 1, 1000, 2048, 16, 16), (1, 8, 4096, 2048, 16, 4), (1, 1, 4096, 2048, 16, 4),  # steps of wide rows, in a short cache and of one sequence
    (2, 4, 300, 1024, 16, 16),  # so few rows that they have tiles of their own, as one above
]  # fmt: skip


CASES = [*((ph.HALF, 0, s, True) for s in SHAPES), *((ph.HALF, 0, s, False) for s in SHAPES if s[1] == 1), *((ph.FLOAT, 0, s, True) for s in SHAPES[::3]),
         *((ph.BFLOAT, 0, s, True) for s in (SHAPES[8], SHAPES[12])),  # where two kernels stand in for the combination
         *((ph.HALF, weights, s, True) for weights, s in ((3, SHAPES[0]), (17, SHAPES[1]), (17, SHAPES[4]), (3, SHAPES[5]), (3, SHAPES[8]),
                                                        (3, SHAPES[-2]), (3, SHAPES[-6]), (17, (1, 1, 64, 2304, 18, 18))))]  # fmt: skip


# The launcher is the same for all: of ONNX Runtime's shell every second case shows that it hands on what it is given.
SHELLS = [pytest.param(major, *case, id="-".join(map(str, ("ort" if major == ph.ORT else f"trt{major}", *case))))
          for major in (8, 10, 11, ph.ORT) for case in (CASES[::2] if major == ph.ORT else CASES) if major != 8 or case[0] != ph.BFLOAT]  # fmt: skip


@pytest.mark.parametrize(("launching", "storage", "weights", "shape", "says"), SHELLS, indirect=["launching"])
def test_the_plugin_launches_what_the_python_side_does(
    launching: Built, storage: int, weights: int, shape: tuple[int, ...], says: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels, grids, threads, sizes, early starts and wishes for shared memory, which this driver refuses, those of kernels that need much of it
    too; of a step's programs no more than the device holds, whatever the batch, if its driver says that.

    Steps, prefill, chunks and panels, for the attentions, the mixer and everything around them.
    """
    from sessa_deploy.kernels.engine.spec import rows_early
    from sessa_deploy.kernels.launch import table
    from sessa_deploy.kernels.launch.limits import MANY_ROWS, PAST_ROWS, PAST_WORK, STEP_PROGRAMS

    held = EACH * MULTIPROCESSORS if says else STEP_PROGRAMS
    wanted = launches(monkeypatch, storage, weights, held, *shape)
    parts = driven(launching, storage, [one[:3] for one in wanted], says, tmp_path)
    lines = [[read(x) for x in part if not x.startswith(EVENTS)] for part in parts]
    found = [x for part, one in zip(lines, wanted, strict=False) for x in numbered(part, [ph.operand(i) for i in range(one[3])])]
    expected = [one for *_, all_of in wanted for one in all_of]
    assert [x[:4] for x in found] == [x[:4] for x in expected]
    for mine, theirs in zip(found, expected, strict=True):
        assert mine[4] == pytest.approx(theirs[4], rel=1e-6), mine[0]
        if storage != ph.FLOAT or not mine[0].startswith(("feedback_combine", "feedback_solve")):  # in float32 the plugin keeps x and its inverse in one place
            assert mine[5] == theirs[5], mine[0]
    many = {name for name, *_ in found if name.endswith(("_many", "_gate"))}
    assert len(many) == (5 if shape[0] * shape[1] > MANY_ROWS and storage != ph.FLOAT else 0)
    shares = storage != ph.FLOAT and shape[1] >= PAST_ROWS and shape[0] * shape[1] >= PAST_WORK and shape[2] not in (0, 500)
    assert shares == ("feedback_scores_past" in {name for name, *_ in found})
    if shape[1] == 34000 and storage == ph.HALF:
        assert [name for name, *_ in found].count("feedback_solve") > 2 * 2, "rows in panels"
    behind = [(found[i - 1][0], early) for i, (name, _, _, early, *_) in enumerate(found) if name in ("mixer_step_partial", "mixer_rows_partial")]
    if behind:
        may = shape[0] * shape[1] <= table.kernel("mixer_step_partial" if shape[1] == 1 else "mixer_rows_partial").early_rows
        may &= shape[1] == 1 or rows_early(shape[1], shape[3])
        assert [early for _, early in behind] == [may, False] and behind[0][0] == "layer_project_gain"
    assert bool(behind) == (storage == ph.HALF and 0 < shape[1] <= 16 and shape[3] <= (2048 if shape[1] > 1 else 4096))
    if weights:
        assert len({name for name, *_ in found if name.startswith("layer_")}) >= 5
    elif shape[:2] == (32, 1) and storage == ph.HALF:
        partial = [grid for name, grid, *_ in found if name.endswith("step_partial")]
        assert len(partial) == 4 and all(x * y <= held for x, y, _ in partial)


@pytest.mark.parametrize("launching", (8, 10, 11, ph.ORT), indirect=True)
@pytest.mark.parametrize("says", [True, False], ids=["streams", "one stream"])
def test_both_attentions_of_a_chunk_run_side_by_side(launching: Built, says: bool, tmp_path: Path) -> None:
    """A second stream takes what of feedback attention needs no f: begun behind all before it, over before what comes after. Twice, on the same streams.

    It is forked before causal attention, which it does not wait for, and launched behind it but for the packing of a past.
    """
    chunk = ph.At.Mixer, 0, list(sizes(2, 130, 300, 1024, 16, 16, 64))
    ahead = ("feedback_pack", "feedback_scores", "feedback_inverse_half", "feedback_near_half")
    ended: dict[str, set[str]] = {"0": set()}  # stream -> what has ended when the next kernel there begins
    events, streams, all_of = dict[str, set[str]](), dict[str, str](), set[str]()
    for turn, part in enumerate(driven(launching, ph.HALF, [chunk] * 2, says, tmp_path)[:2]):
        for what, *words in map(str.split, part):
            if what == "record":
                events[words[0]] = set(ended[words[1]])
            elif what == "wait":
                ended[words[0]] = ended.get(words[0], set()) | events[words[1]]
            else:
                name, stream = f"{what} {turn}", words[6]
                before = {x for x in all_of if x.endswith(str(turn - 1))}
                needs = {"feedback_inverse_half": {"feedback_scores"}, "feedback_near_half": {"feedback_inverse_half"}, "layer_linear": {"causal_prefill"},
                         "feedback_solve": {"feedback_pack", "feedback_near_half", "layer_linear"}}.get(what, set())
                assert ended[stream] >= before | {f"{x} {turn}" for x in needs}, name
                assert not (says and what in ahead and f"causal_prefill {turn}" in ended[stream]), name
                ended[stream].add(name)
                all_of.add(name)
                streams[what] = stream
    assert len(all_of) == 14 and {streams[x] for x in ("causal_prefill", "layer_linear", "feedback_solve")} == {"0"}
    assert list(streams) == [ahead[0], "causal_prefill", *ahead[1:], "layer_linear", "feedback_solve"], "the order of launches"
    assert ({streams[x] for x in ahead} == {"0"}) == (not says) and len(set(streams.values())) == 1 + says


@pytest.mark.parametrize("launching", (8, 10, 11), indirect=True)
def test_what_a_step_runs_is_loaded_before_it_may_be_captured(launching: Built, tmp_path: Path) -> None:
    """8.6 tells a plugin of a new context, without its shapes, and later ones of the shapes: behind either, nothing is left to load."""
    rows = [(1, 1), (2, 1), (8, 1), (9, 1), (17, 1), (65, 1), (600, 1), (1, 2), (1, 9), (1, 17), (2, 8), (1, 513), (1, 9300)]
    heads = ((256, 4, 4), (1024, 16, 4), (1040, 13, 13), (2048, 16, 4), (2064, 43, 43), (4096, 32, 8))
    for storage, kinds in ((ph.HALF, (0, 3, 17)), (ph.FLOAT, (0,))):
        forms = [(op, w) for op in (ph.NAMES if storage == ph.HALF else (ph.FEEDBACK, ph.CAUSAL)) for w in kinds if not w or ops.OPS[op].quantised]
        calls = [(op, w, list(sizes(*x, 96, D, h, kv, D // h, {ph.At.ProjectGain: 3 * D + 2 * kv * D // h, ph.At.Logits: 50304}.get(ph.At(op), D))))
                 for (op, w), (D, h, kv), x in itertools.product(forms, heads, rows)]  # fmt: skip
        for call, part in zip(calls, driven(launching, storage, calls, True, tmp_path, loads=True), strict=False):
            late = [line for line in part if line.startswith("load ")]
            assert part and not late, (call, late)
