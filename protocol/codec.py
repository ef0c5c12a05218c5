"""Messages to frames and back. One encoder and decoder per thread: they are not shared."""

from collections.abc import Callable
from typing import Generic, TypeVar

import msgspec

from footplate.protocol.errors import MessageTooLargeError
from footplate.protocol.messages import ClientMessage, CoreMessage, Message

M = TypeVar("M")

# A prompt of four million tokens. Senders check against it and raise; the receiving sockets'
# MAXMSGSIZE is twice this, because an oversized frame costs the peer its connection.
MAX_FRAME_BYTES = 16 * 2**20
MAX_FRAMES = 256  # of one ZeroMQ message


class BadFrameError(Exception):
    """A frame that is no message. It is counted and dropped, and ends no loop."""


class _AddressOfRequest(msgspec.Struct, tag="add", array_like=True, frozen=True):
    """The first fields of `AddRequest`, whatever follows."""

    handle: int


class _AddressOfAttach(msgspec.Struct, tag="attach", array_like=True, frozen=True):
    """Likewise of `AttachRequest`."""

    handle: int


_decode_address: Callable[[bytes | memoryview], _AddressOfRequest | _AddressOfAttach] = (
    msgspec.msgpack.Decoder(_AddressOfRequest | _AddressOfAttach).decode
)


class Encoder:
    """Messages to frames."""

    def __init__(self) -> None:
        self._encode = msgspec.msgpack.Encoder(enc_hook=_as_plain).encode

    def encode(self, message: Message) -> bytes:
        """Encode one message.

        Raises:
            MessageTooLargeError: the frame would exceed `MAX_FRAME_BYTES`.
        """
        frame = self._encode(message)
        if len(frame) > MAX_FRAME_BYTES:
            raise MessageTooLargeError(
                f"the encoded message has {len(frame)} bytes, the limit is {MAX_FRAME_BYTES}: "
                "send a shorter prompt"
            )
        return frame


def _as_plain(value: object) -> object:
    """A number or text of a type derived from Python's own (numpy.float64 is one) is what it is
    derived from. Everybody else's is refused before."""
    for plain in (int, float, str):
        if isinstance(value, plain):
            return plain(value)
    raise TypeError(f"no message holds a {type(value).__name__}")


class Decoder(Generic[M]):
    """Frames to messages of one direction."""

    def __init__(self, union: type[M]) -> None:
        self._decode = msgspec.msgpack.Decoder(union).decode

    def decode(self, frame: bytes | memoryview) -> M:
        """Decode one frame.

        Raises:
            BadFrameError: whatever is wrong with it: not msgpack, an unknown tag, a field of the
                wrong type or out of its bounds, nested too deeply.
        """
        try:
            return self._decode(frame)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise BadFrameError(str(error)) from None


def handle_of(frame: bytes | memoryview) -> int | None:
    """Which request a frame that is no message would have added or attached to, if it says so much:
    somebody may wait for its end."""
    try:
        return _decode_address(frame).handle
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None


def client_message_decoder() -> Decoder[ClientMessage]:
    """For the core: what clients send."""
    return Decoder(ClientMessage)  # type: ignore[arg-type]  # a union is a valid msgspec type


def core_message_decoder() -> Decoder[CoreMessage]:
    """For the client: what the core sends."""
    return Decoder(CoreMessage)  # type: ignore[arg-type]
