"""Detokenizing: deltas join to the full decode, and nothing shown is ever taken back."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from footplate.frontend.text import Detokenizer, Tokenizer, load_tokenizer
from footplate.frontend.text.detokenizer import PieceDetokenizer, WindowDetokenizer

# Beyond every vocabulary here, so that ids without a token occur too.
IDS = st.lists(st.integers(0, 700), max_size=24)
REPLACEMENT = "\ufffd"


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def backend(folder: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def load(folders: dict[str, Path], kind: str) -> Tokenizer:
    return load_tokenizer(folders[kind])


def chunks(ids: Sequence[int], cuts: set[int]) -> list[Sequence[int]]:
    inner = sorted(cut for cut in cuts if cut <= len(ids))
    return [ids[a:b] for a, b in zip([0, *inner], [*inner, len(ids)], strict=True)]


def text_of(detokenizer: Detokenizer, pieces: Sequence[Sequence[int]]) -> str:
    return "".join(map(detokenizer.feed, pieces)) + detokenizer.finish()


def ids_of(tokenizer: Tokenizer, *tokens: str) -> list[int]:
    ids = [tokenizer.token_to_id(token) for token in tokens]
    assert None not in ids, tokens
    return [token_id for token_id in ids if token_id is not None]


@given(output=IDS, cuts=st.sets(st.integers(0, 24)), skip=st.booleans())
def test_deltas_join_to_the_decode_however_the_ids_arrive(
    tokenizer: Tokenizer, output: list[int], cuts: set[int], skip: bool
) -> None:
    detokenizer = tokenizer.detokenizer(skip_special_tokens=skip)
    assert text_of(detokenizer, chunks(output, cuts)) == tokenizer.decode(output, skip)


@given(prompt=IDS, output=IDS, cuts=st.sets(st.integers(0, 24)), skip=st.booleans())
def test_behind_a_prompt_deltas_join_to_what_the_output_adds(
    tokenizer: Tokenizer, prompt: list[int], output: list[int], cuts: set[int], skip: bool
) -> None:
    text = text_of(tokenizer.detokenizer(prompt, skip), chunks(output, cuts))
    # What a prompt shows without an unfinished character at its end, which is the output's.
    shown_by_prompt = tokenizer.detokenizer(skip_special_tokens=skip).feed(prompt)
    if tokenizer.decode(prompt + output, skip) == tokenizer.decode(prompt, skip):
        assert text == "" or tokenizer.decode(prompt, skip).endswith(text)
    else:
        assert shown_by_prompt + text == tokenizer.decode(prompt + output, skip)


@given(output=IDS, more=IDS)
def test_what_is_shown_stays_whatever_comes_next(
    tokenizer: Tokenizer, output: list[int], more: list[int]
) -> None:
    detokenizer = tokenizer.detokenizer()
    shown = "".join(detokenizer.feed([token_id]) for token_id in output)
    assert tokenizer.decode(output + more).startswith(shown)


@given(output=IDS, skip=st.booleans())
def test_decode_is_the_library_s_except_for_broken_byte_fallback(
    tokenizer: Tokenizer, backend: tokenizers.Tokenizer, output: list[int], skip: bool
) -> None:
    expected = backend.decode(output, skip_special_tokens=skip)
    if REPLACEMENT in expected and tokenizer.token_to_id("<0x00>") is not None:
        tokens = [tokenizer.id_to_token(token_id) for token_id in output]
        special = {"<unk>", "<s>", "</s>", "<|start|>", "<|end|>"} if skip else set()
        expected = sentencepiece_decode([t for t in tokens if t is not None and t not in special])
        if tokenizer.decode(ids_of(tokenizer, "▁the")) == "the":
            expected = expected.removeprefix(" ")
    assert tokenizer.decode(output, skip) == expected


def sentencepiece_decode(tokens: list[str]) -> str:
    """SentencePiece's way: a valid character is shown, any other byte becomes U+FFFD."""
    data = b"".join(
        bytes([int(token[3:5], 16)])
        if re.fullmatch("<0x..>", token)
        else token.replace("▁", " ").encode()
        for token in tokens
    )
    text = ""
    while data:
        for length in (1, 2, 3, 4):
            try:
                text += data[:length].decode()
            except UnicodeDecodeError:
                continue
            data = data[length:]
            break
        else:
            text += REPLACEMENT
            data = data[1:]
    return text


@settings(max_examples=30)
@given(text=st.text(max_size=30))
def test_encoded_text_comes_back(folders: dict[str, Path], text: str) -> None:
    tokenizer = load(folders, "byte_level")
    ids = tokenizer.encode(text, allow_special=False)
    assert text_of(tokenizer.detokenizer(), [[token_id] for token_id in ids]) == text


@pytest.mark.parametrize("kind", ["byte_level", "llama", "gemma"], scope="session")
def test_a_character_is_shown_when_its_last_byte_arrives(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("x🚂", add_special_tokens=False)[-4:]
    detokenizer = tokenizer.detokenizer(tokenizer.encode("x"))
    assert [detokenizer.feed([token_id]) for token_id in ids] == ["", "", "", "🚂"]


@pytest.mark.parametrize("kind", ["byte_level", "llama", "gemma"], scope="session")
def test_an_unfinished_character_is_replaced_only_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("x🚂", add_special_tokens=False)[-4:-1]
    detokenizer = tokenizer.detokenizer(tokenizer.encode("x"))
    assert detokenizer.feed(ids) == ""
    assert set(detokenizer.finish()) == {REPLACEMENT}
    assert detokenizer.finish() == ""


@pytest.mark.parametrize("kind", ["byte_level", "llama", "gemma"], scope="session")
def test_a_character_begun_by_the_prompt_is_finished_by_the_output(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("x🚂", add_special_tokens=False)
    assert text_of(tokenizer.detokenizer(ids[:-1]), [ids[-1:]]) == "🚂"
    # If the output never touches it, it is not the output's to show.
    for output in ([], ids_of(tokenizer, "</s>")):
        assert text_of(tokenizer.detokenizer(ids[:-1]), [output]) == ""


def test_one_bad_byte_does_not_take_valid_characters_with_it(folders: dict[str, Path]) -> None:
    tokenizer = load(folders, "llama")
    ids = ids_of(tokenizer, "<0xE4>", "<0xBD>", "<0xA0>", "<0xFF>", "<0xE4>", "<0xBD>")
    # The library turns the whole run into U+FFFD, although "你" may have been on screen.
    assert tokenizer.decode(ids) == "你" + REPLACEMENT * 3
    detokenizer = tokenizer.detokenizer()
    shown = [detokenizer.feed([token_id]) for token_id in ids]
    assert shown == ["", "", "你", REPLACEMENT, "", ""]
    assert detokenizer.finish() == REPLACEMENT * 2


def test_the_leading_space_is_dropped_at_the_start_and_kept_behind_a_prompt(
    folders: dict[str, Path],
) -> None:
    for kind, at_start in (("llama", "the"), ("gemma", " the"), ("unigram", "the")):
        tokenizer = load(folders, kind)
        ids = ids_of(tokenizer, "▁the")
        assert text_of(tokenizer.detokenizer(), [ids]) == at_start
        assert text_of(tokenizer.detokenizer(tokenizer.encode("the")), [ids]) == " the"
        # A prompt of skipped tokens alone shows nothing: the output still starts the text.
        bos = ids_of(tokenizer, "<s>")
        assert text_of(tokenizer.detokenizer(bos * 100), [ids]) == at_start


def test_special_tokens_are_shown_only_when_asked_for(tokenizer: Tokenizer) -> None:
    ids = ids_of(tokenizer, "</s>")
    prompt = tokenizer.encode("the")
    assert text_of(tokenizer.detokenizer(prompt), [ids]) == ""
    shown = text_of(tokenizer.detokenizer(prompt, skip_special_tokens=False), [ids])
    assert shown.strip() == "</s>"


@pytest.mark.parametrize("kind", ["wordpiece", "words"], scope="session")
def test_added_tokens_in_a_row_are_joined_when_asked_for(tokenizer: Tokenizer) -> None:
    ids = ids_of(tokenizer, "the", "<|end|>", "<|start|>", "</s>", "the")
    spaced = tokenizer.detokenizer((), False, True)
    joined = tokenizer.detokenizer((), False, False)
    assert text_of(spaced, [ids]) == "the <|end|> <|start|> </s> the"
    assert text_of(joined, [[token_id] for token_id in ids]) == "the <|end|><|start|></s> the"
    skipped = tokenizer.detokenizer((), True, False)
    assert text_of(skipped, [ids]) == "the the"


def test_a_text_may_start_with_an_added_token_of_several_words(folders: dict[str, Path]) -> None:
    tokenizer = load(folders, "byte_level")
    assert tokenizer.decode(ids_of(tokenizer, "two words", "<think>")) == "two words<think>"


def test_undecodable_bytes_never_pile_up(folders: dict[str, Path]) -> None:
    for kind in ("byte_level", "llama"):
        tokenizer = load(folders, kind)
        byte = ids_of(tokenizer, {"byte_level": "Ł", "llama": "<0xA0>"}[kind])
        detokenizer = tokenizer.detokenizer()
        assert isinstance(detokenizer, PieceDetokenizer)
        for _ in range(1000):
            detokenizer.feed(byte)
            assert len(detokenizer._pending) <= 3
        assert text_of(tokenizer.detokenizer(), [byte * 100_000]) == REPLACEMENT * 100_000


class TestWindowDetokenizer:
    """The way of last resort, tried on a decoder that could be taken apart as well."""

    @given(prompt=st.text("ab 🚂", max_size=20), text=st.text("ab é🚂你", max_size=20))
    def test_text_behind_a_prompt_is_exact(
        self, folders: dict[str, Path], prompt: str, text: str
    ) -> None:
        tokenizer = load(folders, "byte_level")
        detokenizer = WindowDetokenizer(tokenizer.decode, is_shown, tokenizer.encode(prompt))
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert text_of(detokenizer, [[token_id] for token_id in ids]) == text

    def test_undecodable_bytes_wait_for_a_while_and_no_longer(
        self, folders: dict[str, Path]
    ) -> None:
        tokenizer = load(folders, "byte_level")
        window_lengths: list[int] = []
        detokenizer = WindowDetokenizer(counting(tokenizer.decode, window_lengths), is_shown)
        byte = ids_of(tokenizer, "Ł")
        assert text_of(detokenizer, [byte] * 1000) == REPLACEMENT * 1000
        assert max(window_lengths) <= 2 * WindowDetokenizer.CONTEXT

    def test_a_decoder_of_unknown_shape_is_streamed_through_it(
        self, folders: dict[str, Path]
    ) -> None:
        tokenizer = load(folders, "suffixed")
        ids = tokenizer.encode("the crew works the engine")
        detokenizer = tokenizer.detokenizer(ids[:1])
        assert isinstance(detokenizer, WindowDetokenizer)
        text = text_of(detokenizer, [[token_id] for token_id in ids[1:]])
        assert tokenizer.decode(ids[:1]) + text == "the crew works the engine"


@pytest.mark.parametrize("no_id", [-1, 2**32, 2**64])
def test_a_number_that_no_vocabulary_can_hold_has_no_text(
    folders: dict[str, Path], no_id: int
) -> None:
    for kind in folders:
        tokenizer = load(folders, kind)
        ids = tokenizer.encode("the crew")
        detokenizer = tokenizer.detokenizer()
        pieces = [[no_id], ids, [no_id, no_id]]
        assert text_of(detokenizer, pieces) == tokenizer.decode([no_id, *ids]) == "the crew"
        assert tokenizer.id_to_token(no_id) is None


def is_shown(token_id: int) -> bool:
    return token_id > 4  # all but the special ones


def counting(decode: Callable[[list[int]], str], lengths: list[int]) -> Callable[[list[int]], str]:
    def counted(ids: list[int]) -> str:
        lengths.append(len(ids))
        return decode(ids)

    return counted
