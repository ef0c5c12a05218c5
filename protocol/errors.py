"""Errors a caller can meet.

* FootplateError
  - InvalidRequestError (ValueError)   the caller's fault: fix the request, do not retry
    + InvalidParameterError            one parameter: its name, its value, what would do
    + PromptTooLongError
    + DuplicateRequestError
    + MessageTooLargeError
  - QueueOverflowError                 too much is waiting: try again after `retry_after_s`
  - RequestFailedError                 this request ended early; the engine and the others go on
    + RequestLostError                 nothing of this id is kept: send the request again
  - TokenizerError                     the model folder holds no usable tokenizer
  - EngineError
    + EngineStartError                 the engine never became ready: fix the cause, start again
      . AddressInUseError              another engine holds the address
      . ProtocolMismatchError          client and engine core are of different versions
      . KeyFileError                   a key file is missing, damaged, or open to others
      . KeyRefusedError                the engine does not let this client's key in
    + EngineDeadError                  the engine core is gone, and could not be replaced
    + EngineNotReadyError              the core is being replaced, or does not answer: wait
    + EngineDrainingError              the engine takes no new requests: ask another
    + EngineClosedError                the engine was shut down by its owner

A broken invariant is none of these: it is an AssertionError, and it ends the process.
"""

import reprlib

# A value may be as large as the mistake.
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 200
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = _REPR.maxset = 8


def _shorten(value: object) -> str:
    try:
        return _REPR.repr(value)
    except Exception:  # integers of thousands of digits, and types that cannot say what they are
        return f"<{type(value).__name__}>"


class FootplateError(Exception):
    """Base of everything Footplate raises on purpose."""


class InvalidRequestError(FootplateError, ValueError):
    """The request cannot be served as it stands; nothing was sent to the engine core."""


class InvalidParameterError(InvalidRequestError):
    """One parameter is out of its bounds.

    Attributes:
        parameter: its name, as in `SamplingParams` or `EngineArgs`.
        value: what was given.
    """

    def __init__(self, parameter: str, value: object, requirement: str) -> None:
        super().__init__(f"{parameter}={_shorten(value)}: must be {requirement}")
        self.parameter = parameter
        self.value = value


class PromptTooLongError(InvalidRequestError):
    """Prompt and `max_tokens` do not fit into the model's context window together."""


class DuplicateRequestError(InvalidRequestError):
    """A live request of this client has the same id already."""


class MessageTooLargeError(InvalidRequestError):
    """One message would be larger than the engine core accepts."""


class QueueOverflowError(FootplateError):
    """The request would have to wait behind more than the engine lets wait; it was not queued.

    Attributes:
        retry_after_s: when there should be room, at the rate at which requests started lately.
    """

    def __init__(self, why: str, retry_after_s: float) -> None:
        super().__init__(f"{why}: try again in about {retry_after_s:.3g} s")
        self.retry_after_s = retry_after_s


class RequestFailedError(FootplateError):
    """The engine accepted the request and could not finish it. Other requests are unaffected."""


class RequestLostError(RequestFailedError):
    """There is no such request to attach to, or no longer."""


class TokenizerError(FootplateError):
    """The model folder holds no tokenizer that can be loaded here."""


class EngineError(FootplateError):
    """Something about the engine core as a whole, not about one request."""


class EngineStartError(EngineError):
    """The engine core did not become ready; the message holds its root cause."""


class AddressInUseError(EngineStartError):
    """Another process holds the address; nothing was loaded."""


class ProtocolMismatchError(EngineStartError):
    """Client and engine core do not speak the same version of the protocol."""


class KeyFileError(EngineStartError):
    """A file with keys cannot be used; the message names the file and what to do."""


class KeyRefusedError(EngineStartError):
    """The engine does not know the client's key, or no longer: ask its owner for another."""


class EngineDeadError(EngineError):
    """The engine core ended before the request did, and could not be replaced; the message holds
    the cause."""


class EngineNotReadyError(EngineError):
    """The engine core is being replaced, or does not answer. Streams go on by themselves."""


class EngineDrainingError(EngineError):
    """The engine finishes what it has, and takes no new requests."""


class EngineClosedError(EngineError):
    """The engine was shut down by its owner, or never started."""
