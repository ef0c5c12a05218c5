"""The definition of what a request does to its logits, and of the token that follows: plain Python,
from the whole list of tokens every time, slow and without state.

float64, rounded to float32 where the engine keeps a float32: so greedy tokens are equal, not nearly
equal. Of sampled ones `possible_tokens` gives those that rounding could make of the definition.
"""

import math
import struct
from collections.abc import Callable, Sequence, Set
from typing import Any

import numpy as np

from footplate.backend.runner.noise import uniform
from footplate.protocol.token_params import ThinkingBudget, TokenParams

NOTHING = -math.inf

# A custom logits processor: output so far and float32 [vocab], which it changes.
Processor = Callable[[Sequence[int], Any], None]


def to_float32(x: float) -> float:
    if math.isinf(x):
        return x
    try:
        return float(struct.unpack("<f", struct.pack("<f", x))[0])
    except OverflowError:
        return math.copysign(math.inf, x)


def adjusted(
    logits: list[float],
    token_ids: list[int],
    num_prompt_tokens: int,
    params: TokenParams,
    grammar: Set[int] | None = None,
    processors: Sequence[Processor] = (),
) -> list[float]:
    """The row behind prompt and output.

    Args:
        grammar: the tokens that the request's grammar allows next.
        processors: the request's custom ones.
    """
    row = [to_float32(x) for x in logits]
    vocab = range(len(row))
    output = token_ids[num_prompt_tokens:]
    own = params.adjustments
    if own is not None and own.allowed_token_ids is not None:
        allowed = set(own.allowed_token_ids)
        row = [row[i] if i in allowed else NOTHING for i in vocab]
    for word in own.bad_words if own is not None else ():
        before = list(word[:-1])
        if word[-1] in vocab and output[len(output) - len(before) :] == before:
            row[word[-1]] = NOTHING
    stops = set(params.stop_token_ids)
    if len(output) < params.min_tokens and (grammar is None or grammar - stops):
        row = [NOTHING if i in stops else row[i] for i in vocab]
    if own is not None:
        row = [to_float32(row[i] + own.logit_bias.get(i, 0.0)) for i in vocab]
        for process in processors:
            array = np.array(row, np.float32)
            process(output, array)
            row = array.tolist()
        for i in {i for i in token_ids if i in vocab}:
            r, x = own.repetition_penalty, row[i]
            x = x / r if x > 0 else x * r
            x -= own.frequency_penalty * output.count(i)
            x -= own.presence_penalty * (i in output)
            row[i] = to_float32(x)
        if own.thinking is not None:
            forced = forced_by_budget(token_ids, own.thinking)
            if forced is not None and (grammar is None or forced in grammar):
                row = [0.0 if i == forced else NOTHING for i in vocab]
    if grammar is not None:
        row = [row[i] if i in grammar else NOTHING for i in vocab]
    return row


def forced_by_budget(token_ids: list[int], budget: ThinkingBudget) -> int | None:
    """The next token of the end of thinking, if the budget is spent."""
    start, end = list(budget.start_ids), list(budget.end_ids)
    place = 0  # behind the last mark
    while True:
        place = find_behind(token_ids, start, place)
        if place < 0:
            return None
        thoughts = token_ids[place:]
        place = find_behind(token_ids, end, place)
        if place < 0:
            break
    if len(thoughts) < budget.num_tokens:
        return None
    said = max(n for n in range(len(end)) if thoughts[len(thoughts) - n :] == end[:n])
    return end[said]


def find_behind(token_ids: list[int], mark: list[int], start: int) -> int:
    """Where the first mark from `start` on has ended; -1 if there is none."""
    for place in range(start, len(token_ids) - len(mark) + 1):
        if token_ids[place : place + len(mark)] == mark:
            return place + len(mark)
    return -1


def draw(row: list[float], params: TokenParams, position: int, slack: float = 0.0) -> int | None:
    """The token of an adjusted row; None where no token is possible. `slack` moves every border
    by a little."""
    largest = max(row)
    if largest == NOTHING:
        return None
    if params.temperature == 0 or params.top_k == 1:
        return row.index(largest)
    weights = weigh(row, params)
    border = border_of(weights, params, slack)
    left = {i: w for i, w in enumerate(weights) if w >= border and w > 0}
    target = uniform(params.seed, position) * sum(left.values())
    for token_id, weight in left.items():
        target -= weight * (1 + slack)
        if target < 0:
            return token_id
    return max(left)


def weigh(row: list[float], params: TokenParams) -> list[float]:
    """How likely each token is; the most likely one has weight 1."""
    largest, temperature = max(row), max(params.temperature, 0.01)
    return [math.exp((x - largest) / temperature) for x in row]


def border_of(weights: list[float], params: TokenParams, slack: float = 0.0) -> float:
    """The smallest weight that min_p, top_k and top_p keep."""
    border = min(params.min_p * (1 + slack), 1.0)
    if params.top_k > 0:
        border = max(border, sorted(weights, reverse=True)[: params.top_k][-1])
    if params.top_p < 1:
        kept = sorted((w for w in weights if w >= border), reverse=True)
        mass = 0.0
        for weight in kept:
            mass += weight
            border = weight
            if mass >= params.top_p * sum(kept) * (1 + slack):
                break
    return border


def processed(row: list[float], params: TokenParams, slack: float = 0.0) -> list[float]:
    """An adjusted row as the draw sees it: divided by the temperature, and what is cut has
    -infinity."""
    if params.temperature == 0:
        return row
    weights = weigh(row, params)
    border = border_of(weights, params, slack)
    temperature = to_float32(max(params.temperature, 0.01))
    return [
        to_float32(x / temperature) if w >= border else NOTHING
        for x, w in zip(row, weights, strict=True)
    ]


def log_softmax(row: list[float]) -> list[float]:
    """Log probabilities of a row of logits."""
    largest = max(row)
    total = largest + math.log(math.fsum(math.exp(x - largest) for x in row))
    return [x - total for x in row]


def possible_tokens(
    logits: list[float],
    token_ids: list[int],
    num_prompt_tokens: int,
    params: TokenParams,
    grammar: Set[int] | None = None,
    processors: Sequence[Processor] = (),
) -> set[int | None]:
    """What the next token may be: one, or two where a border is too close to tell in float32."""
    position = len(token_ids) - num_prompt_tokens
    forced = params.adjustments.forced_token_ids if params.adjustments is not None else None
    if forced is not None and position < len(forced):
        return {forced[position]}
    row = adjusted(logits, token_ids, num_prompt_tokens, params, grammar, processors)
    return {draw(row, params, position, slack) for slack in (-1e-5, 0.0, 1e-5)}
