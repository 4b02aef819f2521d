"""What a safetensors header must be to be believed, one lie per test case."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import save

from core.errors import InvalidCheckpoint
from core.storage.safetensors_header import Header, parse_header


def reader(data: bytes) -> Callable[[int, int], bytes]:
    return lambda start, length: data[start : start + length]


def parse(data: bytes) -> Header:
    return parse_header(reader(data), len(data), "model.safetensors")


def file_of(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(start: int = 0, end: int = 4, dtype: Any = "F32", shape: Any = (1,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [start, end]}


def test_a_file_of_the_reference_implementation_is_read_as_it_was_meant() -> None:
    tensors = {
        "b": torch.arange(6).reshape(2, 3).to(torch.bfloat16),
        "a": torch.zeros(0, 3),
        "scalar": torch.tensor(1.5),
        "flag": torch.tensor([True, False]),
    }
    data = save(tensors, {"format": "pt"})
    header = parse(data)
    assert header.metadata == {"format": "pt"}
    assert {name: (one.dtype, one.shape) for name, one in header.tensors.items()} == {
        "b": ("BF16", (2, 3)),
        "a": ("F32", (0, 3)),
        "scalar": ("F32", ()),
        "flag": ("BOOL", (2,)),
    }
    start = header.data_start + header.tensors["b"].start
    assert data[start : start + 12] == tensors["b"].view(torch.uint8).numpy().tobytes()


LIES: dict[str, tuple[bytes, str]] = {
    "an empty file": (b"", "truncated"),
    "seven bytes": (b"\x01\x00\x00\x00\x00\x00\x00", "truncated"),
    "a header longer than the file": ((1000).to_bytes(8, "little") + b"{}", "truncated"),
    "a header over the limit": ((100_000_001).to_bytes(8, "little") + b"{}", "limit"),
    "a header of 2^64 - 1 bytes": (b"\xff" * 8 + b"{}", "limit"),
    "no UTF-8": (file_of(b'{"\xff\xfe": 1}'), "UTF-8"),
    "no JSON": (file_of(b"{nonsense"), "not JSON"),
    "JSON with NaN": (file_of(b'{"a": NaN}'), "not JSON"),
    "JSON too deep": (file_of(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "not JSON"),
    "an integer of 10 000 digits": (file_of(b'{"a":' + b"9" * 10_000 + b"}"), "not JSON"),
    "a list": (file_of([]), "begin"),
    "white space before the object": (file_of(b"  {}"), "begin"),
    "a name twice": (
        file_of(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), b"\0" * 4),
        "duplicate key 'a'",
    ),
    "a field twice": (file_of(b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}'), "duplicate"),
    "metadata with a number": (file_of({"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata as a list": (file_of({"__metadata__": ["a"]}), "__metadata__"),
    "a tensor that is a number": (file_of({"a": 1}), "must have"),
    "a tensor without offsets": (file_of({"a": {"dtype": "F32", "shape": [1]}}), "must have"),
    "a field too many": (file_of({"a": entry() | {"stride": [1]}}, b"\0" * 4), "must have"),
    "an unknown dtype": (file_of({"a": entry(dtype="F33")}, b"\0" * 4), "unknown dtype 'F33'"),
    "a dtype that is a list": (file_of({"a": entry(dtype=["F32"])}, b"\0" * 4), "unknown dtype"),
    "a shape that is a number": (file_of({"a": entry(shape=1)}, b"\0" * 4), "shape is not"),
    "a fractional dimension": (file_of({"a": entry(shape=[1.0])}, b"\0" * 4), "shape is not"),
    "a dimension that is true": (file_of({"a": entry(shape=[True])}, b"\0" * 4), "shape is not"),
    "a negative dimension": (file_of({"a": entry(shape=[-1, -1])}, b"\0" * 4), "negative"),
    "dimensions whose product wraps to one": (
        file_of({"a": entry(shape=[2**32 + 1, 2**32 - 1])}, b"\0" * 4),
        "overflows",
    ),
    "a huge dimension beside a zero": (file_of({"a": entry(0, 0, shape=[0, 2**70])}), "overflows"),
    "a hundred dimensions": (file_of({"a": entry(shape=[1] * 100)}, b"\0" * 4), "dimensions"),
    "fewer bytes than the shape needs": (file_of({"a": entry(shape=[2])}, b"\0" * 4), "needs 8 bytes"),
    "more bytes than the shape needs": (file_of({"a": entry(0, 8)}, b"\0" * 8), "needs 4 bytes"),
    "half a byte": (file_of({"a": entry(0, 1, "F4", [1])}, b"\0"), "needs 0.5 bytes"),
    "offsets the wrong way round": (file_of({"a": entry(4, 0)}, b"\0" * 4), "out of order"),
    "a negative offset": (file_of({"a": entry(-4, 0)}, b"\0" * 4), "out of order"),
    "three offsets": (file_of({"a": entry() | {"data_offsets": [0, 4, 4]}}, b"\0" * 4), "two integers"),
    "offsets as text": (file_of({"a": entry() | {"data_offsets": ["0", "4"]}}, b"\0" * 4), "two integers"),
    "data that ends early": (file_of({"a": entry()}, b"\0" * 3), "truncated"),
    "tensors that overlap": (file_of({"a": entry(0, 4), "b": entry(2, 6)}, b"\0" * 6), "overlaps"),
    "tensors in the same place": (file_of({"a": entry(0, 4), "b": entry(0, 4)}, b"\0" * 4), "overlaps"),
    "a hole between tensors": (file_of({"a": entry(0, 4), "b": entry(8, 12)}, b"\0" * 12), "hole"),
    "a hole before the first": (file_of({"a": entry(4, 8)}, b"\0" * 8), "hole"),
    "data beyond the last tensor": (file_of({"a": entry()}, b"\0" * 5), "beyond"),
    "data and no tensor": (file_of({}, b"\0"), "beyond"),
    "an empty name": (file_of({"": entry()}, b"\0" * 4), "name"),
    "a name with a line break": (file_of({"a\nb": entry()}, b"\0" * 4), "control"),
    "a name with half a surrogate pair": (
        file_of(b'{"\\ud800":%s}' % json.dumps(entry()).encode(), b"\0" * 4),
        "control",
    ),
    "a name of 513 bytes": (file_of({"a" * 513: entry()}, b"\0" * 4), "longer"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_refused_with_the_file_and_the_reason(lie: str) -> None:
    data, reason = LIES[lie]
    with pytest.raises(InvalidCheckpoint, match=reason) as refused:
        parse(data)
    assert refused.value.where == "model.safetensors"
    assert len(refused.value.detail) < 400


def test_the_names_of_a_million_duplicates_are_refused_in_linear_time() -> None:
    text = b'{"a":1,' + b",".join(b'"%d":1' % number for number in range(200_000)) + b',"a":1}'
    with pytest.raises(InvalidCheckpoint, match="duplicate"):
        parse(file_of(text))


def test_damage_anywhere_is_refused_or_harmless_and_never_another_exception() -> None:
    """4000 random flips, cuts and insertions of a good file (seed 0): parsed or refused, nothing else."""
    good = save({"a.weight": torch.ones(3, 5), "b.weight": torch.ones(7, dtype=torch.float16)}, {"format": "pt"})
    chance = random.Random(0)
    for _ in range(4000):
        data = bytearray(good)
        for _ in range(chance.randint(1, 4)):
            place = chance.randrange(len(data))
            match chance.randrange(3):
                case 0:
                    data[place] = chance.randrange(256)
                case 1:
                    del data[place:]
                    data += b" "
                case _:
                    data[place:place] = bytes([chance.randrange(256)])
        try:
            header = parse(bytes(data))
        except InvalidCheckpoint:
            continue
        assert all(header.data_start + one.end <= len(data) for one in header.tensors.values())
