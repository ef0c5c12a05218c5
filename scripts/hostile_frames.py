"""Frames that are nearly messages: what a broken or malicious peer might send.

The messages that they nearly are stand beside the tests that know their bytes.
"""

import math
import sys
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any

import msgspec

from footplate.protocol.codec import Encoder
from footplate.protocol.messages import Message

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.protocol import samples

EPOCH = samples.EPOCH
FROM_CLIENT = tuple(samples.FROM_CLIENT.values())
FROM_CORE = tuple(samples.FROM_CORE.values())

_VALUES: tuple[Any, ...] = (
    *(-1, 0, 1, 2, 127, 128, 255, 256, 65_535, 2**31 - 1, 2**31, 2**32, 2**53 + 1),
    *(2**63 - 1, 2**63, 2**64 - 1, -(2**31) - 1, -(2**63)),
    *(0.0, -0.0, 0.5, 1.5, -1.0, 1e308, 5e-324, math.nan, math.inf, -math.inf),
    *("", "a", "hello", "add", "\0", "\u2028", "é" * 100, "x" * 5000),
    *(b"", b"\0", b"\xff" * 64, True, False, None),
    *([], {}, [[]], [None], {"": None}, {1: 2}, {"k": [1, {"k": "v"}]}),
    *([0] * 1000, [-1], [2**64 - 1], ["a"] * 3, [[0]] * 20),
)
_HUGE_LENGTHS = (
    b"\xdd\xff\xff\xff\xff",  # array
    b"\xdf\xff\xff\xff\xff",  # map
    b"\xdb\xff\xff\xff\xff",  # text
    b"\xc6\xff\xff\xff\xff",  # bytes
    b"\xc9\xff\xff\xff\xff\x01",  # extension
    b"\xdc\xff\xff",
)
_NESTS = (b"\x91", b"\x81\xa1k", b"\x92\x01", b"\x81\x01", b"\xdd\x00\x00\x00\x01")


class FrameMutator:
    """Makes frames of samples, each changed a little or a lot. The dice decide, so that a seed is
    a replay."""

    def __init__(self, samples: Sequence[Message], dice: Random) -> None:
        encode = Encoder().encode
        self._frames = [encode(sample) for sample in samples]
        self._dice = dice
        self._pack = msgspec.msgpack.Encoder().encode

    def frame(self) -> bytes:
        """The next one; it may happen to be a message."""
        dice = self._dice
        frame = dice.choice(self._frames)
        kind = dice.random()
        if kind < 0.55:
            return self._change_values(frame)
        if kind < 0.98:
            return self._change_bytes(frame)
        return self._plant_bomb(frame)

    def _change_values(self, frame: bytes) -> bytes:
        """Well-formed msgpack, with other values, types or numbers of fields."""
        fields: list[Any] = msgspec.msgpack.decode(frame)
        for _ in range(self._dice.choice((1, 1, 1, 2, 4))):
            self._change_value(fields)
        return self._pack(fields)

    def _change_value(self, tree: list[Any]) -> None:
        dice = self._dice
        while True:
            at = dice.randrange(len(tree))
            child = tree[at]
            if not (isinstance(child, list) and child and dice.random() < 0.7):
                break
            tree = child
        match dice.randrange(9):
            case 0:
                del tree[at]
                if not tree:
                    tree.append(None)
            case 1:
                tree.insert(at, deepcopy(dice.choice(_VALUES)))
            case 2 | 3 | 4 if type(child) is int:
                near = child + dice.choice((-1, 1, 2, -7))
                tree[at] = max(-(2**63), min(2**64 - 1, near))
            case 5:
                tree[at] = [child] * dice.choice((1, 2, 50))
            case 6:
                tree[at] = deepcopy(dice.choice(tree))
            case _:
                # Of its own type, so that it is not the type that is found wrong.
                alike = [value for value in _VALUES if type(value) is type(child)]
                tree[at] = deepcopy(dice.choice(alike if dice.random() < 0.6 else _VALUES))

    def _change_bytes(self, frame: bytes) -> bytes:
        dice, data = self._dice, bytearray(frame)
        for _ in range(dice.choice((1, 1, 1, 2, 4, 16))):
            at = dice.randrange(len(data) + 1)
            match dice.randrange(8):
                case 0 if at < len(data):
                    data[at] ^= 1 << dice.randrange(8)
                case 1 if at < len(data):
                    data[at] = dice.randrange(256)
                case 2:
                    data[at:at] = dice.randbytes(dice.randrange(1, 9))
                case 3:
                    del data[at : at + dice.randrange(1, 9)]
                case 4:
                    del data[at:]
                case 5:
                    other = dice.choice(self._frames)
                    data[at:] = other[dice.randrange(len(other)) :]
                case 6:
                    data[at:at] = dice.choice(_HUGE_LENGTHS)
                case _:
                    data[at:at] = data[dice.randrange(len(data) + 1) :]
        return bytes(data)

    def _plant_bomb(self, frame: bytes) -> bytes:
        dice = self._dice
        at = dice.randrange(len(frame) + 1)
        nest = dice.choice(_NESTS) * dice.choice((10, 100, 500, 1000, 1100, 5000, 50_000))
        return frame[:at] + nest + dice.choice((b"", b"\x90", b"\x01", frame[at:]))
