"""The real engine over the demo model's tokenizer: masks, ends, errors, vocabularies."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from footplate.backend.runner.load import DEMO_MODEL
from footplate.backend.structured.interface import GrammarError
from footplate.backend.structured.llguidance_engine import LlguidanceEngine, guarded
from footplate.protocol.token_params import Grammar

from .sampling import EOS, TOKENIZER, VOCAB_SIZE, allowed, demo_engine, sample

ABC = Grammar("start: /a|bc*/")
PERSON = Grammar(
    json.dumps(
        {
            "grammars": [
                {
                    "json_schema": {
                        "type": "object",
                        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
                        "required": ["name"],
                    }
                }
            ]
        }
    )
)


@pytest.fixture(scope="module")
def engine() -> LlguidanceEngine:
    return demo_engine()


def ids(text: str) -> list[int]:
    token_ids: list[int] = TOKENIZER.encode(text, add_special_tokens=False).ids
    return token_ids


def texts(token_ids: np.ndarray) -> set[str]:
    return {TOKENIZER.decode([int(token_id)]) for token_id in token_ids}


# ---- masks and ends


def test_a_mask_allows_what_the_grammar_does_and_nothing_else(engine: LlguidanceEngine) -> None:
    assert texts(allowed(engine.compile(ABC).start())) == {"a", "b", "bc"} & texts(
        np.arange(VOCAB_SIZE)
    )


def test_a_mask_overwrites_what_was_in_the_row(engine: LlguidanceEngine) -> None:
    matcher = engine.compile(ABC).start()
    rows = np.full((2, VOCAB_SIZE // 32), -1, np.int32)
    matcher.fill_mask(rows[1])
    assert set(np.flatnonzero(np.unpackbits(rows[1].view(np.uint8), bitorder="little"))) == set(
        allowed(matcher)
    )
    assert (rows[0] == -1).all()


def test_nothing_more_is_possible_after_the_last_token_of_a_finite_text(
    engine: LlguidanceEngine,
) -> None:
    assert engine.compile(ABC).start().advance(ids("a"))


def test_a_text_that_could_go_on_is_complete_with_its_end_token(engine: LlguidanceEngine) -> None:
    matcher = engine.compile(ABC).start()
    assert not matcher.advance(ids("b"))
    assert EOS in allowed(matcher)
    assert matcher.advance([EOS])


def test_the_end_token_is_impossible_inside_of_a_text(engine: LlguidanceEngine) -> None:
    matcher = engine.compile(PERSON).start()
    assert EOS not in allowed(matcher)
    with pytest.raises(GrammarError, match="does not match"):
        matcher.advance([EOS])


def test_all_end_tokens_of_a_model_end_a_text() -> None:
    compiled = demo_engine((EOS, 5)).compile(ABC)
    for token_id in (EOS, 5):
        matcher = compiled.start()
        matcher.advance(ids("b"))
        assert {EOS, 5} <= set(allowed(matcher))
        assert matcher.advance([token_id])


def test_an_end_token_that_is_text_is_impossible_inside_of_a_text() -> None:
    """Some models end with a line break, or with a mark that their tokenizer takes for text."""
    [newline] = ids("\n")
    matcher = demo_engine((EOS, newline)).compile(Grammar(r"start: /a(\n|b)c?/")).start()
    matcher.advance(ids("a"))
    assert "b" in texts(allowed(matcher)) and newline not in allowed(matcher)
    matcher.advance(ids("b"))
    assert newline in allowed(matcher)
    assert matcher.advance([newline])


def test_where_one_text_is_left_only_the_tokenizer_s_own_tokens_of_it_are_possible(
    engine: LlguidanceEngine,
) -> None:
    """As docs/requests.md says: single letters would spell it too."""
    matcher = engine.compile(Grammar('start: "a" | "b the function"')).start()
    matcher.advance(ids("b"))
    assert list(allowed(matcher)) == ids(" the function")[:1]


@pytest.mark.parametrize("text", ["c", "ab", "aa"])
def test_a_token_that_the_grammar_forbids_is_an_error_and_stays_one(
    engine: LlguidanceEngine, text: str
) -> None:
    matcher = engine.compile(ABC).start()
    with pytest.raises(GrammarError):
        matcher.advance(ids(text[:1]))
        matcher.advance(ids(text[1:]))
    with pytest.raises(GrammarError):
        matcher.advance(ids("a"))
    with pytest.raises(GrammarError):
        allowed(matcher)


def test_tokens_after_the_end_are_an_error(engine: LlguidanceEngine) -> None:
    for behind in (EOS, ids("a")[0]):
        matcher = engine.compile(ABC).start()
        assert matcher.advance([*ids("a"), EOS])
        with pytest.raises(GrammarError):
            matcher.advance([behind])


@pytest.mark.parametrize("token_id", [VOCAB_SIZE, 2**31])
def test_a_token_outside_of_the_vocabulary_is_an_error(
    engine: LlguidanceEngine, token_id: int
) -> None:
    with pytest.raises(GrammarError):
        engine.compile(ABC).start().advance([token_id])


def test_no_tokens_change_nothing(engine: LlguidanceEngine) -> None:
    matcher = engine.compile(ABC).start()
    before = list(allowed(matcher))
    assert not matcher.advance([])
    assert list(allowed(matcher)) == before


# ---- matchers and each other


def test_replayed_tokens_lead_to_the_same_place_as_single_ones(engine: LlguidanceEngine) -> None:
    compiled = engine.compile(PERSON)
    for seed in range(10):
        output = sample(compiled.start(), seed).token_ids
        step_by_step = compiled.start()
        for index, token_id in enumerate(output[:-1]):
            step_by_step.advance([token_id])
            if index % 7 == 0:
                at_once = compiled.start()
                assert not at_once.advance(output[: index + 1])
                assert list(allowed(at_once)) == list(allowed(step_by_step)), (seed, index)
        assert compiled.start().advance(output)


def test_masks_depend_on_no_other_matcher_and_on_no_earlier_mask(engine: LlguidanceEngine) -> None:
    output = sample(engine.compile(PERSON).start(), 3).token_ids
    used = engine.compile(PERSON)
    for seed in range(20):
        sample(used.start(), seed)
    one, other = used.start(), demo_engine().compile(PERSON).start()
    for token_id in output[:-1]:
        assert list(allowed(one)) == list(allowed(other))
        one.advance([token_id])
        other.advance([token_id])


# ---- grammars that do not work


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("start: nowhere", "unknown name"),
        ("start: <|bogus|>", "unknown special token"),
        ("start: a\na: a", "no output"),
        (r"start: /[^\s\S]/", "no output"),
        ("start: /(/", "invalid regex"),
        ("", "rammar"),
        ('{"grammars": [{"json_schema": {"not": {}}}]}', "not"),
        ('{"grammars": 1}', "too large"),
        ('{"grammars": [{"json_schema": {"multipleOf": 99999989}}]}', "too large"),
        ("start: " + " | ".join(f'"a{i}"' for i in range(20_000)), "items"),
    ],
)
def test_a_bad_grammar_is_an_error_with_one_line_for_the_user(
    engine: LlguidanceEngine, text: str, words: str
) -> None:
    for _ in range(3):
        with pytest.raises(GrammarError, match=words) as caught:
            engine.compile(Grammar(text))
        assert 0 < len(str(caught.value)) <= 300
        assert "\n" not in str(caught.value)
        engine.compile(ABC)  # a good one, before and after


def test_special_tokens_of_the_model_can_be_named(engine: LlguidanceEngine) -> None:
    matcher = engine.compile(Grammar('start: "a" <|assistant|>')).start()
    matcher.advance(ids("a"))
    assert list(allowed(matcher)) == [TOKENIZER.token_to_id("<|assistant|>")]


def test_a_panic_in_rust_is_a_grammar_error() -> None:
    class PanicException(BaseException):
        pass

    def panic() -> None:
        raise PanicException("index\nout of bounds")

    with pytest.raises(GrammarError, match="index out of bounds"):
        guarded(panic)
    with pytest.raises(KeyboardInterrupt):
        guarded(lambda: (_ for _ in ()).throw(KeyboardInterrupt))


def test_chains_of_references_do_not_exhaust_the_stack() -> None:
    """In a thread like the compiler's; what is done later is done on an ordinary stack."""
    from threading import Thread

    from footplate.protocol.grammar_limits import start_deep_thread

    chain = "start: a0\n" + "".join(f'a{i}: a{i + 1} "b"\n' for i in range(9_000))
    outcomes = []
    engine = demo_engine()
    thread = Thread(target=lambda: outcomes.append(engine.compile(Grammar(chain + 'a9000: "x"'))))
    start_deep_thread(thread)
    thread.join()
    matcher = outcomes.pop().start()
    assert texts(allowed(matcher)) == {"x"}
    assert not matcher.advance(ids("x"))


# ---- vocabularies


def test_a_model_without_an_end_token_ends_where_the_grammar_does() -> None:
    compiled = demo_engine(()).compile(ABC)
    matcher = compiled.start()
    assert matcher.advance(ids("a"))
    matcher = compiled.start()
    assert not matcher.advance(ids("b"))
    assert texts(allowed(matcher)) <= {"c", "cc"}  # and no end token
    assert not matcher.advance(ids("c"))


def test_without_an_end_token_a_grammar_of_the_empty_text_is_an_error() -> None:
    with pytest.raises(GrammarError, match="no token"):
        demo_engine(()).compile(Grammar('start: ""'))


@pytest.mark.parametrize("vocab_size", [1000, VOCAB_SIZE, VOCAB_SIZE + 1, 2500])
@pytest.mark.parametrize("eos_token_ids", [(EOS,), (), (99_999,)])
def test_logits_may_have_fewer_or_more_columns_than_the_tokenizer_tokens(
    vocab_size: int, eos_token_ids: tuple[int, ...]
) -> None:
    engine = LlguidanceEngine(str(DEMO_MODEL), vocab_size, eos_token_ids)
    matcher = engine.compile(Grammar(r"start: /(.|\n)*/")).start()
    token_ids = allowed(matcher, vocab_size)
    assert token_ids.size > 900
    assert token_ids.max() < min(vocab_size, VOCAB_SIZE)
    assert not matcher.advance([int(token_ids[-1])])


def test_added_tokens_that_only_the_configuration_names_are_known(tmp_path: Path) -> None:
    shutil.copy(DEMO_MODEL / "tokenizer.json", tmp_path)
    added = {str(VOCAB_SIZE): {"content": "<|tool|>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    engine = LlguidanceEngine(str(tmp_path), VOCAB_SIZE + 1, (EOS,))
    matcher = engine.compile(Grammar("start: <|tool|>")).start()
    assert list(allowed(matcher, VOCAB_SIZE + 1)) == [VOCAB_SIZE]


@pytest.mark.parametrize("content", ["{", "{}", '{"model": 3}'])
def test_a_tokenizer_that_cannot_be_used_is_an_error_of_each_request(
    tmp_path: Path, content: str
) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    engine = LlguidanceEngine(str(tmp_path), 100, ())
    for _ in range(3):
        with pytest.raises(GrammarError, match="tokenizer"):
            engine.compile(ABC)
