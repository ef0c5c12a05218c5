"""What importing costs: a client loads no model library, and neither does a core before it must."""

import json
import subprocess
import sys

import pytest

HEAVY = {"torch", "transformers", "safetensors", "tokenizers", "jinja2", "numpy", "huggingface_hub"}


def modules_after(statement: str) -> set[str]:
    """Names of all modules that a fresh interpreter holds after one statement."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps(list(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    return set(json.loads(done.stdout))


@pytest.mark.parametrize(
    ("statement", "layer", "others"),
    [
        ("import footplate.frontend", "frontend", {"footplate.backend", "cyclopts"}),
        ("import footplate.frontend.launch", "frontend", {"footplate.backend"}),
        ("import footplate.backend.__main__", "backend", {"footplate.frontend", "asyncio"}),
    ],
)
def test_importing_loads_no_model_library_and_not_the_other_process(
    statement: str, layer: str, others: set[str]
) -> None:
    modules = modules_after(statement)
    assert f"footplate.{layer}" in modules
    assert not modules & (HEAVY | others)


def test_the_contract_needs_msgspec_alone() -> None:
    names = ("codec", "config", "errors", "links", "messages", "params")
    modules = modules_after("import " + ", ".join(f"footplate.protocol.{name}" for name in names))
    assert not modules & (HEAVY | {"zmq", "asyncio", "footplate.frontend", "footplate.backend"})


def test_the_public_names_can_be_imported_from_the_package() -> None:
    import footplate.frontend

    for name in footplate.frontend.__all__:
        assert hasattr(footplate.frontend, name)
