"""Who may import whom: `protocol` is the contract, `frontend` and `backend` know it and not each
other."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A name stands for itself and everything below it; "lazy " allows it inside functions.
FORBIDDEN = {
    "protocol": ("footplate.frontend", "footplate.backend", "torch", "transformers", "zmq"),
    # The client runs where no torch is installed. transformers only converts old tokenizers.
    "frontend": ("footplate.backend", "torch", "lazy transformers"),
    "backend": ("footplate.frontend", "asyncio"),
}
TORCH_FOLDERS = ("backend/runner", "backend/kernels")


def imports_of(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """Every imported name, and whether it is imported together with the module."""
    lazy = {
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "absolute imports only: one name for one module"
            # `from footplate import backend` imports footplate.backend.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from ((name, node not in lazy) for name in names)


def broken_rules(path: Path, source: str) -> list[str]:
    """What a file of this path imports and may not; `path` is relative to the repository."""
    rules = [*FORBIDDEN[path.parts[0]], "frontend", "backend", "protocol"]
    may_use_torch = any(path.is_relative_to(folder) for folder in TORCH_FOLDERS)
    if path.parts[0] == "backend" and not may_use_torch:
        rules += ["torch", "transformers"]
    return [
        f"{path} imports {name}"
        for name, at_once in imports_of(ast.parse(source))
        for rule in rules
        if at_once or not rule.startswith("lazy ")
        if f"{name}.".startswith(f"{rule.removeprefix('lazy ')}.")
    ]


def test_every_file_imports_only_what_its_layer_may() -> None:
    files = [path for layer in FORBIDDEN for path in (ROOT / layer).rglob("*.py")]
    assert len(files) > 30
    broken = [
        line for path in files for line in broken_rules(path.relative_to(ROOT), path.read_text())
    ]
    assert not broken


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("protocol/x.py", "import zmq"),
        ("protocol/x.py", "def f():\n    import zmq.asyncio"),
        ("frontend/x.py", "import footplate.backend.request"),
        ("frontend/x.py", "from footplate.backend.request import Request"),
        ("frontend/x.py", "from footplate import backend"),
        ("frontend/x.py", "def f():\n    from torch import nn"),
        ("frontend/x.py", "import transformers"),
        ("frontend/x.py", "import protocol.messages"),
        ("backend/x.py", "from asyncio import Queue"),
        ("backend/x.py", "from footplate.frontend import LLM"),
        ("backend/x.py", "import torch"),
        ("backend/models/x.py", "if True:\n    import torch.nn"),
        ("backend/runner/x.py", "import asyncio"),
    ],
)
def test_a_file_that_imports_what_it_may_not_is_found(path: str, source: str) -> None:
    assert broken_rules(Path(path), source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("protocol/x.py", "import msgspec"),
        ("frontend/x.py", "import zmq, asyncio\nfrom footplate.protocol import messages"),
        ("frontend/x.py", "def f():\n    from transformers import AutoTokenizer"),
        ("frontend/x.py", "import torchless"),
        ("backend/x.py", "import zmq\nfrom footplate.protocol.messages import Hello"),
        ("backend/runner/x.py", "import torch.nn\nfrom transformers import AutoConfig"),
    ],
)
def test_a_file_that_imports_what_it_may_is_not(path: str, source: str) -> None:
    assert not broken_rules(Path(path), source)
