"""The demo model as a user meets it: through client, sockets, core and runner."""

import re
from pathlib import Path

import pytest

from footplate.frontend import LLM, SamplingParams
from footplate.protocol.structured import StructuredOutputsParams

FAQ = (Path(__file__).parents[2] / "docs" / "faq.md").read_text()


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM()  # "demo" is the default


def questions_and_answers() -> list[tuple[str, str]]:
    pairs = re.findall(r"^### (.+?)\n\n(.+?)(?:\n\n|\Z)", FAQ, re.MULTILINE | re.DOTALL)
    return [(question, " ".join(answer.split())) for question, answer in pairs]


def test_it_answers_every_question_of_the_faq_word_for_word(llm: LLM) -> None:
    pairs = questions_and_answers()
    assert len(pairs) >= 40
    chats = [[{"role": "user", "content": question}] for question, _ in pairs]
    params = SamplingParams(temperature=0, max_tokens=200)
    outputs = llm.chat(chats, params, use_tqdm=False)
    answers = [output.outputs[0] for output in outputs]
    assert [answer.text.strip() for answer in answers] == [answer for _, answer in pairs]
    assert {answer.finish_reason for answer in answers} == {"stop"}


def test_it_goes_on_with_a_sentence_of_documentation(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=20)
    output = llm.generate("If the file does not exist,", params, use_tqdm=False)[0]
    assert len(re.findall(r"\b(?:the|a|is|it|of|to|and)\b", output.outputs[0].text)) >= 3


def test_a_stop_string_ends_a_json_text_in_its_middle(llm: LLM) -> None:
    params = SamplingParams(
        n=2,
        stop=["el"],
        logprobs=0,
        max_tokens=60,
        structured_outputs=StructuredOutputsParams(json={"const": {"a": "hello"}}),
    )
    for completion in llm.generate("Say hello:", params, use_tqdm=False)[0].outputs:
        assert (completion.finish_reason, completion.stop_reason) == ("stop", "el")
        assert re.fullmatch(r'\{\s*"a"\s*:\s*"h', completion.text)
        assert completion.logprobs is not None
        assert len(completion.logprobs) == len(completion.token_ids)
