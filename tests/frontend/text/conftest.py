"""Small tokenizers of every kind, trained on the spot, saved as model folders."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

# A failure prints how to replay it; nothing depends on how fast the machine is.
settings.register_profile("text", deadline=None, print_blob=True)
settings.load_profile("text")

CORPUS = [
    "The crew stands on the footplate and works the locomotive's engine, day and night.",
    "It didn't stop; it can't stop, they're 12 345 miles away and we've only 67 left!",
    "def tokenize(text):\n    return [word for word in text.split() if word]\n",
    "Die Köchin fährt über die große Brücke. L'été dernier, à la gare d'Orléans.",
    "Паровоз идёт вперёд, остановки нет. 机车在轨道上行驶。列車は夜に走る。",
    "hello world hello there the the the engine engine",
] * 4

SPECIAL = ["<unk>", "<s>", "</s>", "<|start|>", "<|end|>"]
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = (
    "{% for message in messages %}{{ '<|start|>' + message['role'] + '\\n' + "
    "message['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\\n' }}{% endif %}"
)


def _byte_level() -> Tokenizer:
    """Like Llama 3 and Qwen: byte-level BPE behind a regular expression."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.add_tokens([AddedToken("<think>"), AddedToken("two words")])
    _add_bos(tokenizer)
    return tokenizer


def _byte_fallback_bpe() -> Tokenizer:
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.train_from_iterator(
        CORPUS[:3],  # the rest is left to byte fallback
        trainers.BpeTrainer(
            vocab_size=600, special_tokens=[*SPECIAL, *byte_tokens], show_progress=False
        ),
    )
    # Trained as special tokens to get ids, but they are ordinary vocabulary: rebuild without.
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = [t for t in data["added_tokens"] if t["content"] in SPECIAL]
    return Tokenizer.from_str(json.dumps(data))


def _llama() -> Tokenizer:
    """Like Llama 2: spaces made visible by the normalizer, one put in front, byte fallback."""
    tokenizer = _byte_fallback_bpe()
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.pre_tokenizer = None
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    _add_bos(tokenizer)
    return tokenizer


def _gemma() -> Tokenizer:
    """Like Gemma: byte fallback, and no space in front."""
    tokenizer = _byte_fallback_bpe()
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    _add_bos(tokenizer)
    return tokenizer


def _unigram() -> Tokenizer:
    """Like T5: Unigram behind Metaspace; its special tokens are words of the model, too."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(
            vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    return tokenizer


def _wordpiece() -> Tokenizer:
    """Like BERT: lower case, words separated by the decoder."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.WordPieceTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")],
    )
    return tokenizer


def _words() -> Tokenizer:
    """A list of words, without a decoder."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(
        CORPUS, trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False)
    )
    return tokenizer


def _suffixed() -> Tokenizer:
    """Like the first GPT: words end in `</w>`, a decoder that `take_apart` does not know."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.BPEDecoder()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=SPECIAL,
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    return tokenizer


def _add_bos(tokenizer: Tokenizer) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )


BUILDERS: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": _byte_level,
    "llama": _llama,
    "gemma": _gemma,
    "unigram": _unigram,
    "wordpiece": _wordpiece,
    "words": _words,
    "suffixed": _suffixed,
}

CONFIG: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "chat_template": CHATML,
    "clean_up_tokenization_spaces": False,
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model folder per kind of tokenizer. Read only."""
    root = tmp_path_factory.mktemp("models")
    for kind, build in BUILDERS.items():
        folder = root / kind
        folder.mkdir()
        build().save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG))
    return {kind: root / kind for kind in BUILDERS}


@pytest.fixture(scope="session", params=BUILDERS)
def kind(request: pytest.FixtureRequest) -> str:
    """The kind of tokenizer; a test that takes it runs for each."""
    kind: str = request.param
    return kind


@pytest.fixture(scope="session")
def folder(folders: dict[str, Path], kind: str) -> Path:
    """The model folder of `kind`."""
    return folders[kind]
