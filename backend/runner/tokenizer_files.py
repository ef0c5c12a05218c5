"""The model's tokenizer, for what the core needs of it: which bytes each token stands for.

Text belongs to the client; its `frontend.text` reads the same files with more care for it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers


def read_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a model folder, with the added tokens that only its other files name.

    Raises:
        Exception: there is none that can be read.
    """
    import tokenizers

    file = folder / "tokenizer.json"
    if file.is_file():
        backend = tokenizers.Tokenizer.from_file(str(file))
    else:
        from transformers import AutoTokenizer

        converted = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        )
        backend = converted.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    _add_tokens(backend, folder / "tokenizer_config.json")
    return backend


def _add_tokens(backend: tokenizers.Tokenizer, config: Path) -> None:
    from tokenizers import AddedToken

    if not config.is_file():
        return
    decoder: dict[str, dict[str, Any]] = json.loads(config.read_text(encoding="utf-8")).get(
        "added_tokens_decoder", {}
    )
    for token_id, token in sorted(decoder.items(), key=lambda item: int(item[0])):
        # Ids are given in order: one that would get another id than its own is left out.
        if backend.id_to_token(int(token_id)) is None and (
            int(token_id) == backend.get_vocab_size(with_added_tokens=True)
        ):
            special = bool(token.get("special"))
            backend.add_tokens([AddedToken(token["content"], special=special)])
