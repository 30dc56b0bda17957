"""Programs of others against a running server: schemathesis, lm-evaluation-harness, guidellm, a browser. Each is skipped where it is not installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import Process, export_demo

pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.clients

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{q}}}}"
doc_to_target: {target}
target_delimiter: ""
{more}
"""
QUESTIONS = [("import os, ", "sys", "QQQQ"), ("for i in ", "range(3):", "%%%%%%%"), ("class A(", "object):", "7777777"), ("try:\n    ", "return", "JJJJJJ")]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    with Process(export_demo(tmp_path_factory.mktemp("exported")), "--served-model-name", "demo") as server:
        yield server


def program(name: str) -> str:
    """Where a program is: beside this Python, or on PATH."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        pytest.skip(f"{name} is not installed: pip install 'sessa-deploy[clients]'")
    return found


def done(*command: object, timeout: float = 250) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    result = subprocess.run([str(x) for x in command], capture_output=True, text=True, timeout=timeout, check=False, env=environment)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result.stdout


def test_schemathesis_finds_no_answer_that_openapi_does_not_describe(running: Process) -> None:
    """Without the check that every request of the schema's is taken: a schema cannot say that a prompt and max_tokens must fit together."""
    left_out = ("--exclude-checks", "positive_data_acceptance")
    said = done(program("schemathesis"), "run", f"{running.url}/openapi.json", "--max-examples", 20, *left_out, "--no-color")
    assert "passed" in said and "Tested: 10" in said


def test_lm_evaluation_harness_scores_and_generates(running: Process, tmp_path: Path) -> None:
    tool = program("lm_eval")
    rows = [{"q": q, "choices": [right, wrong], "gold": 0, "answer": right} for q, right, wrong in QUESTIONS]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    choice = TASK.format(name="own_choice", data=tmp_path / "data.jsonl", kind="multiple_choice", target="gold",
                         more='doc_to_choice: "{{choices}}"\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]')
    text = TASK.format(name="own_text", data=tmp_path / "data.jsonl", kind="generate_until", target='"{{answer}}"',
                       more='generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 16, temperature: 0}\n'
                            'metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]')
    for name, task in (("choice", choice), ("text", text)):
        (tmp_path / f"{name}.yaml").write_text(task)
    done(tool, "run", "--model", "local-completions", "--model_args", f"model=demo,base_url={running.url}/v1/completions,num_concurrent=4,max_length=512",
         "--tasks", "own_choice,own_text", "--include_path", tmp_path, "--batch_size", 3, "--output_path", tmp_path / "out")
    found = json.loads(next((tmp_path / "out").rglob("results*.json")).read_text())["results"]
    assert found["own_choice"]["acc,none"] == 1.0 and "exact_match,none" in found["own_text"]


def test_guidellm_measures_it_under_load(running: Process, tmp_path: Path) -> None:
    tool = program("guidellm")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"def function_{n}(path):\n    return"}) + "\n" for n in range(30)))
    done(tool, "run", "--backend", f"kind=openai_http,target={running.url},request_format=/v1/completions,model=demo", "--profile", "kind=concurrent,streams=8",
         "--constraint", "kind=max_requests,count=24", "--data", f"kind=json_file,path={tmp_path / 'prompts.jsonl'}",
         "--output", f"kind=json,path={tmp_path / 'out.json'}", "--disable-console-interactive")
    told = json.loads((tmp_path / "out.json").read_text())["benchmarks"][0]["metrics"]["request_totals"]
    assert told["successful"] == 24 and told["errored"] == 0


def test_a_browser_shows_the_page_without_a_complaint(running: Process, tmp_path: Path) -> None:
    """The page names the model it found by itself: its script ran, under the policy that the server sends."""
    browser = shutil.which("chromium") or shutil.which("google-chrome") or program("chromium")
    options = ("--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--virtual-time-budget=5000")
    page = done(browser, *options, "--dump-dom", f"{running.url}/")
    assert '<h1 id="name">demo</h1>' in page and "512 tokens of context" in page and '<label id="modes">' in page
    assert "/v1/chat/completions" in done(browser, *options, "--dump-dom", f"{running.url}/docs")
    done(browser, *options, "--window-size=1180,820", f"--screenshot={tmp_path / 'page.png'}", f"{running.url}/")
    assert (tmp_path / "page.png").stat().st_size > 10_000
