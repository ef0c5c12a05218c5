"""Messages of every kind, as peers of this version say them, each under the name of what it shows.

Their bytes are a contract (`test_messages.py`), and changed a little they are what a broken or
malicious peer might send (`scripts/hostile_frames.py`). So together they make sense: a core with
the fake model can take those of a client, and a client with handles 1 to 8 those of a core.
"""

from footplate.protocol.messages import (
    AbortRequests,
    AddRequest,
    Attached,
    AttachRequest,
    ControlReply,
    Drain,
    EngineFailed,
    EngineStopping,
    ErrorKind,
    Finished,
    FinishReason,
    GetStats,
    Goodbye,
    Hello,
    Limits,
    LogprobRows,
    Message,
    ModelFacts,
    ParkRequests,
    Ping,
    Pong,
    Progress,
    Refused,
    ResetPrefixCache,
    ResumeRequests,
    Started,
    Stats,
    StepOutputs,
    Welcome,
)
from footplate.protocol.token_params import (
    Grammar,
    LogitAdjustments,
    LogprobsMode,
    LogprobsRequest,
    ProcessorCall,
    RepetitionDetection,
    ThinkingBudget,
    TokenParams,
)

EPOCH = 9  # of outputs

PARAMS = TokenParams(0.5, 1.0, 0, 0.0, 7, 3, 0, (2,))
EVERYTHING = TokenParams(
    *(0.5, 1.0, 0, 0.0, 7, 3, 0, (2,)),
    LogitAdjustments(
        *(1.0, -1.0, 1.5, {3: 2.0}, (1, 2), ((4, 5),)),
        thinking=ThinkingBudget(5, (6,), (7,)),
        forced_token_ids=(8,),
        processors=(ProcessorCall(0, {"x": [1]}),),
    ),
    LogprobsRequest(2, (1,), 0, (2,), 1, LogprobsMode.PROCESSED_LOGITS),
    Grammar("start: /a/"),
    RepetitionDetection(4, 1, 2),
    True,
)
LONG = TokenParams(0.9, 0.9, 40, 0.01, 7, 30, 3, (2, 3))
SCORED = TokenParams(
    *(0.0, 1.0, 0, 0.0, 7, 9, 0, ()),
    LogitAdjustments(presence_penalty=1.0, logit_bias={40: 5.0}),
    LogprobsRequest(3, (17,), 2),
)
SCORES = LogprobRows(3, 0, [1], b"\x11\0\0\0" * 4, b"\0\0\x80\xbf" * 4)
FACTS = ModelFacts("m", "t", "A", 10, 20, (2,), "float32", "cpu", "paged torch", 5, "int8")
LIMITS = Limits(256, 512, "fcfs", 16, 100, True)
STATS = Stats(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11)

FROM_CLIENT: dict[str, Message] = {
    "hello": Hello((1, 0), "ipc:///x"),
    "hello of a session": Hello((1, 2), "ipc:///nowhere", b"session", "key"),
    "ping": Ping(3),
    "add": AddRequest(1, [20, 300], LONG),
    "add with scores": AddRequest(2, [20, 21] * 40, SCORED, 1, "salt", 2),
    "add with everything": AddRequest(
        *(4, [20, 21], EVERYTHING, -1, "", 3, [19], 0.5, 1.0, 2.0, True, True, "name")
    ),
    "add again": AddRequest(8, [20, 21], LONG, prior_token_ids=[30, 31], is_replay=True),
    "attach": AttachRequest(7, "name"),
    "abort": AbortRequests([1, 2]),
    "abort of what has ended": AbortRequests([7, 8], have_ended=True),
    "park": ParkRequests([1, 5]),
    "resume": ResumeRequests([1, 5]),
    "goodbye": Goodbye(),
    "reset": ResetPrefixCache(3),
    "get stats": GetStats(4),
    "drain": Drain(5, 2.5),
}
FROM_CORE: dict[str, Message] = {
    "welcome": Welcome(EPOCH, (1, 0), FACTS, LIMITS, 42, {"loading": 0.5}, suspects=[1]),
    "progress": Progress("loading weights", 0.25),
    "refused": Refused("start", "no such folder"),
    "pong": Pong(3, EPOCH, 100, True, 0.5),
    "tokens": StepOutputs(EPOCH, [1, 2], [0, 0], [300, 301]),
    "tokens with scores": StepOutputs(
        *(EPOCH, [1, 2, 3], [0, 0, 0], [300, 301, 302]), logprobs=[SCORES]
    ),
    "runs": StepOutputs(
        *(EPOCH, [1, 2], [0, 0], [300, 301, 302], [1, 2], [Started(1, 16, 0.5, 0.25)])
    ),
    "ends": StepOutputs(
        *(EPOCH, [4, 5], [0, 0], [300, 301]),
        started=[Started(4, 0, 0.5, 0.25)],
        finished=[
            Finished(6, FinishReason.STOP),
            Finished(7, FinishReason.ERROR, "why", ErrorKind.LOGITS),
        ],
        prompt_logprobs=[LogprobRows(8, 1, [1, 2], b"\1\0\0\0" * 2, b"\0\0\0\0" * 2)],
    ),
    "attached": Attached(3, AddRequest(1, [20, 21], PARAMS, is_replay=True, request_id="name")),
    "no": ControlReply(3, False, "requests are running"),
    "stats": ControlReply(4, True, "", STATS),
    "failed": EngineFailed("RuntimeError: out of memory"),
    "stopping": EngineStopping("told to end"),
}
