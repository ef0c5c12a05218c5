"""A beam search over an engine: one request per beam and step, and the text of what is found.

A step's requests are all under way at once. Each asks for one token behind its beam, for the log
probabilities of those that might stand there, and for nothing else: the engine's prefix cache holds
all of a beam but the end of its last block.
"""

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from footplate.frontend.beam_params import BeamSearchParams
from footplate.frontend.beam_search import BeamOutput, BeamSearch, NextTokens
from footplate.frontend.outputs import CompletionOutput
from footplate.protocol.messages import ModelFacts
from footplate.protocol.token_params import Grammar, LogprobsMode, LogprobsRequest, TokenParams

if TYPE_CHECKING:
    from footplate.frontend.text import Tokenizer


class BeamScorer(Protocol):
    """Whoever knows what may follow a beam."""

    async def score(self, beams: Sequence[list[int]], num_candidates: int) -> list[NextTokens]:
        """What may follow each of these beams.

        Args:
            beams: output token ids, behind a prompt that the scorer knows.
            num_candidates: how many of the most likely next tokens to tell of.
        """
        ...


async def run_beam_search(search: BeamSearch, scorer: BeamScorer) -> list[BeamOutput]:
    """Search to the end; the outputs, best first. Errors are the scorer's."""
    while not search.is_finished:
        search.advance(await scorer.score(search.beams, search.num_candidates))
    return search.outputs


class ScoreBeam(Protocol):
    """Sends one request and waits for it; cancelling the call aborts the request."""

    async def __call__(self, prior_token_ids: list[int], params: TokenParams, /) -> NextTokens:
        """What may follow the prompt and these tokens.

        Args:
            params: ask for one token behind `prior_token_ids`. A request that stops without one
                has a grammar that is complete.

        Raises:
            RequestFailedError: this request has failed.
            EngineError: the engine has.
        """
        ...


class RequestScorer:
    """A `BeamScorer` that has an engine score every beam.

    Args:
        score_beam: scores one of them, behind the search's prompt.
        grammar: `params.structured_outputs`, translated.
    """

    def __init__(
        self,
        score_beam: ScoreBeam,
        params: BeamSearchParams,
        model: ModelFacts,
        grammar: Grammar | None = None,
    ) -> None:
        self._score_beam = score_beam
        self._temperature = float(params.temperature)
        self._stop_token_ids = () if params.ignore_eos else model.eos_token_ids
        self._vocab_size = model.vocab_size
        self._grammar = grammar

    async def score(self, beams: Sequence[list[int]], num_candidates: int) -> list[NextTokens]:
        """As `BeamScorer`. The first error, or a cancellation, aborts all requests."""
        logprobs = LogprobsRequest(
            num_logprobs=min(num_candidates, self._vocab_size),
            mode=LogprobsMode.PROCESSED_LOGPROBS,
        )
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._score_beam(beam, self._params_for(beam, logprobs)))
                    for beam in beams
                ]
        except BaseExceptionGroup as errors:
            # The first to fail has cancelled the others; it is the one to tell of.
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    def _params_for(self, beam: list[int], logprobs: LogprobsRequest) -> TokenParams:
        return TokenParams(
            temperature=self._temperature,
            top_p=1.0,
            top_k=0,
            min_p=0.0,
            seed=0,  # what is sampled is not looked at
            max_tokens=len(beam) + 1,
            min_tokens=0,
            stop_token_ids=self._stop_token_ids,
            logprobs=logprobs,
            grammar=self._grammar,
        )


def as_completions(
    outputs: Sequence[BeamOutput],
    prompt_token_ids: list[int],
    params: BeamSearchParams,
    tokenizer: "Tokenizer | None",
) -> list[CompletionOutput]:
    """What the user gets for the outputs of a search.

    Args:
        tokenizer: None for token ids alone.
    """
    return [
        CompletionOutput(
            index,
            "" if tokenizer is None else _text_of(output, prompt_token_ids, params, tokenizer),
            output.token_ids,
            str(output.finish_reason),
            cumulative_logprob=output.cumulative_logprob,
        )
        for index, output in enumerate(outputs)
    ]


def _text_of(
    output: BeamOutput,
    prompt_token_ids: list[int],
    params: BeamSearchParams,
    tokenizer: "Tokenizer",
) -> str:
    shown = output.token_ids[:-1] if output.has_eos else output.token_ids
    detokenizer = tokenizer.detokenizer(prompt_token_ids)
    text = detokenizer.feed(shown) + detokenizer.finish()
    if output.has_eos and params.include_stop_str_in_output:
        # The only special token that is shown.
        end = tokenizer.detokenizer([*prompt_token_ids, *shown], skip_special_tokens=False)
        text += end.feed(output.token_ids[-1:]) + end.finish()
    return text
