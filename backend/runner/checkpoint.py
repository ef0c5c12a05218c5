"""From a model's name to its weights, or to one clear line that says why not.

Nothing here reaches for the network, runs code that came with a model, or unpickles: a model is a
folder with config.json and safetensors, given as such or found in the hub's local cache.
"""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from footplate.backend.runner.errors import ModelLoadError, one_line
from footplate.backend.runner.load import DEMO_MODEL
from footplate.backend.runner.weight_files import check_weight_file
from footplate.protocol.config import ModelConfig

logger = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"


def find_folder(name: str) -> Path:
    """The folder of a model: "demo", a path, or the name of a model in the hub's cache.

    Raises:
        ModelLoadError: there is none.
    """
    if name == "demo":
        return DEMO_MODEL
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ModelLoadError(f"{name} is a file: name the folder that holds config.json")
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except HFValidationError:  # cannot be a name on the hub, so it was meant as a path
        raise ModelLoadError(f"{name} does not exist") from None
    except LocalEntryNotFoundError:
        raise ModelLoadError(
            f"{name} is neither a folder nor in the Hugging Face cache: download it first, "
            f"for example with `hf download {name}`"
        ) from None


def check_files(folder: Path) -> None:
    """Look for what a model needs, before anything slow happens.

    Raises:
        ModelLoadError: config.json or weights are missing, are not safetensors, or are damaged.
    """
    if not (folder / "config.json").is_file():
        raise ModelLoadError(f"{folder} holds no config.json")
    for file in _weight_files(folder):
        try:
            check_weight_file(file)
            with safe_open(file, framework="pt"):
                pass  # whatever else the library that will read it does not like
        except FileNotFoundError:
            raise ModelLoadError(f"{file} is missing: the download is not complete") from None
        except (SafetensorError, OSError) as error:
            raise ModelLoadError(f"{file} is damaged: {one_line(error)}") from None


def _weight_files(folder: Path) -> list[Path]:
    index = folder / WEIGHTS_INDEX
    if index.is_file():
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelLoadError(f"{index} is damaged: {one_line(error)}") from None
        if strange := [name for name in names if not _is_weights_name(name)]:
            raise ModelLoadError(f"{index} is damaged: {strange[0]!r} is no file of this folder")
        return [folder / name for name in sorted(names)]
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    hint = ""
    if pickles := [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]:
        hint = f"; {pickles[0].name} is a pickle, which can run any code: convert it"
    raise ModelLoadError(f"{folder} holds no {WEIGHTS}{hint}")


def _is_weights_name(name: object) -> bool:
    """Whether `name` is one of a weight file, and of no other folder."""
    return isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")


def load_config(folder: Path) -> Any:
    """The model's configuration, a transformers `PreTrainedConfig`.

    Raises:
        ModelLoadError: it is damaged, or of an architecture that transformers does not know.
    """
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever the architecture's own checks raise
        logger.debug("loading the configuration failed", exc_info=True)
        file = folder / "config.json"
        if wants_code(folder):
            raise ModelLoadError(
                f"{file} names code that comes with the model (auto_map), which is never run, and "
                "the installed transformers has no architecture of its own for it: convert the "
                "model, or install a release that knows it"
            ) from error
        raise ModelLoadError(f"{file}: {one_line(error)}") from error


def import_architecture(folder: Path) -> None:
    """Have the code at hand that `load_model` will run.

    Raises:
        ModelLoadError: see `load_config`.
        KeyError: no causal language model is made of this configuration.
    """
    MODEL_FOR_CAUSAL_LM_MAPPING[type(load_config(folder))]


def wants_code(folder: Path) -> bool:
    """Whether a model's configuration names code that comes with the model."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and bool(config.get("auto_map"))


def load_model(folder: Path, config: Any, requested: ModelConfig, device: torch.device) -> Any:
    """The model in host memory, ready for inference; a transformers `PreTrainedModel`.

    Args:
        device: where it will run, which may decide its dtype.

    Raises:
        ModelLoadError: the weights do not fit the configuration, or cannot be loaded.
    """
    # What a library has to say during loading is for its users; ours get one line.
    quiet: Any = transformers_logging
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    loader: Any = AutoModelForCausalLM
    try:
        model, info = loader.from_pretrained(
            folder,
            config=config,
            dtype=_dtype(requested.dtype, config, device),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # whatever the architecture's own code raises
        logger.debug("loading the weights failed", exc_info=True)
        raise ModelLoadError(f"cannot load {folder}: {one_line(error)}") from error
    # transformers would go on with random numbers in their place.
    if missing := sorted(info["missing_keys"]):
        raise ModelLoadError(
            f"the weights in {folder} lack {len(missing)} of the model's tensors, {missing[0]} "
            "among them: they belong to another config.json"
        )
    if device.type == "cpu" and model.dtype is torch.float16:
        model = model.to(_instead_of_float16())  # the checkpoint's, and not said in its config
    return model.eval()


def _dtype(requested: str, config: Any, device: torch.device) -> torch.dtype | str:
    dtype = config.dtype if requested == "auto" else getattr(torch, requested)
    if dtype is torch.float16 and device.type == "cpu":
        return _instead_of_float16()
    return "auto" if dtype is None else dtype


def _instead_of_float16() -> torch.dtype:
    logger.warning("float16 becomes bfloat16: CPUs have no arithmetic for float16")
    return torch.bfloat16
