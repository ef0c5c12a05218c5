"""The benchmark end to end against the fake model, and its peer against a tiny real one."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARK = Path(__file__).parents[2] / "scripts" / "benchmark.py"

# Not those of itl: the fake model may be done before the client looks for the first time.
VLLM_KEYS = {
    "date",
    "backend",
    "model_id",
    "num_prompts",
    "request_rate",
    "burstiness",
    "max_concurrency",
    "duration",
    "completed",
    "total_input_tokens",
    "total_output_tokens",
    "request_throughput",
    "output_throughput",
    "total_token_throughput",
    "input_lens",
    "output_lens",
    "ttfts",
    "itls",
    "errors",
} | {
    f"{kind}_{metric}_ms"
    for kind in ("mean", "median", "std", "p99")
    for metric in ("ttft", "tpot", "e2el")
}


def run_benchmark(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARK), "--model", "fake", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_run_writes_a_table_and_the_result_keys_of_vllm(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    done = run_benchmark(
        *("--num-prompts", "6", "--input-len", "8:12", "--output-len", "3", "--save-detailed"),
        *("--json", str(file), "--request-rate", "500", "--max-concurrency", "4"),
    )
    assert done.returncode == 0, done.stderr
    assert "Output throughput" in done.stdout
    result: dict[str, Any] = json.loads(file.read_text())
    assert result.keys() >= VLLM_KEYS
    assert result["completed"] == 6
    assert result["output_lens"] == [3] * 6
    assert result["request_rate"] == 500
    assert result["environment"]["versions"]["msgspec"]
    assert result["client"]["was_bottleneck"] in (True, False)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--input-len", "9:3"], "smaller length first"),
        (["--input-len", "100000"], "the model's limit is"),
        (["--peer", "transformers", "--request-rate", "3"], "--peer"),
        (["--num-prompts", "1", "--peer", "transformers"], "needs a model with weights"),
        (["--max-num-seqs", "0"], "max_num_seqs"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(options: list[str], complaint: str) -> None:
    done = run_benchmark(*options)
    assert done.returncode == 1
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr


def test_a_random_model_is_whole_and_does_not_repeat_itself(
    load_script: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    script = load_script("random_model")
    script.make("llama-tiny", dtype="float32", folder=folder)
    assert {file.name for file in folder.iterdir()} >= {"config.json", "model.safetensors"}
    assert list(tmp_path.iterdir()) == [folder]

    peer = load_script("peer")
    job = peer.Job(
        model=str(folder),
        dtype="float32",
        threads=1,
        warmup=peer.Work([[600] * 3], [2]),
        work=peer.Work([[300, 301, 302], [400] * 5, [500]], [16, 3, 9]),
        options={"batch_size": 2},
    )
    result = peer.run(job, load_script("transformers_peer").start)
    outputs = [output.token_ids for output in result.outputs]
    assert [len(token_ids) for token_ids in outputs] == [16, 3, 9]
    assert [len(output.moments) for output in result.outputs] == [16, 3, 9]
    assert len(set(outputs[0])) > 8
    for output in result.outputs:
        assert output.moments == sorted(output.moments)
        assert output.moments[0] > 0
        assert output.moments[-1] <= result.duration_s


def test_making_a_random_model_again_changes_nothing(
    load_script: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    script = load_script("random_model")
    for name in ("a", "b"):
        script.make("llama-tiny", folder=tmp_path / name)
    first, second = (tmp_path / name / "model.safetensors" for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
    before = first.stat().st_mtime_ns
    script.make("llama-tiny", folder=tmp_path / "a")
    assert first.stat().st_mtime_ns == before
