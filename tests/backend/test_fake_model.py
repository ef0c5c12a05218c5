"""The fake model: a pure function of the prefix, whatever the batch, the chunks or the cache."""

import json
import sys
from array import array
from pathlib import Path
from typing import Any

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
from footplate.backend.runner.fake_rows import LOW_LOGIT, TOP_LOGIT
from footplate.backend.step import ScoredRows, StepPlan
from footplate.protocol.config import CacheConfig, ModelConfig
from footplate.protocol.messages import ErrorKind
from footplate.protocol.token_params import (
    LogitAdjustments,
    LogprobsMode,
    LogprobsRequest,
    TokenParams,
)

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


# ---- requests that ask for more


def special(key: int, token_ids: list[int], **fields: Any) -> Request:
    return request(key, token_ids, msgspec.structs.replace(GREEDY, **fields))


def logprobs_of(scored: ScoredRows) -> list[tuple[int, int, float]]:
    """Rank, id and score, where nothing but the token itself was asked for."""
    ids = array("i", scored.token_ids)
    return list(zip(scored.ranks, ids, array("f", scored.logprobs), strict=True))


@pytest.mark.parametrize("params", [GREEDY, SAMPLED])
def test_asking_for_logprobs_changes_no_token(folder: Path, params: TokenParams) -> None:
    stops = msgspec.structs.replace(
        params, min_tokens=20, stop_token_ids=tuple(range(20, VOCAB_SIZE))
    )
    for plain in (params, stops):
        own = msgspec.structs.replace(plain, logprobs=LogprobsRequest(0))
        expected = generate(folder, [5, 6], 30, plain)
        assert generate(folder, [5, 6], 30, own) == expected


def test_the_fake_model_is_sure_of_its_next_token(folder: Path) -> None:
    one = special(1, [5, 6], logprobs=LogprobsRequest(-1, mode=LogprobsMode.RAW_LOGITS))
    result = runner(folder).execute(sample_all(one))
    scored = result.logprobs[0]
    by_id = dict(zip(array("i", scored.token_ids), array("f", scored.logprobs), strict=True))
    assert scored.ranks == [1]
    assert by_id.keys() == set(range(VOCAB_SIZE))
    assert by_id[result.token_ids[0]] == TOP_LOGIT
    for token_id in by_id.keys() - {result.token_ids[0]}:
        assert by_id[token_id] == LOW_LOGIT if token_id < 16 else 0 <= by_id[token_id] < 4


def test_adjustments_change_the_fake_models_tokens(folder: Path) -> None:
    allowed = LogitAdjustments(allowed_token_ids=(20, 21, 22, 23))
    params = msgspec.structs.replace(GREEDY, adjustments=allowed)
    tokens = generate(folder, [5, 6], 40, params)
    assert set(tokens) == {20, 21, 22, 23}
    assert generate(folder, [5, 6], 40, params) == tokens


def test_special_requests_change_no_others_and_do_not_depend_on_them(folder: Path) -> None:
    fake = runner(folder)
    penalised = LogitAdjustments(frequency_penalty=2.0, logit_bias={30: 7.0})
    params = msgspec.structs.replace(SAMPLED, adjustments=penalised, logprobs=LogprobsRequest(2))
    batch = [request(n, [n, 2, 3], params if n % 2 else GREEDY) for n in range(4)]
    for size in (4, 2, 3, 4, 1, 4):
        chosen = batch[:size]
        for one, token in zip(chosen, fake.execute(sample_all(*chosen)).token_ids, strict=True):
            one.token_ids.append(token)
    for one in batch:
        alone = generate(folder, [one.key, 2, 3], one.num_output_tokens, one.params)
        assert one.token_ids[3:] == alone


def test_prompts_are_scored_alike_whole_and_in_chunks(folder: Path) -> None:
    prompt = [20, 21, 22, 23, 24, 25, 26]
    wanted = LogprobsRequest(num_prompt_logprobs=0)
    whole = runner(folder).execute(StepPlan([special(1, prompt, logprobs=wanted)], [7], [0]))
    assert whole.prompt_logprobs[0].position == 1
    expected = logprobs_of(whole.prompt_logprobs[0])
    assert [token_id for _, token_id, _ in expected] == prompt[1:]
    fake, one = runner(folder), special(1, prompt, logprobs=wanted)
    scores: list[tuple[int, int, float]] = []
    for count in (1, 3, 2, 1):
        result = fake.execute(StepPlan([one], [count], []))
        one.num_computed_tokens += count
        if scored := result.prompt_logprobs.get(0):
            assert scored.position == len(scores) + 1
            scores += logprobs_of(scored)
    assert scores == expected


def test_the_likeliest_prompt_token_is_the_one_that_would_be_produced(folder: Path) -> None:
    tokens = [20, *generate(folder, [20], 5, GREEDY)]
    one = special(1, tokens, logprobs=LogprobsRequest(num_prompt_logprobs=0))
    scored = runner(folder).execute(StepPlan([one], [6], [0])).prompt_logprobs
    assert scored[0].ranks == [1] * 5


def test_a_special_request_that_fails_fails_alone(folder: Path) -> None:
    impossible = LogitAdjustments(allowed_token_ids=(30,), bad_words=((30,),))
    plan = sample_all(request(1, [5, 6]), special(2, [5, 6], adjustments=impossible))
    result = runner(folder).execute(plan)
    assert result.token_ids[0] == generate(folder, [5, 6], 1, GREEDY)[0]
    assert {index: error.kind for index, error in result.errors.items()} == {1: ErrorKind.LOGITS}


def test_without_numpy_special_requests_fail_and_say_what_is_missing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "footplate.backend.runner.fake_rows", None)
    wanted = LogprobsRequest(0, num_prompt_logprobs=0)
    plan = StepPlan([request(1, [5, 6]), special(2, [5, 6], logprobs=wanted)], [2, 2], [0, 1])
    result = runner(folder).execute(plan)
    assert result.errors.keys() == {1}
    assert result.errors[1].kind is ErrorKind.INVALID
    assert "numpy" in result.errors[1].message


def test_nothing_is_kept_of_released_special_requests(folder: Path) -> None:
    fake = runner(folder)
    own = LogitAdjustments(presence_penalty=1.0)
    fake.execute(sample_all(*(special(n, [n], adjustments=own) for n in range(5))))
    assert fake._rows is not None and len(fake._rows) == 5
    fake.execute(StepPlan(released=list(range(5))))
    assert len(fake._rows) == 0


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
