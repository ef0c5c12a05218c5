"""A request with a grammar is answered alike, to the bit of every logprob: alone and in company,
its prompt in chunks, over a warm prefix cache, preempted, begun again at any token, and as one of
several completions."""

import random
from collections.abc import Callable
from functools import cache

import msgspec
import pytest

from footplate.backend.step import ModelRunner
from footplate.protocol.messages import AddRequest, FinishReason
from footplate.protocol.token_params import (
    Grammar,
    LogitAdjustments,
    LogprobsMode,
    LogprobsRequest,
    TokenParams,
)

from .sampling import EOS, TOKENIZER, TOKENS, VOCAB_SIZE
from .whole_engine import Answer, Crowded, StructuredDriver, grammar_of, load, make_model

OTHER_EOS = 5
ENDS: tuple[tuple[int, ...], ...] = ((), (EOS,), (EOS, OTHER_EOS))
TARGET = 0
MAX_TOKENS = 40
HASTE = {i: 6.0 for i, token in enumerate(TOKENS) if token[:1] in ('"', "}", "]", ",", ":")}
GRAMMARS = [
    grammar_of(
        json={
            "type": "object",
            "properties": {
                "name": {"type": "string", "maxLength": 6},
                "age": {"type": "integer", "minimum": 0, "maximum": 150},
                "kind": {"enum": ["a", "b", None]},
            },
            "required": ["name", "kind"],
            "additionalProperties": False,
        }
    ),
    grammar_of(json_object=True),
    grammar_of(regex=r"[0-9]{3,8}(-[a-z]+)?"),
    grammar_of(regex=r"\([^()]{1,30}\)"),
    grammar_of(choice=["yes", "yes, of course", "no", "maybe"]),
    grammar_of(grammar='start: NUMBER ("+" NUMBER){0,4}\nNUMBER: /[0-9]{1,2}/'),
]
# Every grammar with one kind of end: with all, it would take three times as long.
CASES = [(number, ENDS[number % len(ENDS)]) for number in range(len(GRAMMARS))]


@pytest.fixture(scope="module")
def runner_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ModelRunner]:
    @cache
    def make(eos: tuple[int, ...]) -> ModelRunner:
        return load(make_model(eos), tmp_path_factory.mktemp("llama"))

    return make


def random_params(rng: random.Random, eos: tuple[int, ...], grammar: Grammar | None) -> TokenParams:
    return TokenParams(
        temperature=rng.choice([0.0, 0.7, 1.5]),
        top_p=rng.choice([1.0, 0.9]),
        top_k=rng.choice([0, 20]),
        min_p=0.0,
        seed=rng.getrandbits(62),
        max_tokens=MAX_TOKENS,
        min_tokens=rng.choice([0, 0, 4, 12]),
        stop_token_ids=rng.choice([eos, eos, ()]),  # (): end-of-sequence tokens are ignored
        adjustments=LogitAdjustments(
            presence_penalty=rng.choice([0.0, 0.5]),
            frequency_penalty=rng.choice([0.0, -0.3]),
            repetition_penalty=rng.choice([1.0, 1.2]),
            logit_bias=rng.choice([{}, HASTE]),
        ),
        logprobs=LogprobsRequest(
            rng.choice([0, 3, -1]), mode=rng.choice(list(LogprobsMode)), token_ids=(EOS, 20)
        ),
        grammar=grammar,
    )


def random_request(rng: random.Random, handle: int, eos: tuple[int, ...]) -> AddRequest:
    grammar = rng.choice([*GRAMMARS, *GRAMMARS, None])
    prompt = [rng.randrange(VOCAB_SIZE) for _ in range(rng.choice([1, 15, 16, 33, 60]))]
    return AddRequest(handle, prompt, random_params(rng, eos, grammar))


def ask(
    runner: ModelRunner | Crowded, target: AddRequest, neighbours: list[AddRequest], budget: int
) -> tuple[Answer, Answer, int]:
    """The target twice, in company, over one prefix cache: in the middle, and last, which is who
    is preempted first. Also how many were preempted."""
    driver = StructuredDriver(runner, len(neighbours) + 1, len(neighbours) + 1 + budget)
    first = driver.run([*neighbours[::2], target, *neighbours[1::2]])
    again = driver.run([*neighbours, target])
    return first[TARGET], again[TARGET], driver.stats.num_preemptions


@pytest.mark.parametrize(("number", "eos"), CASES)
def test_company_chunks_cache_and_preemption_change_nothing(
    number: int, eos: tuple[int, ...], runner_of: Callable[..., ModelRunner]
) -> None:
    runner = runner_of(eos)
    num_preempted = 0
    for seed in range(2):
        rng = random.Random(f"{number} {eos} {seed}")
        prompt = [rng.randrange(VOCAB_SIZE) for _ in range(rng.choice([1, 16, 33, 60]))]
        target = AddRequest(TARGET, prompt, random_params(rng, eos, GRAMMARS[number]))
        alone, again, _ = ask(runner, target, [], 500)
        assert alone.reason in (FinishReason.STOP, FinishReason.LENGTH), alone.message
        assert len(alone.rows) == len(alone.token_ids) > 0
        neighbours = [random_request(rng, handle, eos) for handle in range(1, 9)]
        first, last, _ = ask(runner, target, neighbours, rng.choice([0, 3, 40]))
        crowded = Crowded(runner, num_blocks=10)
        middle, preempted, count = ask(crowded, target, neighbours, 40)
        assert alone == again == first == last == middle == preempted
        num_preempted += count
    assert num_preempted > 0


@pytest.mark.parametrize(("number", "eos"), CASES)
def test_an_output_goes_on_from_any_token_as_it_would_have(
    number: int, eos: tuple[int, ...], runner_of: Callable[..., ModelRunner]
) -> None:
    """The grammar takes the tokens that are there already. One that they complete ends the request
    without a token more."""
    rng = random.Random(f"{number} {eos}")
    prompt = [rng.randrange(VOCAB_SIZE) for _ in range(20)]
    target = AddRequest(TARGET, prompt, random_params(rng, eos, GRAMMARS[number]))
    driver = StructuredDriver(runner_of(eos))
    whole = driver.run([target])[TARGET]
    cuts = range(len(whole.token_ids) + 1)
    if whole.reason is FinishReason.LENGTH or whole.token_ids[-1] in target.params.stop_token_ids:
        cuts = range(len(whole.token_ids))  # the core would say that it has ended
    answers = driver.run(
        [
            msgspec.structs.replace(target, handle=cut, prior_token_ids=whole.token_ids[:cut])
            for cut in cuts
        ]
    )
    for cut, answer in answers.items():
        assert answer.token_ids == whole.token_ids[cut:]
        assert answer.rows == whole.rows[cut:]
        assert (answer.reason, answer.message) == (whole.reason, "")


@pytest.mark.parametrize("eos", ENDS, ids=str)
def test_completions_of_one_prompt_are_those_of_single_requests(
    eos: tuple[int, ...], runner_of: Callable[..., ModelRunner]
) -> None:
    runner = runner_of(eos)
    for number, grammar in enumerate(GRAMMARS):
        rng = random.Random(f"{number} {eos}")
        prompt = [rng.randrange(VOCAB_SIZE) for _ in range(40)]
        request = AddRequest(0, prompt, random_params(rng, eos, grammar), n=4)
        children = StructuredDriver(runner, 3, 20).run([request])
        singles = [
            msgspec.structs.replace(
                request,
                handle=index,
                n=1,
                params=msgspec.structs.replace(request.params, seed=request.params.seed + index),
            )
            for index in range(4)
        ]
        assert children == StructuredDriver(runner).run(singles)


def test_outputs_are_of_all_kinds(runner_of: Callable[..., ModelRunner]) -> None:
    """Otherwise the tests above would show less than they say."""
    kinds = set()
    for eos in ENDS:
        requests = [random_request(random.Random(seed), seed, eos) for seed in range(60)]
        for handle, answer in StructuredDriver(runner_of(eos)).run(requests).items():
            if requests[handle].params.grammar is not None:
                kinds.add((answer.reason, answer.token_ids[-1] in eos))
    assert kinds == {
        (FinishReason.STOP, True),
        (FinishReason.STOP, False),
        (FinishReason.LENGTH, False),
    }


# ---- what a grammar wins over, and what it loses to


def answer_to(runner: ModelRunner, grammar: Grammar, **fields: object) -> Answer:
    params = TokenParams(1.0, 1.0, 0, 0.0, 1, MAX_TOKENS, 0, (), grammar=grammar)
    request = AddRequest(TARGET, [20, 21, 22], msgspec.structs.replace(params, **fields))
    return StructuredDriver(runner).run([request])[TARGET]


@pytest.mark.parametrize("eos", ENDS, ids=str)
def test_a_complete_grammar_ends_before_min_tokens(
    eos: tuple[int, ...], runner_of: Callable[..., ModelRunner]
) -> None:
    answer = answer_to(
        runner_of(eos), grammar_of(choice=["yes"]), min_tokens=20, stop_token_ids=eos
    )
    assert (TOKENIZER.decode(answer.token_ids), answer.reason) == ("yes", FinishReason.STOP)


def test_min_tokens_keeps_an_output_going_that_could_end(
    runner_of: Callable[..., ModelRunner],
) -> None:
    hurry = LogitAdjustments(logit_bias={EOS: 100.0})
    grammar = grammar_of(regex="[a-z]{1,99}")
    for min_tokens in (0, 12):
        answer = answer_to(
            runner_of((EOS,)),
            grammar,
            adjustments=hurry,
            min_tokens=min_tokens,
            stop_token_ids=(EOS,),
        )
        assert answer.token_ids[-1] == EOS
        assert len(answer.token_ids) == max(min_tokens, 1) + 1


def test_an_end_of_sequence_token_completes_a_grammar_also_where_it_is_ignored(
    runner_of: Callable[..., ModelRunner],
) -> None:
    hurry = LogitAdjustments(logit_bias={OTHER_EOS: 100.0})
    answer = answer_to(
        runner_of((EOS, OTHER_EOS)), grammar_of(regex="[a-z]{1,99}"), adjustments=hurry
    )
    assert (answer.token_ids[1:], answer.reason) == ([OTHER_EOS], FinishReason.STOP)


def test_a_prior_output_outside_of_the_grammar_is_an_error_of_its_request(
    runner_of: Callable[..., ModelRunner],
) -> None:
    params = TokenParams(
        1.0, 1.0, 0, 0.0, 1, MAX_TOKENS, 0, (), grammar=grammar_of(choice=["yes", "no"])
    )
    [good, bad] = (TOKENIZER.encode(text).ids[-1:] for text in ("y", "x"))
    requests = [
        AddRequest(handle, [20], params, prior_token_ids=prior)
        for handle, prior in enumerate([good, bad, []])
    ]
    answers = StructuredDriver(runner_of(())).run(requests)
    assert [answers[handle].reason for handle in range(3)] == [
        FinishReason.STOP,
        FinishReason.ERROR,
        FinishReason.STOP,
    ]
    assert answers[1].message == "the output does not match its grammar"
