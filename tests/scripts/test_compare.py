"""The comparison with scripted engines: who takes part, what is reported, what a failure costs."""

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

COMPARE = str(Path(__file__).parents[2] / "scripts" / "compare.py")
Load = Callable[[str], ModuleType]

# Answers every token of a prompt's output with the prompt's first, one each SECONDS.
ANSWERING = """
import json, sys
seconds = float(sys.argv[1])
work = json.load(sys.stdin)["work"]
outputs = [
    {"token_ids": [prompt[0]] * n, "moments": [seconds * (i + 1) for i in range(n)]}
    for prompt, n in zip(work["prompts"], work["max_tokens"])
]
duration = seconds * max(work["max_tokens"])
json.dump({"outputs": outputs, "duration_s": duration, "start_s": 0.5, "version": "1"}, sys.stdout)
"""
WAITING = "import signal; signal.pause()"
FAILING = "import sys; print('loading', file=sys.stderr); sys.exit('no such instruction')"


def program(source: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", source, *arguments]


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """All of a model that scripted engines need."""
    folder = tmp_path / "model"
    folder.mkdir()
    config = {"vocab_size": 1000, "max_position_embeddings": 64, "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def job(load_script: Load) -> Any:
    peer = load_script("peer")
    warmup, work = peer.Work([[9, 9]], [1]), peer.Work([[1, 2], [3]], [3, 2])
    return peer.Job("model", "float32", 1, warmup, work)


def test_a_failing_engine_costs_the_others_nothing(
    load_script: Load,
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    compare = load_script("compare")
    contenders = [
        compare.Contender("footplate", program(ANSWERING, "0.01"), {}),
        compare.Contender("broken", program(FAILING), {}),
        compare.Contender("slow", program(ANSWERING, "0.02"), {}),
    ]
    monkeypatch.setattr(compare, "all_contenders", lambda *_: contenders)
    peers = compare.Peers(transformers=True)
    file = model_folder.parent / "result.json"
    options = compare.Options(work=("2x8x4", "1x5:9x3"), rounds=2, json=file)
    status = compare.main(options, peers, compare.EngineArgs(model=str(model_folder), threads=1))
    assert status == 1
    printed = capsys.readouterr()
    assert "2x8x4, round 1 of 2, broken: failed: no such instruction" in printed.err
    assert "round 2 of 2, broken" not in printed.err
    assert "  loading" in printed.err
    assert "2.00 (2.00-2.00)" in printed.out
    assert "Of 2 requests, the same tokens as footplate: slow 2" in printed.out

    result = json.loads(file.read_text())
    assert [work["work"] for work in result["works"]] == ["2x8x4", "1x5:9x3"]
    first = result["works"][0]
    assert [list(results) for results in first["rounds"]] == [
        ["footplate", "slow"],
        ["slow", "footplate"],
    ]
    assert first["failures"] == {"broken": "no such instruction"}
    assert first["medians"]["slow"]["output_throughput"] == pytest.approx(100)
    assert first["medians"]["slow"]["start_s"] == 0.5
    assert first["ratios"]["slow"]["output_throughput"]["median"] == pytest.approx(2)


def test_all_works_done_is_success(
    load_script: Load, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare = load_script("compare")
    only = compare.Contender("footplate", program(ANSWERING, "0.01"), {})
    monkeypatch.setattr(compare, "all_contenders", lambda *_: [only])
    peers = compare.Peers(transformers=True)
    options = compare.Options(work=("1x2x3",), rounds=1)
    assert compare.main(options, peers, compare.EngineArgs(model=str(model_folder))) == 0


def test_the_warm_up_has_the_shape_of_the_work_and_none_of_its_tokens(
    load_script: Load, model_folder: Path
) -> None:
    compare = load_script("compare")
    model = compare.ModelFolder.read(model_folder)
    workload = compare.parse_work("3x8x20:30", seed=5)
    job = compare.make_job(model, compare.EngineArgs(threads=2), workload)
    assert job.threads == 2
    assert [len(prompt) for prompt in job.warmup.prompts] == [8, 8, 8]
    assert job.warmup.max_tokens == [compare.WARMUP_TOKENS] * 3
    assert not {tuple(prompt) for prompt in job.warmup.prompts} & {
        tuple(prompt) for prompt in job.work.prompts
    }
    assert all(20 <= length <= 30 for length in job.work.max_tokens)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ([], "nothing to compare with"),
        (["--transformers"], "demo is no folder with a config.json"),
        (["--transformers", "--work", "32x128"], "--work 32x128: write"),
        (["--transformers", "--work", "1x9:3x5"], "smaller length first"),
        (["--transformers", "--work", "0x1x1"], "num_prompts=0"),
        (["--transformers", "--rounds", "0"], "--rounds 0"),
        (["--transformers", "--model", "{model}", "--work", "1x60x5"], "the model's limit is 64"),
        (["--vllm-python", "/nowhere/python"], "/nowhere/python is no Python"),
        (["--vllm-python", sys.executable], "-m pip install vllm"),
        (["--openvino-python", sys.executable], "-m pip install openvino-genai"),
        (["--openvino-weights", "int8"], "needs --openvino-python"),
        (["--llama-server", sys.executable], "both --llama-server and --gguf"),
        (["--llama-server", "/nowhere", "--gguf", "{model}"], "no such program"),
        (["--llama-server", sys.executable, "--gguf", "/nowhere"], "no such file"),
        (["--llama-server", sys.executable, "--gguf", COMPARE, "--gguf", COMPARE], "two files"),
        (["--transformers", "--max-num-seqs", "0"], "max_num_seqs"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(
    model_folder: Path, options: list[str], complaint: str
) -> None:
    command = [sys.executable, COMPARE, *(text.format(model=model_folder) for text in options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert complaint in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        (FAILING, "no such instruction"),
        ("import sys; sys.exit(3)", "exit status 3"),
        ("print('ready')", "its answer is no result"),
        (ANSWERING.replace("* n,", "* (n - 1),"), "2 of 2 outputs are not as long"),
        (WAITING, "not done after 1 s"),
    ],
)
def test_a_peer_that_does_not_do_its_job_is_an_error_that_says_why(
    load_script: Load, job: Any, source: str, complaint: str
) -> None:
    process = load_script("peer_process")
    with pytest.raises(process.PeerError, match=complaint):
        process.run_peer(program(source, "0.1"), job, 1 if source == WAITING else 60)


def test_nothing_that_a_peer_started_outlives_its_turn(
    load_script: Load, job: Any, tmp_path: Path
) -> None:
    held = tmp_path / "held"
    os.mkfifo(held)
    leaving = f"""
import subprocess, sys
child = subprocess.Popen(
    [sys.executable, "-c", {f"file = open({str(held)!r}, 'w'); print(flush=True); {WAITING}"!r}],
    stdout=subprocess.PIPE,
)
child.stdout.readline()
{ANSWERING}
"""
    with open(os.open(held, os.O_RDONLY | os.O_NONBLOCK), "rb") as reader:
        load_script("peer_process").run_peer(program(leaving, "0.1"), job)
        # At its end once nobody has it open for writing any more.
        assert select.select([reader], [], [], 30)[0]
        assert reader.read() == b""


def test_work_is_timed_after_the_warm_up_and_from_its_own_start(
    load_script: Load, job: Any
) -> None:
    peer = load_script("peer")
    done: list[Any] = []

    def generate(work: Any) -> list[Any]:
        done.append(work)
        return [peer.Output([7] * n, [time.perf_counter()]) for n in work.max_tokens]

    result = peer.run(job, lambda job: nullcontext(peer.Engine("scripted 1", generate)))
    assert done == [job.warmup, job.work]
    assert result.version == "scripted 1"
    assert 0 < result.outputs[0].moments[0] <= result.outputs[1].moments[0] == result.duration_s
