"""`EngineArgs` refuses what no engine could mean, and drops nothing on its way to the core."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest

from footplate.frontend import EngineArgs
from footplate.protocol.config import CoreConfig, SecurityConfig
from footplate.protocol.errors import InvalidParameterError


@pytest.mark.parametrize(
    ("name", "legal"),
    [
        ("model", ["demo", "fake", "/models/m", "org/name"]),
        ("tokenizer", [None, "/models/m"]),
        ("dtype", ["auto", "float32", "bfloat16", "float16"]),
        ("device", ["auto", "cpu", "cuda"]),
        ("quantization", [None, "int8", "int4"]),
        ("max_model_len", [None, 1, 10**6]),
        ("block_size", [1, 16, 4096]),
        ("num_gpu_blocks_override", [None, 1]),
        ("kv_cache_memory_bytes", [None, 2**40]),
        ("gpu_memory_utilization", [1, 1.0, 0.01]),
        ("enable_prefix_caching", [True, False]),
        ("standby", [True, False]),
        ("max_num_seqs", [1, 512]),
        ("max_num_batched_tokens", [256, 10**6]),
        ("scheduling_policy", ["fcfs", "priority"]),
        ("long_prefill_token_threshold", [0, 1, 2**31 - 1]),
        ("max_num_queued_reqs", [None, 1]),
        ("max_num_queued_tokens", [None, 1]),
        ("max_unread_tokens", [None, 1, 10**6]),
        ("max_unread_bytes", [1, 2**40]),
        ("max_logprobs", [-1, 0, 20, 2**31 - 1]),
        ("logprobs_mode", ["raw_logprobs", "processed_logits"]),
        ("stream_interval", [1, 100]),
        ("logits_processors", [(), ["a.b:C"], ("a:B", "c:D")]),
        ("reasoning_start_str", [None, "<think>"]),
        ("reasoning_end_str", [None, "</think>"]),
        ("threads", [None, 1]),
        ("start_timeout_s", [0.1, 1, math.inf]),
        ("log_level", ["DEBUG", "ERROR"]),
    ],
)
def test_values_within_bounds_are_taken(name: str, legal: list[Any]) -> None:
    for value in legal:
        assert getattr(EngineArgs(**{name: value}), name) == value


POSITIVE = [0, -1, 1.5, True, "1", 2**63]


@pytest.mark.parametrize(
    ("name", "illegal"),
    [
        ("model", ["", None, 5, Path("m")]),
        ("tokenizer", ["", 5, Path("m")]),
        ("dtype", ["float64", "", None, ["auto"]]),
        ("device", ["tpu", None]),
        ("quantization", ["int2", "", 8]),
        ("max_model_len", POSITIVE),
        ("block_size", [*POSITIVE, None]),
        ("num_gpu_blocks_override", POSITIVE),
        ("kv_cache_memory_bytes", POSITIVE),
        ("gpu_memory_utilization", [0, -0.5, 1.01, math.nan, "0.9", None, True]),
        ("enable_prefix_caching", [None, 1, "yes"]),
        ("standby", [None, 1, "yes"]),
        ("max_num_seqs", [*POSITIVE, None]),
        ("max_num_batched_tokens", [*POSITIVE, None]),
        ("scheduling_policy", ["lifo", None]),
        ("long_prefill_token_threshold", [-1, 2**31, 1.0, None, True]),
        ("max_num_queued_reqs", POSITIVE),
        ("max_num_queued_tokens", POSITIVE),
        ("max_unread_tokens", POSITIVE),
        ("max_unread_bytes", [*POSITIVE, None]),
        ("lease_s", [0, -1, math.nan, math.inf, "1", None, True]),
        ("lease_bytes", [*POSITIVE, None]),
        ("max_logprobs", [-2, 2**31, None, 1.5]),
        ("logprobs_mode", ["raw", None, 0]),
        ("stream_interval", [*POSITIVE, None]),
        ("logits_processors", ["a:B", None, 5]),
        ("reasoning_start_str", ["", 5]),
        ("reasoning_end_str", ["", 5]),
        ("threads", POSITIVE),
        ("start_timeout_s", [0, -1, math.nan, "1", None, True]),
        ("log_level", ["debug", "TRACE", None]),
    ],
)
def test_values_out_of_bounds_are_refused_by_name(name: str, illegal: list[Any]) -> None:
    for value in illegal:
        with pytest.raises(InvalidParameterError, match=f"{name}=") as caught:
            EngineArgs(**{name: value})
        assert (caught.value.parameter, caught.value.value) == (name, value)


def test_a_path_of_a_processor_is_a_text() -> None:
    with pytest.raises(InvalidParameterError, match="logits_processors=5"):
        EngineArgs(logits_processors=("a:B", 5))  # type: ignore[arg-type]


def test_every_running_request_must_get_a_token_in_every_step() -> None:
    EngineArgs(max_num_seqs=8, max_num_batched_tokens=8)
    with pytest.raises(InvalidParameterError, match=r"max_num_seqs \(9\)"):
        EngineArgs(max_num_seqs=9, max_num_batched_tokens=8)


def test_an_unknown_argument_is_an_error() -> None:
    with pytest.raises(TypeError, match="max_num_sequences"):
        EngineArgs(max_num_sequences=1)  # type: ignore[call-arg]


def test_arguments_do_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        EngineArgs().model = "fake"  # type: ignore[misc]


# Every argument with a value that is not its default, and where the core finds it.
MOVED: dict[str, tuple[Any, str]] = {
    "model": ("fake", "model.model"),
    "tokenizer": ("/t", "model.tokenizer"),
    "dtype": ("float16", "model.dtype"),
    "device": ("cuda", "model.device"),
    "quantization": ("int8", "model.quantization"),
    "max_model_len": (77, "model.max_model_len"),
    "threads": (3, "model.num_threads"),
    "block_size": (8, "cache.block_size"),
    "num_gpu_blocks_override": (99, "cache.num_gpu_blocks_override"),
    "kv_cache_memory_bytes": (2**40, "cache.kv_cache_memory_bytes"),
    "gpu_memory_utilization": (0.5, "cache.gpu_memory_utilization"),
    "enable_prefix_caching": (False, "cache.enable_prefix_caching"),
    "max_num_seqs": (5, "scheduler.max_num_seqs"),
    "max_num_batched_tokens": (600, "scheduler.max_num_batched_tokens"),
    "scheduling_policy": ("priority", "scheduler.policy"),
    "long_prefill_token_threshold": (64, "scheduler.long_prefill_token_threshold"),
    "max_num_queued_reqs": (7, "requests.max_num_queued_reqs"),
    "max_num_queued_tokens": (8, "requests.max_num_queued_tokens"),
    "max_unread_tokens": (9, "requests.max_unread_tokens"),
    "max_unread_bytes": (10, "max_unread_bytes"),
    "lease_s": (11, "requests.lease_s"),
    "lease_bytes": (12, "requests.lease_bytes"),
    "max_logprobs": (-1, "requests.max_logprobs"),
    "logprobs_mode": ("raw_logits", "requests.logprobs_mode"),
    "stream_interval": (5, "requests.stream_interval"),
    "logits_processors": (("a.b:C",), "requests.logits_processors"),
    "reasoning_start_str": ("[THINK]", "requests.reasoning_start_str"),
    "reasoning_end_str": ("[/THINK]", "requests.reasoning_end_str"),
    "log_level": ("ERROR", "log_level"),
    "weights_version": ("v2", "weights_version"),
}
OF_THE_CLIENT = {
    "start_timeout_s",
    "max_restarts",
    "restart_window_s",
    "stall_timeout_s",
    "hang_timeout_s",
    "standby",
}
OF_TCP = {"key_dir", "insecure_tcp"}


def test_every_argument_reaches_the_core() -> None:
    assert {field.name for field in dataclasses.fields(EngineArgs)} == {
        *MOVED,
        *OF_THE_CLIENT,
        *OF_TCP,
    }
    args = EngineArgs(**{name: value for name, (value, _) in MOVED.items()})
    sent = args.core_config("ipc:///x", "/private")
    received = msgspec.msgpack.decode(msgspec.msgpack.encode(sent), type=CoreConfig)
    assert (received.address, received.private_dir) == ("ipc:///x", "/private")
    for name, (value, path) in MOVED.items():
        found: Any = received
        for part in path.split("."):
            found = getattr(found, part)
        assert found == value != getattr(EngineArgs(), name)


def test_who_may_come_in_reaches_the_core() -> None:
    address = "tcp://127.0.0.1:5555"
    with_keys = EngineArgs(key_dir="/keys").core_config(address, owner_key="mine").security
    assert with_keys == SecurityConfig(key_dir="/keys", owner_key="mine")
    assert EngineArgs(insecure_tcp=True).core_config(address).security.insecure_tcp


@pytest.mark.parametrize(
    ("address", "args", "words"),
    [
        ("tcp://127.0.0.1:5555", {}, "key_dir"),
        ("tcp://0.0.0.0:5555", {"insecure_tcp": True}, "loopback"),
        ("tcp://*:5555", {"insecure_tcp": True}, "loopback"),
        ("tcp://127.0.0.1:5555", {"key_dir": "/k", "insecure_tcp": True}, "insecure_tcp"),
        ("ipc:///x", {"key_dir": "/k"}, "ipc"),
        ("ipc:///x", {"insecure_tcp": True}, "ipc"),
    ],
)
def test_a_core_that_would_let_in_whoever_comes_is_not_started(
    address: str, args: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidParameterError, match=words):
        EngineArgs(**args).core_config(address)


@pytest.mark.parametrize("args", [{"key_dir": ""}, {"key_dir": 7}, {"insecure_tcp": "yes"}])
def test_what_says_who_may_come_in_has_a_type(args: dict[str, Any]) -> None:
    with pytest.raises(InvalidParameterError, match=next(iter(args))):
        EngineArgs(**args)


def test_the_core_has_the_same_defaults() -> None:
    theirs = CoreConfig(address="ipc:///x", weights_version="demo")
    assert EngineArgs().core_config("ipc:///x") == theirs
