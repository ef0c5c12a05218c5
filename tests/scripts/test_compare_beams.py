"""The comparison of beam searches: its work, its report, and its peer, for real."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from footplate.protocol.errors import InvalidParameterError

Load = Callable[[str], ModuleType]


def test_every_prompt_is_there_once_for_each_of_its_outputs(load_script: Load) -> None:
    script = load_script("compare_beams")
    work = script.work_of([[5, 6], [7]], 3, 9)
    assert work.prompts == [[5, 6]] * 3 + [[7]] * 3
    assert work.max_tokens == [9] * 6


def test_the_warm_up_is_no_prefix_of_the_work(load_script: Load) -> None:
    options = load_script("compare_beams").Options(num_prompts=3, input_len=20)
    prompts = options.prompts(1000)
    [warmup] = options.prompts(1000, warmup=True)
    assert [len(prompt) for prompt in prompts] == [20, 20, 20]
    assert len(warmup) == 20
    assert warmup[0] not in {prompt[0] for prompt in prompts}


def test_outputs_are_compared_place_by_place(load_script: Load) -> None:
    script = load_script("compare_beams")
    options = script.Options(beam_width=2, num_prompts=2, max_tokens=5)
    ours = script.Turn([[[1], [2]], [[3], [4]]], 2.0)
    theirs = script.Turn([[[1], [2]], [[4], [3]]], 4.0)
    text = script.report(options, [ours], [theirs])
    assert "in the same place: 2 of 4" in text
    assert "factor of 2.00" in text
    assert "200.00 ms per step" in text


def test_a_width_that_cannot_be_is_refused_before_anything_is_loaded(load_script: Load) -> None:
    script = load_script("compare_beams")
    with pytest.raises(InvalidParameterError, match="beam_width"):
        script.main(script.Options(beam_width=0))
    with pytest.raises(ValueError, match="rounds"):
        script.main(script.Options(rounds=0))


def test_the_peer_searches_with_transformers(load_script: Load, tmp_path: Path) -> None:
    models = load_script("random_model")
    folder = tmp_path / "model"
    models.save_random_model(models.config_of("llama-tiny"), models.torch.float32, folder)
    script = load_script("compare_beams")
    options = script.Options(beam_width=3, num_prompts=2, max_tokens=6, input_len=8)
    turn = script.take_peers_turn(options, script.EngineArgs(threads=1), str(folder), 1000)
    assert len(turn.outputs) == 2
    for outputs in turn.outputs:
        assert len(outputs) == 3
        assert len({tuple(output) for output in outputs}) == 3
        assert {len(output) for output in outputs} == {6}
    assert turn.duration_s > 0
