"""The grammar engine: llguidance, over the vocabulary of the model's tokenizer.

Earley parsing over lexemes that are derivatives of regular expressions; a mask is one walk over
the trie of the vocabulary (https://github.com/guidance-ai/llguidance). Nothing here is imported,
and no vocabulary read, before the first grammar comes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from footplate.backend.runner.tokenizer_files import read_tokenizer
from footplate.backend.structured.interface import GrammarError
from footplate.protocol.grammar_limits import PARSER_LIMITS, GrammarLimitError, check_grammar

if TYPE_CHECKING:
    import numpy.typing as npt

    from footplate.protocol.token_params import Grammar

logger = logging.getLogger(__name__)

NEVER_SAMPLED = "<|footplate: no end of sequence|>"
Result = TypeVar("Result")


class LlguidanceEngine:
    """Owns the vocabulary in llguidance's form; it is built with the first grammar.

    Args:
        tokenizer: a folder with `tokenizer.json`, or the older files that transformers converts.
        vocab_size: columns of the model's logits. The tokenizer may know more tokens or fewer.
        eos_token_ids: tokens that end a text. May be empty: then nothing is allowed behind a
            complete output.
    """

    def __init__(self, tokenizer: str, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._folder = Path(tokenizer)
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._limits = LLParserLimits(**PARSER_LIMITS)
        self._lock = Lock()
        self._vocabulary: Vocabulary | None = None
        self._problem = ""

    def compile(self, grammar: Grammar) -> LlguidanceGrammar:
        """See `GrammarEngine`. One step is tried, too: the first mask is the most expensive one,
        and a step shows what the text of a grammar does not, such as that no output fits it."""
        try:
            check_grammar(grammar.text)
        except GrammarLimitError as error:
            raise GrammarError(f"the grammar is too large: {error}") from None
        vocabulary = self._load_vocabulary()
        pristine = guarded(
            lambda: LLMatcher(vocabulary.tokenizer, grammar.text, limits=self._limits, log_level=0)
        )
        raise_error_of(pristine)
        compiled = LlguidanceGrammar(pristine, vocabulary)
        self._try_step(compiled.start())
        return compiled

    def _try_step(self, matcher: LlguidanceMatcher) -> None:
        mask = np.zeros((self._vocab_size + 31) // 32, np.int32)
        matcher.fill_mask(mask)
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
        matcher.advance([int(bits.argmax())])

    def _load_vocabulary(self) -> Vocabulary:
        with self._lock:
            if self._vocabulary is None and not self._problem:
                since = time.perf_counter()
                try:
                    self._vocabulary = guarded(self._read_vocabulary)
                except Exception as error:  # anything that can be wrong with a folder
                    text = " ".join(str(error).split())[:200]
                    self._problem = f"the model's tokenizer cannot be used for grammars: {text}"
                    logger.warning("%s", self._problem)
                else:
                    seconds = time.perf_counter() - since
                    logger.info("vocabulary for grammars built in %.3f s", seconds)
            if self._vocabulary is None:
                raise GrammarError(self._problem)
            return self._vocabulary

    def _read_vocabulary(self) -> Vocabulary:
        backend = read_tokenizer(self._folder)
        num_tokens = backend.get_vocab_size(with_added_tokens=True)
        eos = [i for i in self._eos_token_ids if i < min(num_tokens, self._vocab_size)]
        never: int | None = None
        if not eos:
            # llguidance needs one. It gets a token that no model has, so that it cannot be chosen.
            backend.add_special_tokens([NEVER_SAMPLED])
            never = backend.token_to_id(NEVER_SAMPLED)
            assert never is not None
            eos, num_tokens = [never], backend.get_vocab_size(with_added_tokens=True)
        tokenizer = LLTokenizer(
            backend.to_str(), n_vocab=max(num_tokens, self._vocab_size), eos_token=eos
        )
        added = backend.get_added_tokens_decoder()
        special = {token_id for token_id, token in added.items() if token.special}
        return Vocabulary(
            tokenizer, self._vocab_size, frozenset(eos), never, frozenset(eos) - special
        )


class Vocabulary:
    """llguidance's tokenizer and how its masks become the model's.

    Attributes:
        eos_token_ids: tokens that end an output where the grammar allows it.
        never_sampled: the end-of-sequence token of a model that has none, and no column of logits.
        written_ends: end-of-sequence tokens that are text to the tokenizer, such as a line break.
            llguidance allows them wherever their text may stand, but takes them for the end.
    """

    def __init__(
        self,
        tokenizer: LLTokenizer,
        vocab_size: int,
        eos_token_ids: frozenset[int],
        never_sampled: int | None,
        written_ends: frozenset[int],
    ) -> None:
        self.tokenizer = tokenizer
        self.eos_token_ids = eos_token_ids
        self.never_sampled = never_sampled
        self.written_ends = written_ends
        self._vocab_size = vocab_size
        self._num_words = (tokenizer.vocab_size + 31) // 32
        self._is_direct = tokenizer.vocab_size == vocab_size and never_sampled is None

    def fill_mask(self, matcher: LLMatcher, mask: npt.NDArray[np.int32]) -> None:
        """Write `matcher`'s mask for the model's columns."""
        if self._is_direct:
            matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
            self._forbid_written_ends(matcher, mask)
            return
        own = np.zeros(self._num_words, np.int32)
        matcher.unsafe_compute_mask_ptr(own.ctypes.data, own.nbytes)
        if self.never_sampled is not None:
            own.view(np.uint32)[self.never_sampled // 32] &= ~np.uint32(
                1 << self.never_sampled % 32
            )
        mask[:] = own[: mask.size]
        if tail := self._vocab_size % 32:
            mask.view(np.uint32)[-1] &= np.uint32((1 << tail) - 1)
        self._forbid_written_ends(matcher, mask)

    def _forbid_written_ends(self, matcher: LLMatcher, mask: npt.NDArray[np.int32]) -> None:
        """Inside of an output its end is no text."""
        if self.written_ends and not matcher.is_accepting():
            for token_id in self.written_ends:
                mask.view(np.uint32)[token_id // 32] &= ~np.uint32(1 << token_id % 32)


class LlguidanceGrammar:
    """A grammar that compiled. Owns a matcher that never moves; requests get copies of it."""

    def __init__(self, pristine: LLMatcher, vocabulary: Vocabulary) -> None:
        self._pristine = pristine
        self._vocabulary = vocabulary

    def start(self) -> LlguidanceMatcher:
        """A matcher at the beginning of an output; shares no state with any other."""
        return LlguidanceMatcher(guarded(self._pristine.deep_copy), self._vocabulary)


class LlguidanceMatcher:
    """Where one output stands. After an error it stays in error."""

    def __init__(self, matcher: LLMatcher, vocabulary: Vocabulary) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary

    def advance(self, token_ids: Sequence[int]) -> bool:
        """See `Matcher`. An end-of-sequence token where the grammar allows one is the end, too."""
        if not token_ids:
            return self._is_complete()
        if not guarded(lambda: self._matcher.consume_tokens(list(token_ids))):
            raise_error_of(self._matcher, "the output does not match its grammar")
        return self._is_complete()

    def _is_complete(self) -> bool:
        if self._matcher.is_stopped():
            self._raise_if_dead()
            return True
        if self._vocabulary.never_sampled is None or not self._matcher.is_accepting():
            return False
        # Without an end-of-sequence token nobody could say that nothing more comes.
        mask = np.frombuffer(guarded(self._matcher.compute_bitmask), np.uint8)
        never = self._vocabulary.never_sampled
        return int(np.count_nonzero(mask)) == 1 and mask[never // 8] == 1 << never % 8

    def fill_mask(self, mask: npt.NDArray[np.int32]) -> None:
        """See `Matcher`. A mask without any token is an error, too."""
        guarded(lambda: self._vocabulary.fill_mask(self._matcher, mask))
        if not mask.any():
            raise_error_of(self._matcher, "the grammar allows no token here")
        self._raise_if_dead()

    def _raise_if_dead(self) -> None:
        """In a state that no text leads out of, llguidance allows the end all the same."""
        if self._matcher.is_stopped() and not self._matcher.is_accepting():
            raise_error_of(self._matcher, "no output matches the grammar")


def guarded(work: Callable[[], Result]) -> Result:
    """Do something in Rust, where a broken invariant is a panic, which is no `Exception`.

    Raises:
        GrammarError: it panicked.
    """
    try:
        return work()
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise GrammarError(f"the grammar engine failed: {' '.join(str(error).split())}") from None


def raise_error_of(matcher: LLMatcher, otherwise: str = "") -> None:
    """Raise the error that a matcher is in, or `otherwise` if it is in none.

    Raises:
        GrammarError: in one line.
    """
    if matcher.is_error():
        message = matcher.get_error()
        if message.startswith("panic"):
            message = "it is too large for the grammar engine"
        elif "NoExtension" in message:
            message = "no output matches the grammar"
        elif "no error message" in message or "doesn't satisfy" in message:
            message = otherwise  # theirs speaks of bytes
        raise GrammarError(message.split("\n")[0][:300] or "the grammar engine failed")
    if otherwise:
        raise GrammarError(otherwise)
