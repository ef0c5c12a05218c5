"""What a peer may ask for."""

from dataclasses import dataclass

from footplate.protocol.keys import Role
from footplate.protocol.messages import (
    AbortRequests,
    AddRequest,
    AttachRequest,
    ClientMessage,
    GetStats,
    Goodbye,
    Hello,
    ParkRequests,
    Ping,
    ResumeRequests,
)

# Everything else takes an admin: what a later version brings is not open to all by oversight.
FOR_EVERYBODY = frozenset(
    {
        Hello,
        Ping,
        AddRequest,
        AttachRequest,
        AbortRequests,
        ParkRequests,
        ResumeRequests,
        GetStats,
        Goodbye,
    }
)


@dataclass(frozen=True, slots=True)
class Peer:
    """Somebody who has been let in.

    Attributes:
        key: the public key that was proved; empty where links have no keys.
        name: of the key, for the log and for people.
        role: "generate" or "admin".
        host: where the connection comes from; empty over ipc.
        is_insider: runs as the core's own user, who may see paths and process ids.
        max_requests: most live requests of all connections with this key; None is no limit.
        max_queued_tokens: most prompt tokens of those that wait for their first step.
    """

    key: str = ""
    name: str = ""
    role: Role = "admin"
    host: str = ""
    is_insider: bool = True
    max_requests: int | None = None
    max_queued_tokens: int | None = None

    def may_send(self, message: ClientMessage) -> bool:
        """Whether this peer may ask for that."""
        return self.role == "admin" or type(message) in FOR_EVERYBODY


def words_for_refusal(peer: Peer, message: ClientMessage) -> str:
    """What is answered to a call that its sender may not make."""
    return f"{type(message).__name__} needs the role admin, this key has the role {peer.role}"
