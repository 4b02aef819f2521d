"""Stored bytes of layout version 1, pinned: what was written once can be read for ever, and is written the same way.

`layout_v1.json` was written by `python -m tests.golden.test_layout`; what stands in it is decoded for ever. An encoding
that was superseded (its entry says so) is still read and no longer written.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from core.exports.layout import LAYOUT_VERSION
from core.recipe.tensor_format import parse
from core.tensors.dtypes import TORCH_DTYPES
from core.tensors.encoded import EncodedTensor
from core.tensors.nearest import encode_nearest
from core.tensors.writer import tensor_bytes

FILE = Path(__file__).with_name("layout_v1.json")
SHAPE = (3, 11)
FORMATS = [
    "int4@4",
    "int3-asym@4:signmax:fp16",
    "int5-sym@channel:absmax:fp32",
    "int12@8",
    "int2.58@11",
    "nf4@4",
    "t7_3.58@4:signmax",
    "t5_3@tensor:rms",
    "normal4-sym@8:absmax:e8m0",
    "mxfp4",
    "mxfp6_e2m3",
    "mxfp8_e4m3",
    "nf4@4:search",
    "sf4@4:absmax:dq8",
    "af4-l1@4",
    "bof4-s@4",
    "lloyd3@tensor:rms",
    "lloyd3-rows@channel",
    "t_3@4:signmax",
    "power4@channel",
    "float5@4",
    "int4-mx@4:absmax:e8m0-even",
    "nvfp4",
    "float4_e2m1@4:fouroversix:e4m3",
    "t7_4@4:signmax+unbiased",
    "int4@4+outliers0.1",
    "normal4@4+outliers0.1+hadamard",
    "normal4@4+rotate",
    "grid3@tensor+columns",
    "q4_k",
    "mx6",
]


def weights() -> torch.Tensor:
    """Numbers of a recurrence, so that no generator of random numbers decides them."""
    values, state = [], 1
    for _ in range(SHAPE[0] * SHAPE[1]):
        state = state * 75 % 65537
        values.append((state - 32768) / 32768)
    return torch.tensor(values, dtype=torch.float32).reshape(SHAPE)


def entry(text: str) -> dict[str, Any]:
    encoded = encode_nearest(weights(), parse(text))
    parts = {name: tensor_bytes(part).tobytes().hex() for name, part in encoded.parts().items()}
    return {"format": str(parse(text)), "parts": parts, "decoded": tensor_bytes(encoded.decode()).tobytes().hex()}


GOLDEN: list[dict[str, Any]] = json.loads(FILE.read_text()) if FILE.exists() else []
WRITTEN = [one for one in GOLDEN if "superseded" not in one]


def test_the_pinned_layout_is_the_current_one() -> None:
    assert LAYOUT_VERSION == 1
    assert [one["format"] for one in WRITTEN] == [str(parse(text)) for text in FORMATS]


@pytest.mark.parametrize("pinned", GOLDEN, ids=lambda one: one["format"])
def test_pinned_bytes_are_decoded_to_the_pinned_values(pinned: dict[str, Any]) -> None:
    fmt = parse(pinned["format"])
    parts = {
        name: torch.frombuffer(bytearray.fromhex(pinned["parts"][name]), dtype=TORCH_DTYPES[dtype]).reshape(shape)
        for name, (dtype, shape) in EncodedTensor.planned_parts(fmt, SHAPE).items()
    }
    decoded = EncodedTensor.from_parts(fmt, SHAPE, "F32", parts).decode()
    assert tensor_bytes(decoded).tobytes().hex() == pinned["decoded"]


@pytest.mark.parametrize("pinned", WRITTEN, ids=lambda one: one["format"])
def test_encoding_writes_the_pinned_bytes(pinned: dict[str, Any]) -> None:
    written = entry(pinned["format"])
    assert written["parts"].keys() == pinned["parts"].keys()
    for part in written["parts"].keys() - {"codebook"}:
        assert written["parts"][part] == pinned["parts"][part], part
    # a library's special functions may differ in the last place: the stored table is what decodes
    tables = [bytearray.fromhex(one["parts"].get("codebook", "00000000")) for one in (written, pinned)]
    ours, theirs = (torch.frombuffer(table, dtype=torch.float32) for table in tables)
    torch.testing.assert_close(ours, theirs, rtol=2**-22, atol=0)


if __name__ == "__main__":
    superseded = [one for one in GOLDEN if "superseded" in one]
    FILE.write_text(json.dumps([entry(text) for text in FORMATS] + superseded, indent=1) + "\n")
