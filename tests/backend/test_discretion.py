"""Error texts for people who are elsewhere."""

import time

import pytest

from footplate.backend.discretion import without_places

PLACES = ["/", "0x7f", "127.0", "10.1", "ipc:", "tcp:", "4711", "secret", "home"]


@pytest.mark.parametrize(
    "text",
    [
        "FileNotFoundError: [Errno 2] No such file or directory: '/home/x/secret'",
        "/home/x/secret does not exist",
        "cannot listen on tcp://10.1.2.3:5555 (process 4711 does)",
        "another engine core (process 4711) holds /home/x/secret.sock: stop it",
        "cannot listen on ipc:///home/secret: Address already in use",
        "TypeError: <footplate.backend.Secret object at 0x7f12ab> is no tensor",
        "ValueError: <function secret at 0x7f00>",
        "RuntimeError: at address 0x7fffdeadbeef",
        "OSError: ~/secret/x, /home/y",
        "pid 4711 went, PID 4711 too",
        'File "/home/secret.py", line 3',
        "path=/home/secret",
        "connect to 10.1.2.3:80 failed",
        "x (in /home/secret)",
    ],
)
def test_paths_addresses_and_ids_are_left_out(text: str) -> None:
    cleaned = without_places(text)
    assert not [place for place in PLACES if place in cleaned], cleaned
    assert len(cleaned) > 5


@pytest.mark.parametrize(
    "text",
    [
        "",
        "token ids must be 0 to 99",
        "n is 0, must be 1 to 16384",
        "logprobs and/or prompt_logprobs; 3/4 of the prompt; tokens/s",
        "min_p=0.5: must be 0 to 1",
        "max_model_len=99 does not fit into 1 KV blocks of 16",
        "this key has 3 requests and 1 more would exceed its max_requests, which is 3",
        "version 1.2.3 speaks protocol 1.2",
    ],
)
def test_what_tells_nothing_of_this_machine_stays(text: str) -> None:
    assert without_places(text) == text


@pytest.mark.parametrize("text", ["/" * 200_000, "1." * 100_000, "<" * 200_000, "~/" * 100_000])
def test_no_text_takes_long(text: str) -> None:
    since = time.monotonic()
    without_places(text)
    assert time.monotonic() - since < 2
