"""Loading tokenizers and encoding text: the same ids as transformers, fewer dependencies."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from footplate.frontend.text import Tokenizer, TokenizerFacts, load_tokenizer
from footplate.protocol.errors import InvalidRequestError, TokenizerError

WORDS = ["the engine", " ", "\n", "12 345", "didn't", "Köchin", "机车", "🚂", "▁", "a\u0301", "ﬁ"]
SPECIAL = ["<s>", "</s>", "<|start|>", "<|end|>", "<unk>"]
ADDED = ["<think>", "two words", "<|", "|>"]
TEXT = st.lists(st.sampled_from(WORDS + SPECIAL + ADDED) | st.text(max_size=4), max_size=8).map(
    "".join
)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def folder_with(folders: dict[str, Path], tmp_path: Path, **files: Any) -> Path:
    """A copy of a model folder in which some files are replaced; None removes one."""
    folder = tmp_path / "model"
    shutil.copytree(folders["byte_level"], folder)
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        if content is None:
            path.unlink()
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@settings(max_examples=60)
@given(text=TEXT, add_special_tokens=st.booleans())
def test_ids_are_those_of_transformers(
    tokenizer: Tokenizer, reference: Any, text: str, add_special_tokens: bool
) -> None:
    expected = reference.encode(text, add_special_tokens=add_special_tokens)
    assert tokenizer.encode(text, add_special_tokens) == expected
    assert tokenizer.encode_batch([text, "x"], add_special_tokens)[0] == expected


@settings(max_examples=30)
@given(text=TEXT)
def test_decoding_them_is_too(tokenizer: Tokenizer, reference: Any, text: str) -> None:
    ids = reference.encode(text)
    for skip in (True, False):
        assert tokenizer.decode(ids, skip) == reference.decode(ids, skip_special_tokens=skip)


@settings(max_examples=60)
@given(text=TEXT)
def test_special_tokens_in_untrusted_text_become_characters(
    tokenizer: Tokenizer, text: str
) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False, allow_special=False)
    control = {tokenizer.token_to_id(token) for token in SPECIAL if token != "<unk>"}
    assert control.isdisjoint(ids)
    around = tokenizer.encode(text, allow_special=False)
    assert len(around) - len(ids) == len(tokenizer.encode("")) - len(tokenizer.encode("", False))


@settings(max_examples=30)
@given(text=st.text(max_size=30).filter(lambda text: not any(token in text for token in SPECIAL)))
def test_text_without_special_tokens_is_encoded_the_same_either_way(
    tokenizer: Tokenizer, text: str
) -> None:
    assert tokenizer.encode(text, allow_special=False) == tokenizer.encode(text)


def test_untrusted_text_decodes_to_itself(folders: dict[str, Path]) -> None:
    text = "the <|end|> of<s> it</s>"
    for kind in ("byte_level", "llama", "gemma"):
        tokenizer = load_tokenizer(folders[kind])
        assert tokenizer.decode(tokenizer.encode(text, allow_special=False)) == text


def test_a_normalizer_cannot_make_special_tokens_out_of_other_characters() -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    backend.normalizer = tokenizers.normalizers.NFKC()
    backend.add_tokens([tokenizers.AddedToken("<end>", special=True, normalized=True)])
    tokenizer = Tokenizer(backend)
    assert tokenizer.encode("\uff1cend\uff1e") == [1]
    assert tokenizer.encode("\uff1cend\uff1e", allow_special=False) == [0]


def test_special_tokens_in_a_prompt_are_read_as_tokens(folders: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(folders["byte_level"])
    end = tokenizer.token_to_id("<|end|>")
    assert end in tokenizer.encode("the <|end|>")
    assert end not in tokenizer.encode("the <|end|>", allow_special=False)


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb"])
def test_half_a_surrogate_pair_is_refused(folders: dict[str, Path], text: str) -> None:
    tokenizer = load_tokenizer(folders["byte_level"])
    for allow_special in (True, False):
        with pytest.raises(InvalidRequestError, match="surrogate"):
            tokenizer.encode(text, allow_special=allow_special)
    with pytest.raises(InvalidRequestError, match="surrogate"):
        tokenizer.encode_batch(["fine", text])
    assert tokenizer.token_to_id(text) is None


def test_the_vocabulary_can_be_looked_at(tokenizer: Tokenizer, reference: Any) -> None:
    assert tokenizer.vocab_size == len(reference)
    assert tokenizer.bos_token_id == reference.bos_token_id
    assert tokenizer.eos_token_id == reference.eos_token_id
    assert tokenizer.pad_token_id is None
    for token_id in range(tokenizer.vocab_size):
        token = tokenizer.id_to_token(token_id)
        assert token is not None
        assert tokenizer.token_to_id(token) == token_id
    assert tokenizer.id_to_token(tokenizer.vocab_size + 1000) is None
    assert tokenizer.token_to_id("no such token") is None


def test_every_token_has_a_text_of_its_own_however_often_it_is_asked_for(
    tokenizer: Tokenizer,
) -> None:
    for token_id in [*range(tokenizer.vocab_size), tokenizer.vocab_size + 1000]:
        text = tokenizer.decode([token_id], skip_special_tokens=False)
        assert [tokenizer.text_of_token(token_id) for _ in range(2)] == [text] * 2


def test_generation_config_adds_ways_to_end(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = folder_with(
        folders,
        tmp_path,
        config__json={"eos_token_id": 7, "pad_token_id": 8},
        generation_config__json={"eos_token_id": [4, 2]},
    )
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_token_id == 2  # the tokenizer's own comes first
    assert tokenizer.eos_token_ids == (2, 4)
    assert tokenizer.pad_token_id == 8


def test_the_model_s_configuration_names_what_the_tokenizer_s_does_not(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = folder_with(
        folders, tmp_path, tokenizer_config__json=None, config__json={"eos_token_id": 4}
    )
    assert load_tokenizer(folder).eos_token_id == 4
    assert load_tokenizer(folder).bos_token_id is None


CONFIGS: dict[str, dict[str, Any]] = {
    "new special tokens": {
        "tokenizer_config__json": {
            "eos_token": "<eos>",
            "pad_token": {"__type": "AddedToken", "content": "<pad>", "lstrip": True},
            "additional_special_tokens": ["<extra>"],
            "image_token": "<image>",
        }
    },
    "words that become special": {"tokenizer_config__json": {"eos_token": "the"}},
    "flags that differ from tokenizer.json": {
        "tokenizer_config__json": {
            "eos_token": "<think>",
            "added_tokens_decoder": {
                "3": {"content": "<|start|>", "rstrip": True, "special": True},
                "526": {"content": "<think>", "lstrip": True, "special": False},
                "900": {"content": "<new>", "special": False},
            },
        }
    },
    "files of older models": {
        "special_tokens_map__json": {"eos_token": {"content": "<|end|>", "rstrip": True}},
        "added_tokens__json": {"<old>": 528, "<older>": 529},
    },
    "special tokens read as text": {"tokenizer_config__json": {"split_special_tokens": True}},
    "named extra tokens": {
        "tokenizer_config__json": {"extra_special_tokens": {"call_token": "<call>"}}
    },
}


@pytest.mark.parametrize("case", CONFIGS)
def test_added_tokens_are_those_of_transformers(
    folders: dict[str, Path], tmp_path: Path, case: str
) -> None:
    from transformers import AutoTokenizer

    files = CONFIGS[case]
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    files = {**files, "tokenizer_config__json": files.get("tokenizer_config__json", {}) | config}
    folder = folder_with(folders, tmp_path, **files)
    tokenizer = load_tokenizer(folder)
    reference = AutoTokenizer.from_pretrained(folder)
    text = "the <eos> <pad><extra> <image>the <|start|> <think>  <new><old><older><|end|> <call>."
    ids = reference.encode(text)
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)
    assert tokenizer.vocab_size == len(reference)
    assert tokenizer.eos_token_id == reference.eos_token_id
    assert tokenizer.special_tokens == reference.special_tokens_map


def test_truncation_and_padding_left_in_the_file_are_ignored(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    data = json.loads((folders["byte_level"] / "tokenizer.json").read_text())
    data["truncation"] = {
        "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0,
    }  # fmt: skip
    data["padding"] = {
        "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>",
    }  # fmt: skip
    cut = load_tokenizer(folder_with(folders, tmp_path, tokenizer__json=data))
    text = "the crew stands on the footplate"
    assert cut.encode(text) == load_tokenizer(folders["byte_level"]).encode(text)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer__json": "{}"}, "tokenizer.json: cannot be loaded"),
        ({"tokenizer_config__json": "{"}, "tokenizer_config.json: cannot be read"),
        ({"tokenizer_config__json": "[]"}, "must hold a JSON object"),
        ({"tokenizer_config__json": {"added_tokens_decoder": 1}}, "make no sense"),
        ({"generation_config__json": {"eos_token_id": "x"}}, "make no sense"),
        ({"tokenizer__json": None, "tokenizer_config__json": None}, "there is no tokenizer.json"),
    ],
)
def test_an_unusable_folder_says_which_file_is_wrong(
    folders: dict[str, Path], tmp_path: Path, files: dict[str, Any], message: str
) -> None:
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(folder_with(folders, tmp_path, **files))


def test_a_missing_folder_is_an_error_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="no such folder"):
        load_tokenizer(tmp_path / "nowhere")


def bert_folder(tmp_path: Path) -> Path:
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "engine", "##s"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "cls_token": "[CLS]"})
    )
    return tmp_path


def test_a_folder_without_tokenizer_json_is_converted(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(bert_folder(tmp_path))
    ids = tokenizer.encode("The engines")
    assert [tokenizer.id_to_token(token_id) for token_id in ids] == [
        "[CLS]", "the", "engine", "##s", "[SEP]",
    ]  # fmt: skip
    assert tokenizer.decode(ids) == "the engines"


def test_converting_without_transformers_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(TokenizerError, match=r"footplate-llm\[engine\]"):
        load_tokenizer(bert_folder(tmp_path))


def test_code_in_the_folder_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "custom.py").write_text("raise SystemExit('ran')")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["custom.Custom", None]}})
    )
    with pytest.raises(TokenizerError):
        load_tokenizer(tmp_path)


def test_a_tokenizer_can_be_made_without_a_folder(folders: dict[str, Path]) -> None:
    backend = tokenizers.Tokenizer.from_file(str(folders["byte_level"] / "tokenizer.json"))
    tokenizer = Tokenizer(backend, TokenizerFacts(special_tokens={"eos_token": "</s>"}))
    assert tokenizer.eos_token_id == tokenizer.token_to_id("</s>")
    assert tokenizer.chat_template is None


def test_importing_the_package_imports_no_library(folders: dict[str, Path]) -> None:
    # And using it, chats included, never imports transformers or torch.
    program = """
import sys
import footplate.frontend.text
heavy = {"tokenizers", "jinja2", "transformers", "torch"}
print(sorted(heavy & sys.modules.keys()))
tokenizer = footplate.frontend.text.load_tokenizer(sys.argv[1])
tokenizer.encode_chat([{"role": "user", "content": "Hello"}])
print(sorted(heavy & sys.modules.keys()))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(folders["byte_level"])],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == ["[]", "['jinja2', 'tokenizers']"]
