"""Block types: what the bytes mean, what encoders promise, and what happens at the ends of fp32 and with hostile bytes.

Oracles are the formulas of the layouts element by element, brute force over all codes, Python's big integers as bit
streams, and ml_dtypes for small floats.
"""

from __future__ import annotations

import struct
import warnings
from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from core.errors import InvalidFormat, MethodNotAvailable, NonFiniteWeights
from core.formats import floating
from core.formats.block_types import (
    BLOCK_TYPES,
    GGUF_TYPES,
    IQ4_NL_LEVELS,
    TILE_TYPES,
    BlockType,
    block_type,
    implicit_codebooks,
)
from core.tensors.block_types.codec import CHUNK, decode_blocks, encode_blocks
from core.tensors.block_types.fields import float_codes
from core.tensors.block_types.int32_words import pack_int32, unpack_int32
from core.tensors.block_types.rows import decode_rows, encode_rows

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
F = np.float32
LEGACY = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")
K_TYPES = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")
SEARCHED = tuple(name for name, kind in BLOCK_TYPES.items() if kind.is_searched)
POWER_OF_TWO = ("mxfp4", *(name for name, kind in TILE_TYPES.items() if kind.scale == "e8m0"))
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


def normal(name: str, blocks: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal((blocks, block_type(name).elements)).astype(np.float32)


def round_trip(name: str, values: Floats) -> Floats:
    return decode_blocks(name, encode_blocks(name, values))


def half(block: bytes, at: int) -> np.float32:
    return F(struct.unpack_from("<e", block, at)[0])


def nibble(block: bytes, start: int, i: int) -> int:
    return block[start + i % 16] >> 4 * (i // 16) & 15


def bit(block: bytes, start: int, i: int) -> int:
    return block[start + i // 8] >> i % 8 & 1


def signed(byte: int) -> int:
    return byte - 256 if byte > 127 else byte


# The layouts, element by element: (scale, code or level, what is subtracted), each product and sum rounded to fp32.
Terms = tuple[np.float32, float, np.float32]


def pair_of_six_bits(z: bytes, j: int) -> tuple[int, int]:
    if j < 4:
        return z[j] & 63, z[j + 4] & 63
    return (z[j + 4] & 15) | ((z[j - 4] >> 6) << 4), (z[j + 4] >> 4) | ((z[j] >> 6) << 4)


def q2_k(b: bytes, i: int) -> Terms:
    quarter, line = i % 128 // 32, i % 32
    code = b[16 + 32 * (i // 128) + line] >> 2 * quarter & 3
    return half(b, 80) * F(b[i // 16] & 15), code, half(b, 82) * F(b[i // 16] >> 4)


def q3_k(b: bytes, i: int) -> Terms:
    low = b[32 + 32 * (i // 128) + i % 32] >> 2 * (i % 128 // 32) & 3
    code = low - (0 if b[i % 32] >> (i // 32) & 1 else 4)
    j, z = i // 16, b[96:108]
    scale = (z[j % 8] >> 4 * (j // 8) & 15) | ((z[8 + j % 4] >> 2 * (j // 4) & 3) << 4)
    return half(b, 108) * F(scale - 32), code, F(0)


def q4_k(b: bytes, i: int) -> Terms:
    j = i // 32
    scale, minimum = pair_of_six_bits(b[4:16], j)
    code = b[16 + 32 * (j // 2) + i % 32] >> 4 * (j % 2) & 15
    return half(b, 0) * F(scale), code, half(b, 2) * F(minimum)


def q5_k(b: bytes, i: int) -> Terms:
    j = i // 32
    scale, minimum = pair_of_six_bits(b[4:16], j)
    code = (b[48 + 32 * (j // 2) + i % 32] >> 4 * (j % 2) & 15) + 16 * (b[16 + i % 32] >> j & 1)
    return half(b, 0) * F(scale), code, half(b, 2) * F(minimum)


def q6_k(b: bytes, i: int) -> Terms:
    quarter = i % 128 // 32
    low = b[64 * (i // 128) + 32 * (quarter % 2) + i % 32] >> 4 * (quarter // 2) & 15
    high = b[128 + 32 * (i // 128) + i % 32] >> 2 * quarter & 3
    return half(b, 208) * F(signed(b[192 + i // 16])), (low | high << 4) - 32, F(0)


def nvfp4(b: bytes, i: int) -> Terms:
    byte, part, place = b[i // 16], i // 16, i % 16
    exponent, mantissa = byte >> 3 & 15, byte & 7
    scale = mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    code = b[4 + 8 * part + place % 8] >> 4 * (place // 8) & 15
    return F(0 if byte == 0x7F else scale), E2M1[code], F(0)


LAYOUTS: dict[str, Callable[[bytes, int], Terms]] = {
    "q4_0": lambda b, i: (half(b, 0), nibble(b, 2, i) - 8, F(0)),
    "q4_1": lambda b, i: (half(b, 0), nibble(b, 4, i), -half(b, 2)),
    "q5_0": lambda b, i: (half(b, 0), nibble(b, 6, i) + 16 * bit(b, 2, i) - 16, F(0)),
    "q5_1": lambda b, i: (half(b, 0), nibble(b, 8, i) + 16 * bit(b, 4, i), -half(b, 2)),
    "q8_0": lambda b, i: (half(b, 0), signed(b[2 + i]), F(0)),
    "iq4_nl": lambda b, i: (half(b, 0), IQ4_NL_LEVELS[nibble(b, 2, i)], F(0)),
    "mxfp4": lambda b, i: (F(np.ldexp(F(1), b[0] - 128)), 2 * E2M1[nibble(b, 1, i)], F(0)),
    "nvfp4": nvfp4,
    "q2_k": q2_k,
    "q3_k": q3_k,
    "q4_k": q4_k,
    "q5_k": q5_k,
    "q6_k": q6_k,
}


def by_formula(name: str, block: bytes) -> Floats:
    terms = [LAYOUTS[name](block, i) for i in range(block_type(name).elements)]
    return np.array([scale * F(code) - lowered for scale, code, lowered in terms], dtype=np.float32)


@pytest.mark.parametrize("kind", GGUF_TYPES, ids=lambda kind: kind.name)
@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow")
def test_any_bytes_decode_as_the_layouts_formulas_say(kind: BlockType) -> None:
    data = np.random.default_rng(1).integers(0, 256, (12, kind.nbytes), dtype=np.uint8)
    for block, found in zip(data, decode_blocks(kind.name, data), strict=True):
        np.testing.assert_array_equal(found, by_formula(kind.name, block.tobytes()))


@pytest.mark.parametrize("name", BLOCK_TYPES)
@given(seed=st.integers(0, 2**32), fill=st.sampled_from([None, 0, 127, 128, 255]))
@settings(max_examples=5)
def test_hostile_bytes_decode_without_a_warning(name: str, seed: int, fill: int | None) -> None:
    shape = (3, block_type(name).nbytes)
    noise = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = decode_blocks(name, noise if fill is None else np.full(shape, fill, dtype=np.uint8))
    assert found.shape == (3, block_type(name).elements)


def scalar_legacy(name: str, block: Floats) -> bytes:
    """Q4_0, Q5_0 and Q8_0 as the encoders' rules are written, element by element in fp32."""
    extreme = max(block, key=abs)
    reach = {"q4_0": -8, "q5_0": -16, "q8_0": 127}[name]
    d = F(extreme) / F(reach) if reach < 0 else abs(extreme) / F(reach)
    inverse = F(1) / d if d else F(0)
    head = struct.pack("<e", d)
    if name == "q8_0":
        steps = [x * inverse for x in block]
        return head + bytes(int(np.sign(y) * np.floor(abs(float(y)) + 0.5)) & 255 for y in steps)
    codes = [min(-2 * reach - 1, int(x * inverse + F(-reach + 0.5))) for x in block]
    fifth = sum((code >> 4) << i for i, code in enumerate(codes)).to_bytes(4, "little") if name == "q5_0" else b""
    return head + fifth + bytes((codes[i] & 15) | ((codes[i + 16] & 15) << 4) for i in range(16))


@pytest.mark.parametrize("name", ["q4_0", "q5_0", "q8_0"])
def test_symmetric_legacy_types_are_written_by_the_rules_of_the_stock_encoder(name: str) -> None:
    rounded = np.round(normal(name, 40, 1) * 4) / F(4)
    values: Floats = np.concatenate((normal(name, 40), rounded, np.zeros((1, 32), np.float32)))
    for block, found in zip(values, encode_blocks(name, values), strict=True):
        assert found.tobytes() == scalar_legacy(name, block)


quarters = st.lists(st.integers(-400, 400), min_size=32, max_size=32).map(lambda q: np.array([q], np.float32) / 4)


@pytest.mark.parametrize("name", LEGACY)
@given(values=quarters)
def test_decoded_legacy_blocks_encode_to_themselves(name: str, values: Floats) -> None:
    decoded = round_trip(name, values)
    np.testing.assert_array_equal(round_trip(name, decoded), decoded)


@pytest.mark.parametrize("name", LEGACY)
@given(values=quarters)
def test_legacy_types_are_off_by_at_most_a_step(name: str, values: Floats) -> None:
    """Half a step of rounding, half a step where the symmetric range ends early, and fp16's rounding of d and m."""
    span = np.abs(values).max() if name in ("q4_0", "q5_0", "q8_0") else np.ptp(values)
    step = span / {"q4_0": 8, "q4_1": 15, "q5_0": 16, "q5_1": 31, "q8_0": 127}[name]
    rounding = 2.0**-11 * (span + np.abs(values).max()) + 2.0**-24 * 128
    assert np.abs(round_trip(name, values) - values).max() <= step + rounding


@pytest.mark.parametrize("name", [*K_TYPES, "iq4_nl"])
def test_every_element_takes_the_nearest_level_that_its_sub_block_has(name: str) -> None:
    values: Floats = np.concatenate((normal(name, 3), np.exp(normal(name, 3, 1)), normal(name, 2, 2) - F(3)))
    levels = np.array(block_type(name).levels, dtype=np.float32)
    for block, data in zip(values, encode_blocks(name, values), strict=True):
        terms = [LAYOUTS[name](data.tobytes(), i) for i in range(len(block))]
        reachable = np.array([scale * levels - lowered for scale, _, lowered in terms])
        nearest = np.abs(reachable - block[:, None]).min(axis=1)
        found = np.abs(decode_blocks(name, data[None])[0] - block)
        np.testing.assert_allclose(found, nearest, atol=1e-5 * np.abs(block).max())


@pytest.mark.parametrize("name", [*K_TYPES, "iq4_nl", "q4_1", "q5_1"])
@pytest.mark.parametrize("noise", [0.0, 1e-3])
def test_nearly_constant_sub_blocks_are_kept(name: str, noise: float) -> None:
    values = normal(name, 4)
    values[:2, :32] = F(2.5) + F(noise) * normal(name, 2, 1)[:, :32]
    values[2] = F(1) + F(noise) * values[2]
    found = round_trip(name, values)
    parts = [(found[:2, :32], values[:2, :32]), (found[2], values[2])]
    assert all(np.abs(got - wanted).max() < 0.2 * np.abs(wanted).max() for got, wanted in parts)


@pytest.mark.parametrize("name", SEARCHED)
def test_importance_lowers_the_error_that_it_weighs(name: str) -> None:
    values = normal(name, 65536 // block_type(name).elements)
    importance = np.exp(2 * np.random.default_rng(5).standard_normal(values.shape)).astype(np.float32)
    plain = decode_blocks(name, encode_blocks(name, values))
    weighted = decode_blocks(name, encode_blocks(name, values, importance))

    def error(found: Floats) -> float:
        return float((importance * np.square(found - values)).sum())

    assert error(weighted) < 0.97 * error(plain)


@pytest.mark.parametrize("name", SEARCHED)
def test_only_ratios_of_importance_count_and_no_importance_is_even_importance(name: str) -> None:
    values = normal(name, 32)
    importance = np.abs(normal(name, 32, 3)) + F(0.01)
    plain = encode_blocks(name, values)
    np.testing.assert_array_equal(encode_blocks(name, values, np.full_like(values, 1e30)), plain)
    np.testing.assert_array_equal(encode_blocks(name, values, np.zeros_like(values)), plain)
    np.testing.assert_array_equal(
        encode_blocks(name, values, importance * F(2.0**90)), encode_blocks(name, values, importance)
    )


def test_importance_may_leave_elements_out() -> None:
    values, importance = normal("q4_k", 8), np.ones((8, 256), np.float32)
    values[:, ::32], importance[:, ::32] = 50, 0
    found = decode_blocks("q4_k", encode_blocks("q4_k", values, importance))
    counted = importance > 0
    assert np.abs(found - values)[counted].max() < 0.5


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_zero_blocks_decode_to_zeros(name: str) -> None:
    assert not round_trip(name, np.zeros((2, block_type(name).elements), np.float32)).any()


@pytest.mark.parametrize("name", POWER_OF_TWO)
def test_zero_blocks_of_power_of_two_scales_are_zero_bytes(name: str) -> None:
    assert not encode_blocks(name, np.zeros((1, block_type(name).elements), np.float32)).any()


@pytest.mark.parametrize("name", BLOCK_TYPES)
@pytest.mark.parametrize("largest", [1e-45, 1e-40, 2e-38, 1e-12, 3e-8, 7e5, 3e9, 1e30, 3.4028235e38])
def test_ends_of_fp32_stay_finite_and_no_further_off_than_zeros_would_be(name: str, largest: float) -> None:
    """But for fp16's smallest step, 2^-24, of which 31 codes of a d and a minimum can each be half a step off."""
    values = normal(name, 16)
    values = (values / np.abs(values).max() * largest).astype(np.float32)
    values[0] = F(largest)
    values[1] = -F(largest)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = round_trip(name, values)
    assert np.isfinite(found).all()
    error = found.astype(np.float64) - values
    nearer = np.square(error).sum(axis=1) <= np.square(values.astype(np.float64)).sum(axis=1) * (1 + 1e-6)
    has_halves = name not in POWER_OF_TWO and np.abs(error).max() <= 32 * 2.0**-25
    assert nearer.all() or has_halves


@pytest.mark.parametrize("name", POWER_OF_TWO)
def test_power_of_two_scales_follow_the_weights_exactly(name: str) -> None:
    values = normal(name, 8)
    plain = round_trip(name, values)
    for power in (-110, -20, 30, 100):
        np.testing.assert_array_equal(round_trip(name, np.ldexp(values, power)), np.ldexp(plain, power))


@pytest.mark.parametrize(("name", "reach"), [("q8_0", 127), ("q4_0", 8), ("q6_k", 32 * 128), ("q4_1", 16)])
def test_scales_beyond_fp16_saturate_and_elements_are_quantised_anew(name: str, reach: int) -> None:
    values = np.zeros((1, block_type(name).elements), np.float32)
    values[0, :2] = -1e12, -100_000
    found = round_trip(name, values)[0]
    assert found[0] == {"q4_1": -65504, "q6_k": -65504 * 128 * 32}.get(name, -65504 * reach)
    if name != "q6_k":
        assert abs(found[1] + 100_000) <= {"q4_1": 100_000 - 65504}.get(name, 65504 / 2)


def bits_of(data: bytes, start: int, width: int, count: int) -> list[int]:
    stream = int.from_bytes(data, "little") >> start
    return [stream >> (i * width) & ((1 << width) - 1) for i in range(count)]


@pytest.mark.parametrize(("name", "bits"), [("mx9", 8), ("mx6", 5), ("mx4", 3)])
def test_msfp_blocks_are_an_exponent_eight_offset_bits_and_integers(name: str, bits: int) -> None:
    values = normal(name, 20)
    for block, data in zip(values, encode_blocks(name, values), strict=True):
        exponent = int(np.floor(np.log2(np.abs(block).max())))
        assert data[0] == exponent + 127
        offsets = bits_of(data.tobytes(), 8, 1, 8)
        codes = bits_of(data.tobytes(), 16, bits, 16)
        for pair in range(8):
            part = block[2 * pair : 2 * pair + 2].astype(np.float64)
            assert offsets[pair] == (np.abs(part).max() < 2.0**exponent)
            step = 2.0 ** (exponent - offsets[pair] - (bits - 2))
            top = 2 ** (bits - 1) - 1
            wanted = np.clip(np.round(part / step), -top, top).astype(int)
            assert codes[2 * pair : 2 * pair + 2] == [code % 2**bits for code in wanted]


def test_offset_bits_lower_a_sub_tiles_scale_and_two_tiles_fill_whole_bytes() -> None:
    block = np.full((1, 64), 0.25, np.float32)
    block[0, 0], block[0, 32] = 6, -3
    data = encode_blocks("e2m1_e32s8o1", block, rule="max")[0].tobytes()
    assert list(data[:2]) == [127, 126]
    assert bits_of(data, 16, 1, 8) == [0, 1, 1, 1, 0, 1, 1, 1]
    codes = bits_of(data, 24, 4, 64)
    assert (codes[0], codes[1], codes[8], codes[32], codes[33], codes[40]) == (7, 0, 1, 15, 1, 2)
    found = decode_blocks("e2m1_e32s8o1", np.frombuffer(data, np.uint8)[None])[0]
    assert found[[0, 1, 8, 32, 33, 40]].tolist() == [6, 0, 0.25, -3, 0.25, 0.25]


def test_implicit_codebooks_are_the_two_patterns_moved_down_the_codes_of_the_float() -> None:
    numbers = floating.magnitudes(2, 3, "")
    patterns = [7, 11, 15, 19, 23, 27, 31], [9, 17, 21, 25, 27, 29, 31]
    expected = [tuple(numbers[code - s] for code in pattern) for pattern in patterns for s in range(8)]
    assert list(implicit_codebooks(2, 3)) == expected
    assert implicit_codebooks(2, 3)[3] == tuple(level for level in floating.magnitudes(2, 1, "")[1:])
    assert implicit_codebooks(2, 3)[9] == tuple(range(1, 8))
    for split in ((3, 2), (4, 3)):
        tables = implicit_codebooks(*split)
        assert len(tables) == 16
        assert tables[0][-1] == tables[8][-1] == floating.magnitudes(*split, "")[-1]


@pytest.mark.parametrize("name", [name for name in TILE_TYPES if name.startswith("icb")])
def test_codebooks_are_the_best_of_all_sixteen_for_each_sub_tile(name: str) -> None:
    kind = TILE_TYPES[name]
    values = normal(name, 4)
    data = encode_blocks(name, values, rule="max")
    found = decode_blocks(name, data).reshape(-1, kind.sub_tile)
    parts = values.reshape(-1, kind.sub_tile).astype(np.float64)
    tiles = np.repeat(np.abs(values).reshape(-1, kind.tile).max(axis=1), kind.tile // kind.sub_tile)
    numbers = kind.element.magnitudes
    if kind.scale == "e8m0":
        scales = 2.0 ** (np.floor(np.log2(tiles)) - np.floor(np.log2(numbers[-1])))
    else:  # five exponent bits, three of mantissa
        wanted = (tiles / np.float32(numbers[-1])).astype(np.float64)
        ulp = 2.0 ** (np.floor(np.log2(wanted)) - 3)
        scales = np.round(wanted / ulp) * ulp
    tables = np.array(implicit_codebooks(kind.element.exponent_bits, kind.element.mantissa_bits))
    levels = (
        np.concatenate((-tables, np.zeros((16, 1)), tables), axis=1)[None, :, None, :] * scales[:, None, None, None]
    )
    errors = np.square(np.abs(levels - parts[:, None, :, None]).min(axis=3)).sum(axis=2).min(axis=1)
    np.testing.assert_allclose(np.square(found - parts).sum(axis=1), errors, rtol=1e-5)


SMALL_FLOATS = {
    (2, 1): ml_dtypes.float4_e2m1fn,
    (2, 3): ml_dtypes.float6_e2m3fn,
    (3, 2): ml_dtypes.float6_e3m2fn,
    (4, 3): ml_dtypes.float8_e4m3fn,
    (5, 2): ml_dtypes.float8_e5m2,
}


@pytest.mark.parametrize("split", SMALL_FLOATS, ids=lambda split: "e{}m{}".format(*split))
def test_small_floats_round_as_ml_dtypes_does_and_saturate(split: tuple[int, int]) -> None:
    numbers = np.array(floating.magnitudes(*split, ""), dtype=np.float32)
    middles = (numbers[1:] + numbers[:-1]) / 2
    random = np.abs(np.random.default_rng(2).standard_normal(2000).astype(np.float32)) * numbers[-1] / 4
    probes = np.concatenate((numbers, middles, np.nextafter(middles, F(0)), np.nextafter(middles, F(np.inf)), random))
    inside = np.minimum(probes, numbers[-1])
    codes = float_codes(inside, *split, top=len(numbers) - 1)
    assert numbers[codes].tolist() == inside.astype(SMALL_FLOATS[split]).astype(np.float32).tolist()
    beyond = np.array([numbers[-1] * 1.01, 3.4e38], dtype=np.float32)
    assert set(float_codes(beyond, *split, top=len(numbers) - 1)) == {len(numbers) - 1}


def test_nvfp4_is_never_worse_than_the_plain_rule() -> None:
    values = normal("nvfp4", 64)
    parts = values.reshape(-1, 16)
    scale = (np.abs(parts).max(axis=1) / 6).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)[:, None]
    levels = np.array(sorted(E2M1), dtype=np.float32)
    plain = np.abs(levels - (parts / scale)[:, :, None]).min(axis=2) * scale
    found = (round_trip("nvfp4", values) - values).reshape(-1, 16)
    assert (np.square(found).sum(axis=1) <= np.square(plain).sum(axis=1) * (1 + 1e-6)).all()


def test_chunks_leave_no_trace() -> None:
    values = normal("q4_0", CHUNK // 32 + 5)
    data = encode_blocks("q4_0", values)
    np.testing.assert_array_equal(data[-7:], encode_blocks("q4_0", values[-7:]))
    np.testing.assert_array_equal(decode_blocks("q4_0", data)[-7:], decode_blocks("q4_0", data[-7:]))


@given(bits=st.integers(1, 8), rows=st.integers(0, 4), columns=st.integers(0, 70), seed=st.integers(0, 2**31))
def test_int32_words_are_the_rows_bit_stream(bits: int, rows: int, columns: int, seed: int) -> None:
    half_range = 2 ** (bits - 1)
    values = np.random.default_rng(seed).integers(-half_range, half_range, (rows, columns))
    words = pack_int32(torch.from_numpy(values), bits)
    assert words.dtype == torch.int32
    for row, packed in zip(values, words, strict=True):
        stream = sum(int(value + half_range) << (i * bits) for i, value in enumerate(row))
        assert packed.numpy().tobytes() == stream.to_bytes(4 * -(-columns * bits // 32), "little")
    assert torch.equal(unpack_int32(words, bits, columns), torch.from_numpy(values).to(torch.int8))


def test_int32_words_refuse_what_does_not_fit() -> None:
    with pytest.raises(InvalidFormat, match="do not fit"):
        pack_int32(torch.tensor([8]), 4)
    with pytest.raises(InvalidFormat, match="1 to 8 bits"):
        pack_int32(torch.tensor([0]), 9)
    with pytest.raises(InvalidFormat, match="not 2 words"):
        unpack_int32(torch.zeros(2, dtype=torch.int32), 4, 8)


@pytest.mark.parametrize("name", ["q4_k", "q8_0", "mx6", "icb44fi2_e32"])
@pytest.mark.parametrize("columns", [1, 63, 256, 300])
def test_rows_are_padded_with_zeros_and_cropped(name: str, columns: int) -> None:
    kind = block_type(name)
    weight = torch.randn(2, 3, columns, generator=torch.Generator().manual_seed(1))
    data = encode_rows(name, weight)
    assert data.shape == (2, 3, kind.row_bytes(columns))
    padded = torch.zeros(6, -(-columns // kind.elements) * kind.elements)
    padded[:, :columns] = weight.view(6, columns)
    blocks = encode_blocks(name, padded.numpy().reshape(-1, kind.elements))
    assert torch.equal(data.view(-1, kind.nbytes), torch.from_numpy(blocks))
    decoded = decode_rows(name, data, columns)
    assert decoded.shape == weight.shape
    expected = torch.from_numpy(decode_blocks(name, blocks)).view(6, -1)[:, :columns]
    assert torch.equal(decoded.view(6, columns), expected)


def test_rows_of_many_pieces_are_as_of_one() -> None:
    weight = torch.randn(9, 8 * CHUNK // 2 + 32, generator=torch.Generator().manual_seed(2))
    data = encode_rows("q4_0", weight)
    assert torch.equal(data[4:5], encode_rows("q4_0", weight[4:5]))
    assert torch.equal(decode_rows("q4_0", data, weight.shape[1])[8:], decode_rows("q4_0", data[8:], weight.shape[1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rows_of_other_dtypes_are_as_in_fp32(dtype: torch.dtype) -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(3)).to(dtype)
    assert torch.equal(encode_rows("q5_1", weight), encode_rows("q5_1", weight.float()))


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (64,), (2, 0, 32)])
def test_empty_tensors_and_single_rows_are_tensors_too(shape: tuple[int, ...]) -> None:
    weight = torch.ones(shape)
    data = encode_rows("q8_0", weight)
    assert data.shape == (*shape[:-1], shape[-1] // 32 * 34)
    assert torch.equal(decode_rows("q8_0", data, shape[-1]).round(), weight)


def test_importance_of_columns_serves_every_row() -> None:
    weight = torch.randn(3, 256, generator=torch.Generator().manual_seed(4))
    importance = torch.rand(256, generator=torch.Generator().manual_seed(5))
    whole = encode_rows("q3_k", weight, importance.expand(3, 256))
    assert torch.equal(encode_rows("q3_k", weight, importance), whole)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e300])
def test_weights_that_are_not_finite_in_fp32_are_refused(bad: float) -> None:
    weight = torch.zeros(2, 64, dtype=torch.float64)
    weight[1, 3] = bad
    with pytest.raises(NonFiniteWeights):
        encode_rows("q4_0", weight)


@pytest.mark.parametrize("importance", [torch.full((256,), -1.0), torch.full((256,), torch.nan), torch.ones(255)])
def test_importance_that_makes_no_sense_is_refused(importance: torch.Tensor) -> None:
    with pytest.raises(InvalidFormat):
        encode_rows("q4_k", torch.ones(2, 256), importance)


def test_unknown_types_and_wrong_shapes_are_refused() -> None:
    with pytest.raises(MethodNotAvailable, match="q4_x"):
        encode_blocks("q4_x", np.zeros((1, 32), np.float32))
    with pytest.raises(InvalidFormat, match="32 columns"):
        encode_blocks("q4_0", np.zeros((1, 31), np.float32))
    with pytest.raises(InvalidFormat, match="18 columns"):
        decode_blocks("q4_0", np.zeros((1, 17), np.uint8))
    with pytest.raises(InvalidFormat, match="importance"):
        encode_blocks("q4_k", np.zeros((1, 256), np.float32), np.zeros((1, 32), np.float32))
    with pytest.raises(InvalidFormat, match="18 bytes"):
        decode_rows("q4_0", torch.zeros(2, 17, dtype=torch.uint8), 32)


@pytest.mark.parametrize("kind", BLOCK_TYPES.values(), ids=lambda kind: kind.name)
def test_the_catalogue_is_consistent(kind: BlockType) -> None:
    assert list(kind.levels) == sorted(set(kind.levels))
    assert 0 in kind.levels or kind.name == "iq4_nl"
    assert kind.row_bytes(kind.elements + 1) == 2 * kind.nbytes
    if kind.name in TILE_TYPES:
        tile = TILE_TYPES[kind.name]
        per_tile = 8 * (tile.scale_bytes + tile.zero_bytes) / tile.tiles + tile.meta_bits * tile.tile / tile.sub_tile
        assert kind.bits == tile.element.bits + per_tile / tile.tile
