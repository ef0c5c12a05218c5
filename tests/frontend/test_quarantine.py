"""Who is run alone, and who is to blame."""

import pytest

from footplate.frontend.quarantine import Quarantine


class Case:
    """A quarantine, and the tokens that its requests have."""

    def __init__(self) -> None:
        self.num_tokens: dict[int, int] = {}
        self._quarantine = Quarantine()

    def alone(self, *handles: int) -> list[int]:
        """Those of them that are run alone."""
        return [h for h in handles if self._quarantine.runs_alone(h, self.num_tokens.get(h, 0))]

    def crash(self, *suspects: int, was_alone: bool = True) -> list[int]:
        # As of live requests: it is asked of no others.
        count = {handle: self.num_tokens.get(handle, 0) for handle in suspects}
        is_alone = was_alone and len(suspects) == 1
        return self._quarantine.judge(suspects, count.__getitem__, was_alone=is_alone)


def test_nobody_is_run_alone_before_a_crash() -> None:
    assert Case().alone(1, 2) == []


def test_whoever_took_part_in_a_crash_is_run_alone() -> None:
    case = Case()
    assert case.crash(1, 2, 3) == []
    assert case.alone(1, 2, 3, 4) == [1, 2, 3]


def test_a_core_that_ended_between_two_steps_makes_nobody_a_suspect() -> None:
    case = Case()
    assert case.crash() == []
    assert case.crash(1) == [], "nor was anybody one before"
    assert case.alone(1) == [1]


def test_who_was_alone_in_a_crash_is_to_blame_and_the_others_are_free() -> None:
    case = Case()
    case.crash(1, 2, 3)
    assert case.crash(2) == [2]
    assert case.alone(1, 3) == [], "one crash has its culprit"


def test_a_culprit_is_named_once() -> None:
    case = Case()
    case.crash(1)
    assert case.crash(1) == [1]
    assert case.crash(1) == [], "a request of that handle would begin anew"


def test_a_new_token_makes_a_suspect_a_request_like_any_other() -> None:
    case = Case()
    case.crash(1, 2)
    case.num_tokens[1] = 1
    assert case.alone(1, 2) == [2]
    assert case.crash(1) == [], "suspected anew, and not to blame"
    assert case.crash(1) == [1]


def test_two_culprits_are_found_one_after_the_other() -> None:
    case = Case()
    assert case.crash(1, 2, 3) == []
    assert case.crash(1) == [1]
    assert case.crash(2, 3) == []
    assert case.crash(3) == [3]


@pytest.mark.parametrize("others", [(), (2,)], ids=["of other sessions", "of its own"])
def test_who_had_others_beside_it_is_not_to_blame(others: tuple[int, ...]) -> None:
    case = Case()
    case.crash(1)
    # It was alone, had a token, was alone no longer, and the token was lost.
    assert case.crash(1, *others, was_alone=False) == []
    assert case.alone(1, 2) == [1, *others]
    assert case.crash(1) == [1]


def test_siblings_that_were_alone_are_to_blame_together() -> None:
    quarantine = Quarantine()
    for blamed in ([], [1, 2]):
        assert quarantine.judge((1, 2), lambda _: 0, was_alone=True) == blamed


def test_a_suspect_is_one_until_it_has_a_token_however_often_it_is_sent() -> None:
    case = Case()
    case.crash(1, 2)
    case.num_tokens[2] = 1
    for _ in range(3):
        assert case.alone(1, 2, 3) == [1]
    case.crash(1)
    assert case.alone(1) == [], "it is not sent any more"
