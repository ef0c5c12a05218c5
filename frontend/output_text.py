"""The text of one completion: detokenized when somebody wants it, searched for stop strings as it
comes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from footplate.frontend.text import Detokenizer, StopStrings


class OutputText:
    """Owns how far a completion's tokens have become text, and the text nobody has taken yet.

    Args:
        detokenizer: of this completion alone.
        stops: None looks for none; then no text is made before it is taken.
        min_tokens: no stop string counts that is complete before there are more than these.
    """

    __slots__ = ("_detokenizer", "_min_tokens", "_pending", "_stops", "num_tokens", "stop")

    def __init__(
        self, detokenizer: "Detokenizer", stops: "StopStrings | None" = None, min_tokens: int = 0
    ) -> None:
        self._detokenizer = detokenizer
        self._stops = stops
        self._min_tokens = min_tokens
        self._pending = ""
        self.num_tokens = 0  # that have become text
        self.stop: str | None = None  # the stop string that ended the text

    @property
    def looks_for_stops(self) -> bool:
        """Whether `reach_stop` may find anything."""
        return self._stops is not None

    def reach_stop(self, token_ids: Sequence[int]) -> bool:
        """Go on to the end of `token_ids`, or to the first token that completes a stop string.

        Token by token, so that the text ends with the one that completed it. True if there was
        one: `num_tokens` then says how many tokens the completion has.
        """
        assert self._stops is not None
        while self.num_tokens < len(token_ids):
            token_id = token_ids[self.num_tokens]
            self.num_tokens += 1  # first: a token that has no text is not tried again
            delta = self._detokenizer.feed((token_id,))
            may_match = self.num_tokens > self._min_tokens
            shown, self.stop = self._stops.feed(delta, may_match=may_match)
            self._pending += shown
            if self.stop is not None:
                return True
        return False

    def take(self, token_ids: Sequence[int], *, is_over: bool) -> str:
        """The text that is new since the last call.

        Args:
            token_ids: all of the completion.
            is_over: no more will come, so nothing is held back any longer.
        """
        if self.num_tokens < len(token_ids):
            self._pending += self._detokenizer.feed(token_ids[self.num_tokens :])
            self.num_tokens = len(token_ids)
        if is_over and self.stop is None:
            rest = self._detokenizer.finish()
            if self._stops is not None:
                # The request has ended already: what matches now has not ended it.
                rest = self._stops.feed(rest, may_match=False)[0] + self._stops.finish()
            self._pending += rest
        taken, self._pending = self._pending, ""
        return taken
