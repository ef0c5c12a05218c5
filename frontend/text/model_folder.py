"""What a model folder's JSON files say about its tokenizer.

Reads small files only, and decides which of them wins, in transformers' order; building the
tokenizer is `tokenizer.py`'s part.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from footplate.protocol.errors import TokenizerError

_NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)

# Keyword arguments of `tokenizers.AddedToken`: a plain dict, so that reading a folder needs no
# tokenizer library.
Token = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class TokenizerFacts:
    """All that is known about a tokenizer beside its vocabulary.

    Attributes:
        special_tokens: name to text, such as {"bos_token": "<s>"}; chat templates see them.
        redefined_tokens: added tokens whose flags replace those in tokenizer.json.
        needed_tokens: added tokens to create where tokenizer.json has none; new ones get their
            ids in this order.
        chat_templates: name to Jinja source; the plain one is called "default".
        generation_ids: the ids the model's own configuration gives for "eos_token_id" and so
            on; a tuple, for a model may end a text in more than one way.
        split_special_tokens: the folder asks for special tokens to be read as plain text.
    """

    special_tokens: dict[str, str] = field(default_factory=dict)
    redefined_tokens: list[Token] = field(default_factory=list)
    needed_tokens: list[Token] = field(default_factory=list)
    chat_templates: dict[str, str] = field(default_factory=dict)
    generation_ids: dict[str, tuple[int, ...]] = field(default_factory=dict)
    split_special_tokens: bool = False


def read_tokenizer_facts(folder: Path) -> TokenizerFacts:
    """Read everything but the vocabulary; every one of the files is optional.

    Raises:
        TokenizerError: a file is there and cannot be understood.
    """
    config = _read_json(folder / "tokenizer_config.json")
    legacy_added_tokens: dict[str, Any] = {}
    if "added_tokens_decoder" not in config:
        # Folders older than that key spread the same facts over two more files.
        config |= _read_json(folder / "special_tokens_map.json")
        legacy_added_tokens = _read_json(folder / "added_tokens.json")
    try:
        named, extra = _special_tokens(config)
        special = {token["content"] for token in (*named.values(), *extra)}
        return TokenizerFacts(
            special_tokens={name: token["content"] for name, token in named.items()},
            redefined_tokens=[
                token | {"special": token.get("special") or token["content"] in special}
                for _, token in _sorted_by_id(config.get("added_tokens_decoder", {}))
            ],
            needed_tokens=[
                *(
                    {"content": content, "special": content in special}
                    for content, _ in sorted(legacy_added_tokens.items(), key=lambda item: item[1])
                ),
                *(token | {"special": True} for token in (*named.values(), *extra)),
            ],
            chat_templates=_chat_templates(folder, config),
            generation_ids=_generation_ids(folder),
            split_special_tokens=config.get("split_special_tokens") is True,
        )
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise TokenizerError(f"{folder}: the tokenizer's files make no sense: {error!r}") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{path}: must hold a JSON object")
    return content


def _special_tokens(config: dict[str, Any]) -> tuple[dict[str, Token], list[Token]]:
    """Return the tokens that have a name, well-known names first, and those that have none."""
    names = [*_NAMED_TOKENS, *(key for key in config if key.endswith("_token"))]
    named = {name: _token(config[name]) for name in names if _is_token(config.get(name))}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if isinstance(extra, dict):
        return named | {name: _token(token) for name, token in extra.items()}, []
    return named, [_token(token) for token in extra]


def _is_token(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and "content" in value)


def _token(value: Any) -> Token:
    if isinstance(value, str):
        return {"content": value}
    keys = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    return {key: value[key] for key in keys if key in value}


def _sorted_by_id(tokens: dict[str, Any]) -> list[tuple[int, Token]]:
    return sorted(
        ((int(token_id), _token(token)) for token_id, token in tokens.items()),
        key=lambda item: item[0],
    )


def _chat_templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Template files of their own win over whatever tokenizer_config.json holds."""
    files = {
        path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))
    }
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    if files:
        return {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    template = config.get("chat_template")
    if template is None:
        return {}
    if isinstance(template, str):
        return {"default": template}
    return {entry["name"]: entry["template"] for entry in template}


def _generation_ids(folder: Path) -> dict[str, tuple[int, ...]]:
    ids: dict[str, tuple[int, ...]] = {}
    # generation_config.json is about generating: what it says replaces what config.json says.
    for file in ("config.json", "generation_config.json"):
        config = _read_json(folder / file)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = config.get(name)
            if value is not None:
                ids[name] = tuple(value) if isinstance(value, list) else (int(value),)
    return ids
