"""One seeded schedule: random clients against a real `EngineCore` with a tiny cache.

Everything random comes from the seed, so a seed is a replay.
"""

from collections import Counter
from collections.abc import Iterator
from random import Random
from typing import Literal

from footplate.backend.engine_core import EngineCore
from footplate.backend.step import RunnerFacts
from footplate.protocol.config import CacheConfig, RequestConfig, SchedulerConfig
from footplate.protocol.messages import (
    AbortRequests,
    AddRequest,
    ErrorKind,
    GetStats,
    ModelFacts,
    ResetPrefixCache,
    Stats,
    StepOutputs,
)
from footplate.protocol.token_params import LogprobsRequest, RepetitionDetection, TokenParams

from .checking_runner import CheckingRunner
from .marks import Marks
from .oracle import (
    ExpectedClient,
    ExpectedFamily,
    ExpectedStream,
    expected_stream,
    is_valid,
    single_requests,
)

EPOCH = 7


class Simulation:
    """Owns one core, its clients and what they expect. Time is the number of steps."""

    def __init__(self, seed: int) -> None:
        self._random = random = Random(seed)
        block_size = random.choice((1, 2, 3, 4, 8))
        max_model_len = random.choice((2, 7, 20, 40, 60))
        # From "one request fits" to "nobody is ever preempted".
        num_blocks = -(-max_model_len // block_size) + random.choice((0, 0, 1, 2, 5, 40))
        caching, can_share = random.random() < 0.8, random.random() < 0.9
        self.max_num_seqs = random.choice((1, 2, 4, 6, 8))
        policy: Literal["fcfs", "priority"] = random.choice(("fcfs", "priority"))
        self.scheduler = SchedulerConfig(
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_seqs + random.choice((0, 1, 4, 16, 100)),
            policy=policy,
            long_prefill_token_threshold=random.choice((0, 0, 1, 3, 10)),
        )
        # Who is admitted and displaced before the step has left the queue, and nobody sees it.
        limits = (None, None) if policy == "priority" else (5, 20)
        self.limits = RequestConfig(
            max_num_queued_reqs=random.choice((None, None, *limits)),
            max_num_queued_tokens=random.choice((None, None, *(10 * n for n in limits if n))),
        )
        self.by_priority = self.scheduler.policy == "priority"
        self.num_blocks, self.block_size = num_blocks, block_size
        self.caching = caching and can_share
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
        self.marks = Marks(random.choice((0, 300, 3000)))
        self.runner = CheckingRunner(
            RunnerFacts(
                self.model,
                num_blocks,
                supports_prefix_caching=can_share,
                max_scored_rows=random.choice((1, 4, 1000)),
            ),
            block_size,
            self.scheduler.max_num_seqs,
            self.scheduler.max_num_batched_tokens,
            self.scheduler.long_prefill_token_threshold,
            may_displace=self.by_priority,
            marks=self.marks,
        )
        self.num_steps = 0
        self.core = EngineCore(
            self.runner,
            CacheConfig(block_size=block_size, enable_prefix_caching=caching),
            self.scheduler,
            EPOCH,
            clock=lambda: float(self.num_steps),
            requests=self.limits,
        )
        self.happened: Counter[str] = Counter()
        self.clients: dict[bytes, ExpectedClient] = {}
        self._names = [b"red", b"green", b"blue"][: random.randint(1, 3)]
        self._busy, self._bias = random.choice(self._names), 0.6  # the client that does most
        self._prefixes = [self._token_ids(max_model_len) for _ in range(3)]
        self._num_arrivals = 0
        self._num_prompt_tokens = 0
        # Since when two clients have both been waiting, and what they had been served then.
        self._both_wait: dict[tuple[bytes, bytes], int] = {}
        self._waited: dict[bytes, set[int]] = {}
        self._longest = 0  # of all requests so far, in tokens

    def run(self) -> Stats:
        """Random events between the steps, then only steps until every request has ended; the
        books at the end."""
        for name in self._names:
            self._join(name)
        if self._random.random() < 0.08:
            # One client has the engine for itself for a while, and then it is everybody's.
            self._bias = 0.95
            self._let_time_pass(flood=50)
            self._drain()
            self._bias = 0.0
        self._let_time_pass(flood=50 if self._random.random() < 0.05 or not self._bias else 0)
        self._drain()
        return self._close()

    def _let_time_pass(self, flood: int) -> None:
        """Random events between the steps, and some that come all at once before the first."""
        rate = self._random.choice((0.3, 1.0, 3.0))  # events per step
        for _ in range(self._random.randint(5, 20)):
            for _ in range(int(self._random.expovariate(1 / rate)) + flood):
                self._act()
            flood = 0
            self.step()
            if self._random.random() < 0.1:
                self._busy = self._random.choice(self._names)

    def _drain(self) -> None:
        # However requests hinder each other, one of them progresses in every step.
        # Who comes late and has an earlier arrival, or less of the service, may undo some of that.
        patience = 3 * sum(s.max_num_steps for s in self._streams())
        while self.core.has_work:
            assert patience >= 0, "no end in sight"
            patience -= 1
            self.step()

    # ---- what clients do

    def _act(self) -> None:
        name = (
            self._busy if self._random.random() < self._bias else self._random.choice(self._names)
        )
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
                self.runner.forget(name)
                self._both_wait.clear()

    def _join(self, name: bytes) -> None:
        self.core.join(name)
        self.clients[name] = ExpectedClient(self.block_size, self.caching)

    def _add(self, name: bytes, client: ExpectedClient) -> None:
        message = self._message(client)
        handles = range(message.handle, message.handle + message.n)
        in_use = [handle for handle in handles if handle in client.streams]
        is_bad = bool(in_use) or not is_valid(message, self.model)
        if is_bad or self._is_too_much(message):
            kind = ErrorKind.INVALID if is_bad else ErrorKind.OVERFLOW
            for handle in handles:
                if handle not in in_use:
                    client.refusals.setdefault(handle, []).append(kind)
            self.happened["refusal" if is_bad else "overflow"] += 1
        else:
            self._expect(name, client, message)
        self.core.handle(name, message)

    def _expect(self, name: bytes, client: ExpectedClient, message: AddRequest) -> None:
        family = ExpectedFamily()
        for single in single_requests(message):
            stream = ExpectedStream(
                single,
                family,
                self._num_arrivals,
                self.num_steps - message.age_s,
                *expected_stream(single, self.model, name, self.marks),
            )
            client.streams[single.handle] = stream
            family.streams.append(stream)
            self._num_arrivals += 1
            self._longest = max(self._longest, stream.max_num_steps)
            self._num_prompt_tokens += len(message.prompt_token_ids)
        self.happened["prior"] += bool(message.prior_token_ids)
        self.happened["siblings"] += message.n > 1

    def _is_too_much(self, message: AddRequest) -> bool:
        new = [s for s in self._streams() if s.is_new]
        num_tokens = sum(
            len(family.streams[0].message.prompt_token_ids)
            for family in {id(s.family): s.family for s in new}.values()
        )
        most, most_tokens = self.limits.max_num_queued_reqs, self.limits.max_num_queued_tokens
        return (most is not None and len(new) + message.n > most) or (
            most_tokens is not None and num_tokens + len(message.prompt_token_ids) > most_tokens
        )

    def _message(self, client: ExpectedClient) -> AddRequest:
        random = self._random
        n = random.choice((1, 1, 1, 1, 1, 1, 2, 4))
        prompt, params = self._prompt(), self._params()
        prior = self._token_ids(random.randint(1, 8)) if random.random() < 0.15 else []
        return AddRequest(
            self._new_handle(client, n),
            prompt,
            params,
            priority=random.randint(-1, 2),
            cache_salt=random.choice(("", "", "", "salt")),
            n=n,
            prior_token_ids=prior,
            age_s=random.choice((0.0, 0.0, 0.0, 3.0, 0.5)),
            ttft_deadline_s=self._seconds(10),
            deadline_s=self._seconds(40),
        )

    def _seconds(self, most: int) -> float | None:
        chance = self._random.random()
        if chance < 0.005:
            return self._random.choice((float("nan"), float("inf"), -1.0))
        return self._random.uniform(0, most) if chance < 0.1 else None

    def _new_handle(self, client: ExpectedClient, n: int) -> int:
        if self._random.random() < 0.02 and client.streams:
            handle = self._random.choice(list(client.streams))  # a client's bug
            streams = [client.streams.get(h) for h in range(handle, handle + n)]
            if not any(s and s.is_aborted for s in streams):  # whose end is still to be told
                return handle
        # Every client counts from one: handles meet, requests must not.
        client.num_handles += n
        return client.num_handles - n + 1

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
            logprobs=self._logprobs() if random.random() < 0.15 else None,
            repetition=self._repetition() if random.random() < 0.1 else None,
            skip_reading_prefix_cache=random.random() < 0.1,
        )

    def _logprobs(self) -> LogprobsRequest:
        random = self._random
        return LogprobsRequest(
            num_logprobs=random.choice((None, 0)),
            num_prompt_logprobs=random.choice((None, 0, 0)),
            prompt_start=random.choice((0, 0, random.randint(0, self.model.max_model_len))),
        )

    def _repetition(self) -> RepetitionDetection:
        least = self._random.randint(1, 3)
        return RepetitionDetection(self._random.randint(least, 5), least, 2)

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
        self.num_steps += 1
        for s in self._streams():
            if s.has_deadline and not s.is_aborted:
                s.is_overdue = s.passes_deadline(self.num_steps)
        live = self._live()
        running = {(r.client, r.handle) for r in self.runner.last_requests}
        self.core.step()
        self.core.check_ledger()
        ran = {(r.client, r.handle) for r in self.runner.last_requests}
        if live:
            self._check_progress(live, ran, running)
        for name, handle in ran:
            if stream := self.clients[name].streams.get(handle):
                stream.has_run = True
        for name, outputs in self.core.take_outputs():
            assert name in self.clients, "words for a client that has left"
            self._deliver(self.clients[name], outputs)
        for s in self._streams():
            assert not s.is_aborted, "an abort without end"
            assert not s.is_overdue, "a deadline without end"
        for client in self.clients.values():
            assert not any(client.refusals.values()), "a refusal without end"
        if len(self.clients) > 1 and not self.by_priority:
            self._check_fairness()

    def _live(self) -> list[tuple[int, float, int, bytes, int]]:
        """(priority, arrival time, arrival, client, handle) of whoever should be in the
        scheduler."""
        return [
            (
                s.message.priority if self.by_priority else 0,
                s.arrival_time,
                s.arrival,
                name,
                handle,
            )
            for name, client in self.clients.items()
            for handle, s in client.streams.items()
            if not s.is_over
        ]

    def _check_progress(
        self,
        live: list[tuple[int, float, int, bytes, int]],
        ran: set[tuple[bytes, int]],
        running: set[tuple[bytes, int]],
    ) -> None:
        """The best ranked of those that run progresses, unless a better priority takes its place;
        and the best ranked of all, where nobody comes late and there is one client."""
        best = min((entry for entry in live if entry[3:] in running), default=None)
        best_to_run = min((entry[0] for entry in live if entry[3:] in ran), default=None)
        assert best_to_run is not None, "nobody progressed"
        assert best is None or best[3:] in ran or best_to_run < best[0], "no progress"
        assert min(live)[0] == best_to_run, "a worse priority was better served"
        names = {entry[3] for entry in live}
        if len(names) == 1 and not any(s.may_come_late for s in self._streams()):
            assert min(live)[3:] in ran, "the best ranked request did not progress"

    def _streams(self) -> Iterator[ExpectedStream]:
        for client in self.clients.values():
            yield from client.streams.values()

    def _deliver(self, client: ExpectedClient, outputs: StepOutputs) -> None:
        assert outputs.epoch == EPOCH and outputs.counts == []
        for prompt_rows in outputs.prompt_logprobs:
            client.streams[prompt_rows.handle].score_prompt(prompt_rows)
        for handle, position, token_id in zip(
            outputs.handles, outputs.positions, outputs.token_ids, strict=True
        ):
            assert handle in client.streams, "a token for nobody"
            client.streams[handle].receive(position, token_id)
        for rows in outputs.logprobs:
            client.streams[rows.handle].score(rows)
        for started in outputs.started:
            client.start(started)
        for finished in outputs.finished:
            self.happened[str(finished.reason)] += 1
            client.finish(finished)

    def _check_fairness(self) -> None:
        """Two clients that both wait all the time are served alike, up to what the running
        requests of one can be served at most (the paper's theorem 4.4)."""
        now = {
            name: {s.arrival for s in client.streams.values() if s.waits}
            for name, client in self.clients.items()
        }
        # Somebody has waited since the step before, so that the queue has known it all the time.
        waiting = [name for name in now if now[name] & self._waited.get(name, set())]
        self._waited = now
        served = self.runner.num_served
        self._both_wait = {
            (a, b): self._both_wait.get((a, b), served[a] - served[b])
            for a in waiting
            for b in waiting
            if a < b
        }
        most = self.max_num_seqs * self._longest
        for (a, b), before in self._both_wait.items():
            lead = served[a] - served[b] - before
            assert abs(lead) <= 2 * most, "one client is served more than the other"
            self.happened["fair share"] += 1

    def _close(self) -> Stats:
        """Everyone has had an end, and nothing is left behind."""
        assert all(client.is_satisfied for client in self.clients.values())
        stats = self.core.stats()
        assert (stats.num_running, stats.num_waiting) == (0, 0)
        assert stats.num_free_blocks == self.num_blocks
        assert not self.runner.lengths, "the runner was not told to let go"
        self.happened += self.runner.seen
        return stats
