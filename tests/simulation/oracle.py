"""What every client must be told, worked out without scheduler, blocks or batches."""

from dataclasses import dataclass, field

from footplate.backend.runner.fake import digest_prefix, next_token
from footplate.protocol.messages import AddRequest, Finished, FinishReason, ModelFacts, Started


def expected_stream(message: AddRequest, model: ModelFacts) -> tuple[list[int], FinishReason]:
    """The whole output of a valid request, and how it ends if nobody ends it before."""
    params, prompt = message.params, message.prompt_token_ids
    digest = digest_prefix(prompt)
    output: list[int] = []
    while True:
        token_id = next_token(digest, len(output), params, model.vocab_size)
        output.append(token_id)
        digest = digest_prefix([token_id], digest)
        if token_id in params.stop_token_ids and len(output) > params.min_tokens:
            return output, FinishReason.STOP
        if len(output) == params.max_tokens or len(prompt) + len(output) == model.max_model_len:
            return output, FinishReason.LENGTH


def is_valid(message: AddRequest, model: ModelFacts) -> bool:
    """Whether the core has to serve it, if its handle is free."""
    prompt = message.prompt_token_ids
    return 1 <= len(prompt) < model.max_model_len and all(
        0 <= token_id < model.vocab_size for token_id in prompt
    )


@dataclass(slots=True)
class ExpectedStream:
    """One valid request of one client, and how much of it has been delivered."""

    message: AddRequest
    arrival: int
    token_ids: list[int]
    reason: FinishReason
    num_received: int = 0
    is_started: bool = False
    is_aborted: bool = False

    @property
    def max_num_steps(self) -> int:
        """Steps it takes at one token per step, which is what the best ranked gets at least."""
        return len(self.message.prompt_token_ids) + len(self.token_ids)

    def receive(self, position: int, token_id: int) -> None:
        """The next token, as a client sees it."""
        assert not self.is_aborted, "a token behind an abort"
        assert position == self.num_received, "a gap or a repetition"
        assert [token_id] == self.token_ids[position : position + 1], "a wrong token, or too many"
        self.num_received += 1


@dataclass(slots=True)
class ExpectedClient:
    """What one client waits for, from join to leave."""

    block_size: int
    caching: bool
    num_handles: int = 0
    streams: dict[int, ExpectedStream] = field(default_factory=dict)
    num_refusals: dict[int, int] = field(default_factory=dict)  # by handle

    def start(self, started: Started) -> None:
        """It comes once, with the first token."""
        stream = self.streams[started.handle]
        assert not stream.is_started and stream.num_received == 1
        stream.is_started = True
        cached = started.num_cached_tokens
        assert 0 <= cached < len(stream.message.prompt_token_ids)
        assert cached % self.block_size == 0 and (self.caching or not cached)

    def finish(self, finished: Finished) -> None:
        """It comes once for every add, and is true."""
        handle = finished.handle
        if finished.reason is FinishReason.ERROR:
            assert finished.message and self.num_refusals.get(handle), "refused, and nobody asked"
            self.num_refusals[handle] -= 1
            return
        assert handle in self.streams, "a second end"
        stream = self.streams.pop(handle)
        if stream.is_aborted:
            assert finished.reason is FinishReason.ABORT
        else:
            assert finished.reason is stream.reason
            assert stream.num_received == len(stream.token_ids), "it ended early"
        assert stream.is_started == (stream.num_received > 0)

    @property
    def is_satisfied(self) -> bool:
        """Whether everything has had its end."""
        return not self.streams and not any(self.num_refusals.values())
