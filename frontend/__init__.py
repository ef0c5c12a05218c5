"""The client: streams, text, and the engine-core process it starts or attaches to.

Imports neither torch nor `footplate.backend`.
"""

from footplate.frontend.async_llm_engine import AsyncLLMEngine
from footplate.frontend.engine_args import EngineArgs
from footplate.frontend.llm import LLM
from footplate.frontend.outputs import CompletionOutput, RequestMetrics, RequestOutput
from footplate.frontend.stream import RequestStream
from footplate.protocol.params import RequestOutputKind, SamplingParams

__all__ = [
    "LLM",
    "AsyncLLMEngine",
    "CompletionOutput",
    "EngineArgs",
    "RequestMetrics",
    "RequestOutput",
    "RequestOutputKind",
    "RequestStream",
    "SamplingParams",
]
