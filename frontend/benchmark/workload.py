"""What is sent, and when: a pure function of its description and a seed."""

import math
import random
from dataclasses import dataclass
from itertools import accumulate
from typing import Self

# Ids below this are special tokens in most vocabularies.
FIRST_TOKEN_ID = 256


@dataclass(frozen=True, slots=True)
class LengthRange:
    """How many tokens: uniform over low to high, both included."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """From `128` or `64:256`.

        Raises:
            ValueError: it is neither, or not positive, or descends.
        """
        low, _, high = text.partition(":")
        try:
            lengths = cls(int(low), int(high or low))
        except ValueError:
            raise ValueError(f"{text!r} is no length: write 128, or 64:256") from None
        if not 1 <= lengths.low <= lengths.high:
            raise ValueError(f"{text!r} must be positive, the smaller length first")
        return lengths


@dataclass(frozen=True, slots=True)
class Workload:
    """A description of work.

    Attributes:
        input_len: of each prompt, without the shared prefix.
        prefix_len: tokens that all prompts begin with.
        request_rate: requests per second; infinite sends all at once.
        burstiness: shape of the gamma distribution of the gaps between arrivals. 1 is a Poisson
            process, less is burstier, more is steadier.
    """

    num_prompts: int
    input_len: LengthRange
    output_len: LengthRange
    prefix_len: int = 0
    request_rate: float = math.inf
    burstiness: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_prompts", "request_rate", "burstiness"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be above 0")
        if self.prefix_len < 0:
            raise ValueError(f"prefix_len={self.prefix_len}: must be at least 0")

    @property
    def max_len(self) -> int:
        """Longest prompt and output together."""
        return self.prefix_len + self.input_len.high + self.output_len.high


@dataclass(frozen=True, slots=True)
class WorkItem:
    """One request.

    Attributes:
        send_at_s: seconds after the start.
    """

    prompt_token_ids: list[int]
    max_tokens: int
    send_at_s: float


def make_work(workload: Workload, vocab_size: int) -> list[WorkItem]:
    """Draw the requests, in the order in which they are sent.

    Lengths, tokens and arrivals are drawn independently: another request rate sends the same
    prompts, and more prompts begin with the same ones.
    """
    lengths, tokens = _stream(workload.seed, "lengths"), _stream(workload.seed, "tokens")
    prefix = _token_ids(_stream(workload.seed, "prefix"), workload.prefix_len, vocab_size)
    arrivals = arrival_times(
        workload.num_prompts,
        workload.request_rate,
        workload.burstiness,
        _stream(workload.seed, "arrivals"),
    )
    work = []
    for send_at_s in arrivals:
        input_len = lengths.randint(workload.input_len.low, workload.input_len.high)
        output_len = lengths.randint(workload.output_len.low, workload.output_len.high)
        prompt = prefix + _token_ids(tokens, input_len, vocab_size)
        work.append(WorkItem(prompt, output_len, send_at_s))
    return work


def arrival_times(count: int, rate: float, burstiness: float, source: random.Random) -> list[float]:
    """When each request is sent, in seconds; the first at 0.

    Gaps follow a gamma distribution and are then scaled to their expected sum, as vLLM does, so
    that two seeds offer the same load.
    """
    if math.isinf(rate) or count < 2:
        return [0.0] * count
    gaps = [source.gammavariate(burstiness, 1 / (rate * burstiness)) for _ in range(count - 1)]
    # Very bursty gaps may all be too small for a float: then everything arrives at once.
    scale = (count - 1) / rate / (sum(gaps) or math.inf)
    return [0.0, *(moment * scale for moment in accumulate(gaps))]


def _token_ids(source: random.Random, count: int, vocab_size: int) -> list[int]:
    first = FIRST_TOKEN_ID if vocab_size > 2 * FIRST_TOKEN_ID else 0
    return source.choices(range(first, vocab_size), k=count)


def _stream(seed: int, name: str) -> random.Random:
    # Seeding by a string hashes all of it, the same way in every process and version.
    return random.Random(f"{seed} {name}")
