"""Two runners of one model keep their packed weights once, and compute the same bits."""

import fcntl
import gc
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from footplate.backend.request import Request
from footplate.backend.runner.batch import Chunk, RaggedBatch
from footplate.backend.runner.model_runner import prepare_model_runner
from footplate.backend.runner.shared_weights import SharedWeights
from footplate.backend.step import ModelRunner, StepPlan
from footplate.frontend.shared_memory import SharedMemory
from footplate.protocol.config import CacheConfig, ModelConfig, SchedulerConfig
from footplate.protocol.token_params import TokenParams

SaveLlama = Callable[..., Path]
CACHE = CacheConfig(block_size=16, num_gpu_blocks_override=8)
SCHEDULER = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=32)
F_GET_SEALS = 1034
SEALED = 1 | 2 | 4 | 8
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96}


@pytest.fixture
def file() -> Iterator[int]:
    memory = SharedMemory()
    assert memory.file is not None
    yield memory.file
    memory.close()


def runner_of(
    folder: Path, file: int | None, *, is_standby: bool = False, **options: Any
) -> ModelRunner:
    model = ModelConfig(model=str(folder), device="cpu", num_threads=1, **options)
    quiet = lambda phase, fraction: None  # noqa: E731
    make = prepare_model_runner(model, 16, quiet, is_standby=is_standby, weights_file=file)
    return make(CACHE, SCHEDULER, quiet)


def logits_of(runner: Any) -> torch.Tensor:
    """Of every position of a prompt in two chunks."""
    tokens = [(7 * i + 3) % 61 for i in range(40)]
    rows = []
    for start, end in ((0, 23), (23, 40)):
        chunk = Chunk(tokens[start:end], start, [2, 0, 1])
        batch = RaggedBatch.of_chunks([chunk], list(range(end - start)), 16)
        rows.append(runner._model.forward(batch))
    return torch.cat(rows)


def sampled(runner: ModelRunner) -> list[int]:
    params = TokenParams(1.0, 1.0, 0, 0.0, 7, 8, 0, ())
    prompt = [5, 6, 7, 8]
    request = Request(
        key=1,
        client=b"",
        handle=1,
        token_ids=list(prompt),
        num_prompt_tokens=len(prompt),
        params=params,
        block_ids=[3],
    )
    for _ in range(7):
        num_new = len(request.token_ids) - request.num_computed_tokens
        result = runner.execute(StepPlan([request], [num_new], [0]))
        request.num_computed_tokens += num_new
        request.token_ids += result.token_ids
    runner.execute(StepPlan(released=[1]))
    return request.token_ids


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_standby_computes_the_same_bits_with_the_weights_of_the_first(
    dtype: str, is_tied: bool, quantization: str | None, file: int, save_llama: SaveLlama
) -> None:
    folder = save_llama(torch.bfloat16, tie_word_embeddings=is_tied, **SIZES)
    options: dict[str, Any] = {"dtype": dtype, "quantization": quantization}
    alone = runner_of(folder, None, **options)
    first = runner_of(folder, file, **options)
    size = os.fstat(file).st_size
    second = runner_of(folder, file, is_standby=True, **options)
    assert os.fstat(file).st_size == size > 2**14
    expected = logits_of(alone)
    assert torch.equal(logits_of(first), expected)
    assert torch.equal(logits_of(second), expected)
    assert sampled(alone) == sampled(first) == sampled(second)
    packed = [num_shared_bytes(runner) for runner in (alone, first, second)]
    assert packed[0] == 0 < packed[1] == packed[2]


def num_shared_bytes(runner: Any) -> int:
    """Of matrices that lie in a mapping of a memory file."""
    ranges = []
    with open("/proc/self/maps") as maps:
        for line in maps:
            if "memfd:footplate-weights" in line:
                start, end = line.split(None, 1)[0].split("-")
                ranges.append(range(int(start, 16), int(end, 16)))
    model = runner._model._model
    replaced = [vars(module)["forward"] for module in model.modules() if "forward" in vars(module)]
    packed: list[torch.Tensor] = []

    def look(tensor: torch.Tensor) -> torch.Tensor:
        packed.append(tensor)
        return tensor

    for forward in replaced:
        if hasattr(forward, "move"):
            forward.move(look)
    packed += list(model.parameters())
    return sum(t.nbytes for t in packed if any(t.data_ptr() in r for r in ranges))


def test_the_memory_is_sealed_and_reading_only(file: int, save_llama: SaveLlama) -> None:
    runner_of(save_llama(**SIZES), file)
    assert fcntl.fcntl(file, F_GET_SEALS) == SEALED
    for harm in (
        lambda: os.pwrite(file, b"!", 0),
        lambda: os.ftruncate(file, 0),
        lambda: os.ftruncate(file, 2**30),
    ):
        with pytest.raises(PermissionError):
            harm()


def test_another_model_shares_nothing_and_computes_its_own(
    file: int, save_llama: SaveLlama, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_llama(**SIZES)
    runner_of(folder, file)
    save_llama(**{**SIZES, "initializer_range": 0.5})  # the same shapes in the same folder
    expected = logits_of(runner_of(folder, None))
    with caplog.at_level(logging.WARNING):
        other = runner_of(folder, file, is_standby=True)
    assert torch.equal(logits_of(other), expected)
    assert num_shared_bytes(other) == 0
    assert caplog.text.count("the rest is not shared") == 1


def test_one_number_that_differs_ends_the_sharing(file: int) -> None:
    tensors = [torch.arange(5000, dtype=torch.int32) + i for i in range(3)]
    first = SharedWeights(file, 2**20, may_fill=True)
    shared = [first.share(tensor) for tensor in tensors]
    first.seal()
    assert all(map(torch.equal, shared, tensors))
    second = SharedWeights(file, 2**20, may_fill=False)
    changed = [tensor.clone() for tensor in tensors]
    changed[1][-1] += 1
    got = [second.share(tensor) for tensor in changed]
    assert [a is b for a, b in zip(got, changed, strict=True)] == [False, True, True]
    assert all(map(torch.equal, got, changed))


def test_what_a_dead_core_has_left_unfinished_is_not_used_and_is_filled_again(file: int) -> None:
    tensor = torch.arange(5000, dtype=torch.int32)
    SharedWeights(file, 2**20, may_fill=True).share(tensor + 1)  # and dies before it seals
    standby = SharedWeights(file, 2**20, may_fill=False)
    assert standby.share(tensor) is tensor
    standby.seal()
    again = SharedWeights(file, 2**20, may_fill=True)
    assert torch.equal(again.share(tensor), tensor)
    again.seal()
    third = SharedWeights(file, 2**20, may_fill=True)  # a first core after the death of both
    assert third.share(tensor) is not tensor
    third.seal()


def test_what_does_not_fit_stays_where_it_is(file: int) -> None:
    small, large = torch.arange(10, dtype=torch.int32), torch.arange(5000, dtype=torch.int32)
    shared = SharedWeights(file, 8192, may_fill=True)
    assert shared.share(small) is not small
    assert shared.share(large) is large
    assert shared.share(small) is not small
    shared.seal()
    assert shared.num_bytes == os.fstat(file).st_size == 8192


def test_a_system_without_memory_for_it_costs_the_sharing_alone(
    file: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_memory(*arguments: object) -> int:
        raise OSError(28, "No space left on device")

    tensor = torch.arange(10, dtype=torch.int32)
    shared = SharedWeights(file, 8192, may_fill=True)
    monkeypatch.setattr(os, "pwrite", no_memory)
    assert shared.share(tensor) is tensor
    assert "No space left" in caplog.text


def test_a_tensor_outlives_who_shared_it(file: int) -> None:
    shared = SharedWeights(file, 8192, may_fill=True)
    tensor = shared.share(torch.arange(10, dtype=torch.int32))
    shared.seal()
    del shared
    gc.collect()
    assert np.array_equal(tensor.numpy(), np.arange(10))
