#!/usr/bin/env python3
"""Convert a model folder for OpenVINO with optimum-intel. Started by `compare.py`.

    openvino_convert.py MODEL fp|int8|int4 TARGET

"fp" keeps the weights' own dtype. int8 and int4 are optimum-intel's defaults: int8 with a scale per
channel; int4 in groups of 128, embeddings and output layer in int8.
"""

import shutil
import sys
import tempfile
from pathlib import Path

from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig


def convert(model: str, weights: str, target: Path) -> None:
    """The folder appears complete or not at all."""
    bits = {"fp": None, "int8": 8, "int4": 4}[weights]
    converted = OVModelForCausalLM.from_pretrained(
        model,
        export=True,
        compile=False,
        # None would quantise large models all the same.
        load_in_8bit=None if bits else False,
        quantization_config=OVWeightQuantizationConfig(bits=bits) if bits else None,
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        converted.save_pretrained(Path(scratch) / "model")
        shutil.move(Path(scratch) / "model", target)


if __name__ == "__main__":
    convert(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
