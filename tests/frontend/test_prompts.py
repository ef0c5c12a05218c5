"""What counts as a prompt, and what the engine core would not accept."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from footplate.frontend import SamplingParams
from footplate.frontend.prompts import ParsedPrompt, parse_prompt, resolve_max_tokens, tokenize
from footplate.frontend.text import load_tokenizer
from footplate.protocol.errors import InvalidRequestError, PromptTooLongError

from .scripted_core import WELCOME

MODEL = WELCOME.model  # 1000 tokens, a context window of 100
CHAT = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    ("prompt", "parsed"),
    [
        ("text", ParsedPrompt(text="text")),
        ("", ParsedPrompt(text="")),
        ([1, 2], ParsedPrompt(token_ids=[1, 2])),
        ((1, 2), ParsedPrompt(token_ids=[1, 2])),
        (range(3), ParsedPrompt(token_ids=[0, 1, 2])),
        ([], ParsedPrompt(token_ids=[])),
        (CHAT, ParsedPrompt(messages=CHAT)),
        ({"prompt": "text"}, ParsedPrompt(text="text")),
        ({"prompt_token_ids": [1]}, ParsedPrompt(token_ids=[1])),
        ({"prompt": "text", "cache_salt": "s"}, ParsedPrompt(text="text", cache_salt="s")),
        ({"prompt_token_ids": (1,), "cache_salt": None}, ParsedPrompt(token_ids=[1])),
    ],
)
def test_the_kinds_of_prompt_are_told_apart(prompt: Any, parsed: ParsedPrompt) -> None:
    assert parse_prompt(prompt) == parsed


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (None, "NoneType"),
        (5, "int"),
        (b"text", "bytes"),
        ({1, 2}, "set"),
        ([1, "2"], "integers"),
        ([1.0], "integers"),
        ([True], "integers"),
        ([[1]], "integers"),
        (["text"], "integers"),
        ({}, "one of"),
        ({"prompt": "text", "prompt_token_ids": [1]}, "one of"),
        ({"prompt": "text", "promt": "text"}, "promt"),
        ({"prompt": [1]}, "'prompt' must be a string, got list"),
        ({"prompt_token_ids": "text"}, "integers"),
        ({"prompt_token_ids": 5}, "integers"),
        ({"prompt": "text", "cache_salt": 5}, "cache_salt must be a string"),
        ({"prompt": "text", "cache_salt": "\ud800"}, "cache_salt must be a string"),
    ],
)
def test_what_is_no_prompt_is_refused_with_the_reason(prompt: Any, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        parse_prompt(prompt)


def test_the_callers_list_is_not_the_requests() -> None:
    given = [1, 2]
    parsed = parse_prompt(given)
    given.append(3)
    assert parsed.token_ids == [1, 2]


# ---- text


def test_text_and_messages_become_ids(tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    assert tokenize(ParsedPrompt(text="ab"), tokenizer) == ("ab", tokenizer.encode("ab"))
    text, token_ids = tokenize(ParsedPrompt(messages=CHAT), tokenizer)
    assert text == "user: Hi\n"
    assert tokenizer.decode(token_ids) == text


# ---- lengths and ids


def resolve(num_tokens: int, **params: Any) -> int:
    return resolve_max_tokens([7] * num_tokens, SamplingParams(**params), MODEL)


def test_the_context_window_bounds_prompt_and_output_together() -> None:
    assert resolve(90, max_tokens=10) == 10
    assert resolve(99, max_tokens=1) == 1
    with pytest.raises(PromptTooLongError, match=r"90 .* 11, together 101; .* 100: .* to 10,"):
        resolve(90, max_tokens=11)


def test_a_trace_that_does_not_fit_is_named() -> None:
    trace = [7] * 8
    assert resolve(92, trace_decode_token_ids=trace) == 8
    with pytest.raises(PromptTooLongError, match=r"93 .* trace_decode_token_ids 8, together 101"):
        resolve(93, trace_decode_token_ids=trace)


def test_without_max_tokens_the_output_may_fill_the_context_window() -> None:
    assert resolve(1, max_tokens=None) == 99
    assert resolve(99, max_tokens=None) == 1


@pytest.mark.parametrize(("num_tokens", "excess"), [(100, 1), (101, 2), (10_000, 9901)])
def test_a_prompt_that_leaves_room_for_no_output_is_refused(num_tokens: int, excess: int) -> None:
    with pytest.raises(PromptTooLongError, match=rf"{num_tokens} tokens.*100.*least {excess},"):
        resolve(num_tokens, max_tokens=None)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="empty"):
        resolve(0)


@pytest.mark.parametrize("token_id", [-1, 1000, 2**31, 2**63])
def test_an_id_outside_the_vocabulary_is_refused(token_id: int) -> None:
    assert resolve_max_tokens([0, 999], SamplingParams(), MODEL) == 16
    with pytest.raises(InvalidRequestError, match=rf"{token_id} .* 0 to 999"):
        resolve_max_tokens([5, token_id, 6], SamplingParams(), MODEL)


def test_the_models_own_limit_counts() -> None:
    smaller = msgspec.structs.replace(MODEL, max_model_len=10)
    with pytest.raises(PromptTooLongError, match="10"):
        resolve_max_tokens([7] * 10, SamplingParams(), smaller)
