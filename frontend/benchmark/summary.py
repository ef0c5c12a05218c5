"""From the time of every token to throughput and latencies, under vLLM's names.

TTFT: from sending to the first token. TPOT: the mean time per token after the first, one value
per request. ITL: the gap between two outputs of a stream, one value per gap. E2EL: from sending to
the last token.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

PERCENTILES = (90, 99)
METRICS = ("ttft", "tpot", "itl", "e2el")


@dataclass(slots=True)
class RequestRecord:
    """What happened to one request. Moments are seconds on one monotonic clock.

    Attributes:
        planned: when the workload wanted it sent.
        sent: when it was.
        token_ids: all output.
        moments: when each output of the stream arrived; it may have held several tokens. Empty if
            nobody knows.
        error: why it failed; empty if it did not.
    """

    num_prompt_tokens: int
    planned: float = 0.0
    sent: float = 0.0
    token_ids: list[int] = field(default_factory=list)
    moments: list[float] = field(default_factory=list)
    error: str = ""

    @property
    def ttft_s(self) -> float:
        """Time to first token."""
        return self.moments[0] - self.sent

    @property
    def e2el_s(self) -> float:
        """End-to-end latency."""
        return self.moments[-1] - self.sent

    @property
    def itls_s(self) -> list[float]:
        """Inter-token latencies: gaps between outputs."""
        return [after - before for before, after in pairwise(self.moments)]

    @property
    def tpot_s(self) -> float:
        """Time per output token; only for more than one token."""
        return (self.e2el_s - self.ttft_s) / (len(self.token_ids) - 1)


def summarize(records: Sequence[RequestRecord], duration_s: float) -> dict[str, float]:
    """Throughput and latencies of the requests that completed.

    Returns:
        vLLM's result keys: counts, `duration` in seconds, throughputs per second, and
        {mean,median,std,p90,p99}_{ttft,tpot,itl,e2el}_ms. Latencies of nothing are left out.
    """
    completed = [record for record in records if not record.error and record.token_ids]
    timed = [record for record in completed if record.moments]
    num_input = sum(record.num_prompt_tokens for record in completed)
    num_output = sum(len(record.token_ids) for record in completed)
    result: dict[str, float] = {
        "duration": duration_s,
        "completed": len(completed),
        "failed": len(records) - len(completed),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(completed) / duration_s,
        "output_throughput": num_output / duration_s,
        "total_token_throughput": (num_input + num_output) / duration_s,
    }
    latencies = {
        "ttft": [record.ttft_s for record in timed],
        "tpot": [record.tpot_s for record in timed if len(record.token_ids) > 1],
        "itl": [gap for record in timed for gap in record.itls_s],
        "e2el": [record.e2el_s for record in timed],
    }
    for name in METRICS:
        if values := sorted(1000 * latency for latency in latencies[name]):
            result |= {f"{key}_{name}_ms": value for key, value in spread(values).items()}
    return result


def spread(ascending: Sequence[float]) -> dict[str, float]:
    """Mean, median, standard deviation and `PERCENTILES` of ascending values, at least one."""
    return {
        "mean": statistics.fmean(ascending),
        "median": percentile(ascending, 50),
        "std": statistics.pstdev(ascending),
        **{f"p{q}": percentile(ascending, q) for q in PERCENTILES},
    }


def percentile(ascending: Sequence[float], q: float) -> float:
    """The q-th percentile (0 to 100) of ascending values, linear between neighbours as numpy's."""
    place = (len(ascending) - 1) * q / 100
    low, high = ascending[math.floor(place)], ascending[math.ceil(place)]
    return low + (high - low) * (place - math.floor(place))


def count_equal(ours: Sequence[RequestRecord], theirs: Sequence[RequestRecord]) -> int:
    """How many requests produced the same tokens in both."""
    return sum(a.token_ids == b.token_ids for a, b in zip(ours, theirs, strict=True))
