"""One seeded schedule: random clients against a real `EngineCore` with a tiny cache.

Everything random comes from the seed, so a seed is a replay.
"""

from collections import Counter
from random import Random

from footplate.backend.engine_core import EngineCore
from footplate.backend.step import RunnerFacts
from footplate.protocol.config import CacheConfig, SchedulerConfig
from footplate.protocol.messages import (
    AbortRequests,
    AddRequest,
    GetStats,
    ModelFacts,
    ResetPrefixCache,
    Stats,
    StepOutputs,
)
from footplate.protocol.token_params import TokenParams

from .checking_runner import CheckingRunner
from .oracle import ExpectedClient, ExpectedStream, expected_stream, is_valid

EPOCH = 7


class Simulation:
    """Owns one core, its clients and what they expect. Time is the number of steps."""

    def __init__(self, seed: int) -> None:
        self._random = random = Random(seed)
        block_size = random.choice((1, 2, 3, 4, 8))
        max_model_len = random.choice((2, 7, 20, 40, 60))
        # From "one request fits" to "nobody is ever preempted".
        num_blocks = -(-max_model_len // block_size) + random.choice((0, 0, 1, 2, 5, 40))
        caching = random.random() < 0.8
        self.max_num_seqs = random.choice((1, 2, 4, 6, 8))
        self.scheduler = SchedulerConfig(
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_seqs + random.choice((0, 1, 4, 16, 100)),
            policy=random.choice(("fcfs", "priority")),
        )
        self.by_priority = self.scheduler.policy == "priority"
        self.num_blocks, self.block_size, self.caching = num_blocks, block_size, caching
        self.model = ModelFacts(
            model="checking",
            tokenizer="",
            architecture="",
            # Small vocabularies make prefixes, stops and whole prompts meet by chance.
            vocab_size=random.choice((2, 5, 30)),
            max_model_len=max_model_len,
            eos_token_ids=(),
            dtype="",
            device="",
            attention="",
        )
        self.runner = CheckingRunner(
            RunnerFacts(self.model, num_blocks, supports_prefix_caching=True),
            block_size,
            self.scheduler.max_num_seqs,
            self.scheduler.max_num_batched_tokens,
            may_displace=self.by_priority,
        )
        self.num_steps = 0
        self.core = EngineCore(
            self.runner,
            CacheConfig(block_size=block_size, enable_prefix_caching=caching),
            self.scheduler,
            EPOCH,
            clock=lambda: float(self.num_steps),
        )
        self.happened: Counter[str] = Counter()
        self.clients: dict[bytes, ExpectedClient] = {}
        self._names = [b"red", b"green", b"blue"][: random.randint(1, 3)]
        self._prefixes = [self._token_ids(max_model_len) for _ in range(3)]
        self._num_arrivals = 0
        self._num_prompt_tokens = 0

    def run(self) -> Stats:
        """Random events between the steps, then only steps until every request has ended; the
        books at the end."""
        for name in self._names:
            self._join(name)
        rate = self._random.choice((0.3, 1.0, 3.0))  # events per step
        flood = 100 if self._random.random() < 0.05 else 0  # all at once, before the first
        for _ in range(self._random.randint(5, 40)):
            for _ in range(int(self._random.expovariate(1 / rate)) + flood):
                self._act()
            flood = 0
            self.step()
        # However requests hinder each other, one of them progresses in every step.
        patience = sum(s.max_num_steps for c in self.clients.values() for s in c.streams.values())
        while self.core.has_work:
            assert patience >= 0, "no end in sight"
            patience -= 1
            self.step()
        return self._close()

    # ---- what clients do

    def _act(self) -> None:
        name = self._random.choice(self._names)
        client = self.clients.get(name)
        if client is None:
            self._join(name)
            return
        [event] = self._random.choices(
            ("add", "abort", "reset", "stats", "leave"), (70, 20, 4, 4, 1)
        )
        self.happened[event] += 1
        match event:
            case "add":
                self._add(name, client)
            case "abort":
                self._abort(name, client)
            case "reset":
                self._reset(name)
            case "stats":
                self._check_stats(name)
            case "leave":
                self.core.leave(name)
                del self.clients[name]

    def _join(self, name: bytes) -> None:
        self.core.join(name)
        self.clients[name] = ExpectedClient(self.block_size, self.caching)

    def _add(self, name: bytes, client: ExpectedClient) -> None:
        handle = self._new_handle(client)
        message = AddRequest(
            handle,
            self._prompt(),
            self._params(),
            priority=self._random.randint(-1, 2),
            cache_salt=self._random.choice(("", "", "", "salt")),
        )
        if handle in client.streams or not is_valid(message, self.model):
            client.num_refusals[handle] = client.num_refusals.get(handle, 0) + 1
            self.happened["refusal"] += 1
        else:
            tokens, reason = expected_stream(message, self.model)
            client.streams[handle] = ExpectedStream(message, self._num_arrivals, tokens, reason)
            self._num_arrivals += 1
            self._num_prompt_tokens += len(message.prompt_token_ids)
        self.core.handle(name, message)

    def _new_handle(self, client: ExpectedClient) -> int:
        in_use = [handle for handle, s in client.streams.items() if not s.is_aborted]
        if in_use and self._random.random() < 0.02:
            return self._random.choice(in_use)  # a client's bug
        client.num_handles += 1  # every client counts from one: handles meet, requests must not
        return client.num_handles

    def _prompt(self) -> list[int]:
        """A shared prefix, or none, and something of its own; sometimes not servable."""
        random, limit = self._random, self.model.max_model_len
        length = random.randint(1, random.randint(1, limit - 1))  # short ones grow side by side
        shared = random.choice(self._prefixes)[: random.choice((0, length // 2, length))]
        prompt = shared + self._token_ids(length - len(shared))
        if random.random() < 0.03:
            bad = random.choice(([], [0] * limit, [-1], [self.model.vocab_size]))
            return bad if len(bad) != 1 else prompt[:-1] + bad
        return prompt

    def _params(self) -> TokenParams:
        random, vocab_size = self._random, self.model.vocab_size
        return TokenParams(
            temperature=random.choice((0.0, 1.0)),
            top_p=1.0,
            top_k=0,
            min_p=0.0,
            seed=random.randint(0, 3),
            max_tokens=random.choice((1, 3, 10, 1000, 1000)),
            min_tokens=random.choice((0, 0, 1, 3)),
            stop_token_ids=tuple(random.sample(range(vocab_size), random.choice((0, 0, 0, 1)))),
        )

    def _token_ids(self, count: int) -> list[int]:
        return self._random.choices(range(self.model.vocab_size), k=count)

    def _abort(self, name: bytes, client: ExpectedClient) -> None:
        known = list(client.streams)
        handles = self._random.sample(known, self._random.randint(0, min(2, len(known))))
        # Late, repeated and invented ones are no error.
        handles += [self._random.randint(-1, client.num_handles + 1), *handles[:1]]
        for handle in handles:
            if handle in client.streams:
                client.streams[handle].is_aborted = True
        self.core.handle(name, AbortRequests(handles))

    def _reset(self, name: bytes) -> None:
        reply = self.core.handle(name, ResetPrefixCache(1))
        stats = self.core.stats()
        assert reply is not None and reply.call == 1
        assert reply.ok == (stats.num_free_blocks == self.num_blocks) == (not stats.num_running)
        assert not (reply.ok and stats.num_cached_blocks)
        self.happened["reset done"] += reply.ok

    def _check_stats(self, name: bytes) -> None:
        reply = self.core.handle(name, GetStats(2))
        assert reply is not None and reply.stats is not None
        stats = reply.stats
        assert stats.num_running + stats.num_waiting == len(self._live())
        assert stats.num_running <= self.max_num_seqs
        assert stats.num_prompt_tokens == self._num_prompt_tokens
        assert stats.num_generation_tokens == self.runner.num_sampled
        assert stats.num_steps <= self.num_steps

    # ---- steps

    def step(self) -> None:
        """One step, and every check that can be made behind it."""
        live = self._live()
        self.num_steps += 1
        self.core.step()
        self.core.check_ledger()
        if live:
            ran = {(r.client, r.handle) for r in self.runner.last_requests}
            assert min(live)[2:] in ran, "the best ranked request did not progress"
        for name, outputs in self.core.take_outputs():
            assert name in self.clients, "words for a client that has left"
            self._deliver(self.clients[name], outputs)
        for client in self.clients.values():
            assert not any(s.is_aborted for s in client.streams.values()), "an abort without end"
            assert not any(client.num_refusals.values()), "a refusal without end"

    def _live(self) -> list[tuple[int, int, bytes, int]]:
        """(priority, arrival, client, handle) of whoever should be in the scheduler."""
        return [
            (s.message.priority if self.by_priority else 0, s.arrival, name, handle)
            for name, client in self.clients.items()
            for handle, s in client.streams.items()
            if not s.is_aborted
        ]

    def _deliver(self, client: ExpectedClient, outputs: StepOutputs) -> None:
        assert outputs.epoch == EPOCH and outputs.counts == []
        for handle, position, token_id in zip(
            outputs.handles, outputs.positions, outputs.token_ids, strict=True
        ):
            assert handle in client.streams, "a token for nobody"
            client.streams[handle].receive(position, token_id)
        for started in outputs.started:
            client.start(started)
        for finished in outputs.finished:
            client.finish(finished)

    def _close(self) -> Stats:
        """Everyone has had an end, and nothing is left behind."""
        assert all(client.is_satisfied for client in self.clients.values())
        stats = self.core.stats()
        assert (stats.num_running, stats.num_waiting) == (0, 0)
        assert stats.num_free_blocks == self.num_blocks
        assert not self.runner.lengths, "the runner was not told to let go"
        return stats
