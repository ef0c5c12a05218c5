"""What a session does when it has come to a core, be it the first, another, or the same again.

Pure: messages in, messages out.
"""

from msgspec.structs import replace

from footplate.frontend.completion import Completion
from footplate.frontend.engine_client import EngineClient
from footplate.frontend.quarantine import Quarantine
from footplate.protocol.messages import AddRequest, Finished, FinishReason, StepOutputs, Welcome

BLAME = "engine cores ended in steps in which it took part alone"


class Recovery:
    """Owns which core a session listens to, and its quarantine.

    Attributes:
        num_replayed: messages by which requests went on in another core, or by another connection.
    """

    def __init__(self, client: EngineClient) -> None:
        self.num_replayed = 0
        self._client = client
        self._quarantine = Quarantine()
        self._epoch: int | None = None

    def accepts(self, outputs: StepOutputs) -> bool:
        """Whether they are of the core that this session listens to."""
        return outputs.epoch == self._epoch

    def welcome(
        self, welcome: Welcome, live: dict[int, Completion], now: float
    ) -> list[AddRequest]:
        """A core is ready; what to tell it, so that everything goes on.

        Args:
            live: completions that have not ended, by handle.
        """
        # A core that is the same still tells of the end of the one before it.
        if welcome.epoch != self._epoch:
            self._epoch = welcome.epoch
            self._judge(welcome, live)
        messages = self._client.replay(now)
        self.num_replayed += len(messages)
        return [replace(message, run_alone=self._runs_alone(message, live)) for message in messages]

    def _judge(self, welcome: Welcome, live: dict[int, Completion]) -> None:
        suspects = [handle for handle in welcome.suspects if handle in live]
        culprits, _ = self._quarantine.judge(
            suspects,
            lambda handle: live[handle].num_tokens,
            was_alone=len(suspects) == welcome.num_suspects
            and len({live[handle].stream.request_id for handle in suspects}) == 1,
            has_crashed=welcome.has_crashed,
        )
        ends = [Finished(handle, FinishReason.ERROR, BLAME) for handle in culprits]
        self._client.handle(StepOutputs(welcome.epoch, [], [], [], finished=ends), 0.0)

    def _runs_alone(self, message: AddRequest, live: dict[int, Completion]) -> bool:
        return any(
            self._quarantine.runs_alone(handle, live[handle].num_tokens)
            for handle in range(message.handle, message.handle + message.n)
        )
