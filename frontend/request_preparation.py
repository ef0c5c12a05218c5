"""From a prompt and its parameters to a message for the engine core."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from footplate.frontend.attaching import MakeText
from footplate.frontend.output_text import OutputText
from footplate.frontend.prompts import ParsedPrompt, resolve_max_tokens, tokenize
from footplate.frontend.request_schedule import RequestSchedule
from footplate.frontend.session import Session
from footplate.frontend.stream import RequestStream
from footplate.frontend.structured import GrammarTranslator
from footplate.frontend.text import StopStrings, Tokenizer, load_tokenizer
from footplate.frontend.token_params import needs_tokenizer, resolve_params
from footplate.protocol.messages import AddRequest
from footplate.protocol.params import SamplingParams
from footplate.protocol.structured import StructuredOutputsParams
from footplate.protocol.token_params import Grammar

T = TypeVar("T")

# Handing a text to a thread costs about as much as encoding this many characters.
MAX_CHARS_ENCODED_INLINE = 256


class RequestPreparation:
    """Owns the tokenizer, the grammars that were checked lately, and a thread for either kind of
    work: the event loop waits for none of it, and text does not wait for grammars.

    Args:
        session: what the engine said of itself; read with each request.
        tokenizer_source: folder of the tokenizer; None takes the engine's.
    """

    def __init__(self, session: Session, tokenizer_source: str | None) -> None:
        self._session = session
        self._tokenizer_source = tokenizer_source
        self._tokenizer: Tokenizer | None = None
        self._tokenizer_loading: asyncio.Task[Tokenizer] | None = None
        self._grammars: GrammarTranslator | None = None
        self._threads: dict[str, ThreadPoolExecutor] = {}

    def close(self) -> None:
        """Forget the tokenizer: the next start may find another model, on another event loop."""
        self._tokenizer = None
        self._tokenizer_loading = None
        self._grammars = None
        for thread in self._threads.values():
            thread.shutdown(wait=False)
        self._threads.clear()

    async def tokenizer(self) -> Tokenizer:
        """The tokenizer of the engine's model. Raises TokenizerError if there is none."""
        if self._tokenizer is None:
            if self._tokenizer_loading is None:
                source = self._tokenizer_source or self._session.welcome.model.tokenizer
                self._tokenizer_loading = asyncio.ensure_future(
                    self._in_thread("text", load_tokenizer, source)
                )
            self._tokenizer = await asyncio.shield(self._tokenizer_loading)
        return self._tokenizer

    async def prepare(
        self,
        stream: RequestStream,
        prompt: ParsedPrompt,
        schedule: RequestSchedule,
        *,
        is_detachable: bool = False,
    ) -> AddRequest:
        """Encode and check a request; the stream is told what has become of its prompt.

        Args:
            is_detachable: the core is to keep it without us, under the stream's request id.

        Raises:
            InvalidRequestError: it cannot be served as it stands.
            TokenizerError: it needs a tokenizer, and there is none.
        """
        params, welcome = stream.params, self._session.welcome
        text, token_ids = await self.encode(prompt)
        max_tokens = resolve_max_tokens(token_ids, params, welcome.model)
        tokenizer = None
        if params.detokenize or needs_tokenizer(params):
            tokenizer = await self.tokenizer()
        grammar = None
        if params.structured_outputs is not None:
            grammar = await self.translate(params.structured_outputs)
        token_params = resolve_params(
            params,
            seed=stream.seed,
            max_tokens=max_tokens,
            model=welcome.model,
            requests=welcome.requests,
            tokenizer=tokenizer,
            grammar=grammar,
        )
        if tokenizer is not None and params.detokenize:
            make_text = partial(_make_text, tokenizer, params, token_ids, params.min_tokens)
            stream.begin(text, token_ids, make_text, tokenizer.text_of_token)
        else:
            stream.begin(text, token_ids, None)
        return AddRequest(
            stream.handle,
            token_ids,
            token_params,
            schedule.priority,
            prompt.cache_salt,
            params.n,
            age_s=time.monotonic() - stream.metrics.arrival,
            ttft_deadline_s=_seconds(schedule.ttft_deadline_s),
            deadline_s=_seconds(schedule.deadline_s),
            request_id=stream.request_id if is_detachable else None,
        )

    async def text_maker(self, params: SamplingParams) -> MakeText | None:
        """What makes the text of completions of prompts that are not known yet; None if none is
        wanted. Raises TokenizerError if there is no tokenizer."""
        if not params.detokenize:
            return None
        return partial(_make_text, await self.tokenizer(), params)

    async def encode(self, prompt: ParsedPrompt) -> tuple[str | None, list[int]]:
        """Text, if there was any, and token ids."""
        if prompt.token_ids is not None:
            return None, prompt.token_ids
        tokenizer = await self.tokenizer()
        if prompt.text is not None and len(prompt.text) <= MAX_CHARS_ENCODED_INLINE:
            return tokenize(prompt, tokenizer)
        return await self._in_thread("text", tokenize, prompt, tokenizer)

    async def translate(self, wanted: StructuredOutputsParams) -> Grammar:
        """The grammar that an output has to match. Raises InvalidParameterError if it has none."""
        if self._grammars is None:
            self._grammars = GrammarTranslator((await self.tokenizer()).special_token_texts)
        return await self._in_thread("grammars", self._grammars.translate, wanted)

    async def _in_thread(self, name: str, call: Callable[..., T], *args: object) -> T:
        thread = self._threads.get(name)
        if thread is None:
            thread = ThreadPoolExecutor(1, thread_name_prefix=f"footplate-{name}")
            self._threads[name] = thread
        return await asyncio.get_running_loop().run_in_executor(thread, call, *args)


def _seconds(given: float | None) -> float | None:
    # An integer may be larger than a message can hold.
    return None if given is None else float(given)


def _make_text(
    tokenizer: Tokenizer, params: SamplingParams, token_ids: list[int], min_tokens: int
) -> OutputText:
    """The text of one completion, which follows `token_ids`."""
    stops = params.stop_strings
    return OutputText(
        tokenizer.detokenizer(
            token_ids,
            skip_special_tokens=params.skip_special_tokens,
            spaces_between_special_tokens=params.spaces_between_special_tokens,
        ),
        StopStrings(stops, params.include_stop_str_in_output) if stops else None,
        min_tokens,
    )
