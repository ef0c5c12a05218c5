#!/usr/bin/env python3
"""Measure what precision costs: perplexity, and how often the first choice stays the same.

    scripts/measure_quality.py                               the demo model
    scripts/measure_quality.py --model FOLDER --text FILE    any other

Every position of a text is predicted from the true text before it, on our CPU kernels, once per
precision. The demo model's text is what its training held out; random token ids are the harder
test of agreement, for there the model is nowhere sure.
"""

import math
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
from footplate.backend.kernels.linear import Quantization
from footplate.backend.kernels.ops import Kernels
from footplate.backend.runner.batch import Chunk, RaggedBatch
from footplate.backend.runner.checkpoint import find_folder, load_config, load_model
from footplate.backend.runner.cpu_attention import CpuAttention
from footplate.backend.runner.mapped_weights import MappedWeights
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
        text: UTF-8; without it, and but for the demo model, there are only random ids.
        num_rows: of text, and of random token ids.
        row_len: tokens in each.
    """
    folder = find_folder(model)
    rows = read_text(folder, text, is_demo=model == "demo")
    texts = {} if rows is None else {"text": rows.unfold(0, row_len, row_len)[:num_rows]}
    vocab_size = load_config(folder).get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(0)
    texts["random ids"] = torch.randint(vocab_size, (num_rows, row_len), generator=generator)
    print(
        f"{model}: " + ", ".join(f"{ids.numel():,} tokens of {name}" for name, ids in texts.items())
    )
    reference: dict[str, torch.Tensor] = {}
    for precision, (dtype, quantization) in PRECISIONS.items():
        paged = load(folder, dtype, quantization, row_len)
        columns = []
        for name, ids in texts.items():
            loss, choices = predict(paged, ids)
            same = (choices == reference.setdefault(name, choices)).double().mean().item()
            columns.append(f"{name}: first choice as in bfloat16 {same:6.2%}")
            if name == "text":
                columns[-1] += f", perplexity {math.exp(loss):.3f}"
        print(f"{precision:15} ", "; ".join(columns), flush=True)


def read_text(folder: Path, text: Path | None, is_demo: bool) -> torch.Tensor | None:
    """Token ids of the text, one-dimensional, if there is any."""
    if text is None and not is_demo:
        return None
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if text is not None:
        return torch.tensor(tokenizer.encode(text.read_text("utf-8")).ids)
    return Rows(tokenizer, seed=0).held_out().flatten()


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
    rewrite_model(
        network,
        kernels,
        backend,
        shapes,
        block_size=BLOCK_SIZE,
        max_model_len=row_len,
        mapped=MappedWeights(folder),
        quantization=quantization,
    )
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
