"""Blocks: who holds them, in which order they are reused, what they are still known for."""

import random

import pytest

from footplate.backend.block_pool import BlockPool, prefix_hash, root_hash

SIZE = 2
A, B, C = b"a" * 32, b"b" * 32, b"c" * 32


def cached(pool: BlockPool, *names: bytes) -> list[int]:
    """Hold one block per name, computed and registered; its tokens are the name's first bytes."""
    blocks = pool.allocate(len(names))
    for block, name in zip(blocks, names, strict=True):
        pool.register(block, name, tokens(name))
    return blocks


def tokens(name: bytes) -> list[int]:
    return list(name[:SIZE])


def survivors(pool: BlockPool, *names: bytes) -> list[bytes]:
    return [name for name in names if pool.find(name, tokens(name)) is not None]


# ---- holding


def test_allocated_blocks_are_distinct_and_no_longer_free() -> None:
    pool = BlockPool(4, SIZE)
    blocks = pool.allocate(3)
    assert len(set(blocks)) == 3
    assert pool.num_free == 1
    pool.check_ledger([blocks])


def test_more_blocks_than_are_free_are_refused() -> None:
    pool = BlockPool(4, SIZE)
    held = pool.allocate(3)
    with pytest.raises(AssertionError, match="2 of 1 free blocks"):
        pool.allocate(2)
    assert pool.num_free == 1
    assert len(pool.allocate(1)) == 1
    pool.release(held)
    assert pool.num_free == 3


def test_a_released_block_is_free_again_and_cannot_be_released_twice() -> None:
    pool = BlockPool(2, SIZE)
    blocks = pool.allocate(2)
    pool.release(blocks)
    assert pool.num_free == 2
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(blocks[:1])


def test_a_shared_block_is_free_only_after_its_last_holder() -> None:
    pool = BlockPool(2, SIZE)
    first = cached(pool, A)
    pool.share(first)
    pool.share(first)
    pool.check_ledger([first, first, first])
    for num_free in (1, 1, 2):
        pool.release(first)
        assert pool.num_free == num_free
    pool.check_ledger([])


def test_sharing_a_free_cached_block_takes_it_from_the_free_ones() -> None:
    pool = BlockPool(2, SIZE)
    blocks = cached(pool, A)
    pool.release(blocks)
    assert pool.num_free_among(blocks) == 1
    pool.share(blocks)
    assert pool.num_free == 1
    assert pool.num_free_among(blocks) == 0
    assert pool.allocate(1) != blocks


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 2), (-1, 2), (2, 0), (2, -1)])
def test_a_pool_without_blocks_or_tokens_is_refused(num_blocks: int, block_size: int) -> None:
    with pytest.raises(AssertionError):
        BlockPool(num_blocks, block_size)


# ---- the cache


def test_a_registered_block_is_found_by_name_and_tokens() -> None:
    pool = BlockPool(2, SIZE)
    [block] = cached(pool, A)
    assert pool.find(A, tokens(A)) == block
    assert pool.find(B, tokens(A)) is None
    assert pool.num_cached == 1


def test_a_hit_compares_tokens_not_only_names() -> None:
    pool = BlockPool(2, SIZE)
    cached(pool, A)
    assert pool.find(A, [1, 2]) is None
    assert pool.find(A, tokens(A)[:1]) is None


def test_a_released_block_keeps_its_content_until_it_is_handed_out() -> None:
    pool = BlockPool(1, SIZE)
    blocks = cached(pool, A)
    pool.release(blocks)
    assert pool.find(A, tokens(A)) == blocks[0]
    assert pool.allocate(1) == blocks
    assert pool.find(A, tokens(A)) is None
    assert pool.num_cached == 0


def test_when_two_computed_the_same_prefix_the_first_keeps_the_name() -> None:
    pool = BlockPool(2, SIZE)
    first, second = cached(pool, A), cached(pool, A)
    assert pool.find(A, tokens(A)) == first[0]
    assert pool.num_cached == 1
    pool.release(second)
    pool.check_ledger([first])
    pool.release(first)
    # The unnamed twin is worth nothing to anybody: it goes first.
    assert pool.allocate(1) == second
    assert survivors(pool, A) == [A]


def test_a_block_has_one_name() -> None:
    pool = BlockPool(1, SIZE)
    [block] = cached(pool, A)
    pool.register(block, B, tokens(B))
    assert survivors(pool, A, B) == [A]
    pool.check_ledger([[block]])


def test_only_held_and_full_blocks_are_registered() -> None:
    pool = BlockPool(1, SIZE)
    with pytest.raises(AssertionError):
        pool.register(0, A, tokens(A))
    [block] = pool.allocate(1)
    with pytest.raises(AssertionError):
        pool.register(block, A, tokens(A)[:1])
    assert pool.num_cached == 0


# ---- eviction


def test_the_end_of_a_prefix_is_evicted_before_its_start() -> None:
    pool = BlockPool(3, SIZE)
    pool.release(cached(pool, A, B, C))
    for left in ([A, B], [A], []):
        pool.allocate(1)
        assert survivors(pool, A, B, C) == left


def test_the_least_recently_released_prefix_is_evicted_first() -> None:
    pool = BlockPool(3, SIZE)
    first, second, third = cached(pool, A), cached(pool, B), cached(pool, C)
    for blocks in (second, first, third):
        pool.release(blocks)
    for left in ([A, C], [C], []):
        pool.allocate(1)
        assert survivors(pool, A, B, C) == left


def test_a_hit_renews_a_prefix() -> None:
    pool = BlockPool(2, SIZE)
    first, second = cached(pool, A), cached(pool, B)
    pool.release(first)
    pool.release(second)
    pool.share(first)
    pool.release(first)
    pool.allocate(1)
    assert survivors(pool, A, B) == [A]


def test_blocks_without_content_go_before_cached_ones() -> None:
    pool = BlockPool(3, SIZE)
    named = cached(pool, A)
    unnamed = pool.allocate(2)
    pool.release(named)
    pool.release(unnamed)
    assert set(pool.allocate(2)) == set(unnamed)
    assert survivors(pool, A) == [A]


def test_the_partial_end_of_a_sequence_goes_before_its_cached_start() -> None:
    pool = BlockPool(3, SIZE)
    sequence = [*cached(pool, A, B), *pool.allocate(1)]
    pool.release(sequence)
    assert [pool.allocate(1) for _ in range(3)] == [[block] for block in reversed(sequence)]


# ---- forgetting


def test_forgetting_drops_every_name_when_no_block_is_held() -> None:
    pool = BlockPool(3, SIZE)
    pool.release(cached(pool, A, B))
    assert pool.forget_cached()
    assert survivors(pool, A, B) == []
    assert (pool.num_cached, pool.num_free) == (0, 3)
    pool.check_ledger([])
    assert len(set(pool.allocate(3))) == 3


def test_names_of_blocks_that_one_alone_holds_can_be_dropped() -> None:
    pool = BlockPool(4, SIZE)
    mine, ours = cached(pool, A, B)
    [unnamed] = pool.allocate(1)
    pool.share([ours])
    pool.forget([mine, ours, unnamed])
    assert survivors(pool, A, B) == [B]
    pool.check_ledger([[mine, ours, unnamed], [ours]])
    pool.release([ours])
    pool.forget([ours])
    assert survivors(pool, B) == []
    pool.release([mine, ours, unnamed])
    pool.forget([mine])
    assert pool.num_free == 4


def test_forgetting_is_refused_while_a_block_is_held() -> None:
    pool = BlockPool(3, SIZE)
    pool.release(cached(pool, A))
    held = pool.allocate(1)
    assert not pool.forget_cached()
    assert survivors(pool, A) == [A]
    pool.release(held)
    assert pool.forget_cached()


# ---- names


def test_the_name_of_a_block_covers_its_tokens_and_all_before_them() -> None:
    names = {
        prefix_hash(parent, token_ids)
        for parent in (root_hash(""), root_hash("tenant"), A)
        for token_ids in ([1, 2], [2, 1], [1, 2**32 - 1])
    }
    assert len(names) == 9
    assert {len(name) for name in names} == {32}


def test_the_same_prefix_has_the_same_name_in_every_process() -> None:
    # Not Python's hash(), which differs from process to process.
    assert prefix_hash(root_hash(""), [1, 2]).hex() == (
        "1352f5af7ba0dc89e7ba9a6f903eaffc23a4922380cf98fbc32524c991ce4e9f"
    )


# ---- the ledger itself


def test_the_ledger_notices_a_wrong_reference_count() -> None:
    pool = BlockPool(2, SIZE)
    blocks = pool.allocate(1)
    pool.check_ledger([blocks])
    for tables in ([], [blocks, blocks], [[1 - blocks[0]]]):
        with pytest.raises(AssertionError, match="reference counts"):
            pool.check_ledger(tables)


@pytest.mark.parametrize("seed", range(20))
def test_any_legal_sequence_of_calls_keeps_the_ledger(seed: int) -> None:
    rng = random.Random(seed)
    pool = BlockPool(8, SIZE)
    tables: list[list[int]] = []
    for _ in range(200):
        match rng.randrange(4):
            case 0 if pool.num_free:
                names = [bytes([rng.randrange(6)]) * 32 for _ in range(rng.randint(1, 3))]
                tables.append(cached(pool, *names[: pool.num_free]))
            case 1 if tables:
                shared = [b for b in rng.choice(tables) if rng.random() < 0.7]
                pool.share(shared)
                tables.append(shared)
            case 2 if tables:
                pool.release(tables.pop(rng.randrange(len(tables))))
            case 3:
                assert pool.forget_cached() is not any(tables)
        pool.check_ledger(tables)
        held = {block for table in tables for block in table}
        assert pool.num_free + len(held) == pool.num_blocks
