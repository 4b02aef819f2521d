"""Block types against numbers from elsewhere: reference decoders' output, stock encoders' bytes, published errors.

`formats.json` says where each number comes from. Seeded data are 2^20 standard normal numbers of numpy and of torch.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from core.formats.block_types import BLOCK_TYPES, TILE_TYPES, block_type
from core.tensors.block_types.codec import decode_blocks, encode_blocks
from core.tensors.block_types.int32_words import pack_int32, unpack_int32
from core.tensors.block_types.tile_scales import ScaleRule

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "formats.json").read_text())
ENTRIES: dict[str, Any] = GOLDEN["entries"]
TILES: dict[str, Any] = ENTRIES["tensorcast/seeded-mse"]
CODEBOOKS: dict[str, Any] = ENTRIES["tensorcast/seeded-mse-implicit-codebooks"]
SOURCES = ("numpy0", "torch0")
# Where d, and then m or dmin, lie in a block.
HALVES = {
    "Q8_0": (0,),
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "IQ4_NL": (0,),
    "MXFP4": (),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}
# Of the names for which bits are published: what we call them, or None for those that are not block types.
NAMES = {
    "MXFP6": "mxfp6e2",
    "MXFP8": "mxfp8e4",
    "NF4-64-fp32-scale": None,
    "BOF4-S-64-bf16-scale": None,
    "NF4-64-double-quant": None,
}


def entries(prefix: str) -> list[str]:
    return [name.removeprefix(prefix) for name in ENTRIES if name.startswith(prefix)]


@lru_cache(maxsize=2)
def source(name: str) -> NDArray[np.float32]:
    if name == "numpy0":
        numbers = np.random.default_rng(0).standard_normal((1024, 1024)).astype(np.float32)
    else:
        numbers = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)).numpy()
    assert hashlib.sha256(numbers.tobytes()).hexdigest() == GOLDEN["data"][name]["sha256"]
    return numbers


def encoded(name: str, data: str, rule: ScaleRule = "max") -> NDArray[np.uint8]:
    return encode_blocks(name, source(data).reshape(-1, block_type(name).elements), rule=rule)


def mean_squared_error(name: str, blocks: NDArray[np.uint8], data: str) -> float:
    error = decode_blocks(name, blocks).reshape(-1) - source(data).reshape(-1).astype(np.float64)
    return float(np.mean(np.square(error)))


def test_every_published_decode_vector_has_its_type_here() -> None:
    assert set(entries("gguf/decode/")) == set(HALVES)


@pytest.mark.parametrize("name", HALVES)
def test_blocks_of_gguf_decode_to_the_bits_of_the_reference_decoder(name: str) -> None:
    expected = ENTRIES[f"gguf/decode/{name}"]["value"]
    kind = block_type(name.lower())
    assert (kind.gguf_id, kind.elements, kind.nbytes) == (expected["type_id"], expected["block"], expected["bytes"])
    data = np.array([(73 * i + 41) % 256 for i in range(kind.nbytes)], dtype=np.uint8)
    for offset, number in zip(HALVES[name], (0.0123, 0.0457), strict=False):
        data[offset : offset + 2] = np.array([number], dtype="<f2").view(np.uint8)
    if name == "MXFP4":
        data[0] = 124
    found = decode_blocks(name.lower(), data[None])[0] + np.float32(0)
    assert found[:8].tolist() == expected["first8"]
    assert found[-4:].tolist() == expected["last4"]
    assert found.astype(np.float64).sum() == expected["sum"]
    assert hashlib.sha256(found.astype("<f4").tobytes()).hexdigest() == expected["sha256_float32"]


@pytest.mark.parametrize("name", entries("gguf/encode/"))
def test_legacy_types_are_written_byte_for_byte_as_the_stock_encoder_does(name: str) -> None:
    expected = ENTRIES[f"gguf/encode/{name}"]["value"]
    blocks = encoded(name.lower(), "numpy0")
    assert blocks[0].tolist() == expected["first_block_numpy0"]
    assert blocks.nbytes == expected["bytes"]
    assert hashlib.sha256(blocks.tobytes()).hexdigest() == expected["sha256_numpy0"]


@pytest.mark.parametrize("data", SOURCES)
@pytest.mark.parametrize("name", entries("gguf/encode/"))
def test_legacy_types_have_the_published_error(name: str, data: str) -> None:
    entry = ENTRIES[f"gguf/encode/{name}"]
    found = mean_squared_error(name.lower(), encoded(name.lower(), data), data)
    assert found == pytest.approx(entry["value"]["mse"][data], rel=entry["rel_tol"])


@pytest.mark.parametrize("data", SOURCES)
@pytest.mark.parametrize("name", ENTRIES["gguf/encode-mse-reference/stock"]["value"])
def test_searched_types_reach_the_least_squares_error_which_is_below_the_stock_encoders(name: str, data: str) -> None:
    found = mean_squared_error(name.lower(), encoded(name.lower(), data), data)
    searched = ENTRIES["gguf/encode-mse-reference/least-squares"]
    assert found <= searched["value"][name][data] * (1 + searched["rel_tol"])
    assert found < ENTRIES["gguf/encode-mse-reference/stock"]["value"][name][data]


def test_all_published_tile_types_are_here_but_the_one_that_has_no_tiles() -> None:
    assert set(TILES["value"]) - set(TILE_TYPES) == {"bfloat16"}
    assert set(CODEBOOKS["value"]) <= set(TILE_TYPES)


@pytest.mark.parametrize("name", sorted(set(TILES["value"]) & set(TILE_TYPES)))
def test_tile_types_have_the_errors_of_the_library_that_they_come_from(name: str) -> None:
    expected = TILES["value"][name]
    blocks = encoded(name, "torch0", "max")
    assert mean_squared_error(name, blocks, "torch0") == pytest.approx(expected["max"], rel=TILES["rel_tol"])
    raised = encoded(name, "torch0", "midmax")
    if expected["midmax"] == expected["max"]:
        assert np.array_equal(raised, blocks)
    else:
        found = mean_squared_error(name, raised, "torch0")
        assert found == pytest.approx(expected["midmax"], rel=TILES["rel_tol"])


@pytest.mark.parametrize("name", CODEBOOKS["value"])
def test_implicit_codebooks_have_the_errors_of_the_library_that_they_come_from(name: str) -> None:
    found = mean_squared_error(name, encoded(name, "torch0", "max"), "torch0")
    assert found == pytest.approx(CODEBOOKS["value"][name], rel=CODEBOOKS["rel_tol"])


@pytest.mark.parametrize("name", ENTRIES["bits-per-value"]["value"])
def test_weights_take_the_bits_that_are_published(name: str) -> None:
    known = NAMES.get(name, name.lower())
    if known is None:
        assert name.lower() not in BLOCK_TYPES
    else:
        assert block_type(known).bits == ENTRIES["bits-per-value"]["value"][name]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_int32_words_are_those_of_compressed_tensors(bits: int) -> None:
    expected = ENTRIES["compressed-tensors/pack-int32"]["value"]
    values = torch.tensor([(7 * i) % 2**bits - 2 ** (bits - 1) for i in range(40)])
    words = pack_int32(values, bits)
    wanted = expected["8_first3"] if bits == 8 else expected[str(bits)]
    assert words[: len(wanted)].tolist() == wanted
    assert len(words) == 40 * bits // 32 + (40 * bits % 32 > 0)
    assert torch.equal(unpack_int32(words, bits, 40).long(), values)
