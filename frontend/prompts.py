"""From what a user calls a prompt to token ids that the engine core will accept."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from footplate.frontend.text import Tokenizer
from footplate.protocol.errors import InvalidRequestError, PromptTooLongError
from footplate.protocol.messages import ModelFacts
from footplate.protocol.params import SamplingParams

Prompt: TypeAlias = str | Mapping[str, Any] | Sequence[int] | Sequence[Mapping[str, Any]]
"""Text; token ids; chat messages; or a mapping with one of `prompt`, `prompt_token_ids` and
`messages`, and optionally `cache_salt`. Empty text is a prompt if the tokenizer adds a
beginning-of-sequence token to it."""

_KINDS = ("prompt", "prompt_token_ids", "messages")


class ParsedPrompt(NamedTuple):
    """A prompt by its kind; exactly one of the first three is set."""

    text: str | None = None
    token_ids: list[int] | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    cache_salt: str = ""


def parse_prompt(prompt: Prompt) -> ParsedPrompt:
    """Tell the kinds of prompt apart.

    Raises:
        InvalidRequestError: it is none of them.
    """
    if isinstance(prompt, str):
        return ParsedPrompt(text=prompt)
    if type(prompt) is list and _are_token_ids(prompt):  # before slower questions: what most send
        return ParsedPrompt(token_ids=prompt.copy())
    if isinstance(prompt, Mapping):
        return _parse_mapping(prompt)
    if isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
        return ParsedPrompt(messages=prompt)  # type: ignore[arg-type]  # checked by the template
    if isinstance(prompt, Sequence) and not isinstance(prompt, bytes):
        return ParsedPrompt(token_ids=_as_token_ids(prompt))
    raise InvalidRequestError(
        f"a prompt is text, token ids, a list of chat messages or a mapping with 'prompt' or "
        f"'prompt_token_ids'; got {type(prompt).__name__}"
    )


def _parse_mapping(prompt: Mapping[str, Any]) -> ParsedPrompt:
    kinds = [kind for kind in _KINDS if kind in prompt]
    if len(kinds) != 1 or set(prompt) - {*kinds, "cache_salt"}:
        raise InvalidRequestError(
            "a prompt mapping has one of 'prompt', 'prompt_token_ids' and 'messages', and "
            f"optionally 'cache_salt'; got {sorted(map(str, prompt))}"
        )
    salt = prompt.get("cache_salt") or ""
    if not isinstance(salt, str) or not salt.isprintable():
        raise InvalidRequestError(f"cache_salt must be a string of printable characters: {salt!r}")
    if "messages" in prompt:
        return ParsedPrompt(messages=prompt["messages"], cache_salt=salt)
    if "prompt_token_ids" in prompt:
        return ParsedPrompt(token_ids=_as_token_ids(prompt["prompt_token_ids"]), cache_salt=salt)
    if not isinstance(prompt["prompt"], str):
        kind = type(prompt["prompt"]).__name__
        raise InvalidRequestError(f"'prompt' must be a string, got {kind}")
    return ParsedPrompt(text=prompt["prompt"], cache_salt=salt)


def _as_token_ids(token_ids: object) -> list[int]:
    if not isinstance(token_ids, Sequence) or not _are_token_ids(token_ids):
        raise InvalidRequestError("prompt_token_ids must be a list of Python integers")
    return list(token_ids)


def _are_token_ids(prompt: Sequence[object]) -> bool:
    # By type, not isinstance: a bool is no token id, and neither is a numpy scalar, which the
    # wire could not carry. A set of types is made in C.
    return {int}.issuperset(map(type, prompt))


def tokenize(parsed: ParsedPrompt, tokenizer: Tokenizer) -> tuple[str, list[int]]:
    """Text and token ids of a prompt that is text or messages. Takes time: not for the event
    loop when the prompt is long."""
    if parsed.messages is not None:
        return tokenizer.encode_chat(parsed.messages)
    assert parsed.text is not None
    return parsed.text, tokenizer.encode(parsed.text)


def resolve_max_tokens(token_ids: list[int], params: SamplingParams, model: ModelFacts) -> int:
    """Check a prompt against the model; return how many tokens the request may produce.

    Raises:
        PromptTooLongError: it does not fit, alone or with `max_tokens`.
        InvalidRequestError: it is empty, or an id is outside the vocabulary.
    """
    length, limit = len(token_ids), model.max_model_len
    if not length:
        raise InvalidRequestError("the prompt is empty: it must have at least one token")
    if length >= limit:
        raise PromptTooLongError(
            f"the prompt has {length} tokens, the model's limit is {limit} for prompt and output "
            f"together: shorten it by at least {length - limit + 1}, or start the engine with a "
            "larger max_model_len"
        )
    trace = params.trace_decode_token_ids
    if trace is not None:
        max_tokens = len(trace)
    else:
        max_tokens = limit - length if params.max_tokens is None else params.max_tokens
    if length + max_tokens > limit:
        together = f"together {length + max_tokens}; the model's limit is {limit}"
        if trace is not None:
            raise PromptTooLongError(
                f"the prompt has {length} tokens and trace_decode_token_ids {max_tokens}, "
                f"{together}: shorten the prompt, or the trace to {limit - length} tokens"
            )
        raise PromptTooLongError(
            f"the prompt has {length} tokens and max_tokens is {max_tokens}, {together}: shorten "
            f"the prompt, lower max_tokens to {limit - length}, or leave it None"
        )
    for token_id in (min(token_ids), max(token_ids)):
        if not 0 <= token_id < model.vocab_size:
            raise InvalidRequestError(
                f"token id {token_id} is outside the vocabulary: ids are 0 to "
                f"{model.vocab_size - 1}"
            )
    return max_tokens
