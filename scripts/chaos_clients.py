"""Clients of one core that are killed, beside one that is not.

As a program it is such a client: scripts/chaos_clients.py ADDRESS STREAMS
"""

import argparse
import asyncio
import shutil
import signal
import statistics
import sys
import time
from random import Random

from chaos_load import Load, make_templates
from footplate.frontend import AsyncLLMEngine, SamplingParams
from footplate.protocol.links import make_private_dir

VICTIM_STREAMS = 50
RELEASE_S = 10.0


async def kill_clients(options: argparse.Namespace) -> bool:
    """A client with fifty streams is killed, again and again; whether the core lets go of all that
    it held, and the streams of the other client are what they would be alone."""
    dice = Random(options.seed)
    folder = make_private_dir()
    address = f"ipc://{folder}/engine.sock"
    launcher = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "footplate.frontend.launch", "--address", address),
        *("--model", options.model, "--scheduling-policy", "priority", "--log-level", "ERROR"),
        *(("--max-model-len", "1024") if options.model == "fake" else ()),
        *(("--quantization", options.quantization) if options.quantization else ()),
    )
    try:
        async with AsyncLLMEngine.connect(address, timeout_s=options.timeout) as engine:
            vocab_size = (await engine.get_model_config()).vocab_size
            load = Load(make_templates(options.requests, options.seed, vocab_size))
            await load.learn(engine, options.streams)
            releases = await _kill_beside(engine, load, address, dice, options)
            await load.check_rest(engine, options.streams)
            stats, limits = await engine.get_stats(), await engine.get_scheduler_config()
    finally:
        launcher.terminate()
        status = await launcher.wait()
        shutil.rmtree(folder, ignore_errors=True)
    num_held = limits.num_kv_blocks - stats.num_free_blocks
    damage = load.damage
    print(
        f"model {options.model}, {options.streams} streams of the client that stays, "
        f"{VICTIM_STREAMS} of each that was killed, seed {options.seed}\n"
        f"{load.num_streams} streams, {load.num_tokens} tokens, {len(releases)} clients killed\n"
        f"lost {damage.lost}, doubled {damage.doubled}, changed {damage.changed}, "
        f"failed {len(load.failures)}; left in the core: {num_held} blocks; it ended with {status}"
    )
    if len(releases) > 1:
        cuts = statistics.quantiles(releases, n=100, method="inclusive")
        print(f"time until all it held was free: p50 {cuts[49]:.3f} s, p99 {cuts[98]:.3f} s")
    for line in (*load.failures[:5], *load.differences[:5]):
        print(f"  {line[:2000]}")
    harmless = not (damage.lost or damage.doubled or damage.changed or load.failures)
    return harmless and not num_held and not status


async def _kill_beside(
    engine: AsyncLLMEngine, load: Load, address: str, dice: Random, options: argparse.Namespace
) -> list[float]:
    """Seconds from each kill until the core had no more requests than the other client's."""
    load.begin(engine, options.streams)
    releases: list[float] = []
    until = time.monotonic() + (options.seconds or float("inf"))
    while len(releases) < options.kills and time.monotonic() < until:
        victim = await asyncio.create_subprocess_exec(
            *(sys.executable, __file__, address, str(VICTIM_STREAMS)),
            stdout=asyncio.subprocess.PIPE,
        )
        assert victim.stdout is not None
        await victim.stdout.readline()
        await asyncio.sleep(dice.expovariate(1 / options.every))
        since = time.monotonic()
        victim.send_signal(signal.SIGKILL)
        async with asyncio.timeout(RELEASE_S):
            while True:
                stats = await engine.get_stats()
                if stats.num_running + stats.num_waiting <= load.num_asked:
                    break
        releases.append(time.monotonic() - since)
        await victim.wait()
    await load.end()
    return releases


async def be_a_victim(address: str, num_streams: int) -> None:
    """Hold so many streams until the end, and say so once they are open."""
    async with AsyncLLMEngine.connect(address) as engine:
        limit = (await engine.get_model_config()).max_model_len
        params = SamplingParams(max_tokens=limit - 8, detokenize=False, ignore_eos=True)
        while True:
            streams = [
                await engine.add_request(None, [20 + n % 50], params) for n in range(num_streams)
            ]
            await anext(streams[0])
            print("streaming", flush=True)
            await asyncio.gather(*map(_read, streams))


async def _read(stream: object) -> None:
    async for _ in stream:  # type: ignore[attr-defined]
        pass


if __name__ == "__main__":
    asyncio.run(be_a_victim(sys.argv[1], int(sys.argv[2])))
