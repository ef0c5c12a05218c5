#!/usr/bin/env python3
"""Measure what precision costs: perplexity, and how often the first choice stays the same.

    scripts/measure_quality.py                               the demo model
    scripts/measure_quality.py --model FOLDER --text FILE    any other

Every position of a text is predicted from the true text before it, on our CPU kernels, once per
precision. The demo model's text is what its training held out; random token ids are the harder
test of agreement, for there the model is nowhere sure.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from cyclopts import App
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy

from footplate.backend.kernels import build
from footplate.backend.kernels.ops import Kernels, Quantization
from footplate.backend.runner.batch import Chunk, RaggedBatch
from footplate.backend.runner.checkpoint import find_folder, load_config, load_model
from footplate.backend.runner.cpu_attention import CpuAttention
from footplate.backend.runner.paged_model import PagedModel
from footplate.backend.runner.probe import probe_paged
from footplate.backend.runner.rewrite import rewrite_model
from footplate.protocol.config import ModelConfig
from train_demo_model import Rows

BLOCK_SIZE = 16
Dtype = Literal["float32", "bfloat16"]
# bfloat16 comes first: the others are compared with it.
PRECISIONS: dict[str, tuple[Dtype, Quantization | None]] = {
    "bfloat16": ("bfloat16", None),
    "float32": ("float32", None),
    "bfloat16, int8": ("bfloat16", "int8"),
    "bfloat16, int4": ("bfloat16", "int4"),
}

app = App(name="measure_quality.py", help=__doc__, help_format="plaintext")


@app.default
def main(
    *, model: str = "demo", text: Path | None = None, num_rows: int = 64, row_len: int = 256
) -> None:
    """Print one line per precision.

    Args:
        model: "demo", a folder, or a cached hub model.
        text: UTF-8; needed for other models than the demo.
        num_rows: of text, and of random token ids.
        row_len: tokens in each.
    """
    folder = find_folder(model)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if text is not None:
        ids = torch.tensor(tokenizer.encode(text.read_text("utf-8")).ids)
        rows = ids.unfold(0, row_len, row_len)
    elif model == "demo":
        rows = Rows(tokenizer, seed=0).held_out(row_len)
    else:
        sys.exit("measure_quality.py: --text FILE is missing: only the demo model has its own")
    rows = rows[:num_rows]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(tokenizer.get_vocab_size(), (num_rows, row_len), generator=generator)
    print(f"{model}: {rows.numel():,} tokens of text, {noise.numel():,} random token ids")
    print(f"{'precision':16} {'perplexity':>10}   first choice as in bfloat16: text, random ids")
    reference: list[torch.Tensor] = []
    for name, (dtype, quantization) in PRECISIONS.items():
        paged = load(folder, dtype, quantization, row_len)
        loss, choices = predict(paged, rows)
        _, noise_choices = predict(paged, noise)
        reference = reference or [choices, noise_choices]
        same, noise_same = (
            100 * (found == expected).double().mean().item()
            for found, expected in zip((choices, noise_choices), reference, strict=True)
        )
        print(f"{name:16} {torch.tensor(loss).exp():10.3f}   {same:.2f} %, {noise_same:.2f} %")


def load(folder: Path, dtype: Dtype, quantization: Quantization | None, row_len: int) -> PagedModel:
    """The model on our kernels, with room for one row."""
    library = build.load(build.cache_folder(os.environ))
    if library is None:
        sys.exit("measure_quality.py: there are no kernels to measure")
    kernels = Kernels(library)
    requested = ModelConfig(model=str(folder), dtype=dtype, quantization=quantization)
    network = load_model(folder, load_config(folder), requested, torch.device("cpu"))
    backend = CpuAttention(kernels, BLOCK_SIZE)
    shapes = probe_paged(network, backend, BLOCK_SIZE, set())
    rewrite_model(network, kernels, backend, shapes, BLOCK_SIZE, quantization)
    return PagedModel(network, backend, -(-row_len // BLOCK_SIZE), shapes)


def predict(paged: PagedModel, rows: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Mean negative log-likelihood in nats per token; first choices, [num_rows, row_len - 1]."""
    losses, choices = [], []
    for row, logits in zip(rows, _logits(paged, rows), strict=True):
        losses.append(cross_entropy(logits[:-1], row[1:]).item())
        choices.append(logits[:-1].argmax(-1))
    return sum(losses) / len(losses), torch.stack(choices)


def _logits(paged: PagedModel, rows: torch.Tensor) -> Iterator[torch.Tensor]:
    """[row_len, vocab] of each row."""
    row_len = rows.shape[1]
    block_ids = list(range(-(-row_len // BLOCK_SIZE)))
    for row in rows:
        chunk = Chunk(row.tolist(), 0, block_ids)
        yield paged.forward(RaggedBatch.of_chunks([chunk], range(row_len), BLOCK_SIZE))


if __name__ == "__main__":
    app()
