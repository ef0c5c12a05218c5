"""Seeded schedules of everything that interrupts a request: parking, aborts, lost connections,
attaching, a drain. Whatever comes between, tokens are those of the request alone, and nothing is
left."""

from collections import Counter
from functools import cache
from pathlib import Path
from random import Random

from footplate.backend.detached import DETACHED
from footplate.protocol.config import RequestConfig
from footplate.protocol.messages import Attached, ControlReply, ErrorKind, FinishReason

from .flow_driver import FlowDriver, expected

LEASE_S = 8.0
MAX_TOKENS = 12
ERROR, ABORT, LENGTH = FinishReason.ERROR, FinishReason.ABORT, FinishReason.LENGTH
STOP = FinishReason.STOP


ACTS = ("add", "park", "resume", "attach") * 3 + ("abort", "end", "lose", "lose", "bye")


@cache
def whole(prompt: tuple[int, ...]) -> list[int]:
    return expected(list(prompt), MAX_TOKENS)


class Schedule:
    """Two sessions, whose connections come and go, and one client without a session."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.random = random = Random(seed)
        self.driver = FlowDriver(
            folder,
            requests=RequestConfig(
                lease_s=LEASE_S, lease_bytes=random.choice((0, 150, 10_000, 2**20))
            ),
            max_num_seqs=random.choice((1, 2, 4, 16)),
            max_num_batched_tokens=random.choice((16, 64)),
            policy=random.choice(("fcfs", "priority")),
        )
        self.core = self.driver.core
        for name in (b"alice", b"bob"):
            self.core.leave(name)
        self.prompts: dict[tuple[bytes, int], list[int]] = {}  # by connection and handle
        self.ids: dict[tuple[bytes, str], list[int]] = {}  # likewise, by session and id
        self.connections: dict[bytes, bytes] = {}  # by session; of b"" too
        self.parked: set[tuple[bytes, int]] = set()
        self.num_names = self.num_handles = 0
        self.happened: Counter[str] = Counter()
        self.is_draining = False

    def run(self) -> None:
        drain_at = self.random.randrange(40, 120)  # within the schedule, or not
        for number in range(60):
            for _ in range(self.random.choice((0, 1, 1, 3))):
                self.act()
            if number >= drain_at and self.connections and self.random.random() < 0.2:
                self.drain()
            self.driver.clock.now += self.random.choice((0.0, 0.1, 0.5, 2.0))
            self.driver.step()
        for client, handle in self.parked:
            self.driver.resume(client, handle)
        self.driver.run()
        self.check_told()
        for session in list(self.connections):
            self.driver.core.leave(self.connections.pop(session), may_return=True)
        self.driver.step()
        self.driver.clock.now += LEASE_S
        self.driver.step()
        self.driver.run()
        self.driver.check_empty()
        assert not self.core._leases and not self.core._leases._sessions
        assert self.core._live._tables == {DETACHED: {}}

    def act(self) -> None:
        session = self.random.choice((b"one", b"two", b""))
        client = self.connections.get(session)
        if client is None:
            self.num_names += 1
            self.connections[session] = client = b"connection %d" % self.num_names
            self.core.join(client, session)
            return
        known = [handle for owner, handle in self.prompts if owner == client]
        some = self.random.sample(known, min(len(known), self.random.choice((1, 2, 5))))
        match self.random.choice(ACTS):
            case "add":
                self.add(client, session)
            case "park":
                self.driver.park(client, *some, 999_999)
                self.parked |= {(client, handle) for handle in some}
                self.happened["parked"] += self.core.stats().num_parked > 0
            case "resume":
                self.driver.resume(client, *some)
                self.parked -= {(client, handle) for handle in some}
            case "abort":
                self.driver.abort(client, *some)
            case "end":
                self.driver.abort(client, *some, have_ended=True)
            case "lose":
                self.driver.lose(self.connections.pop(session))
                self.happened["detached"] += self.core.stats().num_detached > 0
            case "bye":
                self.core.leave(self.connections.pop(session))
            case "attach":
                self.attach(client, session)

    def drain(self) -> None:
        client = self.random.choice(list(self.connections.values()))
        self.driver.drain(client, 1, self.random.choice((None, 5.0, 20.0)))
        self.is_draining = True

    def add(self, client: bytes, session: bytes) -> None:
        n = self.random.choice((1, 1, 1, 3))
        handle = self.num_handles + 1
        self.num_handles += n
        prompt = [self.random.randrange(3)] * self.random.randint(1, 20)
        request_id = f"{self.num_handles}" if n == 1 and self.random.random() < 0.6 else None
        priority = self.random.randint(0, 2)
        self.driver.add(
            client,
            handle,
            prompt,
            n=n,
            max_tokens=MAX_TOKENS,
            request_id=request_id,
            priority=priority,
        )
        for index in range(n):
            self.prompts[client, handle + index] = prompt
        if request_id is not None and session:
            self.ids[session, request_id] = prompt

    def attach(self, client: bytes, session: bytes) -> None:
        known = [request_id for owner, request_id in self.ids if owner == session]
        request_id = self.random.choice([*known, "unknown"])
        self.num_handles += 1
        self.prompts[client, self.num_handles] = self.ids.get((session, request_id), [])
        self.driver.attach(client, self.num_handles, request_id)

    def check_told(self) -> None:
        """Every handle of a connection that is here has one end; all tokens are right."""
        here = set(self.connections.values())
        for (client, handle), prompt in self.prompts.items():
            tokens = self.driver.tokens(client, handle)
            assert tokens == whole(tuple(prompt))[: len(tokens)]
            ends = self.driver.ends(client, handle)
            assert len(ends) <= 1
            if client not in here:
                continue
            assert len(ends) == 1, f"handle {handle} has no end"
            if ends[0].reason is LENGTH:
                assert len(tokens) == min(MAX_TOKENS, 40 - len(prompt))
            elif ends[0].reason is ERROR:
                assert ends[0].kind in (ErrorKind.LOST, ErrorKind.DRAINING)
                assert not tokens
            self.happened[str(ends[0].reason)] += 1
        attached = [(client, m.handle) for client in here for m in self.driver.attached(client)]
        for client, handle in attached:
            assert self.driver.ends(client, handle)[0].reason in (LENGTH, ABORT, STOP)
        self.happened["attached"] += sum(isinstance(m, Attached) for _, m in self.driver.replies)
        if self.is_draining and not self.core.stats().num_parked:
            assert any(isinstance(m, ControlReply) and m.ok for _, m in self.driver.replies)


def test_whatever_interrupts_requests_their_tokens_are_their_own(tmp_path: Path) -> None:
    happened: Counter[str] = Counter()
    for seed in range(100):
        schedule = Schedule(tmp_path, seed)
        try:
            schedule.run()
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
        happened += schedule.happened
    for what in ("parked", "detached", "attached", "length", "abort", "error"):
        assert happened[what] > 50, happened
    assert happened["stop"] > 10, happened
