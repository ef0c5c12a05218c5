"""The end of the parent is the end of the core, whatever stands in the way."""

import os
import struct
import threading
from pathlib import Path

import msgspec
import pytest

from footplate.backend.core_files import CoreFiles
from footplate.backend.parent_line import ParentLine
from footplate.frontend import EngineArgs

PATIENCE_S = 5.0


@pytest.mark.parametrize("is_in_the_way", [False, True])
def test_a_core_ends_with_its_parent_even_if_its_files_cannot_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_in_the_way: bool
) -> None:
    ended = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda status: ended.set())
    if is_in_the_way:

        def fail(files: CoreFiles) -> None:
            raise PermissionError("this folder is not yours any more")

        monkeypatch.setattr(CoreFiles, "remove_all", fail)
    read_end, write_end = os.pipe()
    answers = os.open(os.devnull, os.O_WRONLY)
    line = ParentLine(read_end, answers, on_promotion=lambda: None)
    config = EngineArgs(model="fake").core_config(f"ipc://{tmp_path}/engine.sock", None)
    packed = msgspec.msgpack.encode(config)
    os.write(write_end, struct.pack("<I", len(packed)) + packed)
    assert line.read_config() == config
    line.watch()
    assert not ended.is_set()
    os.close(write_end)
    assert ended.wait(PATIENCE_S)
    os.close(read_end)
    os.close(answers)
