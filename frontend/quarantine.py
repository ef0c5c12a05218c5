"""Which request it is that ends cores. Pure: told who took part in a step in which a core crashed,
it says who is to blame, and who is to be run alone."""

from collections.abc import Callable, Iterable


class Quarantine:
    """Owns the suspects, by handle, and how many tokens each had when it became one.

    Many requests share a step, and one of them may be the reason for its end. To end all of them
    would punish the others, and to run all of them again and again would be a loop of crashes. So
    everybody who took part is run alone until there is a new token, and who was alone in the next
    crash is the culprit. A core that was killed from outside tells nothing of its requests: whoever
    was there then, and however often, is as innocent as before.
    """

    def __init__(self) -> None:
        self._suspects: dict[int, int] = {}

    def judge(
        self, handles: Iterable[int], num_tokens: Callable[[int], int], *, was_alone: bool
    ) -> list[int]:
        """A core has crashed in a step of these live requests; handles of those that are to blame.

        Args:
            num_tokens: output tokens that a request has by now.
            was_alone: whether these are all that took part, and of one request. One that was to be
                run alone may have had others beside it: it had its new token, and that was lost
                with the core.
        """
        handles = list(handles)
        culprits = [h for h in handles if was_alone and self.runs_alone(h, num_tokens(h))]
        # One crash has one culprit: who is not among them now is suspected no longer.
        self._suspects = {h: num_tokens(h) for h in handles if h not in culprits}
        return culprits

    def runs_alone(self, handle: int, num_tokens: int) -> bool:
        """Whether a request is to be run alone when it is sent to a core.

        Args:
            num_tokens: output tokens that it has by now.
        """
        return self._suspects.get(handle) == num_tokens
