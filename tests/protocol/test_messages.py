"""Every message as it stands on the wire. These bytes are a contract: they change only together
with PROTOCOL_VERSION, except that fields may be appended."""

import random
from typing import Any

import msgspec
import pytest

from footplate.protocol.codec import (
    MAX_FRAME_BYTES,
    BadFrameError,
    Decoder,
    Encoder,
    client_message_decoder,
    core_message_decoder,
)
from footplate.protocol.config import RequestConfig
from footplate.protocol.errors import MessageTooLargeError
from footplate.protocol.messages import (
    AbortRequests,
    AddRequest,
    ClientMessage,
    ControlReply,
    CoreMessage,
    EngineFailed,
    Finished,
    FinishReason,
    Goodbye,
    Hello,
    Message,
    Started,
    StepOutputs,
    Welcome,
)
from footplate.protocol.token_params import TokenParams

from .samples import EVERYTHING, FACTS, FROM_CLIENT, FROM_CORE, LIMITS, PARAMS, STATS

# By the names of the samples.
GOLDEN_CLIENT = {
    "hello": "95a568656c6c6f920100a86970633a2f2f2f78c400a0",
    "hello of a session": (
        "95a568656c6c6f920102ae6970633a2f2f2f6e6f7768657265c40773657373696f6ea36b6579"
    ),
    "ping": "92a470696e6703",
    "add": (
        "9ea3616464019214cd012c9dcb3feccccccccccccdcb3feccccccccccccd28cb3f847ae147ae147b071e0392"
        "0203c0c0c0c0c200a00190cb0000000000000000c0c0c2c2c0"
    ),
    "add with scores": (
        "9ea361646402dc00501415141514151415141514151415141514151415141514151415141514151415141514"
        "1514151415141514151415141514151415141514151415141514151415141514151415141514151415141514"
        "159dcb0000000000000000cb3ff000000000000000cb00000000000000000709009099cb3ff0000000000000"
        "cb0000000000000000cb3ff00000000000008128cb4014000000000000c090c0c0909603911102900000c0c0"
        "c201a473616c740290cb0000000000000000c0c0c2c2c0"
    ),
    "add with everything": (
        "9ea3616464049214159dcb3fe0000000000000cb3ff000000000000000cb0000000000000000070300910299"
        "cb3ff0000000000000cbbff0000000000000cb3ff80000000000008103cb4000000000000000920102919204"
        "05930591069107910891920081a178910196029101009102010392aa73746172743a202f612faa6c6c677569"
        "64616e636593040102c3ffa0039113cb3fe0000000000000cb3ff0000000000000cb4000000000000000c3c3"
        "a46e616d65"
    ),
    "add again": (
        "9ea3616464089214159dcb3feccccccccccccdcb3feccccccccccccd28cb3f847ae147ae147b071e03920203"
        "c0c0c0c0c200a001921e1fcb0000000000000000c0c0c3c2c0"
    ),
    "attach": "93a661747461636807a46e616d65",
    "abort": "93a561626f7274920102c2",
    "abort of what has ended": "93a561626f7274920708c3",
    "park": "92a47061726b920105",
    "resume": "92a6726573756d65920105",
    "goodbye": "91a3627965",
    "reset": "92b272657365745f7072656669785f636163686503",
    "get stats": "92a96765745f737461747304",
    "drain": "93a5647261696e05cb4004000000000000",
}
GOLDEN_CORE = {
    "welcome": (
        "9da777656c636f6d65099201009ba16da174a1410a149102a7666c6f61743332a3637075ab70616765642074"
        "6f72636805a4696e743896cd0100cd0200a4666366731064c32a81a76c6f6164696e67cb3fe0000000000000"
        "8bac6d61785f6c6f6770726f627314ad6c6f6770726f62735f6d6f6465ac7261775f6c6f6770726f6273af73"
        "747265616d5f696e74657276616c01b16c6f676974735f70726f636573736f727390b3726561736f6e696e67"
        "5f73746172745f737472c0b1726561736f6e696e675f656e645f737472c0b36d61785f6e756d5f7175657565"
        "645f72657173ce00010000b56d61785f6e756d5f7175657565645f746f6b656e73c0b16d61785f756e726561"
        "645f746f6b656e73cd1000a76c656173655f73cb404e000000000000ab6c656173655f6279746573ce040000"
        "009101c2a000a561646d696e"
    ),
    "progress": "93a870726f6772657373af6c6f6164696e672077656967687473cb3fd0000000000000",
    "refused": "93a772656675736564a57374617274ae6e6f207375636820666f6c646572",
    "pong": "96a4706f6e67030964c3cb3fe0000000000000",
    "tokens": "9aa36f75740992010292000092cd012ccd012d9090909090",
    "tokens with scores": (
        "9aa36f757409930102039300000093cd012ccd012dcd012e909090919503009101c410110000001100000011"
        "00000011000000c410000080bf000080bf000080bf000080bf90"
    ),
    "runs": (
        "9aa36f75740992010292000093cd012ccd012dcd012e92010291940110cb3fe0000000000000cb3fd0000000"
        "000000909090"
    ),
    "ends": (
        "9aa36f75740992040592000092cd012ccd012d9091940400cb3fe0000000000000cb3fd00000000000009294"
        "0600a000940703a3776879059091950801920102c4080100000001000000c4080000000000000000"
    ),
    "attached": (
        "93a86174746163686564039ea3616464019214159dcb3fe0000000000000cb3ff000000000000000cb000000"
        "00000000000703009102c0c0c0c0c200a00190cb0000000000000000c0c0c3c2a46e616d65"
    ),
    "no": "95a57265706c7903c2b47265717565737473206172652072756e6e696e67c0",
    "stats": "95a57265706c7904c3a0dc00100102030405060708090a0b0000000000",
    "failed": "92a66661696c6564bb52756e74696d654572726f723a206f7574206f66206d656d6f7279",
    "stopping": "92a873746f7070696e67ab746f6c6420746f20656e64",
}
GOLDEN = {**GOLDEN_CLIENT, **GOLDEN_CORE}
SAMPLES = {**FROM_CLIENT, **FROM_CORE}


# What peers of version 1.0 sent: later ones still read it.
GOLDEN_1_0: list[tuple[Message, str]] = [
    (
        AddRequest(1, [300, 4], PARAMS, -1, "s"),
        "96a36164640192cd012c0498cb3fe0000000000000cb3ff000000000000000cb0000000000000000070300"
        "9102ffa173",
    ),
    (
        Welcome(9, (1, 0), FACTS, LIMITS, 42, {"loading": 0.5}),
        "97a777656c636f6d65099201009ba16da174a1410a149102a7666c6f61743332a3637075ab706167656420"
        "746f72636805a4696e743896cd0100cd0200a4666366731064c32a81a76c6f6164696e67cb3fe00000"
        "00000000",
    ),
    (
        StepOutputs(9, [1, 2], [0, 5], [300, 4]),
        "98a36f75740992010292000592cd012c04909090",
    ),
    (
        StepOutputs(
            9,
            [1, 2],
            [0, 5],
            [300, 4, 7],
            [1, 2],
            [Started(1, 16, 0.5, 0.25)],
            [Finished(2, FinishReason.LENGTH), Finished(3, FinishReason.ERROR, "why")],
        ),
        "98a36f75740992010292000593cd012c040792010291940110cb3fe0000000000000cb3fd0000000000000"
        "92930201a0930303a3776879",
    ),
]

# What peers of version 1.1 sent.
GOLDEN_1_1: list[tuple[Message, str]] = [
    (Hello((1, 0), "ipc:///x"), "93a568656c6c6f920100a86970633a2f2f2f78"),
    (
        AddRequest(1, [300, 4], PARAMS, -1, "s"),
        "9ba36164640192cd012c049dcb3fe0000000000000cb3ff000000000000000cb00000000000000000703"
        "009102c0c0c0c0c2ffa1730190cb0000000000000000c0c0",
    ),
    (
        AddRequest(1, [300, 4], EVERYTHING, 0, "", 3, [5], 0.5, 1.0, 2.0),
        "9ba36164640192cd012c049dcb3fe0000000000000cb3ff000000000000000cb00000000000000000703"
        "00910299cb3ff0000000000000cbbff0000000000000cb3ff80000000000008103cb4000000000000000"
        "92010291920405930591069107910891920081a178910196029101009102010392aa73746172743a202f"
        "612faa6c6c67756964616e636593040102c300a0039105cb3fe0000000000000cb3ff0000000000000cb"
        "4000000000000000",
    ),
    (
        Welcome(
            *(9, (1, 0), FACTS, LIMITS, 42, {"loading": 0.5}),
            RequestConfig(max_num_queued_reqs=None),
        ),
        "98a777656c636f6d65099201009ba16da174a1410a149102a7666c6f61743332a3637075ab7061676564"
        "20746f72636805a4696e743896cd0100cd0200a4666366731064c32a81a76c6f6164696e67cb3fe00000"
        "0000000088ac6d61785f6c6f6770726f627314ad6c6f6770726f62735f6d6f6465ac7261775f6c6f6770"
        "726f6273af73747265616d5f696e74657276616c01b16c6f676974735f70726f636573736f727390b372"
        "6561736f6e696e675f73746172745f737472c0b1726561736f6e696e675f656e645f737472c0b36d6178"
        "5f6e756d5f7175657565645f72657173c0b56d61785f6e756d5f7175657565645f746f6b656e73c0",
    ),
    (
        ControlReply(4, True, "", STATS),
        "95a57265706c7904c3a09b0102030405060708090a0b",
    ),
    (AbortRequests([1, 2]), "92a561626f7274920102"),
]


def decode(message_type: type, frame: bytes) -> Message:
    """Decode in the direction that this type of message travels in."""
    from_client = message_type in ClientMessage.__args__
    decoder: Decoder[Any] = client_message_decoder() if from_client else core_message_decoder()
    message: Message = decoder.decode(frame)
    return message


def pack(fields: object) -> bytes:
    return msgspec.msgpack.encode(fields)


def fields_of(frame_hex: str) -> list[Any]:
    fields: list[Any] = msgspec.msgpack.decode(bytes.fromhex(frame_hex))
    return fields


every_message = pytest.mark.parametrize(
    ("message", "golden"),
    [pytest.param(SAMPLES[name], golden, id=name) for name, golden in GOLDEN.items()],
)


def test_every_message_type_has_a_sample_and_each_its_golden_bytes() -> None:
    assert {type(sample) for sample in FROM_CLIENT.values()} == set(ClientMessage.__args__)
    assert {type(sample) for sample in FROM_CORE.values()} == set(CoreMessage.__args__)
    assert (set(GOLDEN_CLIENT), set(GOLDEN_CORE)) == (set(FROM_CLIENT), set(FROM_CORE))


@every_message
def test_a_message_is_encoded_to_its_golden_bytes(message: Message, golden: str) -> None:
    assert Encoder().encode(message).hex() == golden


@every_message
def test_golden_bytes_are_decoded_to_their_message(message: Message, golden: str) -> None:
    assert decode(type(message), bytes.fromhex(golden)) == message


@every_message
def test_a_message_of_the_other_direction_is_a_bad_frame(message: Message, golden: str) -> None:
    from_client = type(message) in ClientMessage.__args__
    other: Decoder[Any] = core_message_decoder() if from_client else client_message_decoder()
    with pytest.raises(BadFrameError):
        other.decode(bytes.fromhex(golden))


# ---- an older or a newer peer


@pytest.mark.parametrize(("message", "golden"), GOLDEN_1_0 + GOLDEN_1_1)
def test_bytes_of_earlier_versions_are_decoded_to_what_they_meant(
    message: Message, golden: str
) -> None:
    assert decode(type(message), bytes.fromhex(golden)) == message


@every_message
def test_fields_that_a_newer_peer_appended_are_ignored(message: Message, golden: str) -> None:
    newer = [*fields_of(golden), "new", 7, None, [1, [2]], {"k": 1.5}]
    assert decode(type(message), pack(newer)) == message


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("add", [3]),  # TokenParams
        ("welcome", [3]),  # ModelFacts
        ("welcome", [4]),  # Limits
        ("runs", [6, 0]),  # Started
        ("ends", [7, 1]),  # Finished
        ("stats", [4]),  # Stats
    ],
)
def test_fields_that_a_newer_peer_appended_to_a_part_are_ignored(
    name: str, path: list[int]
) -> None:
    message, fields = SAMPLES[name], fields_of(GOLDEN[name])
    part = fields
    for index in path:
        part = part[index]
    part += ["new", [1]]
    assert decode(type(message), pack(fields)) == message


@every_message
def test_optional_fields_that_an_older_peer_does_not_send_get_their_defaults(
    message: Message, golden: str
) -> None:
    infos = msgspec.structs.fields(message)
    required = [info for info in infos if info.required]
    assert infos[: len(required)] == tuple(required), "an optional field precedes a required one"
    older = decode(type(message), pack(fields_of(golden)[: 1 + len(required)]))
    for info in infos:
        expected = getattr(message, info.name)
        if not info.required:
            factory = info.default_factory
            has_factory = factory is not msgspec.NODEFAULT
            expected = factory() if has_factory else info.default
        assert getattr(older, info.name) == expected


@every_message
def test_a_required_field_must_not_be_missing(message: Message, golden: str) -> None:
    num_required = sum(info.required for info in msgspec.structs.fields(message))
    with pytest.raises(BadFrameError):
        decode(type(message), pack(fields_of(golden)[:num_required]))


# ---- frames that are no messages


@every_message
def test_every_truncation_is_a_bad_frame(message: Message, golden: str) -> None:
    frame = bytes.fromhex(golden)
    for length in range(len(frame)):
        with pytest.raises(BadFrameError):
            decode(type(message), frame[:length])


@every_message
def test_bytes_behind_the_message_are_a_bad_frame(message: Message, golden: str) -> None:
    with pytest.raises(BadFrameError):
        decode(type(message), bytes.fromhex(golden) + b"\x00")


def mutate(frame: bytes, other: bytes, dice: random.Random) -> bytes:
    data = bytearray(frame)
    for _ in range(dice.choice((1, 1, 1, 2, 4, 16))):
        at = dice.randrange(len(data) + 1)
        match dice.randrange(6):
            case 0 if at < len(data):
                data[at] ^= 1 << dice.randrange(8)
            case 1 if at < len(data):
                data[at] = dice.randrange(256)
            case 2:
                data[at:at] = dice.randbytes(dice.randrange(1, 9))
            case 3:
                del data[at : at + dice.randrange(1, 9)]
            case 4:
                data[at:] = other[dice.randrange(len(other)) :]
            case _:
                data[at:at] = data[dice.randrange(len(data) + 1) :]
    return bytes(data)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("from_client", [True, False], ids=["from client", "from core"])
def test_mutated_frames_are_messages_or_bad_frames_and_nothing_else(
    from_client: bool, seed: int
) -> None:
    decoder: Decoder[Any] = client_message_decoder() if from_client else core_message_decoder()
    texts = GOLDEN_CLIENT if from_client else GOLDEN_CORE
    golden = [bytes.fromhex(text) for text in texts.values()]
    dice, encoder, num_bad = random.Random(seed), Encoder(), 0
    for _ in range(5_000):
        frame = mutate(dice.choice(golden), dice.choice(golden), dice)
        try:
            message = decoder.decode(frame)
        except BadFrameError:
            num_bad += 1
        else:
            # Not compared with `==`: a mutated float may be NaN.
            again = encoder.encode(decoder.decode(encoder.encode(message)))
            assert again == encoder.encode(message)
    assert 1_000 < num_bad < 5_000, "the mutations are too mild, or too wild, to test anything"


ABORT = bytes.fromhex("a561626f7274")
BOMBS = {
    "empty": b"",
    "nested arrays": b"\x91" * 200_000,
    "nested maps": b"\x81\xa1k" * 100_000,
    "nested arrays in a field": b"\x92" + ABORT + b"\x91" * 200_000,
    "nested arrays in an unknown field": b"\x93" + ABORT + b"\x90" + b"\x91" * 200_000,
    "nested maps in an unknown field": b"\x93" + ABORT + b"\x90" + b"\x81\xa1k" * 100_000,
    "an array of four billion": b"\x92" + ABORT + b"\xdd\xff\xff\xff\xff",
    "an unknown array of four billion": b"\x93" + ABORT + b"\x90\xdd\xff\xff\xff\xff",
    "four billion fields": b"\xdd\xff\xff\xff\xff" + ABORT,
    "a map of four billion": b"\xdf\xff\xff\xff\xff",
    "a string of four billion": b"\x93\xa5hello\x92\x01\x00\xdb\xff\xff\xff\xff",
    "an extension of four billion": b"\x92" + ABORT + b"\xc9\xff\xff\xff\xff\x01",
    "text that is not UTF-8": b"\x93\xa5hello\x92\x01\x00\xa2\xff\xff",
    "a tag that is not UTF-8": b"\x92\xa5\xff\xff\xff\xff\xff\x90",
    "a tag that is an array": b"\x92\x90\x90",
    "an unknown tag": b"\x92\xa5eject\x90",
    "a reserved byte": b"\x92" + ABORT + b"\xc1",
    "a negative seed": pack(["add", 1, [1], [0.5, 1.0, 0, 0.0, -7, 3, 0, []]]),
    "a NaN temperature": pack(["add", 1, [1], [float("nan"), 1.0, 0, 0.0, 7, 3, 0, []]]),
    "a fractional token id": pack(["add", 1, [1.5], [0.5, 1.0, 0, 0.0, 7, 3, 0, []]]),
}


@pytest.mark.parametrize("frame", BOMBS.values(), ids=BOMBS)
def test_a_bomb_is_a_bad_frame(frame: bytes) -> None:
    for decoder in (client_message_decoder(), core_message_decoder()):
        with pytest.raises(BadFrameError):
            decoder.decode(frame)


def test_a_frame_may_be_a_view_of_a_larger_buffer() -> None:
    frame = bytes.fromhex(GOLDEN["add with everything"])
    view = memoryview(b"x" + frame + b"x")[1:-1]
    assert client_message_decoder().decode(view) == SAMPLES["add with everything"]


def test_the_largest_message_is_encoded_and_one_byte_more_is_refused_with_numbers() -> None:
    encoder = Encoder()
    overhead = len(encoder.encode(EngineFailed("x" * 2**16))) - 2**16
    largest = "x" * (MAX_FRAME_BYTES - overhead)
    assert len(encoder.encode(EngineFailed(largest))) == MAX_FRAME_BYTES
    with pytest.raises(MessageTooLargeError, match=rf"{MAX_FRAME_BYTES + 1}.*{MAX_FRAME_BYTES}"):
        encoder.encode(EngineFailed(largest + "x"))
    assert encoder.encode(Goodbye()).hex() == "91a3627965", "the encoder is as good as before"


class Whole(int):
    pass


class Share(float):
    pass


def test_numbers_and_text_of_derived_types_travel_as_what_they_are_derived_from() -> None:
    plain = AddRequest(5, [1], TokenParams(0.5, 1.0, 3, 0.0, 0, 4, 0, (2,)), deadline_s=0.5)
    params = TokenParams(Share(0.5), Share(1), Whole(3), Share(0), 0, Whole(4), 0, (Whole(2),))
    derived = AddRequest(Whole(5), [Whole(1)], params, deadline_s=Share(0.5))
    assert Encoder().encode(derived) == Encoder().encode(plain)
    with pytest.raises(TypeError, match="no message holds a complex"):
        Encoder().encode(AddRequest(5, [1j], params))  # type: ignore[list-item]
