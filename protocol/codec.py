"""Messages to frames and back. One encoder and decoder per thread: they are not shared."""

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


class Encoder:
    """Messages to frames."""

    def __init__(self) -> None:
        self._encode = msgspec.msgpack.Encoder().encode

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


def client_message_decoder() -> Decoder[ClientMessage]:
    """For the core: what clients send."""
    return Decoder(ClientMessage)  # type: ignore[arg-type]  # a union is a valid msgspec type


def core_message_decoder() -> Decoder[CoreMessage]:
    """For the client: what the core sends."""
    return Decoder(CoreMessage)  # type: ignore[arg-type]
