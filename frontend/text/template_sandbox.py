"""Where chat templates run: Jinja's sandbox, with what transformers adds and two limits.

A template is code that came with a model, so it runs in `ImmutableSandboxedEnvironment` only,
sees plain data only, and stops when it writes or runs too much. The limits catch loops; a single
expression can still ask for much memory, which is one more reason to take templates from the
operator and never from a request.

The only module that imports jinja2 (30 ms): import it when the first template is compiled.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from footplate.protocol.errors import InvalidRequestError

# One token is about four characters: no context window is anywhere near these.
MAX_TEMPLATE_CHARS = 1 << 20
MAX_OUTPUT_CHARS = 1 << 25
MAX_RENDER_S = 10.0

_deadline: ContextVar[float] = ContextVar("_deadline")


class CompiledTemplate:
    """One template, compiled; use `compile_template`, which remembers it.

    Attributes:
        iterates_content: the template loops over a message's content, so it expects a list of
            parts and not a string.
        tests_content: it asks what type the content is, so it can deal with either.
        names: the variables the environment defines; a caller's may not replace them.
    """

    def __init__(self, source: str) -> None:
        environment = _environment()
        syntax_tree = environment.parse(source)
        self._template = environment.from_string(syntax_tree)
        self.iterates_content, self.tests_content = _use_of_content(syntax_tree)
        self.names = frozenset(environment.globals)

    def render(self, variables: Mapping[str, Any]) -> str:
        """Render with `variables`, which must be plain data (see `chat_messages.plain`).

        Raises:
            InvalidRequestError: the template refused the messages, failed, or went on too long.
        """
        chunks: list[str] = []
        num_chars = 0
        token = _deadline.set(time.monotonic() + MAX_RENDER_S)
        try:
            for chunk in self._template.generate(variables):
                chunks.append(chunk)
                num_chars += len(chunk)
                if num_chars > MAX_OUTPUT_CHARS:
                    raise SecurityError(f"it wrote more than {MAX_OUTPUT_CHARS} characters")
                _check_deadline()
        except _RefusedError as error:
            raise InvalidRequestError(f"the chat template refused the messages: {error}") from error
        except Exception as error:
            # Foreign code: it can raise anything, and it must end this request only.
            line = _line_of(error)
            raise InvalidRequestError(
                f"the chat template failed{line}: {error or type(error).__name__}"
            ) from error
        finally:
            _deadline.reset(token)
        return "".join(chunks)


@lru_cache(maxsize=64)
def compile_template(source: str) -> CompiledTemplate:
    """Compile `source`, or return the compilation made before.

    Raises:
        InvalidRequestError: not a template, or one that is too long.
    """
    if len(source) > MAX_TEMPLATE_CHARS:
        raise InvalidRequestError(
            f"the chat template has more than {MAX_TEMPLATE_CHARS} characters"
        )
    try:
        return CompiledTemplate(source)
    except jinja2.TemplateSyntaxError as error:
        raise InvalidRequestError(
            f"the chat template is not valid Jinja, line {error.lineno}: {error}"
        ) from error
    except RecursionError as error:
        raise InvalidRequestError("the chat template is nested too deeply") from error


class _RefusedError(jinja2.TemplateError):
    """The template called `raise_exception`: its way of saying that the messages are wrong."""


class _GenerationTag(Extension):
    """`{% generation %}`: marks what the assistant said, for training; here it only renders."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it as an instance attribute)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Macro) -> str:
        return str(caller())


class _Sandbox(ImmutableSandboxedEnvironment):
    """The immutable sandbox, with a look at the clock at every call a template makes."""

    def call(
        self, context: Context, function: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        # Loops that write nothing call something, `range` at least, or end by themselves.
        _check_deadline()
        return super().call(context, function, *args, **kwargs)


class _PlainDict:
    """`dict` for templates: makes dicts, and nothing else.

    With the class itself, `dict.update(message, role="system")` would get past the sandbox,
    which only looks for methods that change the object they are called on.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _PlainNamespace(Namespace):
    """`namespace` for templates, without names that begin with an underscore.

    The sandbox forbids reading such names everywhere, but lets a namespace define them.
    """

    def __init__(*args: Any, **kwargs: Any) -> None:  # the caller may well name a variable `self`
        namespace, *values = args
        variables = dict(*values, **kwargs)
        for name in variables:
            _refuse_private(name)
        Namespace.__init__(namespace, variables)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: str) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace may not hold {name!r}: it begins with an underscore")


@lru_cache(maxsize=1)
def _environment() -> _Sandbox:
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    environment.globals["dict"] = _PlainDict()
    environment.globals["namespace"] = _PlainNamespace
    del environment.globals["lipsum"]  # filler text by the megabyte
    return environment


def _raise_exception(message: str) -> NoReturn:
    raise _RefusedError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own escapes <, > and & for HTML, and models were not trained on that.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _check_deadline() -> None:
    if time.monotonic() > _deadline.get():
        raise SecurityError(f"it ran for more than {MAX_RENDER_S:g} seconds")


def _line_of(error: Exception) -> str:
    """The template's line, which jinja2 writes into the traceback."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == "<template>"
    ]
    return f" in line {lines[-1]}" if lines else ""


def _use_of_content(syntax_tree: nodes.Template) -> tuple[bool, bool]:
    """Say whether the template loops over a message's content, and whether it tests its type."""
    aliases = {"content"}  # also the usual name for it in macros

    def is_content(node: nodes.Node | None) -> bool:
        match node:
            case nodes.Filter(node=inner):
                return is_content(inner)
            case nodes.Name(name=name):
                return name in aliases
            case nodes.Getattr(attr="content") | nodes.Getitem(arg=nodes.Const(value="content")):
                return True
            case nodes.Call(
                node=nodes.Getattr(attr="get"), args=[nodes.Const(value="content"), *_]
            ):
                return True
        return False

    for assignment in syntax_tree.find_all(nodes.Assign):
        if isinstance(assignment.target, nodes.Name) and is_content(assignment.node):
            aliases.add(assignment.target.name)
    iterates = any(is_content(loop.iter) for loop in syntax_tree.find_all(nodes.For))
    tests = any(
        test.name in ("string", "iterable", "sequence", "mapping") and is_content(test.node)
        for test in syntax_tree.find_all(nodes.Test)
    )
    return iterates, tests
