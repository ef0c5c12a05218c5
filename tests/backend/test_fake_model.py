"""The fake model: a pure function of the prefix, whatever the batch, the chunks or the cache."""

import json
from pathlib import Path

import msgspec
import pytest

from footplate.backend.request import Request
from footplate.backend.runner.fake import (
    BYTES_PER_TOKEN,
    DEFAULT_MAX_MODEL_LEN,
    FakeModelRunner,
    digest_prefix,
    next_token,
)
from footplate.backend.step import StepPlan
from footplate.protocol.config import CacheConfig, ModelConfig
from footplate.protocol.token_params import TokenParams

VOCAB_SIZE = 40
GREEDY = TokenParams(0.0, 1.0, 0, 0.0, 0, 16, 0, ())
SAMPLED = msgspec.structs.replace(GREEDY, temperature=1.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": VOCAB_SIZE}))
    return tmp_path


def runner(folder: Path, max_model_len: int | None = None, **cache: int) -> FakeModelRunner:
    model = ModelConfig(model="fake", max_model_len=max_model_len)
    return FakeModelRunner(model, CacheConfig(**cache), folder)  # type: ignore[arg-type]


def request(key: int, token_ids: list[int], params: TokenParams = GREEDY) -> Request:
    return Request(key, b"", key, list(token_ids), len(token_ids), params)


def sample_all(*requests: Request) -> StepPlan:
    return StepPlan(list(requests), [1] * len(requests), list(range(len(requests))))


def generate(folder: Path, token_ids: list[int], count: int, params: TokenParams) -> list[int]:
    fake, alone = runner(folder), request(1, token_ids, params)
    for _ in range(count):
        alone.token_ids += fake.execute(sample_all(alone)).token_ids
    return alone.token_ids[len(token_ids) :]


# ---- the function


def test_a_digest_goes_on_where_that_of_a_prefix_ended() -> None:
    assert digest_prefix([3, 4], digest_prefix([1, 2])) == digest_prefix([1, 2, 3, 4])
    assert digest_prefix([1, 2]) != digest_prefix([2, 1]) != digest_prefix([1])


def test_greedy_tokens_ignore_the_seed_and_sampled_ones_depend_on_it() -> None:
    def tokens(params: TokenParams) -> set[tuple[int, ...]]:
        return {
            tuple(next_token(d, 0, msgspec.structs.replace(params, seed=s), 1000) for d in range(9))
            for s in range(5)
        }

    assert len(tokens(GREEDY)) == 1
    assert len(tokens(SAMPLED)) == 5


def test_the_largest_seed_of_the_wire_is_served() -> None:
    params = msgspec.structs.replace(SAMPLED, seed=2**64 - 1)
    assert 0 <= next_token(1, 0, params, VOCAB_SIZE) < VOCAB_SIZE


def test_tokens_come_from_the_whole_range_and_not_from_below_first_id() -> None:
    tokens = {
        next_token(digest_prefix([n]), 0, GREEDY, VOCAB_SIZE, first_id=16) for n in range(999)
    }
    assert tokens == set(range(16, VOCAB_SIZE))


def test_stop_tokens_are_not_chosen_before_min_tokens() -> None:
    stops = tuple(range(20, VOCAB_SIZE))
    params = msgspec.structs.replace(GREEDY, min_tokens=3, stop_token_ids=stops)
    digests = [digest_prefix([n]) for n in range(99)]
    for digest in digests:
        forced = next_token(digest, 2, params, VOCAB_SIZE, 16)
        assert 16 <= forced < 20
        assert next_token(digest, 3, params, VOCAB_SIZE, 16) in {forced, *stops}
    assert any(next_token(digest, 3, params, VOCAB_SIZE, 16) in stops for digest in digests)


def test_a_request_that_stops_at_every_token_hangs_nobody() -> None:
    params = msgspec.structs.replace(GREEDY, min_tokens=3, stop_token_ids=tuple(range(VOCAB_SIZE)))
    assert 0 <= next_token(1, 0, params, VOCAB_SIZE) < VOCAB_SIZE


# ---- the runner


def test_every_token_is_the_function_of_its_prefix(folder: Path) -> None:
    for params in (GREEDY, SAMPLED):
        tokens = [5, 6, 7]
        for position, token in enumerate(generate(folder, [5, 6, 7], 10, params)):
            assert token == next_token(digest_prefix(tokens), position, params, VOCAB_SIZE, 16)
            tokens.append(token)


def test_tokens_do_not_depend_on_the_batch(folder: Path) -> None:
    fake = runner(folder)
    batch = [request(n, [n, 2, 3]) for n in range(4)]
    for size in (4, 1, 3, 2, 4):
        chosen = batch[:size]
        for one, token in zip(chosen, fake.execute(sample_all(*chosen)).token_ids, strict=True):
            one.token_ids.append(token)
    for one in batch:
        assert one.token_ids[3:] == generate(folder, [one.key, 2, 3], one.num_output_tokens, GREEDY)


def test_only_sampling_requests_get_a_token(folder: Path) -> None:
    fake = runner(folder)
    requests = [request(1, [1] * 9), request(2, [2]), request(3, [3])]
    plan = StepPlan(requests, [4, 1, 1], sampling=[1, 2])
    assert fake.execute(plan).token_ids == fake.execute(sample_all(*requests[1:])).token_ids


def test_a_released_request_starts_again_from_its_tokens(folder: Path) -> None:
    fake, preempted = runner(folder), request(1, [5, 6, 7])
    for count in range(6):
        plan = sample_all(preempted)
        plan.released = [1, 99] if count % 2 else []
        preempted.token_ids += fake.execute(plan).token_ids
    assert preempted.token_ids[3:] == generate(folder, [5, 6, 7], 6, GREEDY)


def test_nothing_is_kept_of_released_requests(folder: Path) -> None:
    fake = runner(folder)
    fake.execute(sample_all(*(request(n, [n]) for n in range(5))))
    assert fake.execute(StepPlan(released=list(range(5)))).token_ids == []
    assert not fake._digests


# ---- facts


def test_the_cache_is_as_large_as_it_was_asked_to_be(folder: Path) -> None:
    assert runner(folder, num_gpu_blocks_override=7).facts.num_kv_blocks == 7
    size = 5 * 16 * BYTES_PER_TOKEN + 1
    assert runner(folder, kv_cache_memory_bytes=size).facts.num_kv_blocks == 5
    both = runner(folder, kv_cache_memory_bytes=size, num_gpu_blocks_override=7)
    assert both.facts.num_kv_blocks == 7


def test_the_context_window_is_as_asked_for_or_what_the_cache_holds(folder: Path) -> None:
    assert runner(folder).facts.model.max_model_len == DEFAULT_MAX_MODEL_LEN
    assert runner(folder, num_gpu_blocks_override=7).facts.model.max_model_len == 7 * 16
    assert runner(folder, 32, num_gpu_blocks_override=2).facts.model.max_model_len == 32
    with pytest.raises(ValueError, match="max_model_len=33 does not fit into 2 KV blocks"):
        runner(folder, 33, num_gpu_blocks_override=2)


def test_a_cache_of_less_than_one_block_is_refused(folder: Path) -> None:
    assert runner(folder, kv_cache_memory_bytes=16 * BYTES_PER_TOKEN).facts.num_kv_blocks == 1
    with pytest.raises(ValueError, match="holds no KV block"):
        runner(folder, kv_cache_memory_bytes=16 * BYTES_PER_TOKEN - 1)


def test_the_vocabulary_is_that_of_the_tokenizer(folder: Path) -> None:
    facts = runner(folder).facts
    assert facts.model.vocab_size == VOCAB_SIZE
    assert facts.model.tokenizer == str(folder)
    assert facts.supports_prefix_caching
