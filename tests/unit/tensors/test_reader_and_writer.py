"""Safetensors files of ours: exact sizes in advance, the same bytes always, readable by others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from core.errors import BitmillError
from core.storage.checkpoint import CheckpointIndex
from core.storage.sources import LocalFile
from core.tensors.reader import iter_tensors, read_tensor
from core.tensors.writer import Part, SafetensorsWriter, planned_bytes

TENSORS = {
    "é.codes": torch.arange(7, dtype=torch.uint8),
    "a.scales": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "b": torch.randn(3, 5),
    "empty": torch.zeros(0, 4, dtype=torch.float16),
    "scalar": torch.tensor(3, dtype=torch.int64),
    "flags": torch.tensor([True, False, True]),
    "e4m3": torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn),
}
NAMES = {
    torch.uint8: "U8",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
}
PARTS = [Part(name, NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in TENSORS.items()]


def write(path: Path, order: list[str], metadata: dict[str, str] | None = None) -> Path:
    with SafetensorsWriter(path, PARTS, metadata or {"format": "pt"}) as writer:
        for name in order:
            writer.write(name, TENSORS[name])
    return path


def test_the_reference_implementation_and_our_reader_read_what_was_written(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", list(TENSORS), {"format": "pt", "note": 'quo"te'})
    index = CheckpointIndex.from_files({path.name: LocalFile(path)})
    with safe_open(path, "pt") as theirs:
        assert theirs.metadata() == {"format": "pt", "note": 'quo"te'}
        for name, tensor in TENSORS.items():
            for read in (theirs.get_tensor(name), read_tensor(index, name)):
                assert read.dtype == tensor.dtype
                assert read.shape == tensor.shape
                assert torch.equal(read.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_the_order_of_writing_does_not_change_a_byte(tmp_path: Path) -> None:
    one = write(tmp_path / "1.safetensors", list(TENSORS))
    other = write(tmp_path / "2.safetensors", list(reversed(TENSORS)))
    assert one.read_bytes() == other.read_bytes()


def test_the_planned_size_is_the_size(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", list(TENSORS))
    assert path.stat().st_size == planned_bytes(PARTS, {"format": "pt"})


def test_every_tensor_is_aligned_to_its_dtype(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", list(TENSORS))
    index = CheckpointIndex.from_files({path.name: LocalFile(path)})
    start = index.headers[path.name].data_start
    assert all((start + index.tensors[name].start) % tensor.element_size() == 0 for name, tensor in TENSORS.items())


def test_a_tensor_that_never_came_or_has_another_shape_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BitmillError, match="was not written"):
        write(tmp_path / "1.safetensors", list(TENSORS)[1:])
    with SafetensorsWriter(tmp_path / "2.safetensors", PARTS[:1], {}) as writer:
        with pytest.raises(BitmillError, match="planned as"):
            writer.write("é.codes", TENSORS["b"])
        with pytest.raises(BitmillError, match="planned with 7 bytes"):
            writer.write("é.codes", b"123")
        writer.write("é.codes", bytes(7))


def test_a_strided_tensor_is_written_in_the_order_of_its_elements(tmp_path: Path) -> None:
    tensor = torch.arange(6.0).reshape(2, 3).t()
    path = tmp_path / "x.safetensors"
    with SafetensorsWriter(path, [Part("a", "F32", (3, 2))], {}) as writer:
        writer.write("a", tensor)
    index = CheckpointIndex.from_files({path.name: LocalFile(path)})
    assert torch.equal(dict(iter_tensors(index, ["a"]))["a"], tensor)
