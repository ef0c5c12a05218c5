from footplate.backend.request import Request
from footplate.backend.runner.batch import Chunk, RaggedBatch
from footplate.backend.step import StepPlan
from footplate.protocol.token_params import TokenParams

GREEDY = TokenParams(0.0, 1.0, 0, 0.0, 0, 8, 0, ())


def test_chunks_are_flattened_in_order() -> None:
    chunks = [Chunk([7, 8, 9], 0, [5]), Chunk([1], 4, [2, 6]), Chunk([3, 4, 5], 3, [9, 1])]
    batch = RaggedBatch.of_chunks(chunks, [2, 6], block_size=4)
    assert batch.query_starts == [0, 3, 4, 7]
    assert batch.token_ids.tolist() == [7, 8, 9, 1, 3, 4, 5]
    assert batch.positions.tolist() == [0, 1, 2, 4, 3, 4, 5]
    # Block times block size plus offset; the last chunk crosses from block 9 into block 1.
    assert batch.slots.tolist() == [20, 21, 22, 24, 39, 4, 5]
    assert batch.logit_rows.tolist() == [2, 6]


def test_a_plan_becomes_the_new_tokens_of_its_requests() -> None:
    def request(key: int, tokens: list[int], computed: int, blocks: list[int]) -> Request:
        return Request(
            key, b"", key, tokens, 1, GREEDY, num_computed_tokens=computed, block_ids=blocks
        )

    plan = StepPlan(
        requests=[
            request(1, [10, 11, 12], 2, [3]),
            request(2, list(range(20, 29)), 4, [0, 1, 2]),
            request(3, [30, 31], 0, [7]),
        ],
        num_new_tokens=[1, 3, 2],
        sampling=[0, 2],
    )
    batch = RaggedBatch.of_plan(plan, block_size=4)
    assert batch.token_ids.tolist() == [12, 24, 25, 26, 30, 31]
    assert batch.positions.tolist() == [2, 4, 5, 6, 0, 1]
    assert batch.slots.tolist() == [14, 4, 5, 6, 28, 29]
    assert batch.logit_rows.tolist() == [0, 5], "the second request's prompt is not complete"


def test_rows_of_scored_prompt_tokens_stand_behind_those_that_are_sampled() -> None:
    requests = [
        Request(1, b"", 1, list(range(9)), 9, GREEDY, num_computed_tokens=4, block_ids=[0, 1, 2]),
        Request(2, b"", 2, [10, 11, 12], 2, GREEDY, num_computed_tokens=2, block_ids=[3]),
        Request(3, b"", 3, [30, 31, 32], 3, GREEDY, block_ids=[7]),
    ]
    plan = StepPlan(requests, [3, 1, 3], [1, 2])
    scored = {0: range(6, 8), 2: range(1, 3)}
    batch = RaggedBatch.of_plan(plan, 4, scored)
    assert batch.positions.tolist() == [4, 5, 6, 2, 0, 1, 2]
    # Positions 6 and 7 are told by tokens 5 and 6 of the first, 1 and 2 by 0 and 1 of the third.
    assert batch.logit_rows.tolist() == [3, 6, 1, 2, 4, 5]


def test_a_step_may_sample_nobody() -> None:
    batch = RaggedBatch.of_chunks([Chunk([1, 2], 0, [0])], [], block_size=4)
    assert batch.logit_rows.shape == (0,)
