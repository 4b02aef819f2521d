"""Parts `codes` that nobody wrote: InvalidCheckpoint, through an artefact with the tensor's name; never a crash.

Mutations come as they are, which checksums find, or with all checksums made right again, which any tensor may come of.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from core.errors import BitmillError, InvalidCheckpoint
from core.exports.artefact import Artefact
from core.recipe.tensor_format import parse
from core.storage.checkpoint import CheckpointIndex
from core.storage.sources import LocalFile
from core.tensors import coded
from core.tensors.coded import HEAD_BYTES, as_part, coded_bytes
from core.tensors.dtypes import SAFETENSORS_NAMES
from core.tensors.encoded import EncodedTensor
from core.tensors.entropy import layout
from core.tensors.entropy.matrix import COLUMNS, KINDS, ROWS
from core.tensors.nearest import encode_nearest
from core.tensors.writer import Part, SafetensorsWriter
from tests.unit.tensors.test_entropy_damage import mutated, signed_again

Bytes = NDArray[np.uint8]
RANDOM = np.random.default_rng(11)
LINES = torch.tensor([0.03, 1.0]).repeat(20)
NORMAL = torch.from_numpy(RANDOM.standard_normal((60, 40))).float()
KINDS_OF_CODES = {
    "constant": ("int4@8+rans", torch.zeros(60, 40), None),
    "plain": ("int8@tensor+rans", torch.from_numpy(RANDOM.uniform(-1, 1, (60, 40))).float(), None),
    "rans": ("int4@8+rans", NORMAL, None),
    "rans of 9 bits": ("int9@tensor:absmax:fp32+rans", NORMAL**3, None),
    "rows": ("int6@tensor+rans", (NORMAL * LINES).T.contiguous(), ROWS),
    "columns": ("int6@tensor+rans", NORMAL * LINES, COLUMNS),
    "columns of blocks": ("int6@7+rans", NORMAL * LINES, COLUMNS),
    "huffman": ("nf4@16+huffman", NORMAL, None),
    "grid": ("grid4@tensor", NORMAL, None),
    "grid of columns": ("grid5@tensor", NORMAL * LINES, COLUMNS),
    "grid of blocks": ("grid6@16+huffman", NORMAL, None),
}


@lru_cache(maxsize=32)
def example(kind: str) -> tuple[EncodedTensor, torch.Tensor]:
    """An encoded tensor whose codes have the form that the kind says, and what it decodes to."""
    text, weight, form = KINDS_OF_CODES[kind]
    encoded = encode_nearest(weight, parse(text))
    if form is not None and not encoded.format.is_grid:
        codes = encoded.all_codes().numpy().reshape(encoded.shape)
        encoded = with_code(encoded, coded_bytes(codes, "rans", form))
    return encoded, encoded.decode()


def code_of(encoded: EncodedTensor) -> Bytes:
    """The code in the part, writable."""
    part = encoded.codes.numpy()
    size = int.from_bytes(part[:HEAD_BYTES].tobytes(), "little")
    return part[HEAD_BYTES : HEAD_BYTES + size].copy()


def with_code(encoded: EncodedTensor, code: Bytes) -> EncodedTensor:
    """The tensor with another code; of a grid, whose part has one size, what would be too much is cut off."""
    size = encoded.codes.numel() if encoded.format.is_grid else HEAD_BYTES + code.size
    return with_part(encoded, as_part(code[: size - HEAD_BYTES], size))


def with_part(encoded: EncodedTensor, part: torch.Tensor) -> EncodedTensor:
    return EncodedTensor.from_parts(encoded.format, encoded.shape, "F32", encoded.parts() | {"codes": part})


def resealed(code: Bytes, method: str | None) -> Bytes:
    """All checksums made right, as far as the bytes can be read."""
    if method == "huffman":
        return layout.sealed(code[:-4].tobytes())
    if code.size < 8 or code[1] not in KINDS:
        return signed_again(code)
    try:
        reader = layout.Reader(code)
        reader.at = 2
        reader.varint(1 << 20, "width")
        size = reader.varint(code.size - reader.at, "classes")
        begin = reader.at
        ids = signed_again(code[begin : begin + size].copy())
        reader.at += size
        reader.align()
    except InvalidCheckpoint:
        return code
    head = layout.sealed(code[:begin].tobytes() + ids.tobytes() + bytes(reader.at - begin - ids.size))
    return np.concatenate([head, signed_again(code[head.size :].copy())])


def outcome(kind: str, damaged: EncodedTensor, *, may_differ: bool) -> None:
    """Decodes: an error or the very tensor; where checksums were made right, any tensor."""
    expected = example(kind)[1]
    try:
        found = damaged.decode()
    except InvalidCheckpoint:
        return
    assert found.shape == expected.shape
    assert may_differ or torch.equal(found, expected)


def fuzz(count: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    kinds = list(KINDS_OF_CODES)
    for number in range(count):
        kind, is_resealed = kinds[number % len(kinds)], number // len(kinds) % 2 == 1
        encoded = example(kind)[0]
        code = mutated(code_of(encoded), random)
        code = resealed(code, encoded.format.entropy_code) if is_resealed else code
        outcome(kind, with_code(encoded, code), may_differ=is_resealed)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_thousand_mutations_give_an_error_or_the_tensor(seed: int) -> None:
    fuzz(1100, seed)


@pytest.mark.slow
def test_a_hundred_thousand_mutations_give_an_error_or_the_tensor() -> None:
    fuzz(100_000, 3)


def test_mutations_meet_tiles_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coded, "_TILE", 1 << 10)
    monkeypatch.setattr(coded, "_TOGETHER", 50)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    fuzz(550, 4)
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", KINDS_OF_CODES)
def test_examples_have_the_form_that_they_are_for(kind: str) -> None:
    encoded, (_, _, form) = example(kind)[0], KINDS_OF_CODES[kind]
    found = encoded.coded
    assert found is not None
    assert (found.sequence is None) == (encoded.format.entropy_code == "huffman")
    if form is not None:
        assert KINDS[int(code_of(encoded)[1])] == found.axis == form
        assert found.sequence is not None
        assert len(found.sequence.models) > 1
    elif found.sequence is not None:
        known = {"constant": layout.CONSTANT, "plain": layout.PLAIN}.get(kind, layout.RANS)
        assert int(code_of(encoded)[1]) == known


@pytest.mark.parametrize("kind", KINDS_OF_CODES)
def test_a_part_that_is_cut_or_has_a_bit_flipped_anywhere_is_an_error(kind: str) -> None:
    encoded, _ = example(kind)
    part = encoded.codes.numpy()
    used = HEAD_BYTES + code_of(encoded).size
    places = [*range(min(part.size, 80)), *range(80, part.size, 23), used - 1, part.size - 1]
    for at in places:
        flipped = part.copy()
        flipped[at] ^= np.uint8(1 << at % 8)
        with pytest.raises(InvalidCheckpoint):
            with_part(encoded, torch.from_numpy(flipped)).decode()
    for at in places:
        with pytest.raises(InvalidCheckpoint):
            with_part(encoded, torch.from_numpy(part[:at].copy())).decode()
    if not encoded.format.is_grid:
        with pytest.raises(InvalidCheckpoint, match="hold no entropy-coded codes"):
            with_part(encoded, torch.from_numpy(np.append(part, np.uint8(1)))).decode()


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9])
def test_parts_of_a_few_bytes_are_errors(length: int) -> None:
    for kind in ("rans", "huffman", "columns"):
        for value in (0, 1, 255):
            part = torch.full((length,), value, dtype=torch.uint8)
            with pytest.raises(InvalidCheckpoint):
                with_part(example(kind)[0], part).decode()


def plain(low: int, width: int, places: list[int]) -> Bytes:
    """A plain sequence of 2400 numbers, `low` and what is above it, made by hand."""
    numbers = (places * 2400)[:2400]
    bits = np.array([[number >> bit & 1 for bit in range(width)] for number in numbers], np.uint8).reshape(-1)
    start = layout.head(layout.PLAIN, 2400) + layout.signed(low) + bytes([width])
    return layout.sealed(start + np.packbits(bits, bitorder="little").tobytes())


@pytest.mark.parametrize("kind", ["rans", "grid", "columns of blocks"])
@pytest.mark.parametrize(
    ("low", "width"), [(2**31 - 10, 5), (2**31 - 1, 1), (0, 32), (-5, 32), (-(2**31), 22), (2**31 - 3, 2), (7, 22)]
)
def test_numbers_that_no_format_has_are_errors(kind: str, low: int, width: int) -> None:
    """Beyond 32 bits, or so many that a table of their values would be too much."""
    with pytest.raises(InvalidCheckpoint):
        with_code(example(kind)[0], plain(low, width, [0, 1])).decode()


def test_codes_below_zero_are_errors_but_for_a_grid() -> None:
    with pytest.raises(InvalidCheckpoint, match="that no format has"):
        with_code(example("rans")[0], plain(-1, 1, [0, 1])).decode()
    found = with_code(example("grid")[0], plain(-1, 1, [0, 1])).decode()
    assert sorted(set(found.sign().reshape(-1).tolist())) == [-1, 0]


@pytest.mark.parametrize("low", [16, 200, 256, 70_000, 2**31 - 2])
def test_codes_beyond_the_table_decode_as_its_last_value(low: int) -> None:
    encoded = example("rans")[0]
    last = with_code(encoded, plain(15, 1, [0])).decode()
    assert torch.equal(with_code(encoded, plain(low, 1, [0, 1])).decode(), last)


@pytest.mark.parametrize("kind", ["rows", "columns", "grid of columns"])
def test_a_matrix_of_another_shape_is_an_error(kind: str) -> None:
    encoded, expected = example(kind)
    rows, columns = encoded.shape
    for shape in ((columns, rows), (rows, columns - 1), (2400,), (1, 2400)):
        with pytest.raises(InvalidCheckpoint):
            EncodedTensor.from_parts(encoded.format, shape, "F32", encoded.parts()).decode()
    split = EncodedTensor.from_parts(encoded.format, (rows // 2, 2, columns), "F32", encoded.parts())
    assert torch.equal(split.decode().reshape(rows, columns), expected)


def test_a_code_of_the_other_kind_is_an_error() -> None:
    for kind, other in (("rans", "+huffman"), ("huffman", "+rans")):
        encoded = example(kind)[0]
        fmt = parse(f"{encoded.format.without_code}{other}")
        with pytest.raises(InvalidCheckpoint):
            EncodedTensor.from_parts(fmt, encoded.shape, "F32", encoded.parts()).decode()


@pytest.mark.parametrize("name", ["step", "centroids"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_a_step_and_centroids_that_no_encoder_writes_are_errors(name: str, value: float) -> None:
    encoded = example("grid")[0]
    parts = encoded.parts() | {name: torch.full_like(encoded.parts()[name], value)}
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(InvalidCheckpoint, match="a grid with a step of"):
            EncodedTensor.from_parts(encoded.format, encoded.shape, "F32", parts).decode(dtype)


@pytest.mark.parametrize("method", ["rans", "huffman"])
def test_codes_that_the_format_does_not_have_are_errors(method: str) -> None:
    encoded = encode_nearest(torch.randn(40, 50), parse(f"int4@64+{method}"))
    other = EncodedTensor.from_parts(parse(f"int3@64+{method}"), encoded.shape, "F32", encoded.parts())
    with pytest.raises(InvalidCheckpoint, match="that no format has"):
        other.decode()


def artefact_of(path: Path, kind: str, part: torch.Tensor) -> Artefact:
    """An artefact of one tensor `a.weight` with that part `codes`."""
    encoded = example(kind)[0]
    parts = {f"a.weight.{name}": one for name, one in (encoded.parts() | {"codes": part}).items()}
    fmt = encoded.format.with_coded_bytes(part.numel())
    described = {"a.weight": {"format": str(fmt), "shape": list(encoded.shape), "dtype": "F32"}}
    metadata = {"format": "pt", "bitmill": json.dumps({"version": 1, "tensors": described})}
    planned = [Part(name, SAFETENSORS_NAMES[one.dtype], tuple(one.shape)) for name, one in parts.items()]
    (path / "model.safetensors").unlink(missing_ok=True)
    with SafetensorsWriter(path / "model.safetensors", planned, metadata) as writer:
        for name, one in parts.items():
            writer.write(name, one)
    return Artefact.open(CheckpointIndex.from_files({"model.safetensors": LocalFile(path / "model.safetensors")}))


@pytest.mark.parametrize("dtype", [None, "BF16"])
@pytest.mark.parametrize("kind", KINDS_OF_CODES)
def test_an_artefact_names_the_tensor_whose_codes_are_damaged(kind: str, dtype: str | None, tmp_path: Path) -> None:
    encoded, expected = example(kind)
    found = artefact_of(tmp_path, kind, encoded.codes).decode("a.weight", dtype)
    assert torch.equal(found, expected.to(torch.bfloat16) if dtype else expected)
    for at in (3, HEAD_BYTES, HEAD_BYTES + code_of(encoded).size // 2, HEAD_BYTES + code_of(encoded).size - 1):
        part = encoded.codes.clone()
        part[at] ^= 16
        with pytest.raises(BitmillError) as refused:
            artefact_of(tmp_path, kind, part).decode("a.weight", dtype)
        assert isinstance(refused.value, InvalidCheckpoint)
        assert refused.value.where == "a.weight"
