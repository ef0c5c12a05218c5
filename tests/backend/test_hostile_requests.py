"""Whatever a request says that a frame can hold, the core lives, and a plain one beside it gets
its tokens."""

import json
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest

from footplate.backend.engine_core import EngineCore
from footplate.backend.logits.processor import LogitsProcessor
from footplate.backend.runner.fake import FakeModelRunner, digest_prefix, next_token
from footplate.protocol.codec import BadFrameError, client_message_decoder
from footplate.protocol.config import CacheConfig, ModelConfig, RequestConfig, SchedulerConfig
from footplate.protocol.messages import AbortRequests, AddRequest
from footplate.protocol.token_params import TokenParams

PLAIN = TokenParams(0.0, 1.0, 0, 0.0, 0, 4, 0, ())
VOCAB_SIZE = 40
CLIENT = b"client"
PROMPT = [20, 21]


class Adder(LogitsProcessor):
    def __call__(self, output_token_ids: Any, logits: Any) -> None:
        logits[self.arguments["id"]] += self.arguments.get("by", 1.0)


INTS = [-(2**63), -1, 0, 1, 2, 3, 39, 40, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1]
FLOATS = [
    0.0,
    -0.0,
    1e-320,
    0.5,
    1.0,
    2.0,
    1e308,
    -1e308,
    float("inf"),
    float("-inf"),
    float("nan"),
]


def some_int(dice: random.Random) -> int:
    return dice.choice(INTS) if dice.random() < 0.15 else dice.randint(0, 8)


def some_float(dice: random.Random) -> float:
    return dice.choice(FLOATS) if dice.random() < 0.15 else dice.random()


def some_ids(dice: random.Random) -> list[int]:
    most = 60 if dice.random() < 0.1 else 5
    bad = dice.random() < 0.1
    return [
        some_int(dice) if bad else dice.randrange(VOCAB_SIZE) for _ in range(dice.randint(0, most))
    ]


def adjustments(dice: random.Random) -> list[Any]:
    ids = [dice.randrange(VOCAB_SIZE) for _ in range(3)]
    return [
        *(some_float(dice), some_float(dice), some_float(dice) + 0.01),
        {dice.randrange(VOCAB_SIZE): some_float(dice) for _ in range(2)},
        dice.choice([None, None, ids]),
        dice.choice([[], [ids[:1]], [ids, some_ids(dice) or [1]]]),
        dice.choice([None, None, [some_int(dice), ids[:2], ids[1:]]]),
        dice.choice([None, None, ids]),
        dice.choice(
            [
                [],
                [],
                [[0, {"id": some_int(dice), "by": some_float(dice)}]],
                [[some_int(dice), {}]],
                [[0, {"id": "x"}]],
            ]
        ),
    ]


def logprobs(dice: random.Random) -> list[Any]:
    return [
        dice.choice([None, -1, some_int(dice)]),
        some_ids(dice),
        dice.choice([None, -1, some_int(dice)]),
        some_ids(dice),
        some_int(dice),
        dice.randint(0, 3),
    ]


def hostile_frame(dice: random.Random) -> bytes:
    params = [
        *(some_float(dice), some_float(dice), some_int(dice), some_float(dice), some_int(dice)),
        *(some_int(dice), some_int(dice), some_ids(dice)),
        adjustments(dice) if dice.random() < 0.5 else None,
        logprobs(dice) if dice.random() < 0.4 else None,
        ["start: /a/", dice.choice(["llguidance", "x"])] if dice.random() < 0.1 else None,
        [dice.randint(1, 9), some_int(dice), some_int(dice)] if dice.random() < 0.1 else None,
        dice.random() < 0.1,
    ]
    return msgspec.msgpack.encode(
        [
            "add",
            some_int(dice),
            some_ids(dice),
            params,
            some_int(dice),
            dice.choice(["", "salt", "\0" * 100]),
            dice.choice([1, 1, 1, 2, some_int(dice)]),
            some_ids(dice) if dice.random() < 0.3 else [],
            some_float(dice) if dice.random() < 0.2 else 0.0,
            some_float(dice) if dice.random() < 0.2 else None,
            some_float(dice) if dice.random() < 0.2 else None,
            dice.random() < 0.3,
            dice.random() < 0.2,
        ]
    )


@pytest.mark.parametrize("seed", range(8))
def test_no_request_ends_the_core_or_changes_another(seed: int, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": VOCAB_SIZE}))
    cache = CacheConfig(block_size=4, num_gpu_blocks_override=32)
    runner = FakeModelRunner(ModelConfig(max_model_len=48), cache, tmp_path, [Adder])
    core = EngineCore(
        runner,
        cache,
        SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=16),
        epoch=1,
        clock=lambda: 0.0,
        requests=RequestConfig(logits_processors=("a:Adder",)),
    )
    core.join(CLIENT)
    core.join(b"plain")
    dice, decode = random.Random(seed), client_message_decoder().decode
    expected = list(PROMPT)
    for position in range(PLAIN.max_tokens):
        expected.append(next_token(digest_prefix(expected), position, PLAIN, VOCAB_SIZE, 16))
    num_taken = 0
    live = core._live.of(CLIENT)
    assert live is not None
    for handle in range(30):
        core.handle(b"plain", AddRequest(handle, PROMPT, PLAIN))
        told: list[int] = []
        for _ in range(30):
            try:
                message = decode(hostile_frame(dice))
            except BadFrameError:
                continue
            assert isinstance(message, AddRequest)
            num_live = len(live)
            core.handle(CLIENT, message)
            num_taken += len(live) - num_live
        while len(told) < PLAIN.max_tokens:
            core.step()
            core.check_ledger()
            for client, outputs in core.take_outputs():
                if client == b"plain":
                    told += outputs.token_ids
        assert PROMPT + told == expected, f"seed {seed}"
        core.handle(CLIENT, AbortRequests(list(range(-2, 10))))
    assert num_taken > 100, "too few of them were taken in"
    assert core.stats().num_void_steps == 0, "every one of these is refused, or fails as a row"
