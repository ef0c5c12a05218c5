"""A weight file that is not what its header says is found out before it is read."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from footplate.backend.runner.errors import ModelLoadError
from footplate.backend.runner.weight_files import BITS, MAX_HEADER_BYTES, check_weight_file


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def write(file: Path, header: object, num_bytes: int) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(num_bytes))


def tensor(start: object, stop: object, shape: object, dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def damage(file: Path) -> str:
    with pytest.raises(ModelLoadError) as caught:
        check_weight_file(file)
    message = str(caught.value)
    assert message.startswith(f"{file} is damaged: ") and "\n" not in message
    assert len(message) < 1000
    return message.removeprefix(f"{file} is damaged: ")


def test_what_the_library_writes_is_right(file: Path) -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.bool, torch.uint8]
    dtypes += [torch.float64, torch.int64, torch.int32, torch.int16, torch.float8_e4m3fn]
    tensors = {str(dtype): torch.zeros(3, 5, dtype=dtype) for dtype in dtypes}
    tensors |= {"empty": torch.zeros(0, 4), "scalar": torch.tensor(1.0)}
    save_file(tensors, file, {"format": "pt"})
    check_weight_file(file)


@pytest.mark.parametrize("num_bytes", [0, 1, 7])
def test_a_file_without_a_header(num_bytes: int, file: Path) -> None:
    file.write_bytes(bytes(num_bytes))
    assert damage(file) == f"it has {num_bytes} bytes, and a header alone needs more"


@pytest.mark.parametrize("length", [3, 2**31, 2**64 - 1])
def test_a_header_beyond_the_file(length: int, file: Path) -> None:
    file.write_bytes(length.to_bytes(8, "little") + b"{}")
    assert damage(file) == f"its header should have {length} bytes, and the file has 10"


def test_a_header_beyond_all_bounds(file: Path) -> None:
    length = MAX_HEADER_BYTES + 1
    with file.open("wb") as content:
        content.write(length.to_bytes(8, "little"))
        content.truncate(length + 8)  # takes no room
    assert f"{length} bytes, the limit is {MAX_HEADER_BYTES}" in damage(file)


@pytest.mark.parametrize("header", [b"{", b"\xff\xfe", b"[" * 100_000, b"[1]", b"7", b"null"])
def test_a_header_that_is_no_object(header: bytes, file: Path) -> None:
    write(file, header, 0)
    assert "its header is no JSON" in damage(file)


@pytest.mark.parametrize("missing", ["dtype", "shape", "data_offsets"])
def test_a_tensor_that_says_too_little(missing: str, file: Path) -> None:
    fields = tensor(0, 8, [2])
    del fields[missing]
    write(file, {"w": fields}, 8)
    assert damage(file) == "'w' has no dtype, shape and data_offsets"


def test_a_truncated_file_names_the_tensor_and_the_bytes(file: Path) -> None:
    write(file, {"a": tensor(0, 8, [2]), "b": tensor(8, 24, [4])}, 23)
    assert damage(file).startswith("'b' lies at bytes 8 to 24 of 23: perhaps the download")


def test_what_stands_behind_the_last_tensor(file: Path) -> None:
    write(file, {"a": tensor(0, 8, [2])}, 9)
    assert damage(file) == "its tensors end at byte 8 of 9"


def test_tensors_that_overlap(file: Path) -> None:
    write(file, {"a": tensor(0, 8, [2]), "b": tensor(4, 12, [2])}, 12)
    assert damage(file) == "'b' begins at byte 4 and should at 8: it overlaps what is before it"


def test_a_gap(file: Path) -> None:
    write(file, {"a": tensor(0, 8, [2]), "b": tensor(12, 20, [2])}, 20)
    assert damage(file) == "'b' begins at byte 12 and should at 8: it leaves a gap before it"


@pytest.mark.parametrize(
    "wrong",
    [
        *(tensor(-4, 4, [2]), tensor(8, 0, [2]), tensor(0, 8.0, [2]), tensor(0, True, [1])),
        *(tensor(0, 8, [-2]), tensor(0, 8, ["2"]), tensor(0, 8, [[2]])),
    ],
)
def test_numbers_that_are_none(wrong: object, file: Path) -> None:
    write(file, {"w": wrong}, 8)
    assert damage(file).startswith("'w' has shape ")


@pytest.mark.parametrize("dtype", BITS)
def test_a_shape_that_does_not_fit_its_bytes(dtype: str, file: Path) -> None:
    right = BITS[dtype]  # bytes of eight numbers
    write(file, {"w": tensor(0, right, [8], dtype)}, right)
    check_weight_file(file)
    write(file, {"w": tensor(0, right, [8, 2], dtype)}, right)
    expected = f"'w', {dtype} of shape [8, 2], needs {2 * right} bytes and has {right}"
    assert damage(file) == expected


def test_a_type_of_the_future_is_left_to_the_library(file: Path) -> None:
    write(file, {"w": tensor(0, 5, [3], "F13")}, 5)
    check_weight_file(file)


@pytest.mark.parametrize("shape", [[1] * 10_000, [10**4000]])
def test_a_long_lie_is_quoted_shortly(shape: list[int], file: Path) -> None:
    write(file, {"w" * 10_000: tensor(0, 8, shape)}, 8)
    assert "www...www" in damage(file)
