"""Each peer against its engine: Footplate's own for real, the others' as far as they are scripted
here. That the scripts are right is seen only where those engines are installed."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

Load = Callable[[str], ModuleType]

PROMPTS = [[300, 301, 302], [400, 401]]
MAX_TOKENS = [4, 2]


def make_job(peer: ModuleType, **options: Any) -> Any:
    warmup = peer.Work([[600] * 3, [601]], [2, 1])
    return peer.Job("model", "bfloat16", 2, warmup, peer.Work(PROMPTS, MAX_TOKENS), options)


def assert_is_done(result: Any) -> None:
    assert [len(output.token_ids) for output in result.outputs] == MAX_TOKENS
    for output in result.outputs:
        assert output.moments[0] > 0
        assert output.moments == sorted(output.moments)
        assert output.moments[-1] <= result.duration_s


def test_footplate_is_a_peer_like_the_others(load_script: Load) -> None:
    process = load_script("peer_process")
    job = make_job(process, engine_args={"model": "fake", "threads": 1})
    result = process.run_peer(process.peer_command("footplate"), job, 60)
    assert_is_done(result)
    assert result.version.startswith("footplate ")
    assert 0 < result.start_s < 60


def test_what_footplate_refuses_is_the_peers_error(load_script: Load) -> None:
    process = load_script("peer_process")
    job = make_job(process, engine_args={"model": "/nowhere"})
    with pytest.raises(process.PeerError, match="/nowhere"):
        process.run_peer(process.peer_command("footplate"), job, 60)


# Loads for one /health, then streams. A word is one token; "half" ends within a character, and is
# held back by the server until a token completes it.
LLAMA_SERVER = """#!{python}
import json, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Handler(BaseHTTPRequestHandler):
    loading = True

    def do_GET(self):
        self.send_response(503 if Handler.loading else 200)
        self.end_headers()
        Handler.loading = False

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with open({bodies!r}, "a") as file:
            print(json.dumps(body), file=file)
        self.send_response(200)
        self.end_headers()
        n = body["n_predict"]
        for i in range(1, n + 1):
            held = body["prompt"][0] == 300 and i in (2, 4)
            if not held:
                self.event(tokens=[i], tokens_predicted=i, stop=False)
        self.event(tokens=[], tokens_predicted=n, stop=True)

    def event(self, **fields):
        self.wfile.write(b"data: " + json.dumps(fields).encode() + b"\\n\\n")

    def log_message(self, *_):
        pass

if "--version" in sys.argv:
    sys.exit("version: 42 (scripted)")
with open({arguments!r}, "w") as file:
    json.dump(sys.argv[1:], file)
port = int(sys.argv[sys.argv.index("--port") + 1])
ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def test_llama_cpp_has_a_slot_per_request_and_no_cached_prompt(
    load_script: Load, tmp_path: Path
) -> None:
    bodies, arguments, server = (tmp_path / name for name in ("bodies", "arguments", "server"))
    server.write_text(
        LLAMA_SERVER.format(python=sys.executable, bodies=str(bodies), arguments=str(arguments))
    )
    server.chmod(0o755)
    process = load_script("peer_process")
    job = make_job(process, server=str(server), gguf="model.gguf")
    result = process.run_peer(process.peer_command("llama_server"), job, 60)
    assert_is_done(result)
    assert result.version == "llama.cpp 42 (scripted)"
    assert result.outputs[0].token_ids == [1, -1, 3, -1]
    assert result.outputs[1].token_ids == [1, 2]

    options = json.loads(arguments.read_text())
    assert options[options.index("--parallel") + 1] == "2"
    assert options[options.index("--threads") + 1] == "2"
    sent = [json.loads(line) for line in bodies.read_text().splitlines()]
    assert sorted(body["prompt"] for body in sent) == sorted([[600] * 3, [601], *PROMPTS])
    assert all(body["ignore_eos"] and not body["cache_prompt"] for body in sent)


def test_a_llama_server_that_does_not_start_is_an_error(load_script: Load, tmp_path: Path) -> None:
    server = tmp_path / "server"
    server.write_text(f"#!{sys.executable}\nraise SystemExit(7)\n")
    server.chmod(0o755)
    process = load_script("peer_process")
    job = make_job(process, server=str(server), gguf="model.gguf")
    with pytest.raises(process.PeerError, match="ended while it was starting, with 7"):
        process.run_peer(process.peer_command("llama_server"), job, 60)


class ScriptedPipeline:
    """OpenVINO GenAI's: every step gives every unfinished request one token."""

    made: SimpleNamespace

    def __init__(self, ir: str, scheduler: Any, device: str, properties: dict[str, Any]) -> None:
        type(self).made = SimpleNamespace(
            ir=ir, scheduler=scheduler, device=device, properties=properties
        )
        self._left: dict[int, int] = {}
        self._ready: dict[int, list[int]] = {}

    def add_request(self, request_id: int, prompt: Any, config: Any) -> Any:
        assert config.ignore_eos
        assert request_id not in self._ready
        self._left[request_id] = config.max_new_tokens
        ready = self._ready[request_id] = []
        return SimpleNamespace(
            can_read=lambda: bool(ready),
            read=lambda: {0: SimpleNamespace(generated_ids=[ready.pop()])},
        )

    def has_non_finished_requests(self) -> bool:
        return any(self._left.values())

    def step(self) -> None:
        for request_id, left in self._left.items():
            if left:
                self._ready[request_id].append(left)
                self._left[request_id] -= 1


def test_openvino_has_room_for_all_requests_and_no_prefix_cache(
    load_script: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    genai = SimpleNamespace(
        __version__="scripted",
        ContinuousBatchingPipeline=ScriptedPipeline,
        GenerationConfig=SimpleNamespace,
        SchedulerConfig=SimpleNamespace,
    )
    monkeypatch.setitem(sys.modules, "openvino_genai", genai)
    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(Tensor=list))
    peer = load_script("peer")
    job = make_job(
        peer,
        ir="folder",
        max_num_batched_tokens=64,
        properties={"INFERENCE_PRECISION_HINT": "f32"},
    )
    result = peer.run(job, load_script("openvino_peer").start)
    assert_is_done(result)
    assert result.outputs[0].token_ids == [4, 3, 2, 1]
    made = ScriptedPipeline.made
    assert (made.ir, made.device) == ("folder", "CPU")
    assert made.properties == {"INFERENCE_NUM_THREADS": 2, "INFERENCE_PRECISION_HINT": "f32"}
    assert made.scheduler.enable_prefix_caching is False
    assert made.scheduler.max_num_seqs == 2
    assert made.scheduler.max_num_batched_tokens == 64
    assert made.scheduler.num_kv_blocks >= 2


class ScriptedAsyncLLM:
    """vLLM's: one token per delta, and a last one without any."""

    @classmethod
    def from_engine_args(cls, args: Any) -> "ScriptedAsyncLLM":
        assert args.model == "model"
        assert args.max_model_len == 7
        assert args.max_num_batched_tokens == 64
        assert not args.enable_prefix_caching
        return cls()

    async def generate(self, prompt: Any, params: Any, request_id: str) -> Any:
        for token_id in range(params.max_tokens):
            yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=[token_id])])
        yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=[])])

    def shutdown(self) -> None:
        pass


def test_vllm_streams_every_request(load_script: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    modules: dict[str, dict[str, Any]] = {
        "vllm": {"__version__": "scripted", "SamplingParams": SimpleNamespace},
        "vllm.engine": {},
        "vllm.engine.arg_utils": {"AsyncEngineArgs": SimpleNamespace},
        "vllm.sampling_params": {"RequestOutputKind": SimpleNamespace(DELTA=1)},
        "vllm.v1": {},
        "vllm.v1.engine": {},
        "vllm.v1.engine.async_llm": {"AsyncLLM": ScriptedAsyncLLM},
    }
    for name, members in modules.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    for variable in ("VLLM_CPU_OMP_THREADS_BIND", "VLLM_CPU_KVCACHE_SPACE"):
        monkeypatch.setenv(variable, "")  # put back as it was, whatever the peer sets
    peer = load_script("peer")
    result = peer.run(make_job(peer, max_num_batched_tokens=64), load_script("vllm_peer").start)
    assert_is_done(result)
    assert result.outputs[0].token_ids == [0, 1, 2, 3]
    assert result.version == "vllm scripted"
