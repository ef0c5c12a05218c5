"""How much of the core the clients with one key may take up."""

from dataclasses import dataclass, field

from footplate.backend.admission import RefusalError
from footplate.backend.roles import Peer
from footplate.protocol.messages import AddRequest, ErrorKind


@dataclass(slots=True)
class Account:
    """What all connections with one key have in the core; the scheduler keeps it.

    Attributes:
        num_requests: that have not ended.
        num_queued_tokens: prompt tokens of those without a first step; siblings have one prompt.
    """

    num_requests: int = 0
    num_queued_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Quota:
    """The limits of one client, and the account that they are compared with."""

    account: Account
    max_requests: int | None
    max_queued_tokens: int | None

    def check(self, message: AddRequest) -> None:
        """Pass, or say why not.

        A replay's tokens were within their limit in the core before, where its likes had had their
        first step; the limit of requests holds for it too.

        Raises:
            RefusalError: with words for the client.
        """
        _check("requests", self.max_requests, self.account.num_requests, message.n)
        if not message.is_replay:
            num_tokens = len(message.prompt_token_ids)
            limit = self.max_queued_tokens
            _check("queued_tokens", limit, self.account.num_queued_tokens, num_tokens)


@dataclass(slots=True)
class Quotas:
    """Owns the accounts of the keys that have limits."""

    _accounts: dict[str, Account] = field(default_factory=dict)

    def of(self, peer: Peer) -> Quota | None:
        """What holds for a client; None is no limit."""
        if peer.max_requests is None and peer.max_queued_tokens is None:
            return None
        account = self._accounts.setdefault(peer.key, Account())
        return Quota(account, peer.max_requests, peer.max_queued_tokens)


def _check(what: str, limit: int | None, count: int, more: int) -> None:
    if limit is not None and count + more > limit:
        raise RefusalError(
            f"this key has {count} {what.replace('_', ' ')} and {more} more would exceed its "
            f"max_{what}, which is {limit}",
            ErrorKind.OVERFLOW,
        )
