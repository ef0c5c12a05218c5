"""One seeded run of clients, sessions and engine cores, with a nemesis among them.

Sessions talk to one core at a time over pipes in memory, on a clock that is a number. Users start,
read and abort requests; the nemesis kills, stops and hangs cores, cuts connections, ends clients,
and lets what is under way come late, twice, or when it is too late. Everything random comes from
the seed, so a seed is a replay.
"""

from collections import Counter, deque
from random import Random

from footplate.frontend.recovery import BLAME
from footplate.protocol.errors import EngineDeadError, QueueOverflowError
from footplate.protocol.messages import AddRequest

from .checking_runner import BrokenPlan
from .core_host import CoreCrash, CoreHost
from .expectation import ExpectedRequest
from .link import Link, session_of
from .recovering_session import RecoveringSession
from .supervisor import PATIENCE, Supervisor
from .workload import Workload, make_setting

NUM_EVENTS = 200
MAX_REQUESTS = 14
TICK_S = 0.04  # at most, from event to event


class World:
    """Owns the clock, the connections, and who is there.

    Args:
        is_poisonous: many requests that no core survives, and the faults that make it hard to say
            which they are; some worlds are like that anyway.

    Attributes:
        happened: what, and how often.
        events: the last of them, for whoever looks for the cause of a failure.
    """

    def __init__(self, seed: int, *, is_poisonous: bool = False) -> None:
        self._random = random = Random(seed)
        self.now = 100.0
        self.happened: Counter[str] = Counter()
        self.events: deque[str] = deque(maxlen=30)
        self.num_events = 0
        setting = make_setting(random)
        self._nemesis_rate = random.choice((0.02, 0.05, 0.1))
        self._faults = random.sample(list(FAULTS), random.randint(1, len(FAULTS)))
        poison_rate = random.choice((0.0, 0.0, 0.1, 0.4))
        if is_poisonous or random.random() < 0.1:
            self._faults = ["nemesis: kill", "nemesis: cut"]
            poison_rate = 0.15
        self._workload = Workload(random, setting, poison_rate)
        max_restarts = 2 if random.random() < 0.1 else 1000
        self.supervisor = Supervisor(setting, self._clock, random, max_restarts)
        self._links: list[Link] = []
        self._gone: list[Link] = []  # closed, and the core does not know yet
        self._stale: list[tuple[RecoveringSession, bytes]] = []  # frames that may come again
        self._requests: dict[bytes, dict[int, ExpectedRequest]] = {}  # by session and handle
        self._num_requests = 0
        self._num_sessions = 0
        # By session and handle: tokens, and how many fatal steps since it had so many.
        self._fatal_steps: dict[tuple[bytes, int], tuple[int, int]] = {}
        self._known_epoch: dict[bytes, int] = {}
        self._stopped_until = 0.0
        self.sessions = [self._make_session() for _ in range(random.choice((1, 1, 2, 3)))]

    def _clock(self) -> float:
        return self.now

    # ---- a run

    def run(self) -> Counter[str]:
        """Random events, then only such as help, until every request has had its end; the books at
        the end."""
        act, chance = self._act, self._random.random
        for self.num_events in range(NUM_EVENTS):
            self.now += chance() * TICK_S
            act(chance())
            self._keep_up()
            if self.supervisor.is_spent:
                break
        self._settle()
        return self._close()

    def _keep_up(self) -> None:
        """What comes with time alone."""
        supervisor = self.supervisor
        if supervisor.host is None:
            supervisor.start_if_due()
        elif supervisor.host.is_stopped and self.now >= self._stopped_until:
            supervisor.host.is_stopped = False
            if not supervisor.host.is_in_step:
                supervisor.progress.go_on()
        supervisor.beat_if_due()

    def _act(self, chance: float) -> None:
        if chance < 0.12:
            self._use()
        elif chance < 0.35:
            self._carry_to_core(self._random.randint(1, 4))
        elif chance < 0.62:
            self._turn()
        elif chance < 0.86:
            self._carry_to_session()
        elif chance < 0.9:
            self._read()
        elif chance < 0.9 + self._nemesis_rate:
            self._strike()

    def _settle(self) -> None:
        """No more faults; as many turns as it takes. Poison is still there."""
        supervisor, patience, num_idle = self.supervisor, 3000, 0
        while not supervisor.is_spent and not self._is_done():
            patience -= 1
            assert patience, "no end in sight"
            num_idle = 0 if self._is_anybody_waiting() else num_idle + 1
            assert num_idle < 10, "a core works for nobody"
            self.now += 0.005
            host = supervisor.host
            if host is None or host.is_hung or host.is_stopped:
                self.now += 0.1
            self._keep_up()
            self._carry_to_core(100)
            while self._gone and supervisor.host is not None:
                self._notice_gone()
            self._turn()
            for session in self.sessions:
                while self._hear(session):
                    pass
        if supervisor.is_spent:
            for session in self.sessions:
                session.on_dead()
        self._read()

    def _is_anybody_waiting(self) -> bool:
        host = self.supervisor.host
        is_well = host is not None and not (host.is_hung or host.is_stopped)
        return not is_well or any(
            not s.is_serving or s.client.num_live or s.link.is_cut or s.link.outputs
            for s in self.sessions
        )

    def _is_done(self) -> bool:
        host = self.supervisor.host
        return (
            host is not None
            and not (host.is_hung or host.is_stopped or host.is_in_step or host.has_work)
            and not any(link.to_core for link in self._links)
            and not self._gone
            and all(s.is_serving and not s.client.num_live for s in self.sessions)
            and not any(s.link.is_cut or s.link.outputs for s in self.sessions)
        )

    # ---- users

    def _use(self) -> None:
        random = self._random
        session = random.choice(self.sessions)
        requests = self._requests[session.name]
        if random.random() < 0.75:
            if self._num_requests < MAX_REQUESTS:
                self._submit(session)
        elif requests:
            request = random.choice(list(requests.values()))
            if not request.stream.is_finished:
                request.was_aborted = True
            self._note("abort", request.stream.request_id)
            if random.random() < 0.5:
                session.abort(request.stream.request_id)
            else:
                request.read()  # and never again
                request.stream.close()
                request.has_ended = True

    def _submit(self, session: RecoveringSession) -> None:
        request = self._workload.open(session, str(self._num_requests), self._clock)
        self._num_requests += 1
        for completion in request.stream.completions:
            self._requests[session.name][completion.handle] = request
        self._note("poison" if request.is_poison else "add", request.stream.request_id)
        session.submit(request.stream, request.message)

    def _read(self) -> None:
        """Every consumer takes what is there."""
        for requests in self._requests.values():
            for request in requests.values():
                if not request.has_ended:
                    request.read()
                    if request.error is not None:
                        self._check_error(request)

    def _check_error(self, request: ExpectedRequest) -> None:
        """Of errors that are not the request's own doing."""
        if isinstance(request.error, EngineDeadError):
            assert self.supervisor.is_spent, "there would have been another core"
        elif BLAME in str(request.error):
            name = next(n for n, requests in self._requests.items() if request in requests.values())
            handles = (c.handle for c in request.stream.completions)
            most = max(self._fatal_steps.get((name, handle), (0, 0))[1] for handle in handles)
            assert most >= 2, "an innocent request was blamed"
            # Twice in a fatal step, the second time alone: nobody can tell that it was not the
            # request that made the core hang, but the nemesis, or that it was stopped for too long.
            assert request.is_poison or self.supervisor.happened["crash without a reason"], (
                "an innocent request was blamed"
            )
            self.happened["blame" if request.is_poison else "bad luck"] += 1

    # ---- what is under way

    def _connect(self, routing_id: bytes) -> Link:
        link = Link(routing_id)
        self._links.append(link)
        return link

    def _make_session(self) -> RecoveringSession:
        self._num_sessions += 1
        name = b"session %d" % self._num_sessions
        self._requests[name] = {}
        return RecoveringSession(name, self._connect, self._clock)

    def _carry_to_core(self, most: int) -> None:
        """Some frames arrive at the core; or it notices that somebody is gone."""
        host, random = self.supervisor.host, self._random
        if host is None or host.is_stopped:
            return
        if self._gone and random.random() < 0.3:
            self._notice_gone()
        full = [link for link in self._links if link.to_core]
        while full and most:
            link = random.choice(full) if len(full) > 1 else full[0]
            sent_at = link.to_core[0][0]
            message = host.hear(link)
            if isinstance(message, AddRequest):
                request = self._requests.get(session_of(link.routing_id), {}).get(message.handle)
                if request is not None:
                    request.check_sent(message, link.routing_id, sent_at)
            if not link.to_core:
                full.remove(link)
                if link.is_closed:
                    self._links.remove(link)
            most -= 1

    def _notice_gone(self) -> None:
        host = self.supervisor.host
        assert host is not None
        link = self._gone.pop(self._random.randrange(len(self._gone)))
        if link.host is host:
            host.notice_gone(link)

    def _carry_to_session(self) -> None:
        """Something arrives at a session, or it notices that there is nobody any more."""
        self._hear(self._random.choice(self.sessions))

    def _hear(self, session: RecoveringSession) -> bool:
        link, random = session.link, self._random
        if link.is_cut and random.random() < 0.3:
            self._lose(session)  # and never reads what has come
        elif link.answers and (not link.outputs or random.random() < 0.5):
            self._hear_answer(session)
        elif link.outputs:
            frame = link.outputs.popleft()
            if random.random() < 0.1:
                self._stale.append((session, frame))
            session.hear_outputs(frame)
            if random.random() < self._nemesis_rate:
                session.hear_outputs(frame)
        elif link.is_cut:
            self._lose(session)
        else:
            return False
        return True

    def _lose(self, session: RecoveringSession) -> None:
        self._note("lost", session.name)
        self._close_link(session)
        session.on_lost()

    def _hear_answer(self, session: RecoveringSession) -> None:
        live = {handle: c.num_tokens for handle, c in session.live().items()}
        welcome = session.hear_answer()
        if welcome is None:
            return
        self._note("welcome", session.name)
        if self._random.random() < 3 * self._nemesis_rate:
            self._repeat()  # of the time before, perhaps
        if self._known_epoch.get(session.name) != welcome.epoch:
            self._known_epoch[session.name] = welcome.epoch
            for handle in welcome.suspects:
                if handle in live:
                    place = (session.name, handle)
                    num_tokens, count = self._fatal_steps.get(place, (0, 0))
                    count = count + 1 if num_tokens == live[handle] else 1
                    self._fatal_steps[place] = (live[handle], count)

    def _close_link(self, session: RecoveringSession) -> None:
        """Its end goes under way to the core, which may hear of the next one before."""
        link = session.link
        if link in self._links:
            self._links.remove(link)
        if link.host is not None and link.host is self.supervisor.host:
            self._gone.append(link)
        else:
            # What nobody has read may come by the next connection; of the same core it may not.
            self._stale += [(session, frame) for frame in link.outputs]

    # ---- the core

    def _turn(self) -> None:
        """The busy loop goes on by half a turn, or a whole one."""
        host = self.supervisor.host
        if host is None or host.is_stopped or host.is_hung:
            return
        if host.is_in_step or (host.has_work and self._begin(host) and self._random.random() < 0.8):
            self._end(host)

    def _end(self, host: CoreHost) -> None:
        host.end_step()
        if self._random.random() < 0.04:
            host.core.check_ledger()
        self.supervisor.progress.go_on()

    def _begin(self, host: CoreHost) -> bool:
        """False if it has not survived."""
        self.supervisor.progress.stop(self.now)
        try:
            host.begin_step()
        except CoreCrash:
            self._note("poisoned", f"core {host.epoch}")
            if self._random.random() < 0.2:
                host.is_hung = True
            else:
                self.supervisor.kill("crash", has_crashed=True)
            return False
        for ran in host.runner.participants:
            requests = self._requests.get(session_of(ran.client))
            if requests is not None:
                requests[ran.handle].check_arrival(ran.client, ran.arrival_time)
        return True

    # ---- the nemesis

    def _strike(self) -> None:
        fault = self._random.choice(self._faults)
        self._note(fault)
        FAULTS[fault](self)

    def _kill(self) -> None:
        """At any moment: between two steps, in the middle of one, while it tells of one."""
        host = self.supervisor.host
        if host is None:
            return
        can_run = not (host.is_stopped or host.is_hung or host.is_in_step)
        if can_run and self._random.random() < 0.7 and host.has_work and not self._begin(host):
            return
        self.supervisor.kill("kill")

    def _stop(self) -> None:
        """For a while, or for longer than anybody waits."""
        host = self.supervisor.host
        if host is not None and not host.is_stopped and not host.is_hung:
            host.is_stopped = True
            self._stopped_until = self.now + self._random.choice((0.5, 1.5, 3.0, 20.0))
            self.supervisor.progress.stop(self.now)

    def _hang_in_a_step(self) -> None:
        host = self.supervisor.host
        if host is None or host.is_stopped or host.is_hung or not host.has_work:
            return
        if host.is_in_step or self._begin(host):
            host.is_hung = True

    def _be_slow(self) -> None:
        """One step takes seconds, or some do in a row, and everybody waits. None is a hang."""
        host = self.supervisor.host
        if host is None or host.is_stopped or host.is_hung or host.is_in_step:
            return
        for _ in range(self._random.choice((1, 1, 3))):
            if not host.has_work or not self._begin(host):
                return
            end = self.now + self._random.uniform(0.0, 4.0)
            while self.now < end and self.supervisor.host is host:
                self.now += PATIENCE.beat_s
                self._keep_up()
                self._carry_to_core(2)
            if self.supervisor.host is not host:
                return  # it was stopped just before, and so it has been silent for too long
            self._end(host)

    def _suspend(self) -> None:
        """The whole machine, for a minute or an hour."""
        seconds = self._random.choice((60.0, 3600.0))
        self.now += seconds
        self._stopped_until += seconds
        self.supervisor.progress.sleep(seconds)

    def _cut(self) -> None:
        """One connection, and the core lives on."""
        link = self._random.choice(self.sessions).link
        if not link.is_cut and link.host is not None:
            link.cut(self._random)
            if self._random.random() < 0.5:
                self._gone.append(link)  # the core may notice first

    def _end_client(self) -> None:
        """Its process is gone, with all it knew, and comes back as another."""
        index = self._random.randrange(len(self.sessions))
        session = self.sessions[index]
        if self._random.random() < 0.3:
            session.leave()
            if session.link.is_cut or session.link.host is not self.supervisor.host:
                self._close_link(session)
        else:
            self._close_link(session)
            session.link.close()
        del self._requests[session.name]
        self._stale = [entry for entry in self._stale if entry[0] is not session]
        self.sessions[index] = self._make_session()

    def _repeat(self) -> None:
        """A frame comes once more, perhaps out of another core's time."""
        if self._stale:
            session, frame = self._stale[self._random.randrange(len(self._stale))]
            session.hear_outputs(frame)

    # ---- the end

    def _close(self) -> Counter[str]:
        for session in self.sessions:
            client = session.client
            assert client.num_live == 0 and client.replay(self.now) == []
            assert (client.waiting.num_reqs, client.waiting.num_tokens) == (0, 0)
            self.happened["replay"] += session.recovery.num_replayed
            for request in set(self._requests[session.name].values()):
                assert request.has_ended, "a request without end"
                self._count_ends(request)
        host = self.supervisor.host
        if host is not None and not self.supervisor.is_spent:
            names = {session.link.routing_id for session in self.sessions}
            host.check_ledger(names | {self.supervisor.routing_id})
            self.happened["preemption"] += host.core.stats().num_preemptions
        self.happened += self.supervisor.happened
        return self.happened

    def _count_ends(self, request: ExpectedRequest) -> None:
        for completion in request.completions:
            self.happened[completion.finish_reason or "unread"] += 1
            self.happened["stop string"] += (
                completion.finish_reason == "stop" and type(completion.stop) is str
            )
        match request.error:
            case QueueOverflowError():
                self.happened["overflow"] += 1
            case EngineDeadError():
                self.happened["spent"] += 1
        self.happened["grammar"] += request.message.params.grammar is not None

    def _note(self, what: str, about: object = "") -> None:
        self.happened[what] += 1
        self.events.append(f"{self.num_events} at {self.now:.3f}: {what} {about}")


FAULTS = {
    "nemesis: kill": World._kill,
    "nemesis: stop": World._stop,
    "nemesis: hang": World._hang_in_a_step,
    "nemesis: slow": World._be_slow,
    "nemesis: suspend": World._suspend,
    "nemesis: cut": World._cut,
    "nemesis: end client": World._end_client,
    "nemesis: repeat": World._repeat,
}


def run_world(seed: int) -> Counter[str]:
    """One run, and its books. What fails says how it came to that."""
    world = World(seed)
    try:
        return world.run()
    except (Exception, BrokenPlan) as error:
        error.add_note("the last events, by number and time:")
        for event in world.events:
            error.add_note(f"  {event}")
        error.add_note(f"to replay: pytest tests/simulation --simulation-seed {seed}")
        raise
