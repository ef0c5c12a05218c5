"""What users ask for, in the simulation: every kind of request, at random."""

from collections.abc import Callable
from random import Random
from typing import Any, Literal

from footplate.frontend import RequestMetrics, SamplingParams
from footplate.frontend.output_text import OutputText
from footplate.frontend.stream import RequestStream
from footplate.frontend.text import StopStrings
from footplate.frontend.token_params import resolve_params
from footplate.protocol.config import CacheConfig, RequestConfig, SchedulerConfig
from footplate.protocol.messages import AddRequest, ModelFacts
from footplate.protocol.params import RepetitionDetectionParams, RequestOutputKind

from .core_host import BAD_GRAMMAR, POISON, Setting, StreamMarks, grammar_of
from .expectation import PIECES, ExpectedRequest, make_detokenizer
from .recovering_session import RecoveringSession

STOPS = ("ab", "a", "ä", "€b", "ca", "😀", "bcb", "\ufffd")
KINDS = (RequestOutputKind.DELTA, RequestOutputKind.DELTA, *RequestOutputKind)


def make_setting(random: Random) -> Setting:
    """Small enough that everything is short of something."""
    block_size = random.choice((1, 2, 4, 8))
    max_model_len = random.choice((12, 20, 32))
    max_num_seqs = random.choice((1, 2, 4, 8))
    policy: Literal["fcfs", "priority"] = random.choice(("fcfs", "priority"))
    model = ModelFacts(
        model="checking",
        tokenizer="",
        architecture="",
        vocab_size=random.choice((3, 5, len(PIECES))),
        max_model_len=max_model_len,
        eos_token_ids=(random.randrange(3),) if random.random() < 0.3 else (),
        dtype="",
        device="",
        attention="",
    )
    return Setting(
        model,
        -(-max_model_len // block_size) + random.choice((0, 1, 3, 40)),
        random.choice((1, 4, 1000)),
        CacheConfig(block_size=block_size, enable_prefix_caching=random.random() < 0.8),
        SchedulerConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + random.choice((0, 1, 4, 100)),
            policy=policy,
            long_prefill_token_threshold=random.choice((0, 0, 3)),
        ),
        RequestConfig(max_num_queued_reqs=5 if random.random() < 0.2 else None),
        StreamMarks(random.choice((0, 0, 300, 2000))),
    )


class Workload:
    """Owns the prefixes that prompts have in common.

    Args:
        poison_rate: how many of the requests no core survives, 0 to 1.
    """

    def __init__(self, random: Random, setting: Setting, poison_rate: float) -> None:
        self._random = random
        self._setting = setting
        self._poison_rate = poison_rate
        self._prefixes = [self._token_ids(setting.model.max_model_len) for _ in range(2)]

    def open(
        self, session: RecoveringSession, request_id: str, clock: Callable[[], float]
    ) -> ExpectedRequest:
        """A request that is ready to be sent, and what must come of it."""
        random, setting = self._random, self._setting
        prompt = self._prompt()
        params = self._params(len(prompt))
        stream = RequestStream(
            request_id,
            session.client.new_handles(params.n),
            params,
            random.randint(0, 3),
            RequestMetrics(0.0, clock()),
            lambda stream: session.abort(stream.request_id),
        )
        stops = params.stop_strings
        stream.begin(
            None,
            prompt,
            lambda: OutputText(
                make_detokenizer(),
                StopStrings(stops, params.include_stop_str_in_output) if stops else None,
                params.min_tokens,
            ),
        )
        message = self._message(stream)
        return ExpectedRequest(stream, message, session.name, setting.model, setting.marks, clock)

    def _message(self, stream: RequestStream) -> AddRequest:
        random, setting, params = self._random, self._setting, stream.params
        grammar = None
        if random.random() < 0.2:
            length = random.randint(1, random.choice((3, 10)))
            grammar = BAD_GRAMMAR if random.random() < 0.1 else grammar_of(length)
        assert params.max_tokens is not None
        token_params = resolve_params(
            params,
            seed=stream.seed,
            max_tokens=params.max_tokens,
            model=setting.model,
            requests=setting.requests,
            grammar=grammar,
        )
        is_poison = random.random() < self._poison_rate
        return AddRequest(
            stream.handle,
            stream.prompt_token_ids,
            token_params,
            priority=random.randint(-1, 1),
            cache_salt=POISON if is_poison else random.choice(("", "", "salt")),
            n=params.n,
            ttft_deadline_s=random.uniform(0, 4) if random.random() < 0.05 else None,
            deadline_s=random.uniform(0, 8) if random.random() < 0.05 else None,
        )

    def _prompt(self) -> list[int]:
        random, limit = self._random, self._setting.model.max_model_len
        length = random.randint(1, random.randint(1, limit - 1))
        shared = random.choice(self._prefixes)[: random.choice((0, length // 2, length))]
        return shared + self._token_ids(length - len(shared))

    def _token_ids(self, count: int) -> list[int]:
        return self._random.choices(range(self._setting.model.vocab_size), k=count)

    def _params(self, num_prompt_tokens: int) -> SamplingParams:
        random = self._random
        rest = self._setting.model.max_model_len - num_prompt_tokens
        max_tokens = min(rest, random.choice((1, 3, 10, 100)))
        chosen: dict[str, Any] = {
            "temperature": random.choice((0.0, 1.0)),
            "max_tokens": max_tokens,
            "output_kind": random.choice(KINDS),
        }
        if random.random() < 0.25:
            chosen["n"] = random.choice((2, 3))
        if random.random() < 0.25:
            chosen["stop"] = random.sample(STOPS, random.choice((1, 2)))
            chosen["include_stop_str_in_output"] = random.random() < 0.5
        if random.random() < 0.2:
            chosen["stop_token_ids"] = [random.randrange(3)]
        if random.random() < 0.2:
            chosen["min_tokens"] = min(max_tokens, random.choice((1, 3)))
        if random.random() < 0.2:
            chosen["logprobs"] = 0
        if random.random() < 0.1:
            chosen["prompt_logprobs"] = 0
            chosen["prompt_logprob_start"] = random.choice((0, 0, 3))
        if random.random() < 0.15:
            chosen["frequency_penalty"] = 0.5
        if random.random() < 0.25:
            least = random.randint(1, 2)
            chosen["repetition_detection"] = RepetitionDetectionParams(
                max_pattern_size=3, min_pattern_size=least, min_count=2
            )
        if random.random() < 0.2:
            chosen["stream_interval"] = 3
        return SamplingParams(**chosen)
