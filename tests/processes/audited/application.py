"""An application that uses the whole of an engine. A program: its argument is the model."""

import asyncio
import sys

from footplate.frontend import AsyncLLMEngine, EngineArgs, SamplingParams, StructuredOutputsParams

PARAMS = [
    SamplingParams(max_tokens=5, detokenize=False),
    SamplingParams(max_tokens=5, n=3, temperature=0.8, seed=1, logprobs=2, detokenize=False),
    SamplingParams(max_tokens=5, repetition_penalty=1.2, bad_words=["the"], stop=["x"]),
    SamplingParams(
        max_tokens=5, structured_outputs=StructuredOutputsParams(json={"type": "integer"})
    ),
]
CHAT = [{"role": "user", "content": "What is Footplate?"}]


async def main(model: str) -> None:
    async with AsyncLLMEngine(EngineArgs(model=model)) as engine:
        for params in PARAMS:
            for prompt in ([20, 21], "The function returns", CHAT):
                async for _ in engine.generate(prompt, params):
                    pass
        stream = await engine.add_request("id", [20], SamplingParams(max_tokens=400))
        await anext(stream)
        await engine.abort("id")
        await engine.get_stats()
        await engine.reset_prefix_cache()
    print("served")


asyncio.run(main(sys.argv[1]))
