#!/usr/bin/env python3
"""A peer: llama.cpp's server, over HTTP. Options: server (the program), gguf (the model's file).

Its KV cache and everything else not named here are as the server has them by default.
"""

import http.client
import json
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from peer import Engine, Job, Output, Work, main

HOST = "127.0.0.1"
_POLL_S = 0.02


@contextmanager
def start(job: Job) -> Iterator[Engine]:
    """Start a server with one slot per request and wait until it has loaded the model."""
    server, gguf = job.options["server"], job.options["gguf"]
    slots = len(job.work.prompts)
    # The context is divided among the slots.
    context = slots * (max(job.warmup.lengths + job.work.lengths) + 1)
    port = _free_port()
    command = [server, "--model", gguf, "--host", HOST, "--port", str(port)]
    command += ["--threads", str(job.threads), "--threads-batch", str(job.threads)]
    command += ["--parallel", str(slots), "--ctx-size", str(context)]
    process = subprocess.Popen(command)
    try:
        _wait_until_ready(process, port)
        with ThreadPoolExecutor(slots) as threads:

            def generate(work: Work) -> list[Output]:
                ports = [port] * len(work.prompts)
                return list(threads.map(_complete, ports, work.prompts, work.max_tokens))

            yield Engine(f"llama.cpp {_version(server)}", generate)
    finally:
        process.terminate()
        process.wait()


def _free_port() -> int:
    with socket.create_server((HOST, 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _wait_until_ready(process: "subprocess.Popen[bytes]", port: int) -> None:
    while process.poll() is None:
        connection = http.client.HTTPConnection(HOST, port)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass  # not listening yet
        finally:
            connection.close()
        time.sleep(_POLL_S)
    raise RuntimeError(f"the server ended while it was starting, with {process.returncode}")


def _complete(port: int, prompt: list[int], max_tokens: int) -> Output:
    body = {
        "prompt": prompt,
        "n_predict": max_tokens,
        "ignore_eos": True,
        "cache_prompt": False,
        "stream": True,
        "return_tokens": True,
        # Greedy, and no other sampler has work to do.
        "samplers": ["top_k"],
        "top_k": 1,
        "temperature": 0,
    }
    connection = http.client.HTTPConnection(HOST, port)
    connection.request("POST", "/completion", json.dumps(body))
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"the server answered {response.status}: {response.read().decode()}")
    output = Output()
    for line in response:
        if line.startswith(b"data: "):
            _take(output, json.loads(line[6:]))
        elif line.startswith(b"error: "):
            raise RuntimeError(line.decode())
    connection.close()
    return output


def _take(output: Output, event: dict[str, Any]) -> None:
    """Tokens that end within a character are held back, and counted with the next that does not;
    of those only the count is known. The last event has no token and may have such a count."""
    named = event["tokens"]
    held = event["tokens_predicted"] - len(output.token_ids) - len(named)
    if named or held:
        output.moments.append(time.perf_counter())
        output.token_ids += [-1] * held + named


def _version(server: str) -> str:
    done = subprocess.run([server, "--version"], capture_output=True, text=True)
    return (done.stdout + done.stderr).partition("\n")[0].removeprefix("version: ")


if __name__ == "__main__":
    main(start)
