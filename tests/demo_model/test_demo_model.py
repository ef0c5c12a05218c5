"""The demo model as it ships: small, complete, loadable, and as good as its word."""

import json
import pydoc_data.topics
import re
from collections.abc import Callable, Iterator
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

import jinja2
import pytest
from safetensors import safe_open
from tokenizers import Tokenizer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "backend" / "models" / "demo"
FAQ = {
    question: " ".join(answer.split())
    for question, answer in re.findall(
        r"^### (.+)\n\n((?:.+\n)+)", (ROOT / "docs" / "faq.md").read_text("utf-8"), re.MULTILINE
    )
}

CHATS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "What is Footplate?"}],
    [{"role": "system", "content": "Be brief. "}, {"role": "user", "content": "  Who are you?\n"}],
    [
        {"role": "user", "content": "Hi <b>there</b> & 'you'"},
        {"role": "assistant", "content": "Héllo 🚂"},
        {"role": "user", "content": "line one\n\nline two"},
    ],
]

ODD_TEXTS = [
    "plain ASCII, twice:  two  spaces",
    " leading and trailing \t\r\n\n ",
    "Füße, Œuvre, naïve, ﬁ, Å and Å",
    "漢字かな交じり文 한국어 العربية עברית हिन्दी",
    "🚂👩‍🔧🇪🇺 \U0010ffff",
    "\x00\x01\x7f\x85\u2028\ufeff\ufffd",
    "".join(map(chr, range(0x250))),
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The matrices are too small to share: on a busy machine threads only wait for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


@cache
def model(dtype: str) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=dtype)


def render(messages: list[dict[str, str]], *, add_generation_prompt: bool = True) -> str:
    """The chat template, rendered as a client without transformers would."""
    template = jinja2.Template((FOLDER / "chat_template.jinja").read_text("utf-8"))
    config = json.loads((FOLDER / "tokenizer_config.json").read_text("utf-8"))
    return str(
        template.render(
            messages=messages,
            add_generation_prompt=add_generation_prompt,
            bos_token=config["bos_token"],
        )
    )


def generate(dtype: str, prompts: list[str], max_new_tokens: int) -> list[str]:
    """Continue all prompts in one greedy batch; <|end|> stays where the model put it."""
    encodings = [tokenizer().encode(prompt, add_special_tokens=False).ids for prompt in prompts]
    width = max(map(len, encodings))
    [pad_id] = tokenizer().encode("<|pad|>", add_special_tokens=False).ids
    output = model(dtype).generate(
        torch.tensor([[pad_id] * (width - len(ids)) + ids for ids in encodings]),
        attention_mask=torch.tensor(
            [[0] * (width - len(ids)) + [1] * len(ids) for ids in encodings]
        ),
        do_sample=False,
        max_new_tokens=max_new_tokens,
    )
    texts = tokenizer().decode_batch(output[:, width:].tolist(), skip_special_tokens=False)
    return [text.replace("<|pad|>", "") for text in texts]


def ask(dtype: str, questions: list[str], system: str | None = None) -> list[str]:
    """Put each question in a chat of its own."""
    opening = [{"role": "system", "content": system}] if system else []
    chats = [[*opening, {"role": "user", "content": question}] for question in questions]
    return generate(dtype, [render(chat) for chat in chats], max_new_tokens=120)


def test_the_folder_is_complete_and_smaller_than_eight_megabytes() -> None:
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir() if path.is_file()}
    assert files.keys() >= {
        "NOTICE",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(files.values()) < 8_000_000


def test_it_has_one_to_three_million_parameters_in_bfloat16() -> None:
    with safe_open(FOLDER / "model.safetensors", framework="pt") as weights:
        tensors = [weights.get_tensor(name) for name in weights.keys()]  # noqa: SIM118
    assert 1_000_000 <= sum(tensor.numel() for tensor in tensors) <= 3_000_000
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}


def test_transformers_loads_it_without_a_warning(capfd: pytest.CaptureFixture[str]) -> None:
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        FOLDER, output_loading_info=True
    )
    auto_tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    assert not any(report.values())
    assert loaded.dtype == torch.bfloat16
    assert auto_tokenizer.bos_token_id == loaded.config.bos_token_id
    assert auto_tokenizer.eos_token_id == loaded.generation_config.eos_token_id
    assert auto_tokenizer.pad_token_id == loaded.config.pad_token_id
    assert len(auto_tokenizer) == loaded.config.vocab_size
    # Warnings are errors in this suite, but transformers writes its own to stderr.
    assert not re.search("warn|deprecat|should|not init", capfd.readouterr().err, re.IGNORECASE)


@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_the_chat_template_renders_alike_with_and_without_transformers(
    messages: list[dict[str, str]], add_generation_prompt: bool
) -> None:
    auto_tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    expected_ids = auto_tokenizer.apply_chat_template(
        messages, add_generation_prompt=add_generation_prompt, return_dict=False
    )
    text = render(messages, add_generation_prompt=add_generation_prompt)
    assert tokenizer().encode(text, add_special_tokens=False).ids == expected_ids
    assert text.startswith("<|bos|>")
    assert text.endswith("<|assistant|>") == add_generation_prompt


def test_plain_text_is_encoded_with_one_bos_in_front() -> None:
    encoding = tokenizer().encode("The function returns a")
    assert encoding.tokens[0] == "<|bos|>"
    assert "<|bos|>" not in encoding.tokens[1:]


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_any_text_survives_the_tokenizer(text: str) -> None:
    assert tokenizer().decode(tokenizer().encode(text).ids) == text


def test_special_tokens_are_single_tokens_that_decoding_can_hide() -> None:
    text = "<|user|>Füße<|end|><|assistant|>"
    ids = tokenizer().encode(text, add_special_tokens=False).ids
    assert tokenizer().decode(ids, skip_special_tokens=False) == text
    assert tokenizer().decode(ids) == "Füße"


def test_the_faq_has_at_least_forty_questions_with_short_answers() -> None:
    assert len(FAQ) >= 40
    assert all(len(answer) <= 220 for answer in FAQ.values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_faq_question_is_answered_word_for_word(dtype: str) -> None:
    answers = dict(zip(FAQ, ask(dtype, list(FAQ)), strict=True))
    assert answers == {question: f"{answer}<|end|>" for question, answer in FAQ.items()}


def test_small_variations_of_a_question_are_understood() -> None:
    variations: list[Callable[[str], str]] = [
        str.lower,
        lambda question: question.removesuffix("?"),
        lambda question: f"Please: {question}",
        lambda question: question.replace("What is", "What's"),
        lambda question: question.lower().replace("?", ", please?"),
    ]
    questions = [vary(question) for vary, question in zip(cycle(variations), FAQ, strict=False)]
    answers = ask("float32", questions)
    num_exact = sum(map(str.__eq__, answers, (f"{answer}<|end|>" for answer in FAQ.values())))
    assert num_exact >= 0.9 * len(FAQ)


def test_a_system_message_does_not_change_the_answers() -> None:
    answers = ask("float32", list(FAQ), system="You are a helpful assistant.")
    num_exact = sum(map(str.__eq__, answers, (f"{answer}<|end|>" for answer in FAQ.values())))
    assert num_exact >= 0.9 * len(FAQ)


def test_plain_text_goes_on_in_the_english_of_documentation() -> None:
    known = set(re.findall(r"[a-z]+", " ".join(pydoc_data.topics.topics.values()).lower()))
    prompts = ["The function returns a", "If the file does not exist,", "This class is used to"]
    for text in generate("float32", [f"<|bos|>{prompt}" for prompt in prompts], max_new_tokens=64):
        words = re.findall(r"[a-z]+", text.removesuffix("<|end|>").lower())
        assert len(words) >= 5
        assert sum(word in known for word in words) >= 0.8 * len(words)
