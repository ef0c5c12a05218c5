"""One loaded model and one reference per architecture and session."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from footplate.backend.runner import onednn_linear
from footplate.backend.runner.model_runner import load_model_runner
from footplate.backend.step import ModelRunner
from footplate.protocol.config import CacheConfig, ModelConfig

from .architectures import VOCAB_SIZE, make_model
from .driver import NUM_NEW_TOKENS, SCHEDULER, TORCH_BLOCK_SIZE, Case, Loader

PROMPT_LENGTHS = (1, 7, 15, 24, 40)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Two threads on matrices of this size only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def every_linear_is_packed() -> Iterator[None]:
    """Where our kernels are not used. Matrices of this size would gain nothing by it, and those
    of real models do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onednn_linear, "_takes_less", lambda packed, plain, x: True)
        yield


@pytest.fixture(scope="session")
def load() -> Loader:
    """Loads a folder as the engine core does, with a small cache."""

    def load_folder(
        folder: Path, block_size: int = TORCH_BLOCK_SIZE, **options: Any
    ) -> ModelRunner:
        return load_model_runner(
            ModelConfig(model=str(folder), num_threads=1, device="cpu", **options),
            CacheConfig(block_size=block_size, num_gpu_blocks_override=64),
            SCHEDULER,
            lambda phase, fraction: None,
        )

    return load_folder


@pytest.fixture(scope="session")
def case_of(load: Loader, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Case]:
    """Makes, saves and loads a model, and asks `generate` for the reference; once each."""

    @cache
    def reference(architecture: str) -> tuple[Path, list[list[int]], list[list[int]]]:
        model = make_model(architecture)
        generator = torch.Generator().manual_seed(1)
        prompts = [
            torch.randint(VOCAB_SIZE, (1, length), generator=generator) for length in PROMPT_LENGTHS
        ]
        expected = []
        for prompt in prompts:
            output = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=NUM_NEW_TOKENS,
                do_sample=False,
                pad_token_id=0,
            )
            expected.append(output[0, prompt.shape[1] :].tolist())
        folder: Path = tmp_path_factory.mktemp(architecture)
        model.save_pretrained(folder)
        return folder, [p[0].tolist() for p in prompts], expected

    @cache
    def case(architecture: str, block_size: int) -> Case:
        folder, prompts, expected = reference(architecture)
        return Case(load(folder, block_size), block_size, prompts, expected)

    return case
