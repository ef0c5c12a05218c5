"""What comes over a wire or out of a file is data: nothing in shipped code makes code of it, or
objects of arbitrary classes."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHIPPED = ("protocol", "frontend", "backend", "scripts")

# Modules that make objects, or code, of bytes; and networks of their own.
FORBIDDEN_MODULES = (
    "_pickle", "cloudpickle", "code", "codeop", "dill", "joblib", "jsonpickle", "marshal",
    "multiprocessing", "pickle", "pickletools", "runpy", "shelve", "socketserver", "xmlrpc",
    "zmq.asyncio",
)  # fmt: skip
# Called by any of these names, whatever they are called on.
FORBIDDEN_CALLS = (
    "eval", "exec", "recv_pyobj", "send_pyobj", "recv_serialized", "os_system", "popen",
    "spawnl", "spawnv", "unsafe_load", "__import__", "read_pickle", "load_module",
)  # fmt: skip
# Where something of that kind is needed, and why it is none of the above's business.
ALLOWED = {
    # The operator's own logits processors, as named in EngineArgs: no client's word gets here.
    ("backend/logits/processor.py", "import_module"),
    # The engine core, and the C++ compiler: fixed commands, no shell.
    ("frontend/fork_server.py", "subprocess"),
    ("frontend/benchmark/report.py", "subprocess"),
    ("backend/kernels/build.py", "subprocess"),
}
# Our own C++ kernels are called through ctypes, and a fail point makes a core crash through it.
ALLOWED_FOLDERS = {
    "subprocess": ("scripts/",),
    "ctypes": ("backend/kernels/", "backend/runner/", "backend/fail_points.py"),
}
# Of the folders that read a wire: names of attributes are literals or this package's own tables.
WIRE_READERS = (
    "protocol/codec.py", "protocol/messages.py", "backend/inbox.py", "backend/gatekeeper.py",
    "backend/core_process.py", "backend/engine_core.py", "backend/outbox.py",
    "frontend/connection.py", "frontend/core_link.py", "frontend/session.py",
    "frontend/succession.py", "frontend/engine_client.py",
)  # fmt: skip


def name_of(function: ast.expr) -> str:
    match function:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=ast.Name(id="os"), attr="system"):
            return "os_system"
        case ast.Attribute(attr=name):
            return name
    return ""


def imported(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module is not None:
        yield node.module
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def findings(path: str, source: str) -> list[str]:
    """What a file does and may not, one line each."""
    found = []
    for node in ast.walk(ast.parse(source)):
        what = [
            f"imports {name}"
            for name in imported(node)
            for rule in FORBIDDEN_MODULES
            if f"{name}.".startswith(f"{rule}.")
        ]
        what += [
            f"imports {name}"
            for name in imported(node)
            if name in ("subprocess", "ctypes") and not path.startswith(ALLOWED_FOLDERS[name])
            if (path, name) not in ALLOWED
        ]
        if isinstance(node, ast.Call):
            called = name_of(node.func)
            if called in FORBIDDEN_CALLS and not _is_torch_eval(node):
                what.append(f"calls {called}")
            if called == "import_module" and (path, called) not in ALLOWED:
                what.append("imports by name")
            if called == "load" and name_of_owner(node.func) in ("torch", "np", "numpy", "yaml"):
                what.append("loads what may be a pickle")
            if called in ("getattr", "globals", "vars", "attrgetter", "methodcaller") and (
                path in WIRE_READERS
            ):
                what.append(f"looks up by name ({called})")
            what += [
                f"passes {keyword.arg}=True"
                for keyword in node.keywords
                if keyword.arg in ("shell", "trust_remote_code", "allow_pickle")
                if not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False)
            ]
        found += [f"{path}:{getattr(node, 'lineno', 0)} {words}" for words in what]
    return found


def name_of_owner(function: ast.expr) -> str:
    match function:
        case ast.Attribute(value=ast.Name(id=name)):
            return name
    return ""


def _is_torch_eval(call: ast.Call) -> bool:
    """`module.eval()` puts a torch module into its other mode."""
    return isinstance(call.func, ast.Attribute) and call.func.attr == "eval" and not call.args


def test_shipped_code_makes_no_code_and_no_objects_of_data() -> None:
    files = [path for folder in SHIPPED for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 150
    found = [
        line for path in files for line in findings(str(path.relative_to(ROOT)), path.read_text())
    ]
    assert not found


@pytest.mark.parametrize("path", WIRE_READERS)
def test_the_files_that_read_a_wire_are_there(path: str) -> None:
    assert (ROOT / path).is_file()


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "def f():\n    import marshal",
        "from multiprocessing import Queue",
        "import cloudpickle",
        "import shelve",
        "import zmq.asyncio",
        "socket.recv_pyobj()",
        "socket.send_pyobj(1)",
        "eval(text)",
        "exec(code)",
        "builtins.eval(text)",
        "__import__(name)",
        "importlib.import_module(name)",
        "import subprocess",
        "import ctypes",
        "os.system(command)",
        "os.popen(command)",
        "run(command, shell=True)",
        "load(path, trust_remote_code=True)",
        "load(path, trust_remote_code=flag)",
        "numpy.load(path, allow_pickle=True)",
        "torch.load(path)",
        "np.load(path)",
        "yaml.load(text)",
        "getattr(self, message.name)()",
        "globals()[name]()",
        "methodcaller(name)",
    ],
)
def test_what_is_forbidden_is_found(source: str) -> None:
    assert findings("backend/inbox.py", source)


@pytest.mark.parametrize(
    "source",
    [
        "import msgspec",
        "model.eval()",
        "re.compile(text)",
        "json.loads(text)",
        "load(path, trust_remote_code=False)",
        "self._decoder.decode(frame)",
        "'pickle'",
    ],
)
def test_what_is_allowed_is_not(source: str) -> None:
    assert not findings("backend/inbox.py", source)
