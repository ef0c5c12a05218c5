"""Who is run alone, and who is to blame."""

import pytest

from footplate.frontend.quarantine import Quarantine


class Case:
    """A quarantine, and the tokens that its requests have."""

    def __init__(self) -> None:
        self.num_tokens: dict[int, int] = {}
        self._quarantine = Quarantine()

    def runs_alone(self, handle: int) -> bool:
        return self._quarantine.runs_alone(handle, self.num_tokens.get(handle, 0))

    def crash(self, *suspects: int, was_alone: bool = True) -> tuple[list[int], set[int]]:
        return self._judge(suspects, was_alone, has_crashed=True)

    def kill(self, *suspects: int, was_alone: bool = True) -> tuple[list[int], set[int]]:
        return self._judge(suspects, was_alone, has_crashed=False)

    def _judge(
        self, suspects: tuple[int, ...], was_alone: bool, has_crashed: bool
    ) -> tuple[list[int], set[int]]:
        # As of live requests: it is asked of no others.
        count = {handle: self.num_tokens.get(handle, 0) for handle in suspects}
        return self._quarantine.judge(
            suspects,
            count.__getitem__,
            was_alone=was_alone and len(suspects) == 1,
            has_crashed=has_crashed,
        )


def test_whoever_took_part_in_a_crash_is_run_alone() -> None:
    assert Case().crash(1, 2, 3) == ([], {1, 2, 3})


def test_a_core_that_ended_between_two_steps_makes_nobody_a_suspect() -> None:
    case = Case()
    assert case.crash() == ([], set())
    assert case.crash(1) == ([], {1}), "nor was anybody one before"


def test_who_was_alone_in_a_crash_is_to_blame_and_the_others_are_free() -> None:
    case = Case()
    case.crash(1, 2, 3)
    assert case.crash(2) == ([2], set())
    assert case.kill(1, 3) == ([], set()), "one crash has its culprit"


def test_a_culprit_is_named_once() -> None:
    case = Case()
    case.crash(1)
    assert case.crash(1) == ([1], set())
    assert case.crash(1) == ([], {1}), "a request of that handle would begin anew"


def test_a_new_token_makes_a_suspect_a_request_like_any_other() -> None:
    case = Case()
    case.crash(1, 2)
    case.num_tokens[1] = 1
    assert case.crash(1) == ([], {1}), "suspected anew, and not to blame"
    assert case.crash(1) == ([1], set())


def test_two_culprits_are_found_one_after_the_other() -> None:
    case = Case()
    assert case.crash(1, 2, 3) == ([], {1, 2, 3})
    assert case.crash(1) == ([1], set())
    assert case.crash(2, 3) == ([], {2, 3})
    assert case.crash(3) == ([3], set())


def test_being_there_once_when_a_core_is_killed_means_nothing() -> None:
    case = Case()
    for num_tokens in range(5):
        case.num_tokens[1] = num_tokens
        assert case.kill(1, 2 + num_tokens) == ([], set())


def test_being_there_twice_without_a_token_makes_a_suspect_and_three_times_a_culprit() -> None:
    case = Case()
    assert case.kill(1, 2) == ([], set())
    assert case.kill(1, 3) == ([], {1})
    assert case.kill(1) == ([1], set())


def test_a_token_in_between_is_a_new_beginning() -> None:
    case = Case()
    case.kill(1)
    case.kill(1)
    case.num_tokens[1] = 1
    assert case.kill(1) == ([], set())
    assert case.kill(1) == ([], {1})


def test_a_suspect_of_a_crash_that_is_alone_when_its_core_is_killed_is_not_to_blame() -> None:
    case = Case()
    case.crash(1, 2)
    assert case.kill(1) == ([], {1}), "alone again"
    assert case.crash(1) == ([1], set())


def test_a_suspect_that_is_killed_again_and_again_is_to_blame() -> None:
    case = Case()
    case.crash(1)
    case.kill(1)
    assert case.kill(1) == ([1], set())


@pytest.mark.parametrize("others", [(), (2,)], ids=["of other sessions", "of its own"])
def test_who_had_others_beside_it_is_not_to_blame(others: tuple[int, ...]) -> None:
    case = Case()
    case.crash(1)
    # It was alone, had a token, was alone no longer, and the token was lost.
    assert case.crash(1, *others, was_alone=False) == ([], {1, *others})
    assert case.crash(1) == ([1], set())


def test_siblings_that_were_alone_are_to_blame_together() -> None:
    quarantine = Quarantine()
    for blamed in ([], [1, 2]):
        culprits, _ = quarantine.judge((1, 2), lambda _: 0, was_alone=True, has_crashed=True)
        assert culprits == blamed


def test_a_suspect_is_one_until_it_has_a_token_however_often_it_is_sent() -> None:
    case = Case()
    assert not case.runs_alone(1)
    case.crash(1, 2)
    case.num_tokens[2] = 1
    assert (case.runs_alone(1), case.runs_alone(2), case.runs_alone(3)) == (True, False, False)
    case.crash(1)
    assert not case.runs_alone(1), "it is not sent any more"


def test_who_was_there_once_when_a_core_was_killed_need_not_run_alone() -> None:
    case = Case()
    case.kill(1)
    assert not case.runs_alone(1)
    case.kill(1)
    assert case.runs_alone(1)
