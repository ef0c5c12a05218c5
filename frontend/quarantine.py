"""Which request it is that ends cores. Pure: told who took part in a fatal step, it says who is to
be run alone, and who is to blame."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class _Record:
    num_tokens: int  # of its output, at its last fatal step
    num_fatal_steps: int  # that it took part in since it had its last token
    ran_alone: bool  # when it is run again


class Quarantine:
    """Owns the record of requests that took part in the step in which a core ended.

    Many requests share a step, and one of them may be the reason for its end. To end all of them
    would punish the others, and to run all of them again and again would be a loop of crashes. So
    suspects are run one by one, until each has a new token, and one that was alone in a fatal step
    is the culprit. A core that ended by itself makes suspects of all who took part; one that was
    killed from outside (perhaps because memory ran out) only when that happens twice to a request
    without a token in between, and a culprit only the third time: chance has to strike often.
    """

    def __init__(self) -> None:
        self._records: dict[int, _Record] = {}

    def judge(
        self,
        suspects: Iterable[int],
        num_tokens: Callable[[int], int],
        *,
        was_alone: bool,
        has_crashed: bool,
    ) -> tuple[list[int], set[int]]:
        """Tell who took part in the last core's last step.

        Args:
            suspects: handles of live requests.
            num_tokens: output tokens that a request has by now.
            was_alone: whether these are all that took part, and of one request. One that was to be
                run alone may have had others beside it: it had its new token, and that was lost
                with the core.
            has_crashed: whether the core ended by itself.

        Returns:
            Handles of those that are to blame and must not be run again, and of those that are to
            be run alone.
        """
        records: dict[int, _Record] = {}
        culprits: list[int] = []
        for handle in suspects:
            count, record = num_tokens(handle), self._records.get(handle)
            if record is None or record.num_tokens != count:
                record = _Record(count, 0, ran_alone=False)
            is_proof = was_alone and (has_crashed or record.num_fatal_steps > 1)
            if record.ran_alone and is_proof:
                culprits.append(handle)
                continue
            num_fatal_steps = record.num_fatal_steps + 1
            alone = has_crashed or num_fatal_steps > 1
            records[handle] = _Record(count, num_fatal_steps, alone)
        self._records = records
        return culprits, {handle for handle, record in records.items() if record.ran_alone}

    def runs_alone(self, handle: int, num_tokens: int) -> bool:
        """Whether a request is to be run alone, still: it may go to the same core twice, when only
        the connection to it is lost.

        Args:
            num_tokens: output tokens that it has by now.
        """
        record = self._records.get(handle)
        return record is not None and record.ran_alone and record.num_tokens == num_tokens
