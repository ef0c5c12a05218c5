"""`LLM`: the same client for programs without an event loop."""

import asyncio
import threading
import weakref
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import msgspec
from tqdm import tqdm

from footplate.frontend.async_llm_engine import AsyncLLMEngine, require_sampling_params
from footplate.frontend.beam_params import BeamSearchParams
from footplate.frontend.engine_args import EngineArgs
from footplate.frontend.outputs import RequestOutput
from footplate.frontend.prompts import Prompt
from footplate.frontend.text import Tokenizer
from footplate.protocol.errors import EngineClosedError, InvalidRequestError
from footplate.protocol.messages import Stats
from footplate.protocol.params import RequestOutputKind, SamplingParams

T = TypeVar("T")


class LLM:
    """An engine behind plain calls. Owns a thread with an event loop, and an `AsyncLLMEngine` on
    it.

        llm = LLM(model="demo")
        for output in llm.generate(["The function returns", "A list is"]):
            print(output.outputs[0].text)
    """

    def __init__(self, model: str = "demo", **engine_args: Any) -> None:
        """Start the engine and wait until it is ready. For arguments see `EngineArgs`.

        Raises:
            InvalidParameterError: an argument is out of its bounds.
            EngineStartError: with the root cause.
        """
        self._engine = AsyncLLMEngine(EngineArgs(model=model, **engine_args))
        self._loop = _new_event_loop()
        self._thread = threading.Thread(
            target=_run_loop, args=(self._loop,), name="footplate LLM", daemon=True
        )
        self._thread.start()
        self._finalizer: weakref.finalize[..., LLM] | None = None
        try:
            self._run(self._engine.start())
        except BaseException:
            _shut_down(self._engine, self._loop, self._thread)
            raise
        # At the program's end it runs before the finalizers of what it shuts down.
        self._finalizer = weakref.finalize(self, _shut_down, self._engine, self._loop, self._thread)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] = 0,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete every prompt; results stand in the order of the prompts.

        Args:
            prompts: one prompt, or a list of them. A list of token ids, or of chat messages, is
                one prompt.
            sampling_params: one for all, or one for each.
            priority: likewise; lower runs earlier, under the priority policy.

        Raises:
            InvalidRequestError: a prompt was refused; the others are ended.
        """
        each = _as_prompt_list(prompts)
        given = SamplingParams() if sampling_params is None else sampling_params
        params = [_final_only(p) for p in _for_each(each, given)]
        priorities = _for_each(each, priority)
        return self._run(self._generate_all(each, params, priorities, use_tqdm))

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] = 0,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """As `generate`, for one conversation or a list of them."""
        return self.generate(messages, sampling_params, priority=priority, use_tqdm=use_tqdm)

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        *,
        priority: int | Sequence[int] = 0,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """The best continuations of every prompt; an output's completions stand best first.

        All prompts are searched at once. For arguments and errors see `generate`.
        """
        each = _as_prompt_list(prompts)
        requests = zip(each, _for_each(each, priority), strict=True)

        async def search() -> list[RequestOutput]:
            return await _last_of_each(
                [self._engine.beam_search(p, params, priority=at) for p, at in requests], use_tqdm
            )

        return self._run(search())

    async def _generate_all(
        self,
        prompts: list[Prompt],
        params: list[SamplingParams],
        priorities: list[int],
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        requests = zip(prompts, params, priorities, strict=True)
        streams = [self._engine.generate(p, param, priority=at) for p, param, at in requests]
        return await _last_of_each(streams, use_tqdm)

    def get_tokenizer(self) -> Tokenizer:
        """The tokenizer of the engine's model."""
        return self._run(self._engine.get_tokenizer())

    def get_stats(self) -> Stats:
        """The engine core's books."""
        return self._run(self._engine.get_stats())

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes."""
        return self._run(self._engine.reset_prefix_cache())

    def shutdown(self) -> None:
        """End the engine core and the thread. May be called more than once."""
        if self._finalizer is not None:
            self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.shutdown()

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        if not self._thread.is_alive() or (self._finalizer and not self._finalizer.alive):
            coroutine.close()
            raise EngineClosedError("the engine was shut down, or belongs to another process")
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # Ctrl-C ends the requests as well
            raise


async def _last_of_each(
    streams: Sequence[AsyncIterator[RequestOutput]], use_tqdm: bool
) -> list[RequestOutput]:
    """Take all streams to their ends at once. The first error ends them all."""
    with tqdm(total=len(streams), disable=not use_tqdm, unit="prompt", leave=True) as bar:

        async def last_of(stream: AsyncIterator[RequestOutput]) -> RequestOutput:
            async for output in stream:
                last = output
            bar.update()
            return last

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(last_of(stream)) for stream in streams]
        except BaseExceptionGroup as errors:
            # The first to fail has cancelled the others; it is the one to fix.
            raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


def _shut_down(
    engine: AsyncLLMEngine, loop: asyncio.AbstractEventLoop, thread: threading.Thread
) -> None:
    if not thread.is_alive():
        return  # in a fork, which has no threads

    async def shut_down() -> None:
        engine.shutdown()
        # The calls of other threads hear of it before the loop ends.
        calls = asyncio.all_tasks() - {asyncio.current_task()}
        if calls:
            await asyncio.wait(calls)
        loop.stop()

    ending = asyncio.run_coroutine_threadsafe(shut_down(), loop)
    # Whichever thread the garbage collector runs on may drop an LLM; this one cannot wait.
    if threading.current_thread() is not thread:
        thread.join()
        ending.result()


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()


def _new_event_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:  # not on every platform
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def _as_prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    is_list_of_prompts = (
        isinstance(prompts, Sequence)
        and not isinstance(prompts, str)
        and all(_is_prompt(item) for item in prompts)
    )
    return list(prompts) if is_list_of_prompts else [prompts]  # type: ignore[arg-type,list-item]


def _is_prompt(item: object) -> bool:
    """Whether `item` is a prompt by itself, so that a sequence of such items is several."""
    if isinstance(item, Mapping):
        return "role" not in item  # a chat message is part of a prompt
    return not isinstance(item, int)


def _for_each(prompts: list[Prompt], given: T | Sequence[T]) -> list[T]:
    """One value for every prompt, as a list."""
    if not isinstance(given, Sequence):
        return [given] * len(prompts)
    if len(given) != len(prompts):
        raise InvalidRequestError(
            f"{len(prompts)} prompts and {len(given)} sampling params or priorities: give one for "
            "all, or one for each"
        )
    return list(given)


def _final_only(params: SamplingParams) -> SamplingParams:
    require_sampling_params(params)
    # Only the last output is looked at.
    return msgspec.structs.replace(params, output_kind=RequestOutputKind.FINAL_ONLY)
