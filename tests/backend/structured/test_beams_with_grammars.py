"""Beam search with a grammar, by a whole engine, finds what transformers' beam search finds with
the same grammar.

Our beams are scored by the log probabilities among the tokens that are allowed. transformers masks
after its softmax, so the processor here also makes a distribution of what is left. Where a grammar
is complete, it leaves one token that ends the output, with probability 1; ours ends there, too,
without that token.
"""

import json
import math
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from footplate.backend.structured.interface import CompiledGrammar, GrammarError
from footplate.frontend import AsyncLLMEngine, BeamSearchParams, EngineArgs
from footplate.protocol.structured import StructuredOutputsParams
from tests.exactness.beam_reference import reference as plain_reference

from .sampling import EOS, TOKENIZER, VOCAB_SIZE
from .whole_engine import TRANSLATOR, engine_of, make_model, save

END = 0  # a special token, which no grammar allows
PROMPTS: list[list[int]] = [
    TOKENIZER.encode(text).ids for text in ("Say it:", "A longer one, of more than one block. " * 3)
]
KINDS: dict[str, dict[str, Any]] = {
    "schema": {
        "json": {
            "type": "object",
            "properties": {"n": {"enum": ["a", "bc", "bd"]}, "on": {"type": "boolean"}},
            "required": ["n", "on"],
            "additionalProperties": False,
        },
        "disable_any_whitespace": True,  # or beams would be of nothing else
    },
    "digits": {"regex": r"[0-9]{2,4}"},
    "letters": {"regex": r"[a-z]{2,99}"},
    "choice": {"choice": ["yes", "yes, of course", "no"]},
}
OPTIONS: list[dict[str, Any]] = [
    {"beam_width": 4},
    {"beam_width": 3, "early_stopping": "never", "length_penalty": -0.5},
    {"beam_width": 1, "early_stopping": True},
]


class MaskAndRenormalise:
    """A logits processor of transformers: one grammar, every beam's output replayed from its
    start."""

    def __init__(self, grammar: CompiledGrammar, num_prompt_tokens: int) -> None:
        self._grammar = grammar
        self._num_prompt_tokens = num_prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        rows = []
        for beam, row in zip(input_ids.tolist(), scores, strict=True):
            allowed = self._allowed(beam[self._num_prompt_tokens :])
            rows.append(row.masked_fill(~torch.from_numpy(allowed), -torch.inf).log_softmax(-1))
        return torch.stack(rows)

    def _allowed(self, output: list[int]) -> np.ndarray:
        end = np.zeros(VOCAB_SIZE, bool)
        end[END] = True
        matcher = self._grammar.start()
        try:
            if output and matcher.advance(output):
                return end
        except GrammarError:  # beams that have ended fill the places of those that are missing
            return end
        mask = np.zeros(VOCAB_SIZE // 32, np.int32)
        matcher.fill_mask(mask)
        return np.unpackbits(mask.view(np.uint8), bitorder="little").astype(bool)


def reference(
    model: Any, prompt: list[int], params: BeamSearchParams, eos: tuple[int, ...]
) -> list[tuple[list[int], float]]:
    """Token ids without `END`, and the sum of their log probabilities; best first."""
    assert params.structured_outputs is not None
    grammar = engine_of(eos).compile(TRANSLATOR.translate(params.structured_outputs))
    mask = MaskAndRenormalise(grammar, len(prompt))
    found = []
    for token_ids, score in plain_reference(
        model, prompt, params, [*eos, END], logits_processor=[mask]
    ):
        total = score * len(token_ids) ** params.length_penalty if token_ids else -math.inf
        if total > -1e6:  # others are no outputs: places that nothing was found for
            found.append(([i for i in token_ids if i != END], total))
    return found


@pytest.mark.parametrize("eos", [pytest.param((), marks=pytest.mark.thorough), (EOS, 5)], ids=str)
async def test_beams_are_those_of_transformers(
    eos: tuple[int, ...], tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = make_model(eos)
    folder = tmp_path_factory.mktemp("llama")
    save(model, folder)
    ends, num_with_eos = set(), 0
    args = EngineArgs(model=str(folder), dtype="float32", threads=1, num_gpu_blocks_override=200)
    async with AsyncLLMEngine.from_engine_args(args) as engine:
        for kind, wanted in KINDS.items():
            for options, prompt in product(OPTIONS, PROMPTS):
                params = BeamSearchParams(
                    max_tokens=20,
                    structured_outputs=StructuredOutputsParams(**wanted),
                    **options,
                )
                [output] = [output async for output in engine.beam_search(prompt, params)]
                expected = reference(model, prompt, params, eos)
                beams = output.outputs
                assert [b.token_ids for b in beams] == [ids for ids, _ in expected], kind
                if params.beam_width > 1:  # greedy search has no scores in transformers
                    sums = [b.cumulative_logprob for b in beams]
                    assert sums == pytest.approx([total for _, total in expected], rel=1e-4)
                for beam in beams:
                    ends.add((kind, beam.finish_reason))
                    num_with_eos += beam.token_ids[-1] in eos
                    if kind == "schema" and beam.finish_reason == "stop":
                        assert json.loads(beam.text)["n"] in ("a", "bc", "bd")
                        assert beam.text == TOKENIZER.decode(beam.token_ids)
    assert {(kind, "stop") for kind in ("schema", "digits", "choice")} <= ends
    assert ("letters", "length") in ends
    assert bool(num_with_eos) == bool(eos)
