"""Sampling against a slow reference that sorts, on the very probabilities that the kernel has made
of its logits; so all but the softmax must agree exactly."""

import math
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch

from footplate.backend.kernels.ops import Kernels
from footplate.backend.runner.torch_sampling import choose

ALMOST_ONE = 1 - 2**-53
# Chunks of the kernel have 512 tokens, vectors 16.
VOCABS = [1, 2, 3, 15, 16, 17, 33, 511, 512, 513, 1000, 1040, 5003, 20_000]


def draw(
    temperature: float = 1.0,
    min_p: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    noise: float = 0.5,
) -> list[float]:
    return [temperature, min_p, top_k, top_p, noise]


def table(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def random_draw(rng: random.Random, vocab: int) -> list[float]:
    return draw(
        temperature=rng.choice([0.01, 0.3, 1.0, 1.0, 1.7, 1e30]),
        min_p=rng.choice([0.0, 0.0, 1e-30, 1.0, rng.random() ** 6]),
        top_k=rng.choice([0, 0, 1, 2, vocab - 1, vocab, 2**31 - 1, rng.randint(1, vocab)]),
        top_p=rng.choice([1.0, 1.0, 1e-300, ALMOST_ONE, rng.random() or 0.5, 0.95]),
        noise=rng.choice([0.0, ALMOST_ONE, rng.random(), rng.random()]),
    )


def random_row(rng: random.Random, vocab: int) -> torch.Tensor:
    """Logits of all kinds."""
    row = torch.randn(vocab, generator=torch.Generator().manual_seed(rng.getrandbits(32)))
    kind = rng.randrange(8)
    if kind == 0:
        row = row * 3
    elif kind == 1:
        row = (row * 2).round() / 2  # many ties
    elif kind == 2:
        row = row * 1e-6  # probabilities that differ in their last bits
    elif kind == 3:
        row = torch.zeros(vocab)
    elif kind == 4:
        row = -1.5 * (row.argsort() + 1.0).log()  # few tokens have nearly all of the mass
    elif kind == 5:
        row = torch.where(row < 1, -math.inf, row)
    elif kind == 6:
        row = -3.0 * torch.arange(vocab)  # sorted, and soon too small for float32
    if row.isinf().all():
        row[rng.randrange(vocab)] = -5.0
    return row


def expected_token(probs: np.ndarray, own: list[float]) -> int:
    """The definition in integers and a sorted list."""
    _, min_p, top_k, top_p, noise = own
    weights = np.floor(probs.astype(np.float64) * 2.0**52).astype(np.int64)
    cutoff = np.float32(min_p) * probs.max()
    descending = np.sort(probs)[::-1]
    if 0 < top_k < len(probs):
        cutoff = max(cutoff, descending[int(top_k) - 1])
    if top_p < 1:
        kept = descending[descending >= cutoff]
        mass = np.cumsum(np.floor(kept.astype(np.float64) * 2.0**52).astype(np.int64))
        cutoff = kept[np.searchsorted(mass, math.ceil(top_p * float(mass[-1])))]
    cdf = np.cumsum(np.where(probs >= cutoff, weights, 0))
    target = int(noise * float(cdf[-1]))
    return int(np.searchsorted(cdf, target, side="right"))


@pytest.mark.parametrize("vocab", VOCABS)
def test_the_token_is_the_one_the_definition_gives(kernels: Kernels, vocab: int) -> None:
    for seed in range(40):
        rng = random.Random(seed)
        rows = torch.stack([random_row(rng, vocab) for _ in range(4)])
        draws = table(*(random_draw(rng, vocab) for _ in range(4)))
        probs = rows.clone()
        tokens = kernels.sample(probs, draws)
        for row, own in enumerate(draws.tolist()):
            where = f"seed {seed}, row {row}: {own}"
            exact = torch.softmax((rows[row] / own[0]).double(), -1)
            assert torch.allclose(probs[row].double(), exact, rtol=1e-5, atol=1e-20), where
            assert tokens[row] == expected_token(probs[row].numpy(), own), where


@pytest.mark.parametrize("vocab", VOCABS)
def test_torch_chooses_the_same_of_the_same_probabilities(kernels: Kernels, vocab: int) -> None:
    for seed in range(40):
        rng = random.Random(1000 + seed)
        logits = torch.stack([random_row(rng, vocab) for _ in range(4)])
        draws = table(*(random_draw(rng, vocab) for _ in range(4)))
        tokens = kernels.sample(logits, draws)
        assert torch.equal(choose(logits, draws), tokens), f"seed {1000 + seed}"


@pytest.mark.parametrize("scale", [0.0, 1e-7, 1.0, 5.0])
def test_a_large_vocabulary_is_no_other_case(kernels: Kernels, scale: float) -> None:
    vocab = 151_936
    logits = torch.randn(9, vocab) * scale
    draws = table(
        draw(),
        draw(min_p=0.05),
        draw(top_k=50),
        draw(top_k=20_000),
        draw(top_p=0.95),
        draw(top_p=0.001),
        draw(top_k=50, top_p=0.95),
        draw(top_k=100_000, top_p=0.999, min_p=1e-4),
        draw(0.6, top_k=1000, top_p=0.3, min_p=0.01),
    )
    tokens = kernels.sample(logits, draws).tolist()
    assert tokens == [
        expected_token(probs, own)
        for probs, own in zip(logits.numpy(), draws.tolist(), strict=True)
    ]


def test_greedy_takes_the_first_of_the_largest(kernels: Kernels) -> None:
    for vocab in VOCABS:
        rng = random.Random(vocab)
        for _ in range(20):
            logits = (torch.randn(3, vocab) * 2).round()  # -0 and 0 among them
            if vocab > 1:
                logits[0, rng.randrange(vocab)] = -math.inf
            tokens = kernels.sample(logits, table(*3 * [draw(0.0)]))
            assert tokens.tolist() == logits.numpy().argmax(-1).tolist()


@pytest.mark.parametrize("own", [draw(), draw(top_k=3), draw(top_p=0.5), draw(min_p=1.0), draw(0)])
def test_the_only_possible_token_is_chosen(kernels: Kernels, own: list[float]) -> None:
    for vocab in VOCABS:
        for token in {0, vocab // 2, vocab - 1}:
            for noise in (0.0, 0.5, ALMOST_ONE):
                row = torch.full((1, vocab), -math.inf)
                row[0, token] = -70.0
                assert kernels.sample(row, table([*own[:4], noise])).item() == token


def test_masked_tokens_are_never_chosen(kernels: Kernels) -> None:
    row = torch.tensor([-math.inf, 0.0, -math.inf, 0.0, -math.inf]).repeat(200)
    row[-2] = -math.inf
    for noise in (0.0, 0.25, 0.5, ALMOST_ONE):
        for own in (draw(noise=noise), draw(top_k=900, noise=noise), draw(1e38, noise=noise)):
            assert row[kernels.sample(row[None].clone(), table(own))].item() == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_no_distribution_yields_no_token_and_spoils_no_other(
    kernels: Kernels, bad: float
) -> None:
    for vocab in (5, 16, 50, 2000):
        for place in {0, 1, vocab // 2, vocab - 1}:
            logits = torch.randn(6, vocab)
            draws = table(*3 * [draw(0.0), draw(0.7, top_k=20, top_p=0.9)])
            expected = kernels.sample(logits.clone(), draws)
            logits[2:4, place] = bad
            if bad == -math.inf:
                logits[2:4] = bad
            expected[2:4] = -1
            assert torch.equal(kernels.sample(logits.clone(), draws), expected)


def test_logits_at_the_ends_of_float32_are_numbers(kernels: Kernels) -> None:
    largest = torch.finfo(torch.float32).max
    row = torch.tensor([[-largest, largest, -largest, 0.0]])
    assert kernels.sample(row.clone(), table(draw())).item() == 1
    assert kernels.sample(row.clone(), table(draw(0))).item() == 1
    assert kernels.sample(row.clone(), table(draw(largest, noise=0.99))).item() == 3
    # At this temperature they are none any more, as in torch.
    assert kernels.sample(row.clone(), table(draw(0.01))).item() == -1
    assert torch.softmax(row / 0.01, -1).isnan().all()


def test_a_row_has_the_same_token_and_bits_in_any_batch_on_any_number_of_threads(
    kernels: Kernels, threads: Callable[[int], None]
) -> None:
    for vocab in (33, 1500, 50_001):
        rng = random.Random(vocab)
        logits = torch.stack([random_row(rng, vocab) for _ in range(12)])
        draws = table(*(random_draw(rng, vocab) for _ in range(12)))
        threads(1)
        alone = logits.clone()
        tokens = torch.cat([kernels.sample(alone[i : i + 1], draws[i : i + 1]) for i in range(12)])
        for count in (1, 2, 3):
            threads(count)
            for size in (2, 5, 12):
                rows = rng.sample(range(12), size)
                batch = logits[rows]
                assert torch.equal(kernels.sample(batch, draws[rows]), tokens[rows]), rows
                assert torch.equal(batch, alone[rows]), rows


def test_rows_may_stand_at_a_distance(kernels: Kernels) -> None:
    wide = torch.randn(4, 100)
    draws = table(*4 * [draw(0.5, top_p=0.9)])
    expected = kernels.sample(wide[:, 10:47].clone(), draws)
    around = wide.clone()
    assert torch.equal(kernels.sample(wide[:, 10:47], draws), expected)
    assert torch.equal(wide[:, :10], around[:, :10])
    assert torch.equal(wide[:, 47:], around[:, 47:])
    assert torch.equal(kernels.sample(around[:, 10:47].T.contiguous().T, draws), expected)


def test_no_rows_are_no_error(kernels: Kernels) -> None:
    assert kernels.sample(torch.empty(0, 7), torch.empty(0, 5, dtype=torch.float64)).shape == (0,)
