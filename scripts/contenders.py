"""Who takes part in a comparison: the engines asked for, and how each is started."""

import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import msgspec
from cyclopts import Parameter

from footplate.frontend import EngineArgs
from peer_process import SCRIPTS, peer_command, require_package

OURS = "footplate"
MAX_STATIC_BATCH = 32

# An option that is given several times makes a list; there is none for an empty one.
Listed = Parameter(negative=())


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Peers:
    """What to compare with."""

    transformers: bool = False
    """Compare with transformers' `generate`, in static batches."""

    vllm_python: Path | None = None
    """Compare with vLLM: the Python of an environment that has it."""

    openvino_python: Path | None = None
    """Compare with OpenVINO GenAI: the Python of an environment that has it."""

    openvino_weights: Annotated[tuple[Literal["fp", "int8", "int4"], ...], Listed] = ()
    """As what the weights are kept: as they are (fp, if not given), or quantised. May be given
    several times. The model is converted once, into the user's cache folder, by optimum-intel in
    that environment."""

    openvino_model: Path | None = None
    """A converted model, instead of --openvino-weights."""

    openvino_property: Annotated[tuple[str, ...], Listed] = ()
    """NAME=VALUE for OpenVINO's CPU device, such as KV_CACHE_PRECISION=bf16. May be given several
    times."""

    llama_server: Path | None = None
    """Compare with llama.cpp: its server program, along with --gguf."""

    gguf: Annotated[tuple[Path, ...], Listed] = ()
    """The model for llama.cpp, its weights in whatever format the file has them. May be given
    several times."""


@dataclass(frozen=True)
class Contender:
    """An engine as this script starts it."""

    name: str
    command: list[str]
    options: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """What peers and prompts need to know of a model."""

    path: Path
    vocab_size: int
    max_len: int
    dtype: str

    @classmethod
    def read(cls, path: Path) -> Self:
        """From its config.json.

        Raises:
            ValueError: there is none, or it is no language model's.
        """
        try:
            config = msgspec.json.decode((path / "config.json").read_bytes())
            text = config.get("text_config", config)
            dtype = text.get("dtype") or config.get("dtype") or config.get("torch_dtype")
            return cls(
                path.resolve(),
                text["vocab_size"],
                text["max_position_embeddings"],
                dtype or "float32",
            )
        except OSError:
            raise ValueError(
                f"{path} is no folder with a config.json: give --model FOLDER or --random-model"
            ) from None
        except (msgspec.DecodeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path / 'config.json'} is no language model's: {error}") from None


def check(peers: Peers) -> None:
    """Whatever is missing is said before anything is measured.

    Raises:
        ValueError: it is.
    """
    if peers.vllm_python:
        require_package(peers.vllm_python, "vllm", "vllm")
    if peers.openvino_python:
        require_package(peers.openvino_python, "openvino_genai", "openvino-genai")
        if not peers.openvino_model:
            require_package(peers.openvino_python, "optimum", "'optimum-intel[nncf]'")
        elif peers.openvino_weights:
            raise ValueError("--openvino-model has its weights: leave --openvino-weights away")
        elif not (peers.openvino_model / "openvino_model.xml").is_file():
            raise ValueError(f"{peers.openvino_model} is no folder with an openvino_model.xml")
    elif peers.openvino_model or peers.openvino_weights or peers.openvino_property:
        raise ValueError("OpenVINO needs --openvino-python")
    for text in peers.openvino_property:
        if "=" not in text:
            raise ValueError(f"--openvino-property {text}: write NAME=VALUE")
    if bool(peers.llama_server) != bool(peers.gguf):
        raise ValueError("llama.cpp needs both --llama-server and --gguf")
    if peers.llama_server and not shutil.which(peers.llama_server.absolute()):
        raise ValueError(f"--llama-server {peers.llama_server}: no such program")
    for file in peers.gguf:
        if not file.is_file():
            raise ValueError(f"--gguf {file}: no such file")
    if len({file.stem for file in peers.gguf}) < len(peers.gguf):
        raise ValueError("--gguf: two files of one name would be one engine in the results")
    if not (peers.transformers or peers.vllm_python or peers.openvino_python or peers.gguf):
        raise ValueError(
            "nothing to compare with: give --transformers, --vllm-python, --openvino-python, or "
            "--llama-server and --gguf"
        )


def all_contenders(peers: Peers, engine_args: EngineArgs, model: ModelFolder) -> list[Contender]:
    """Footplate and the engines that were asked for."""
    ours = dataclasses.asdict(engine_args) | {"model": str(model.path)}
    found = [Contender(OURS, peer_command("footplate"), {"engine_args": ours})]
    if peers.transformers:
        batching = {"batch_size": MAX_STATIC_BATCH}
        found.append(Contender("transformers", peer_command("transformers"), batching))
    # Of the engines that have one: how much of a prompt delays everybody's next token.
    budget = {"max_num_batched_tokens": engine_args.max_num_batched_tokens}
    if peers.vllm_python:
        found.append(Contender("vllm", peer_command("vllm", str(peers.vllm_python)), budget))
    if peers.openvino_python:
        command = peer_command("openvino", str(peers.openvino_python))
        properties = dict(text.split("=", 1) for text in peers.openvino_property)
        for name, ir in _openvino_models(peers, model).items():
            own = {"ir": str(ir), "properties": properties}
            found.append(Contender(name, command, budget | own))
    for file in peers.gguf:
        assert peers.llama_server
        name = "llama.cpp" if len(peers.gguf) == 1 else f"llama.cpp {file.stem}"
        files = {"server": str(peers.llama_server.absolute()), "gguf": str(file.resolve())}
        found.append(Contender(name, peer_command("llama_server"), files))
    return found


def _openvino_models(peers: Peers, model: ModelFolder) -> dict[str, Path]:
    """By the engine's name, the folders of OpenVINO's form of the model, made now if need be."""
    if peers.openvino_model:
        return {"openvino": peers.openvino_model.resolve()}
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "footplate/openvino"
    # Another model may be put in the same place: its weights are then of another time.
    weights = sorted(model.path.glob("*.safetensors"))
    stamp = repr([(str(file), file.stat().st_mtime_ns) for file in weights])
    key = f"{model.path.name}-{hashlib.sha256(stamp.encode()).hexdigest()[:12]}"
    folders = {}
    for form in peers.openvino_weights or ("fp",):
        folder = folders[f"openvino {form}"] = cache / f"{key}-{form}"
        if not folder.exists():
            print(f"Converting {model.path.name} for OpenVINO, {form}", file=sys.stderr)
            assert peers.openvino_python
            command = [peers.openvino_python, SCRIPTS / "openvino_convert.py"]
            if subprocess.run([*command, model.path, form, folder], stdout=sys.stderr).returncode:
                raise ValueError(f"{model.path} could not be converted for OpenVINO, see above")
    return folders
