"""The verbs run, bench and doctor, as a user calls them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time

import pytest

from sessa_deploy.cli import main
from sessa_deploy.cuda import devices
from sessa_deploy.runtime import traffic
from sessa_deploy.runtime.session import Session


def call(capfd, *args) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of one command line."""
    code = 0
    try:
        main([str(a) for a in args])
    except SystemExit as done:
        code = int(done.code or 0)
    out, err = capfd.readouterr()
    return code, out, err


def test_run_streams_the_text_that_the_session_generates(tiny_bundle, capfd):
    code, out, err = call(capfd, "run", tiny_bundle.path, "--prompt", "def f", "--max-new-tokens", 12, "--backend", "ort", "--threads", 1)
    assert code == 0 and out == Session(tiny_bundle).generate("def f", 12)[0].text + "\n"
    assert err.count("\n") == 1 and "ort: 5 prompt tokens, 12 new" in err and "ended by length" in err


def test_run_stops_at_the_capacity_unless_told_how_far_to_go(tiny_bundle, capfd):
    code, _, err = call(capfd, "run", tiny_bundle.path, "--prompt", "x" * 60)
    assert code == 0 and "60 prompt tokens, 5 new" in err
    code, _, err = call(capfd, "run", tiny_bundle.path, "--prompt", "x" * 65)
    assert code == 2 and "a prompt of 65 tokens" in err and "a capacity of 64 tokens" in err and err.count("\n") == 1


def test_run_samples_by_its_seed(tiny_bundle, capfd):
    args = ("run", tiny_bundle.path, "--prompt", "x", "--max-new-tokens", 20, "--temperature", 1.3, "--top-k", 50, "--top-p", 0.95, "--min-p", 0.01,
            "--repetition-penalty", 1.1, "--seed")
    texts = [call(capfd, *args, seed)[1] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    greedy = call(capfd, "run", tiny_bundle.path, "--prompt", "x", "--max-new-tokens", 20, "--seed", 1)[1]
    implied = call(capfd, "run", tiny_bundle.path, "--prompt", "x", "--max-new-tokens", 20, "--top-k", 50, "--seed", 1)[1]
    assert greedy == call(capfd, "run", tiny_bundle.path, "--prompt", "x", "--max-new-tokens", 20)[1] != implied


def test_run_reads_standard_input_and_a_reader_may_leave(tiny_bundle):
    command = [sys.executable, "-c", "from sessa_deploy.cli import main; main()", "run", str(tiny_bundle.path), "--prompt", "-", "--max-new-tokens", "40"]
    done = subprocess.run(command, input="größe".encode(), capture_output=True, timeout=200, check=False)
    assert done.returncode == 0 and done.stdout.decode() == Session(tiny_bundle).generate("größe", 40)[0].text + "\n"
    assert b"7 prompt tokens" in done.stderr
    bad = subprocess.run(command, input=b"\xff\xfe", capture_output=True, timeout=200, check=False)
    assert bad.returncode == 2 and bad.stderr.count(b"\n") == 1 and b"UTF-8" in bad.stderr
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        child.stdout.close()
        child.stdin.write(b"abc")
        child.stdin.close()
        assert child.wait(200) == 0 and b"Traceback" not in child.stderr.read()


BAD = [
    ("--max-new-tokens", 0), ("--max-new-tokens", "many"), ("--max-new-tokens", 1000), ("--temperature", -1), ("--temperature", "nan"), ("--top-k", -1),
    ("--top-p", 0), ("--top-p", 1.5), ("--min-p", 1), ("--repetition-penalty", 0), ("--seed", -1), ("--seed", 0.5), ("--capacity", 0), ("--capacity", 3),
    ("--threads", 0), ("--threads", -2), ("--backend", "tpu"), ("--backend", "trt"), ("--backend", "ort-cuda"), ("--stop", ""), ("--prompt", ""), ("--nope", 1),
    ("--prompt", "\ud800"),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda pair: " ".join(map(ascii, pair)))
def test_run_refuses_bad_input_in_one_line(tiny_bundle, capfd, monkeypatch, bad):
    for name in ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings"):
        monkeypatch.setitem(sys.modules, name, None)  # so that a machine with a GPU refuses those backends too
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    options = {"--prompt": "x" * 9, "--max-new-tokens": 5} | dict([bad])
    code, out, err = call(capfd, "run", tiny_bundle.path, *(part for pair in options.items() for part in pair))
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1, (out, err)


def test_run_refuses_a_changed_or_missing_bundle(tiny_bundle, tmp_path, capfd):
    for name in ("model.onnx", "tokenizer.json", "manifest.json"):
        copy = tmp_path / name
        shutil.copytree(tiny_bundle.path, copy)
        raw = bytearray((copy / name).read_bytes())
        raw[len(raw) // 2] ^= 0x80
        (copy / name).write_bytes(raw)
        code, out, err = call(capfd, "run", copy, "--prompt", "x")
        assert code == 2 and out == "" and err.count("\n") == 1 and name in err and "sessa-deploy export" in err
    assert call(capfd, "run", tmp_path / "absent", "--prompt", "x")[0] == 2
    assert call(capfd, "run", tiny_bundle.path)[0] == 2, "no prompt"


def test_bench_writes_versioned_figures(tiny_bundle, tiny, tmp_path, capfd):
    args = ("bench", tiny_bundle.path, "--batch", 2, "--prompt-tokens", 8, "--window", 6, "--steps", 20, "--seconds", 0.05, "--bandwidth", 20)
    code, out, err = call(capfd, *args, "--json", tmp_path / "figures.json")
    assert code == 0 and "first token" in out and "tokens/s" in out, err
    figures = json.loads((tmp_path / "figures.json").read_text())
    between = figures["inter_token_ms"]
    assert figures["schema_version"] == 2 and between["count"] >= 20
    assert 0 < between["min"] <= between["p50"] <= between["p95"] <= between["p99"] <= between["max"]
    assert figures["ttft_ms"]["p50"] > 0 and figures["tokens_per_second"] > 0 and figures["settings"]["batch"] == 2 and figures["share_of_floor"] > 0
    assert figures["environment"]["packages"]["onnxruntime"] and figures["bundle"]["model_sha256"] == tiny_bundle.sha256("model.onnx")
    row = 2 * (2 * 2 * 4 + 2 * 16) * 4
    weights = sum(w.size for name, w in tiny.w.items() if not name.startswith("embedding")) + 2 * 16  # of the embedding a row a sequence
    assert figures["bytes_per_step"] == 4 * weights + 2 * row * (8 + 2.5)
    assert figures["settings"]["warmup"] == 0.2 and figures["settings"]["bandwidth_is"] == "given" and "peak_device_bytes" not in figures
    assert {"python", "cpu", "gpus", "cuda_driver", "packages"} <= set(figures["environment"])
    code, out, _ = call(capfd, *args, "--json", "-")
    assert code == 0 and json.loads(out)["kind"] == "sessa-deploy bench"


@pytest.mark.parametrize("bad", [("--batch", 0), ("--steps", 0), ("--prompt-tokens", 0), ("--seconds", -1), ("--bandwidth", 0), ("--capacity", 10),
                                 ("--json", "/absent/folder/x.json")])
def test_bench_refuses_bad_input_in_one_line(tiny_bundle, capfd, bad):
    options = {"--prompt-tokens": 8, "--window": 4, "--steps": 2, "--seconds": 0} | dict([bad])
    code, _, err = call(capfd, "bench", tiny_bundle.path, *(part for pair in options.items() for part in pair))
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1


def test_doctor_names_what_is_there_and_what_mends_the_rest(capfd):
    code, out, _ = call(capfd, "doctor")
    assert code == 0 and "onnxruntime" in out and "ready:" in out
    code, out, _ = call(capfd, "doctor", "--json")
    found = json.loads(out)
    assert code == 0 and found["schema_version"] == 1 and "run and bench on a CPU" in found["ready"]
    assert all(bool(check["mend"]) == (check["state"] != "ok") for check in found["checks"])


def test_doctor_works_where_nothing_optional_is_installed():
    code = """
import sys
import time
gone = ("torch", "triton", "onnx", "onnxruntime", "onnxscript", "safetensors", "tensorrt", "matplotlib")
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in gone:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
from importlib import metadata
real = metadata.distribution
def distribution(name):
    if name.split("-")[0] in gone:
        raise metadata.PackageNotFoundError(name)
    return real(name)
metadata.distribution = distribution
from sessa_deploy.cli import main
from sessa_deploy.cuda import devices
from sessa_deploy.runtime import traffic
main(["doctor"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert "pip install 'sessa-deploy[ort]'" in done.stdout and "ready: nothing yet" in done.stdout


def test_bench_counts_the_sessions_own_device_memory_and_reads_clocks_while_it_runs(tiny_bundle, monkeypatch):
    from sessa_deploy.runtime import bench, environment
    from sessa_deploy.runtime.ort.backend import OrtBackend
    from sessa_deploy.runtime.session import Session

    monkeypatch.setattr(OrtBackend, "device_bytes", lambda self: 1000)
    steps_before = []
    session = Session(tiny_bundle, "ort")
    step = session.backend.step_greedy
    monkeypatch.setattr(session.backend, "step_greedy", lambda *a: (steps_before.append(1), step(*a))[1])
    monkeypatch.setattr(environment, "describe", lambda: (time.sleep(0.05), {"steps": len(steps_before)})[1])
    figures = bench.measure(session, bench.BenchOptions(4, 4, steps=5, seconds=0, warmup=0, prefills=1), device_before=400)
    assert figures["peak_device_bytes"] == 600 and figures["inter_token_ms"]["count"] == 5 and figures["environment"]["steps"] > 5
    figures = bench.measure(session, bench.BenchOptions(4, 4, steps=5, seconds=0, warmup=0, prefills=1), device_before=4000)
    assert "peak_device_bytes" not in figures  # less than before: another process gave memory back


def test_bandwidth_is_measured_where_there_is_a_gpu_and_absent_elsewhere():
    found = traffic.copy_bandwidth()
    assert found is None if not devices() else found is not None and 1e10 < found < 1e14, found


def test_a_checkpoint_given_for_a_bundle_and_a_wrong_option_name_the_way_on(tmp_path, capfd):
    (tmp_path / "config.json").write_text("{}")
    for verb in (("run", "--prompt", "x"), ("bench",)):
        code, _, err = call(capfd, verb[0], tmp_path, *verb[1:])
        assert code == 2 and "a checkpoint, not a bundle" in err and f"sessa-deploy export {tmp_path} --out BUNDLE" in err and err.count("\n") == 1
    code, _, err = call(capfd, "run", tmp_path)
    assert code == 2 and err.startswith("error: there is nothing to continue: got no prompt; allowed: --prompt TEXT, --prompt-file FILE or --prompt-ids")
    assert f"sessa-deploy chat {tmp_path}" in err and err.count("\n") == 1
    code, _, err = call(capfd, "run", tmp_path, "--prompt", "x", "--frobnicate")
    assert code == 2 and err.endswith("; see: sessa-deploy run --help\n")
