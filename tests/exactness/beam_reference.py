"""transformers' beam search, and what it is compared with: a search whose next tokens come from
the same model, without an engine in between."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from footplate.frontend.beam_params import BeamSearchParams
from footplate.frontend.beam_search import BeamOutput, BeamSearch, NextTokens

NUM_ROWS = 997
MAX_LEN = 64


class TableModel(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """The next token's logits are a row of a random table, chosen by all tokens before it: the same
    to the bit, whatever the batch, and hardly ever the same for two beams, so that scores differ.
    Rows have several scales, so that outputs end early and late.

    Args:
        eos_bias: added to the logits of the tokens below `num_eos`.
    """

    config_class = PreTrainedConfig

    def __init__(self, vocab_size: int, seed: int, num_eos: int, eos_bias: float) -> None:
        config = PreTrainedConfig()
        config.vocab_size = vocab_size
        super().__init__(config)
        generator = torch.Generator().manual_seed(seed)
        table = torch.randn((NUM_ROWS, vocab_size), generator=generator)
        table *= 3 * torch.rand((NUM_ROWS, 1), generator=generator)
        table[:, :num_eos] += eos_bias
        self.table = torch.nn.Parameter(table)
        self.weights = torch.randint(1, NUM_ROWS, (MAX_LEN,), generator=generator)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: object = None, **kwargs: object
    ) -> CausalLMOutput:
        weighted = (input_ids + 1) * self.weights[: input_ids.shape[1]]
        return CausalLMOutput(logits=self.table[weighted.cumsum(-1) % NUM_ROWS])

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Any, **kwargs: Any
    ) -> dict[str, Any]:
        return {"input_ids": input_ids}


def reference(
    model: Any,
    prompt: list[int],
    params: BeamSearchParams,
    eos_token_ids: Sequence[int],
    **options: Any,
) -> list[tuple[list[int], float]]:
    """Output token ids and scores that `generate` returns; `options` are its own."""
    with torch.inference_mode():
        result = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones((1, len(prompt)), dtype=torch.long),
            num_beams=params.beam_width,
            num_return_sequences=params.beam_width,
            max_new_tokens=params.max_tokens,
            length_penalty=params.length_penalty,
            early_stopping=params.early_stopping,
            do_sample=False,
            use_cache=False,
            eos_token_id=None if params.ignore_eos else list(eos_token_ids) or None,
            pad_token_id=model.config.vocab_size,  # no token, so that padding can be told
            output_scores=True,
            return_dict_in_generate=True,
            **options,
        )
    rows = [
        [token_id for token_id in row[len(prompt) :] if token_id != model.config.vocab_size]
        for row in result.sequences.tolist()
    ]
    scores = result.sequences_scores.tolist() if params.beam_width > 1 else [0.0]
    return list(zip(rows, scores, strict=True))


class ModelScorer:
    """Scores beams by forwards of a model."""

    def __init__(self, model: Any, prompt: list[int]) -> None:
        self._model = model
        self._prompt = prompt

    def score(self, beams: Sequence[list[int]], num_candidates: int) -> list[NextTokens]:
        """As `BeamScorer`, at once."""
        with torch.inference_mode():
            ids = torch.tensor([self._prompt + beam for beam in beams])
            logprobs = self._model(input_ids=ids).logits[:, -1].log_softmax(-1)
            best = logprobs.topk(min(num_candidates, logprobs.shape[-1]))
        return [
            NextTokens(*row)
            for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]


def find(
    model: Any, prompt: list[int], params: BeamSearchParams, eos_token_ids: Sequence[int]
) -> list[BeamOutput]:
    """Our search, with the model's own scores."""
    search, scorer = BeamSearch.of(params, eos_token_ids), ModelScorer(model, prompt)
    while not search.is_finished:
        search.advance(scorer.score(search.beams, search.num_candidates))
    return search.outputs
