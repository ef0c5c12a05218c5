"""What a client does when it has come to a core, be it the first, another, or the same again.

Pure: messages in, messages out.
"""

from msgspec.structs import replace

from footplate.frontend.engine_client import EngineClient
from footplate.frontend.quarantine import Quarantine
from footplate.protocol.errors import RequestFailedError
from footplate.protocol.messages import AddRequest, AttachRequest, StepOutputs, Welcome

BLAME = "engine cores ended in steps in which it took part alone, so it is not run again"


class Recovery:
    """Owns which core the client listens to, and the quarantine of its requests.

    Attributes:
        num_replayed: messages by which requests went on in another core, or by another connection.
        has_heard: outputs have come since the last welcome.
    """

    def __init__(self, client: EngineClient) -> None:
        self.num_replayed = 0
        self.has_heard = False
        self._client = client
        self._quarantine = Quarantine()
        self._epoch: int | None = None

    def accepts(self, outputs: StepOutputs) -> bool:
        """Take note of outputs; whether they are of the core that the client listens to."""
        is_ours = outputs.epoch == self._epoch
        self.has_heard |= is_ours
        return is_ours

    def welcome(
        self, welcome: Welcome, now: float, cause: str = ""
    ) -> list[AddRequest | AttachRequest]:
        """A core is ready; what to tell it, so that everything goes on.

        Args:
            now: monotonic seconds.
            cause: why the core before it ended, for those that are to blame for it.
        """
        self.has_heard = False
        # A core that is the same still tells of the end of the one before it.
        if welcome.epoch != self._epoch:
            self._epoch = welcome.epoch
            if welcome.has_crashed:
                self._judge(welcome, cause)
        self._client.note_weights(welcome.weights_version)
        messages = self._client.replay(now)
        self.num_replayed += len(messages)
        return [
            replace(message, run_alone=True) if self._runs_alone(message) else message
            for message in messages
        ]

    def _judge(self, welcome: Welcome, cause: str) -> None:
        client = self._client
        suspects = [handle for handle in welcome.suspects if client.is_live(handle)]
        is_one_request = len({client.request_id(handle) for handle in suspects}) == 1
        culprits = self._quarantine.judge(
            suspects,
            client.num_tokens,
            was_alone=is_one_request and len(suspects) == welcome.num_suspects,
        )
        for handle in culprits:
            if client.is_live(handle):  # a sibling may have ended the whole request
                client.fail(handle, RequestFailedError(f"{BLAME}: {cause}"))

    def _runs_alone(self, message: AddRequest | AttachRequest) -> bool:
        return isinstance(message, AddRequest) and any(
            self._quarantine.runs_alone(handle, self._client.num_tokens(handle))
            for handle in range(message.handle, message.handle + message.n)
        )
