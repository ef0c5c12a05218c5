"""What a safetensors file says of itself, held against its size before anything is read or mapped.

The format: eight bytes with the length of a header, the header in JSON (a type, a shape and the
range of bytes of each tensor), then the bytes. A file whose download broke off, or that lies, would
otherwise be found out by whoever reads beyond its end.
"""

import json
import math
import reprlib
from pathlib import Path

from footplate.backend.runner.errors import ModelLoadError, one_line

PREFIX_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # the reference implementation's limit

# Bits of a number, by the format's name of its type. Of types that are not here only the range is
# checked: they are new, and the library that reads the tensor knows its size.
BITS = {
    "BOOL": 8,
    **{f"{kind}{bits}": bits for kind in ("U", "I") for bits in (8, 16, 32, 64)},
    **{"F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64},
    **{"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8},
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}

# A name and a shape may be as long as the header.
_SHOWN = reprlib.Repr()
_SHOWN.maxstring = 100


def check_weight_file(file: Path) -> None:
    """Raises:
    ModelLoadError: the file is not what its header says; with its name and the numbers.
    FileNotFoundError: it is not there.
    """
    try:
        with file.open("rb") as content:
            size = content.seek(0, 2)
            content.seek(0)
            prefix = content.read(PREFIX_BYTES)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < PREFIX_BYTES:
                raise _Damage(f"it has {size} bytes, and a header alone needs more")
            if length > size - PREFIX_BYTES:
                raise _Damage(f"its header should have {length} bytes, and the file has {size}")
            if length > MAX_HEADER_BYTES:
                raise _Damage(f"its header has {length} bytes, the limit is {MAX_HEADER_BYTES}")
            header = content.read(length)
        _check_tensors(_parse(header), size - PREFIX_BYTES - length)
    except _Damage as damage:
        raise ModelLoadError(f"{file} is damaged: {damage}") from None


class _Damage(Exception):
    """What is wrong, without the name of the file."""


def _parse(header: bytes) -> dict[str, object]:
    try:
        tensors = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise _Damage(f"its header is no JSON: {one_line(error)}") from None
    if not isinstance(tensors, dict):
        raise _Damage("its header is no JSON object")
    tensors.pop("__metadata__", None)
    return tensors


def _check_tensors(tensors: dict[str, object], num_bytes: int) -> None:
    """Ranges are within `num_bytes`, as long as shapes say, and follow one another without gap and
    overlap up to the end."""
    ranges = sorted((*_range_of(name, tensor), name) for name, tensor in tensors.items())
    end = 0
    for start, stop, full_name in ranges:
        name = _SHOWN.repr(full_name)
        if stop > num_bytes:
            raise _Damage(
                f"{name} lies at bytes {start} to {stop} of {num_bytes}: perhaps the download is "
                "not complete"
            )
        if start != end:
            what = "overlaps what is before it" if start < end else "leaves a gap before it"
            raise _Damage(f"{name} begins at byte {start} and should at {end}: it {what}")
        end = stop
    if end != num_bytes:
        raise _Damage(f"its tensors end at byte {end} of {num_bytes}")


def _range_of(full_name: str, tensor: object) -> tuple[int, int]:
    name = _SHOWN.repr(full_name)
    match tensor:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [start, stop]}:
            numbers = [*shape, start, stop]
        case _:
            raise _Damage(f"{name} has no dtype, shape and data_offsets")
    if not all(type(number) is int and number >= 0 for number in numbers) or start > stop:
        raise _Damage(
            f"{name} has shape {_SHOWN.repr(shape)} and lies at bytes "
            f"{_SHOWN.repr(start)} to {_SHOWN.repr(stop)}"
        )
    if dtype in BITS and (needed := math.prod(shape) * BITS[dtype]) != 8 * (stop - start):
        raise _Damage(
            f"{name}, {dtype} of shape {_SHOWN.repr(shape)}, needs {_SHOWN.repr(needed // 8)} "
            f"bytes and has {_SHOWN.repr(stop - start)}"
        )
    return start, stop
