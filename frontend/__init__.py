"""The client: streams, text, and the engine-core process it starts or attaches to.

Imports neither torch nor `footplate.backend`.
"""

from footplate.frontend.async_llm_engine import AsyncLLMEngine
from footplate.frontend.beam_params import BeamSearchParams
from footplate.frontend.engine_args import EngineArgs
from footplate.frontend.health import Health, Restart
from footplate.frontend.llm import LLM
from footplate.frontend.logprobs import FlatLogprobs, Logprob
from footplate.frontend.outputs import CompletionOutput, RequestMetrics, RequestOutput
from footplate.frontend.stream import RequestStream
from footplate.protocol.params import (
    RepetitionDetectionParams,
    RequestOutputKind,
    SamplingParams,
)
from footplate.protocol.structured import StructuredOutputsParams

__all__ = [
    "LLM",
    "AsyncLLMEngine",
    "BeamSearchParams",
    "CompletionOutput",
    "EngineArgs",
    "FlatLogprobs",
    "Health",
    "Logprob",
    "RepetitionDetectionParams",
    "RequestMetrics",
    "RequestOutput",
    "RequestOutputKind",
    "RequestStream",
    "Restart",
    "SamplingParams",
    "StructuredOutputsParams",
]
