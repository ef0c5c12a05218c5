"""What is written is taken once, in order, and in messages that fit a frame."""

import pytest

from footplate.backend import delivery as delivery_module
from footplate.backend.delivery import Delivery
from footplate.backend.step import ScoredRows
from footplate.protocol.codec import Encoder, core_message_decoder
from footplate.protocol.messages import ErrorKind, Finished, FinishReason, LogprobRows, StepOutputs


def rows(position: int, num_rows: int, row_length: int = 1) -> ScoredRows:
    """Rows whose bytes name them."""
    ids = b"".join(bytes([position + i, 0, 0, 0]) * row_length for i in range(num_rows))
    return ScoredRows(position, list(range(num_rows)), ids, ids[::-1])


def write_token(delivery: Delivery, handle: int, position: int) -> None:
    columns = delivery.to(b"a")
    columns.handles.append(handle)
    columns.positions.append(position)
    columns.token_ids.append(0)


def taken(delivery: Delivery) -> list[StepOutputs]:
    return [outputs for _, outputs in delivery.take()]


def test_everything_is_taken_once() -> None:
    delivery = Delivery(epoch=7)
    assert not delivery and delivery.take() == []
    delivery.end(b"a", 1, FinishReason.ERROR, "no", ErrorKind.GRAMMAR)
    delivery.end(b"b", 2, FinishReason.STOP)
    assert delivery
    assert delivery.take() == [
        (
            b"a",
            StepOutputs(
                7, [], [], [], finished=[Finished(1, FinishReason.ERROR, "no", ErrorKind.GRAMMAR)]
            ),
        ),
        (b"b", StepOutputs(7, [], [], [], finished=[Finished(2, FinishReason.STOP)])),
    ]
    assert not delivery and delivery.take() == []


def test_who_has_left_is_told_nothing() -> None:
    delivery = Delivery(epoch=7)
    delivery.end(b"a", 1, FinishReason.STOP)
    delivery.end(b"b", 1, FinishReason.STOP)
    delivery.forget(b"a")
    delivery.forget(b"never seen")
    assert [client for client, _ in delivery.take()] == [b"b"]


def test_rows_stand_beside_their_tokens() -> None:
    delivery = Delivery(epoch=7)
    write_token(delivery, 3, 5)
    delivery.score(b"a", 3, 5, rows(5, 1))
    [outputs] = taken(delivery)
    assert outputs.handles == [3]
    assert outputs.logprobs == [LogprobRows(3, 5, [0], b"\5\0\0\0", b"\0\0\0\5")]


@pytest.mark.parametrize(("limit", "parts"), [(64, [4]), (32, [4]), (31, [3, 1]), (8, [1] * 4)])
def test_long_prompts_rows_come_in_parts(
    limit: int, parts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery_module, "MAX_COLUMN_BYTES", limit)
    delivery = Delivery(epoch=7)
    whole = rows(9, 4)
    delivery.score_prompt(b"a", 3, whole)
    told = [part for outputs in taken(delivery) for part in outputs.prompt_logprobs]
    assert [len(part.ranks) for part in told] == parts
    assert b"".join(part.token_ids for part in told) == whole.token_ids
    assert b"".join(part.logprobs for part in told) == whole.logprobs
    assert [rank for part in told for rank in part.ranks] == whole.ranks
    assert [part.position for part in told] == [9 + sum(parts[:i]) for i in range(len(parts))]


def test_a_row_that_is_longer_than_the_limit_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery_module, "MAX_COLUMN_BYTES", 10)
    delivery = Delivery(epoch=7)
    delivery.score_prompt(b"a", 3, rows(0, 2, row_length=5))
    told = [part for outputs in taken(delivery) for part in outputs.prompt_logprobs]
    assert [len(part.token_ids) for part in told] == [20, 20]


def test_a_message_with_many_rows_is_closed_and_none_is_parted_from_its_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(delivery_module, "MAX_COLUMN_BYTES", 20)
    monkeypatch.setattr(delivery_module, "FINISHED_BYTES", 0)
    delivery = Delivery(epoch=7)
    for handle in range(8):
        write_token(delivery, handle, 0)
        delivery.score(b"a", handle, 0, rows(handle, 1))
    delivery.end(b"a", 0, FinishReason.STOP)
    outputs = taken(delivery)
    assert [o.handles for o in outputs] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert all([r.handle for r in o.logprobs] == o.handles for o in outputs)
    assert outputs[-1].finished == [Finished(0, FinishReason.STOP)]


def test_closed_messages_of_who_has_left_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery_module, "MAX_COLUMN_BYTES", 1)
    delivery = Delivery(epoch=7)
    delivery.score_prompt(b"a", 3, rows(0, 4))
    delivery.forget(b"a")
    assert delivery.take() == []


def test_ends_by_the_ten_thousand_fit_their_frames() -> None:
    delivery = Delivery(epoch=7)
    for handle in range(30_000):
        delivery.end(b"a", 2**62 + handle, FinishReason.ERROR, "\U0001f600" * 500)
    frames = [Encoder().encode(outputs) for outputs in taken(delivery)]  # or it raises
    decode = core_message_decoder().decode
    handles = [end.handle for frame in frames for end in decode(frame).finished]  # type: ignore[union-attr]
    assert handles == [2**62 + handle for handle in range(30_000)]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("fine", "fine"),
        ("x" * 2000, "x" * 2000),
        ("x" * 20_000_000, "x" * 2000 + "... (20000000 characters)"),
        ("half of \ud83d", "half of ?"),
    ],
)
def test_whatever_a_request_failed_with_can_be_told(given: str, told: str) -> None:
    delivery = Delivery(epoch=7)
    delivery.end(b"a", 1, FinishReason.ERROR, given)
    [outputs] = taken(delivery)
    assert [end.message for end in outputs.finished] == [told]
    Encoder().encode(outputs)
