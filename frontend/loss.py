"""How a client comes to be without a core."""

from dataclasses import dataclass
from enum import Enum, auto


class LossKind(Enum):
    """What is known of the core that is lost."""

    GONE = auto()  # the connection has ended, or the process: that one tells more
    FAILED = auto()  # it is of no use any more, as it has said itself or as its outputs show
    DISMISSED = auto()  # it has ended the connection, and serves its other clients


@dataclass(frozen=True, slots=True)
class Loss:
    """A core that serves a client no longer.

    Attributes:
        cause: in words.
        kind: what is known of it.
    """

    cause: str
    kind: LossKind = LossKind.GONE
