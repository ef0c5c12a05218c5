"""Stop strings, found in a text that arrives in pieces.

Pure text: knows neither tokens nor requests. The automaton is Aho and Corasick's (CACM 1975);
its state is exactly what a stream has to hold back, so nothing is held back for safety's sake.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from footplate.protocol.errors import InvalidParameterError


class StopStrings:
    """Finds the first completed stop string in one request's text.

    The match is the stop string that is *complete* first, whatever the order of `stops` or the
    chunks of the text. Of several that are complete at the same character (each is then the end
    of the next longer one) the longest wins, so that nothing of it is left in the text.

    Takes time linear in the text, plus, once, linear in the stop strings.

    Args:
        stops: non-empty strings; an empty sequence never matches.
        include_stop_str_in_output: show the stop string itself too.

    Raises:
        InvalidParameterError: `stops` is a bare string, or holds an empty or non-string value.
    """

    def __init__(self, stops: Sequence[str], include_stop_str_in_output: bool = False) -> None:
        if isinstance(stops, str) or not all(isinstance(stop, str) and stop for stop in stops):
            raise InvalidParameterError("stop", stops, "a list of non-empty strings")
        self._include_stop = include_stop_str_in_output
        self._state = 0
        self._matched = False
        # State n stands for the prefix _source[n][: _depth[n]]: the longest end of the text so
        # far that begins a stop string. State 0 is the empty one.
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._source = [""]
        self._match: list[str | None] = [None]
        for stop in stops:
            self._add(stop)
        self._fail = self._link()
        self._openings = frozenset(self._next[0])

    def feed(self, delta: str, *, may_match: bool = True) -> tuple[str, str | None]:
        """Return the text that is now safe to show, and the matched stop string.

        Text is held back only while it could still become a stop string. After a match the
        stream is over: the rest of `delta` is dropped.

        Args:
            may_match: False for text in which no stop string may be complete yet; one may begin.
        """
        assert not self._matched, "fed after a match"
        if not self._state and self._openings.isdisjoint(delta):
            return delta, None  # nearly every delta of nearly every request
        state = self._state
        for position, char in enumerate(delta):
            while state and char not in self._next[state]:
                state = self._fail[state]
            state = self._next[state].get(char, 0)
            stop = self._match[state]
            if stop is not None and may_match:
                self._matched = True
                end = self._depth[self._state] + position + 1
                return self._head(delta, end if self._include_stop else end - len(stop)), stop
        shown = self._head(delta, self._depth[self._state] + len(delta) - self._depth[state])
        self._state = state
        return shown, None

    def finish(self) -> str:
        """Release the text held back: the stream ended, so it cannot become a stop string."""
        held = "" if self._matched else self._source[self._state][: self._depth[self._state]]
        self._state = 0
        return held

    def _head(self, delta: str, length: int) -> str:
        """The first `length` characters of the text held back followed by `delta`.

        What is held back is read off the state. Kept as a string, a long one would be copied
        with every delta, and the time would no longer be linear.
        """
        num_held = self._depth[self._state]
        held = self._source[self._state][: min(num_held, length)]
        return held + delta[: length - num_held] if length > num_held else held

    def _add(self, stop: str) -> None:
        state = 0
        for depth, char in enumerate(stop, start=1):
            following = self._next[state].get(char)
            if following is None:
                following = self._next[state][char] = len(self._next)
                self._next.append({})
                self._depth.append(depth)
                self._source.append(stop)
                self._match.append(None)
            state = following
        self._match[state] = stop

    def _link(self) -> list[int]:
        """Compute, shortest prefixes first, the state to fall back to where no arrow leads on."""
        fail = [0] * len(self._next)
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            for char, following in self._next[state].items():
                fallback = fail[state]
                while fallback and char not in self._next[fallback]:
                    fallback = fail[fallback]
                fail[following] = self._next[fallback].get(char, 0)
                # A stop string that is the end of this prefix is complete here as well.
                if self._match[following] is None:
                    self._match[following] = self._match[fail[following]]
                queue.append(following)
        return fail
