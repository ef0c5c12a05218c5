"""Paged attention against attention in double precision, and against itself in other chunks."""

import itertools
from dataclasses import dataclass

import pytest
import torch

from footplate.backend.kernels.cache import LayerPages, StepTables
from footplate.backend.kernels.ops import Kernels

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Case:
    num_heads: int
    num_kv_heads: int
    key_size: int
    value_size: int
    window: int | None = None
    softcap: float | None = None
    with_sinks: bool = False
    block_size: int = 16

    @property
    def scale(self) -> float:
        return float(self.key_size**-0.5)


CASES = [
    Case(4, 4, 64, 64),
    Case(4, 2, 128, 128, block_size=32),
    Case(7, 1, 80, 80, window=5),
    Case(8, 1, 72, 72, softcap=30.0, with_sinks=True),
    Case(8, 1, 96, 96, window=100, with_sinks=True),
    Case(2, 2, 192, 128, window=40, softcap=5.0),
    Case(2, 2, 64, 64, window=300, block_size=64),
    Case(2, 1, 51, 33, with_sinks=True),
]
LENGTHS = [1, 17, 150, 530, 33]


class Conversation:
    """Some sequences in one layer's cache, their blocks shuffled."""

    def __init__(self, case: Case, lengths: list[int], dtype: torch.dtype) -> None:
        self.case, self.lengths = case, lengths
        heads, kv_heads = case.num_heads, case.num_kv_heads
        self.query, self.key, self.value = (
            [torch.randn(length, *shape).to(dtype) for length in lengths]
            for shape in (
                (heads, case.key_size),
                (kv_heads, case.key_size),
                (kv_heads, case.value_size),
            )
        )
        self.sinks = torch.randn(heads) if case.with_sinks else None
        counts = [-(-length // case.block_size) for length in lengths]
        ids = iter(torch.randperm(sum(counts) + 3).tolist())
        self.tables = [list(itertools.islice(ids, count)) for count in counts]
        self.pages = LayerPages(
            sum(counts) + 3, case.block_size, kv_heads, case.key_size, case.value_size, dtype
        )

    def step(self, kernels: Kernels, spans: dict[int, tuple[int, int]]) -> list[torch.Tensor]:
        """Compute tokens [start, end) of some of the sequences, in one batch."""
        size = self.case.block_size
        slots = [
            self.tables[i][p // size] * size + p % size
            for i, (start, end) in spans.items()
            for p in range(start, end)
        ]
        starts = list(itertools.accumulate((b - a for a, b in spans.values()), initial=0))
        width = max(len(self.tables[i]) for i in spans)
        tables = [self.tables[i] + [-1] * (width - len(self.tables[i])) for i in spans]
        step = StepTables(
            slots=torch.tensor(slots),
            query_starts=torch.tensor(starts, dtype=torch.int32),
            context_lens=torch.tensor([end for _, end in spans.values()], dtype=torch.int32),
            block_tables=torch.tensor(tables, dtype=torch.int32),
            block_size=size,
        )

        def batched(parts: list[torch.Tensor]) -> torch.Tensor:
            return torch.cat([parts[i][a:b] for i, (a, b) in spans.items()])

        kernels.write_kv(self.pages, step, batched(self.key), batched(self.value))
        out = kernels.paged_attention(
            self.pages,
            step,
            batched(self.query),
            self.case.scale,
            self.case.window,
            self.case.softcap,
            self.sinks,
        )
        return list(torch.split(out, [b - a for a, b in spans.values()]))

    def in_chunks(self, kernels: Kernels, sizes: list[int]) -> list[torch.Tensor]:
        """All tokens of all sequences; chunk i of each sequence is at most sizes[i] long."""
        done = [0] * len(self.lengths)
        results: list[list[torch.Tensor]] = [[] for _ in self.lengths]
        for size in itertools.chain(sizes, itertools.repeat(10_000)):
            spans = {
                i: (done[i], min(done[i] + size, length))
                for i, length in enumerate(self.lengths)
                if done[i] < length
            }
            if not spans:
                break
            for i, out in zip(spans, self.step(kernels, spans), strict=True):
                results[i].append(out)
                done[i] = spans[i][1]
        return [torch.cat(parts) for parts in results]

    def truth(self, i: int) -> torch.Tensor:
        case = self.case
        q, k, v = (part[i].double() for part in (self.query, self.key, self.value))
        k, v = (x.repeat_interleave(case.num_heads // case.num_kv_heads, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * case.scale
        if case.softcap is not None:
            scores = case.softcap * torch.tanh(scores / case.softcap)
        position = torch.arange(len(q))
        visible = position[None] <= position[:, None]
        if case.window is not None:
            visible &= position[None] > position[:, None] - case.window
        scores = scores.masked_fill(~visible, -torch.inf)
        if self.sinks is not None:
            sinks = self.sinks.double()[:, None, None].expand(-1, len(q), 1)
            scores = torch.cat((scores, sinks), dim=2)
        return torch.einsum("hqk,khd->qhd", scores.softmax(2)[..., : len(q)], v)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_is_exact_and_the_same_in_any_chunks(
    kernels: Kernels, case: Case, dtype: torch.dtype
) -> None:
    conversation = Conversation(case, LENGTHS, dtype)
    whole = conversation.in_chunks(kernels, [])
    for i, out in enumerate(whole):
        truth = conversation.truth(i)
        assert out.shape == truth.shape and out.dtype is dtype
        assert (out - truth).abs().max() < TOLERANCE[dtype]
    chunked = conversation.in_chunks(kernels, [1, 3, 50, 17, 79])
    assert all(torch.equal(a, b) for a, b in zip(whole, chunked, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_request_does_not_see_its_neighbours(kernels: Kernels, dtype: torch.dtype) -> None:
    conversation = Conversation(Case(4, 2, 64, 64), [40, 60, 20], dtype)
    together = conversation.in_chunks(kernels, [])
    for i, length in enumerate(conversation.lengths):
        assert torch.equal(conversation.step(kernels, {i: (0, length)})[0], together[i])
    conversation.query[1][:] = torch.nan
    again = conversation.in_chunks(kernels, [])
    assert again[1].isnan().all()
    assert torch.equal(again[0], together[0]) and torch.equal(again[2], together[2])


def test_number_of_threads_changes_nothing(kernels: Kernels) -> None:
    conversation = Conversation(Case(4, 2, 64, 64), [40, 300, 20], torch.bfloat16)
    before = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(torch.cat(conversation.in_chunks(kernels, [])))
    torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_a_failed_request_leaves_behind_harms_nobody(
    kernels: Kernels, dtype: torch.dtype
) -> None:
    conversation = Conversation(Case(4, 2, 64, 48), [40], dtype)
    expected = conversation.in_chunks(kernels, [])[0]
    # Its pages held infinities and NaN before, also behind its last token.
    key, value = conversation.key[0], conversation.value[0]
    bad = torch.full((48, 2, 64), torch.nan, dtype=dtype)
    bad[::2] = torch.inf
    conversation.lengths, conversation.query[0] = [48], torch.randn(48, 4, 64).to(dtype)
    conversation.key[0], conversation.value[0] = bad, bad[..., :48]
    query = conversation.query[0]
    conversation.in_chunks(kernels, [])
    assert conversation.pages.keys.isfinite().all()
    assert conversation.pages.values.isfinite().all()
    conversation.lengths, conversation.query[0] = [40], query[:40]
    conversation.key[0], conversation.value[0] = key, value
    torch.manual_seed(0)
    again = Conversation(Case(4, 2, 64, 48), [40], dtype)
    again.pages = conversation.pages
    again.tables = conversation.tables
    assert torch.equal(again.in_chunks(kernels, [])[0], expected)


def test_strided_heads_are_read_where_they_are(kernels: Kernels) -> None:
    case = Case(4, 2, 32, 32)
    packed = Conversation(case, [20], torch.float32)
    expected = packed.in_chunks(kernels, [])[0]
    for parts in (packed.query, packed.key, packed.value):
        parts[0] = parts[0].transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(packed.in_chunks(kernels, [])[0], expected)


def test_an_empty_step_is_legal(kernels: Kernels) -> None:
    pages = LayerPages(1, 16, 2, 32, 32, torch.float32)
    empty = torch.zeros(0, dtype=torch.int32)
    step = StepTables(
        empty.long(), torch.zeros(1, dtype=torch.int32), empty, empty.view(0, 1), block_size=16
    )
    nothing = torch.zeros(0, 2, 32)
    kernels.write_kv(pages, step, nothing, nothing)
    assert kernels.paged_attention(pages, step, torch.zeros(0, 4, 32), 1.0).shape == (0, 4, 32)
