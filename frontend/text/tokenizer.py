"""A model's tokenizer: text to ids, chats to ids, ids to text.

Built on the `tokenizers` library alone, so that a client needs neither transformers nor torch.
What `tokenizer.json` says is the truth: ids are those transformers' `AutoTokenizer` gives when it
loads that file, which is what it does for most models. (For a few classes, such as
`LlamaTokenizer`, transformers 5 takes only the vocabulary and builds the rest from memory.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from footplate.frontend.text.chat_template import ChatTemplate, Message
from footplate.frontend.text.detokenizer import (
    Detokenizer,
    PieceDetokenizer,
    SpacelessDetokenizer,
    WindowDetokenizer,
)
from footplate.frontend.text.encoder import Encoder
from footplate.frontend.text.model_folder import TokenizerFacts, read_tokenizer_facts
from footplate.frontend.text.pieces import PieceTable, take_apart, token_of
from footplate.protocol.errors import InvalidRequestError, TokenizerError

if TYPE_CHECKING:
    import tokenizers


class ChatPrompt(NamedTuple):
    """A rendered conversation, as text and as the ids the model will see."""

    text: str
    token_ids: list[int]


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load the tokenizer of a model folder.

    A folder without `tokenizer.json` is converted by transformers, imported only then. Code in
    the folder is never run.

    Raises:
        TokenizerError: there is no tokenizer in the folder, or none that can be loaded here.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise TokenizerError(f"{folder}: no such folder")
    facts = read_tokenizer_facts(folder)
    file = folder / "tokenizer.json"
    if not file.is_file():
        return Tokenizer(_convert(folder), facts)

    import tokenizers

    try:
        return Tokenizer(tokenizers.Tokenizer.from_file(str(file)), facts)
    except Exception as error:  # the library has no error class of its own
        raise TokenizerError(f"{file}: cannot be loaded: {error}") from error


def _convert(folder: Path) -> tokenizers.Tokenizer:
    """Let transformers build a fast tokenizer from older files (`tokenizer.model`, vocab.txt)."""
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise TokenizerError(
            f"{folder}: there is no tokenizer.json, and converting other tokenizer files needs "
            "transformers: pip install 'footplate-llm[engine]'"
        ) from error
    try:
        converted = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # anything, from missing files to code it refuses to run
        raise TokenizerError(
            f"{folder}: there is no tokenizer.json, and transformers finds no other tokenizer: "
            f"{error}"
        ) from error
    backend = getattr(converted, "backend_tokenizer", None)
    if backend is None:
        raise TokenizerError(
            f"{folder}: {type(converted).__name__} cannot be converted to a tokenizer.json"
        )
    result: tokenizers.Tokenizer = backend
    return result


class Tokenizer:
    """Everything between token ids and characters for one model.

    Owns the vocabulary and the tables made from it; holds no state of any request, and may be
    used from several threads. Made by `load_tokenizer`.

    Attributes:
        special_token_texts: of all tokens that are special.

    Args:
        backend: configured here, so it must not be shared.
        facts: what is known beside the vocabulary.
    """

    def __init__(self, backend: tokenizers.Tokenizer, facts: TokenizerFacts | None = None) -> None:
        facts = facts or TokenizerFacts()
        _add_tokens(backend, facts)
        # Training settings that some files still carry: prompts are never cut or filled up.
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = facts.split_special_tokens
        self._backend = backend
        self._facts = facts
        added = backend.get_added_tokens_decoder()
        self._added_tokens = {token_id: token.content.encode() for token_id, token in added.items()}
        special = {token_id: token.content for token_id, token in added.items() if token.special}
        self._special_ids = frozenset(special)
        self.special_token_texts = frozenset(special.values())
        self._encoder = Encoder(backend, special, facts.special_tokens.get("unk_token"))
        self._token_texts: dict[int, str] = {}  # for logprobs, which name the same ones often
        self._pieces: dict[bool, PieceTable] | None = None
        if (token_bytes := take_apart(backend)) is not None:
            self._pieces = {
                skip: PieceTable(backend, token_bytes, self._special_ids if skip else frozenset())
                for skip in (False, True)
            }

    @cached_property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; a model's logits may have more columns."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @cached_property
    def bos_token_id(self) -> int | None:
        """The token that begins a text, if the model has one."""
        return self._first_id("bos_token")

    @cached_property
    def eos_token_id(self) -> int | None:
        """The token that ends a text; `eos_token_ids` has all of them."""
        return self._first_id("eos_token")

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """All tokens that end a text: the tokenizer's, then those of generation_config.json."""
        return self._ids_of("eos_token")

    @cached_property
    def pad_token_id(self) -> int | None:
        """The token that fills up batches, if the model has one."""
        return self._first_id("pad_token")

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """Name to text, such as {"eos_token": "</s>"}."""
        return self._facts.special_tokens

    @property
    def chat_template(self) -> str | None:
        """The source of the default chat template; None if there is none."""
        return self._facts.chat_templates.get("default")

    def token_to_id(self, token: str) -> int | None:
        """The id of a token, or None if the vocabulary does not hold it."""
        try:
            return self._backend.token_to_id(token)
        except UnicodeEncodeError:  # a lone surrogate: no vocabulary holds one
            return None

    def id_to_token(self, token_id: int) -> str | None:
        """The vocabulary's spelling of a token (`Ġthe`, `▁the`), or None for an unused id."""
        return token_of(self._backend, token_id)

    def encode(
        self, text: str, add_special_tokens: bool = True, *, allow_special: bool = True
    ) -> list[int]:
        """Turn text into token ids.

        Args:
            text: any text; nothing is cut off.
            add_special_tokens: add what the model expects around a text, usually a BOS token.
                Not for the output of a chat template, which writes its own.
            allow_special: read `<|im_end|>` and the like as the token of that name. The default,
                as in transformers and vLLM: a prompt is often a chat that somebody has rendered.
                With False such text becomes ordinary characters; use it for text of users you do
                not trust.

        Raises:
            InvalidRequestError: the text holds half of a surrogate pair, which is no character.
        """
        return self._encoder.encode(text, add_special_tokens, allow_special)

    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool = True, *, allow_special: bool = True
    ) -> list[list[int]]:
        """Turn many texts into token ids: `encode` for each, on all cores."""
        if not allow_special:
            return [self.encode(text, add_special_tokens, allow_special=False) for text in texts]
        return self._encoder.encode_batch(texts, add_special_tokens)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Turn token ids into text; ids outside the vocabulary have none.

        Equal to transformers' decode (without its `clean_up_tokenization_spaces`), except where
        byte-fallback tokens do not add up to characters: transformers then shows the whole run
        of byte tokens as U+FFFD, valid characters included; here, as in SentencePiece, only the
        bytes that belong to no character. Otherwise one bad byte could take back text that has
        been streamed.
        """
        if self._pieces is None:
            token_ids = [each for each in token_ids if self.id_to_token(each) is not None]
            return self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)
        detokenizer = PieceDetokenizer(self._pieces[skip_special_tokens])
        return detokenizer.feed(token_ids) + detokenizer.finish()

    def text_of_token(self, token_id: int) -> str:
        """The text of one token by itself, special ones too; U+FFFD for part of a character."""
        text = self._token_texts.get(token_id)
        if text is None:
            text = self.decode((token_id,), skip_special_tokens=False)
            if 0 <= token_id < self.vocab_size:
                self._token_texts[token_id] = text
        return text

    def detokenizer(
        self,
        prompt_token_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> Detokenizer:
        """Start the text of one request's output, which follows `prompt_token_ids`.

        Args:
            prompt_token_ids: only the last few are looked at.
            skip_special_tokens: leave special tokens out of the text.
            spaces_between_special_tokens: with False, and special tokens shown, a decoder that
                separates words does not separate an added token from another one before it.
        """
        if self._pieces is None:
            hidden = self._special_ids if skip_special_tokens else frozenset()
            return WindowDetokenizer(
                lambda ids: self._backend.decode(ids, skip_special_tokens=False),
                lambda token_id: token_id not in hidden and self.id_to_token(token_id) is not None,
                prompt_token_ids,
            )
        pieces = self._pieces[skip_special_tokens]
        if skip_special_tokens or spaces_between_special_tokens:
            return PieceDetokenizer(pieces, prompt_token_ids)
        return SpacelessDetokenizer(pieces, prompt_token_ids, self._added_tokens)

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **variables: Any,
    ) -> str:
        """Render a conversation as transformers' method of that name does, to text.

        To get ids, use `encode_chat`: in the text, a special token that a user typed cannot be
        told from the template's own.

        Args:
            messages: see `ChatTemplate.render`.
            add_generation_prompt: begin the assistant's answer. None means: yes, unless
                `continue_final_message`.
            tools: JSON schemas of functions the model may call.
            chat_template: Jinja source, or the name of one of the model's templates. None means
                "tool_use" if there are tools and such a template, else "default". A template is
                code: do not take it from a request.
            continue_final_message: leave the last message open, for the model to go on with.
            chat_template_kwargs: further template variables, such as `enable_thinking`. What
                comes from a request belongs here: names like `chat_template` are refused.
            variables: the same, for callers who know the names they write.

        Raises:
            InvalidParameterError: a variable has the name of something the template relies on.
            InvalidRequestError: the messages are malformed, the template refused them, or there
                is no template.
        """
        return self._render_chat(
            None,
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            chat_template=chat_template,
            continue_final_message=continue_final_message,
            chat_template_kwargs=chat_template_kwargs,
            **variables,
        )

    def encode_chat(
        self, messages: Sequence[Message], *, allow_special: bool = False, **options: Any
    ) -> ChatPrompt:
        """Render a conversation to token ids; adds no BOS token, for templates write their own.

        Args:
            messages: see `ChatTemplate.render`.
            allow_special: what special tokens in messages, tools and variables mean. False, the
                default, takes them for the characters they are: whoever writes a message must
                not be able to end it and speak as somebody else. True is what vLLM does. Added
                tokens that are not special, such as `<think>`, are ordinary words either way.
            options: the other arguments of `apply_chat_template`, with the same errors.
        """
        literal_text = self._encoder.literal_text
        marked = False

        def mark_if_needed(data: Any) -> Any:
            nonlocal marked
            marked = literal_text.occurs_in(data)
            return literal_text.mark(data) if marked else data

        text = self._render_chat(None if allow_special else mark_if_needed, messages, **options)
        if not marked:
            return ChatPrompt(text, self._encoder.encode(text, add_special_tokens=False))
        return ChatPrompt(literal_text.unmark(text), self._encoder.encode_marked(text))

    def _render_chat(
        self,
        rewrite: Callable[[Any], Any] | None,
        messages: Sequence[Message],
        /,
        *,
        add_generation_prompt: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **variables: Any,
    ) -> str:
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        return self._chat_template(chat_template, with_tools=tools is not None).render(
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            continue_final_message=continue_final_message,
            variables={**variables, **(chat_template_kwargs or {})},
            rewrite=rewrite,
        )

    def _first_id(self, name: str) -> int | None:
        return next(iter(self._ids_of(name)), None)

    def _ids_of(self, name: str) -> tuple[int, ...]:
        """Ids for a special token's name: the tokenizer's own, then the model configuration's."""
        configured = self._facts.generation_ids.get(f"{name}_id", ())
        token = self._facts.special_tokens.get(name)
        own = None if token is None else self.token_to_id(token)
        return tuple(dict.fromkeys(configured if own is None else (own, *configured)))

    def _chat_template(self, choice: str | None, with_tools: bool) -> ChatTemplate:
        templates = self._facts.chat_templates
        if choice is None:
            choice = "tool_use" if with_tools and "tool_use" in templates else "default"
            if choice not in templates:
                raise InvalidRequestError(
                    f"the model has several chat templates, choose one of {sorted(templates)}"
                    if templates
                    else "the model has no chat template: pass chat_template, or a plain prompt"
                )
        return ChatTemplate(templates.get(choice, choice), self._facts.special_tokens)


def _add_tokens(backend: tokenizers.Tokenizer, facts: TokenizerFacts) -> None:
    """Give the vocabulary the tokens that only the folder's other files know about."""
    from tokenizers import AddedToken

    present = {token.content for token in backend.get_added_tokens_decoder().values()}
    present.update(token["content"] for token in facts.redefined_tokens)
    needed = [token for token in facts.needed_tokens if token["content"] not in present]
    tokens = [AddedToken(**token) for token in (*facts.redefined_tokens, *needed)]
    if tokens:
        backend.add_tokens(tokens)
