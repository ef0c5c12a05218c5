"""docs/requests.md names every parameter, and its examples run as they stand, in their order."""

import ast
import asyncio
import re
from inspect import iscoroutine
from pathlib import Path
from typing import Any

import pytest

from footplate.frontend import AsyncLLMEngine, BeamSearchParams, SamplingParams
from footplate.protocol.structured import KINDS

DOCUMENT = Path(__file__).parent.parent / "docs" / "requests.md"
# A heading, or a block of code with the line it begins at.
PARTS = re.compile(
    r"^#+ (?P<heading>[^\n]*)$|^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)


def headings() -> set[str]:
    found = (match["heading"] for match in PARTS.finditer(DOCUMENT.read_text()))
    return {name.strip() for heading in found if heading for name in heading.split(",")}


@pytest.mark.parametrize("name", [*SamplingParams.__struct_fields__, *KINDS])
def test_every_parameter_has_a_section(name: str) -> None:
    assert name in headings() or name == "structured_outputs"


@pytest.mark.parametrize("name", BeamSearchParams.__struct_fields__)
def test_every_parameter_of_a_beam_search_is_named(name: str) -> None:
    assert f"`{name}`" in DOCUMENT.read_text()


@pytest.mark.parametrize(
    "name", ["priority", "arrival_time", "ttft_deadline_s", "deadline_s", "Queue limits"]
)
def test_every_argument_of_a_call_has_a_section(name: str) -> None:
    assert name in headings()


async def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    text, heading = DOCUMENT.read_text(), ""
    names: dict[str, Any] = {}
    try:
        for match in PARTS.finditer(text):
            if match["heading"]:
                heading = match["heading"]
                continue
            if (file := re.match(r"# (\w+\.py)\n", match["code"])) is not None:
                (tmp_path / file[1]).write_text(match["code"])
                continue
            # Tracebacks then show the document's own lines.
            code = "\n" * text.count("\n", 0, match.start("code")) + match["code"]
            flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
            try:
                async with asyncio.timeout(60):
                    running = eval(compile(code, str(DOCUMENT), "exec", flags), names)
                    if iscoroutine(running):
                        await running
            except Exception as error:
                error.add_note(f"in the section {heading!r}")
                raise
    finally:
        engine = names.get("engine")
        if isinstance(engine, AsyncLLMEngine):
            engine.shutdown()
