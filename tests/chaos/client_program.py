"""A client in a process of its own, to be killed: its streams do not end. A program.

Its arguments: the address of a core, or "own", which starts one; and how many streams.
"""

import asyncio
import sys

from footplate.frontend import AsyncLLMEngine, EngineArgs, RequestStream, SamplingParams

FOREVER = SamplingParams(max_tokens=30_000, detokenize=False)


async def read(stream: RequestStream) -> None:
    async for _ in stream:
        pass


async def main(address: str, num_streams: int) -> None:
    if address == "own":
        engine = AsyncLLMEngine(EngineArgs(model="fake", log_level="ERROR"))
    else:
        engine = AsyncLLMEngine.connect(address)
    async with engine:
        streams = [
            await engine.add_request(None, [20 + n % 1000], FOREVER) for n in range(num_streams)
        ]
        await anext(streams[0])
        print("streaming", flush=True)
        await asyncio.gather(*map(read, streams))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
