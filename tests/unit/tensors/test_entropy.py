"""Entropy-coded integers: what goes in comes out, whichever loops do the work, at hardly more than the entropy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from core.errors import InvalidCheckpoint, InvalidFormat
from core.tensors.entropy import coder, decoder
from core.tensors.entropy.coder import encode, encode_segments
from core.tensors.entropy.decoder import CodedSequence, decode
from core.tensors.entropy.families import parametric_model
from core.tensors.entropy.layout import Segment
from core.tensors.entropy.machine import has_wide_vectors
from core.tensors.entropy.matrix import decode_matrix, encode_matrix
from core.tensors.entropy.models import SymbolModel
from core.tensors.entropy.windows import histogram_model

Numbers = NDArray[np.integer[Any]]
PORTABLE = pytest.param(False, id="portable loops")
VECTORS = pytest.param(
    True, id="vectors", marks=pytest.mark.skipif(not has_wide_vectors(), reason="needs AVX-512 with VBMI2")
)
STD = {2: 0.9295, 3: 1.9158, 4: 3.862}  # of Normal variables whose integers have so many bits of entropy
STEP = {"normal": 1.0, "laplace": 0.93, "t": 0.95}


@pytest.fixture(params=[PORTABLE, VECTORS])
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    use(monkeypatch, request.param)
    return bool(request.param)


def use(monkeypatch: pytest.MonkeyPatch, vectors: bool) -> None:
    for module in (coder, decoder):
        monkeypatch.setattr(module, "has_wide_vectors", lambda: vectors)


def entropy(codes: Numbers) -> float:
    counts = np.unique(codes, return_counts=True)[1] / codes.size
    return float(-(counts * np.log2(counts)).sum())


def normal(count: int, std: float, seed: int = 0) -> Numbers:
    drawn: NDArray[np.float64] = np.random.default_rng(seed).standard_normal(count)
    return np.rint(drawn * std).astype(np.int32)


def sample(family: str, count: int, std: float) -> Numbers:
    random = np.random.default_rng(7)
    families: dict[str, Callable[[], NDArray[np.float64]]] = {
        "normal": lambda: random.standard_normal(count),
        "laplace": lambda: random.laplace(size=count) / np.sqrt(2),
        "t": lambda: random.standard_t(5, count) / np.sqrt(5 / 3),
    }
    return np.rint(families[family]() * std).astype(np.int32)


@given(
    low=st.integers(-(2**31), 2**31 - 5000),
    size=st.one_of(st.integers(1, 40), st.sampled_from([32, 33, 64, 65, 128, 129, 256, 257, 600, 4096, 4097, 5000])),
    count=st.one_of(st.integers(0, 200), st.sampled_from([2047, 2048, 2049])),
    power=st.sampled_from([0.0, 1.0, 4.0]),
    lanes=st.sampled_from([1, 4, 32]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("vectors", [PORTABLE, VECTORS])
def test_any_integers_come_back(
    vectors: bool, low: int, size: int, count: int, power: float, lanes: int, seed: int
) -> None:
    places = np.random.default_rng(seed).random(count) ** (1 + power) * size
    codes = (low + places.astype(np.int64)).astype(np.int32)
    with pytest.MonkeyPatch.context() as patch:
        use(patch, vectors)
        assert np.array_equal(decode(encode(codes), count), codes)
        if count:
            segmented = encode_segments(codes, [histogram_model(codes)], [Segment(0, count)], lanes, stream_bits=10)
            assert np.array_equal(decode(segmented, count), codes)


@pytest.mark.parametrize("rest", range(32))
def test_every_length_modulo_the_lanes_comes_back(loops: bool, rest: int) -> None:
    codes = normal(1024 * 9 + 32 * 3 + rest, 3, seed=rest)
    data = encode_segments(codes, [histogram_model(codes)], [Segment(0, codes.size)], lanes=32, stream_bits=10)
    assert np.array_equal(decode(data, codes.size), codes)


@pytest.mark.skipif(not has_wide_vectors(), reason="needs AVX-512 with VBMI2")
@pytest.mark.parametrize("std", [0.2, 1, 5, 12, 30, 200, 1500])
@pytest.mark.parametrize("precision", [10, 11, 12, 13, 14, 15])
def test_vectors_and_portable_loops_write_the_same_bytes(
    std: float, precision: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = normal(9000, std)
    size = min(1 << precision - 1, 4096)
    window = np.arange(size) - size // 2
    model = SymbolModel(int(window[0]), precision, frequencies(window, std, precision), has_escape=True)
    written = []
    for vectors in (False, True):
        use(monkeypatch, vectors)
        data = encode_segments(codes, [model], [Segment(0, codes.size)], lanes=32, stream_bits=10)
        assert np.array_equal(decode(data, codes.size), codes)
        written.append(data.tobytes())
    assert written[0] == written[1]


def frequencies(window: NDArray[np.int64], std: float, precision: int) -> NDArray[np.int64]:
    """A bell over the window that adds up to 2^precision, each at least 1."""
    bell: NDArray[np.float64] = np.exp(-((window / std) ** 2) / 2)
    found: NDArray[np.int64] = 1 + np.floor(bell / bell.sum() * ((1 << precision) - window.size)).astype(np.int64)
    found[found.argmax()] += (1 << precision) - found.sum()
    return found


ADVERSARIAL: dict[str, Callable[[], Numbers]] = {
    "one number, 2^24 - 1 times, and another one once": lambda: np.append(np.zeros(2**24 - 1, np.int8), np.int8(1)),
    "4096 numbers, each as often": lambda: np.arange(1 << 17, dtype=np.int32) % 4096 - 2048,
    "4097 numbers, each as often": lambda: np.arange(4097 * 20, dtype=np.int32) % 4097,
    "many numbers, each once": lambda: np.arange(100_000) * 40_000 - 2**31,
    "powers of two, each as often as it is large": lambda: np.repeat(np.arange(17, dtype=np.int16), 2 ** np.arange(17)),
    "a heap of zeros and both ends of 32 bits": lambda: np.array([0] * 9999 + [2**31 - 1, -(2**31)], np.int32),
    "two numbers far apart": lambda: np.where(np.arange(50_000) % 3 == 0, -1000, 3000).astype(np.int16),
    "all bytes": lambda: np.random.default_rng(0).integers(0, 256, 300_000).astype(np.uint8),
    "unsigned 16 bits": lambda: np.random.default_rng(0).integers(65000, 65536, 300_000).astype(np.uint16),
    "nothing": lambda: np.zeros(0, np.int8),
    "one number": lambda: np.array([-7], np.int8),
}


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial_histograms_come_back(loops: bool, name: str) -> None:
    codes = ADVERSARIAL[name]()
    data = encode(codes)
    assert np.array_equal(decode(data, codes.size, codes.dtype.type), codes)
    width = max(1, int(codes.max() - codes.min().astype(np.int64)).bit_length()) if codes.size else 0
    assert data.size <= codes.size * width / 8 + 20  # never longer than numbers of a fixed width


def test_equal_numbers_take_a_few_bytes_whatever_their_count() -> None:
    assert encode(np.full(1 << 20, -12345)).size <= 16


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_sixteen_million_numbers_take_at_most_a_thousandth_more_than_their_entropy(bits: int) -> None:
    codes = normal(1 << 24, STD[bits]).astype(np.int8)
    assert encode(codes).size * 8 / codes.size <= entropy(codes) * 1.001


@pytest.mark.parametrize("family", STEP)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_sixty_five_thousand_numbers_take_at_most_a_hundredth_of_a_bit_more(family: str, bits: int) -> None:
    codes = sample(family, 1 << 16, STD[bits] / STEP[family])
    assert entropy(codes) == pytest.approx(bits, abs=0.15)
    assert encode(codes).size * 8 / codes.size <= entropy(codes) + 0.01


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.int64])
@pytest.mark.parametrize("size", [20, 100, 256])
def test_numbers_are_decoded_to_any_type_that_holds_them(loops: bool, dtype: type[Any], size: int) -> None:
    low = 0 if np.iinfo(dtype).min == 0 else -size // 2
    codes = (np.arange(1 << 15) ** 2 % size + low).astype(dtype)
    data = encode_segments(codes, [histogram_model(codes)], [Segment(0, codes.size)], lanes=32)
    decoded = decode(data, codes.size, dtype)
    assert decoded.dtype == dtype
    assert np.array_equal(decoded, codes)


def test_numbers_that_do_not_fit_the_type_are_refused() -> None:
    data = encode(normal(5000, 100))
    with pytest.raises(InvalidCheckpoint, match="fit int8"):
        decode(data, 5000, np.int8)
    with pytest.raises(InvalidCheckpoint, match="fit uint8"):
        decode(encode(np.full(9, -1)), 9, np.uint8)
    few = np.append(np.zeros(5000, np.int32), 300)
    data = encode(few, SymbolModel(0, 12, np.array([4095, 1]), has_escape=True))
    with pytest.raises(InvalidCheckpoint, match="fit int8"):
        decode(data, few.size, np.int8)


@given(start=st.integers(0, 20_000), size=st.integers(0, 20_000), threads=st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_any_range_can_be_decoded_alone(start: int, size: int, threads: int) -> None:
    size = min(size, RANGED.size - start)
    out = np.full(size, 99, np.int16)
    CodedSequence.parse(RANGED_DATA, RANGED.size).decode(out, start, threads)
    assert np.array_equal(out, RANGED[start : start + size])


RANGED = normal(20_000, 4).astype(np.int16)
RANGED_DATA = encode_segments(
    RANGED,
    [histogram_model(RANGED), parametric_model("laplace", 4.0)],
    [Segment(0, 7003), Segment(1, 1), Segment(0, 2000), Segment(1, 10_996)],
    lanes=32,
    stream_bits=10,
)


def test_a_range_outside_is_a_mistake_of_the_caller() -> None:
    sequence = CodedSequence.parse(encode(np.arange(100)), 100)
    with pytest.raises(ValueError, match="90 to 101"):
        sequence.decode(np.zeros(11, np.int32), 90)


def test_constant_and_plain_sequences_are_read_in_ranges_too() -> None:
    for codes in (np.full(100, 3), np.arange(100) * 7919 % 101):
        out = np.zeros(41, np.int32)
        CodedSequence.parse(encode(codes), 100).decode(out, 33)
        assert np.array_equal(out, codes[33:74])


@pytest.mark.parametrize("lanes", [1, 8, 32])
def test_each_segment_has_its_own_model(loops: bool, lanes: int) -> None:
    parts = [normal(count, std, seed=count) for count, std in ((1, 2), (5000, 40), (33, 1), (3000, 0.3), (4096, 9))]
    segments = [Segment(number, part.size) for number, part in enumerate(parts)]
    codes = np.concatenate(parts)
    models = [histogram_model(part) for part in parts]
    data = encode_segments(codes, models, segments, lanes, stream_bits=10)
    assert np.array_equal(decode(data, codes.size), codes)


def test_escaped_numbers_may_stand_anywhere(loops: bool) -> None:
    codes = normal(40_000, 1.0)
    codes[[0, 1, 31, 32, 1023, 1024, 5000, -1]] = [5000, -5000, 4, -4, 77, 78, 2**31 - 1, -(2**31)]
    model = SymbolModel(-2, 14, np.array([1000, 4000, 6000, 4000, 1000, 384]), has_escape=True)
    data = encode_segments(codes, [model], [Segment(0, codes.size)], lanes=32, stream_bits=10)
    assert np.array_equal(decode(data, codes.size), codes)


def test_a_model_that_lacks_a_number_is_refused() -> None:
    model = SymbolModel(0, 12, np.array([2048, 0, 2048]))
    for number in (1, 3, -1):
        with pytest.raises(InvalidFormat, match="no symbol"):
            encode(np.array([0, 2, number]), model)


def test_segments_must_cover_the_numbers() -> None:
    model = SymbolModel(0, 12, np.array([4096]))
    for segments in ([], [Segment(0, 3)], [Segment(0, 5), Segment(0, 0)]):
        with pytest.raises(InvalidFormat, match="cover"):
            encode_segments(np.zeros(5, np.int8), [model], segments)


@pytest.mark.parametrize(("lanes", "stream_bits"), [(3, 12), (64, 12), (32, 9), (32, 25)])
def test_impossible_shapes_of_streams_are_refused(lanes: int, stream_bits: int) -> None:
    with pytest.raises(InvalidFormat, match="lanes"):
        encode_segments(
            np.zeros(5, np.int8), [SymbolModel(0, 12, np.array([4096]))], [Segment(0, 5)], lanes, stream_bits
        )


@pytest.mark.parametrize("codes", [np.zeros(3), np.array([2**31]), np.array([-(2**31) - 1])])
def test_only_integers_of_32_bits_are_coded(codes: Numbers) -> None:
    with pytest.raises(InvalidFormat, match="entropy coding of"):
        encode(codes)


@pytest.mark.parametrize("family", ["normal", "laplace", "t"])
def test_a_parametric_model_needs_little_more_than_a_histogram(family: str) -> None:
    codes = sample(family, 1 << 18, 4.0)
    own = encode(codes).size
    assert encode(codes, parametric_model(family, 4.0)).size <= own + 0.004 * codes.size / 8
    assert encode(codes, parametric_model("normal", 8.0)).size > own + 0.1 * codes.size / 8


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("width", [1, 3])
def test_columns_of_different_scales_take_less_than_one_histogram_allows(axis: int, width: int) -> None:
    random = np.random.default_rng(3)
    scales = np.repeat(np.exp(random.standard_normal(300) * 0.6), width)
    codes = np.rint(random.standard_normal((3000, scales.size)) * scales * 2).astype(np.int16)
    columns = np.mean([entropy(codes[:, at : at + width]) for at in range(0, scales.size, width)])
    bias = np.mean([np.unique(codes[:, at : at + width]).size for at in range(0, scales.size, width)]) / 6000 / width
    turned = codes if axis else np.ascontiguousarray(codes.T)
    data = encode_matrix(turned, axis, width)
    assert np.array_equal(decode_matrix(data, turned.shape, np.int16, threads=2), turned)
    assert data.size * 8 / codes.size <= columns + bias / np.log(2) + 0.012
    assert data.size * 8 / codes.size <= entropy(codes) - 0.15


@given(rows=st.integers(0, 9), columns=st.integers(0, 9), axis=st.integers(0, 1), width=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_matrices_of_any_shape_come_back(rows: int, columns: int, axis: int, width: int) -> None:
    codes = normal(rows * columns, 5, seed=rows).reshape(rows, columns)
    assert np.array_equal(decode_matrix(encode_matrix(codes, axis, width), codes.shape), codes)


@pytest.mark.parametrize("shape", [(64, 64), (65, 127), (130, 63), (1, 200), (200, 1)])
@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int64])
def test_columns_are_the_rows_of_the_transposed_matrix(shape: tuple[int, int], dtype: type[np.signedinteger]) -> None:
    """Their bytes differ in what says that they are columns, and in its checksum: not in size."""
    codes = normal(shape[0] * shape[1], 5).reshape(shape).astype(dtype)
    data = encode_matrix(codes, 1)
    assert np.array_equal(decode_matrix(data, shape), codes)
    assert (data != encode_matrix(codes.T, 0)).sum() <= 1 + 4
    assert np.array_equal(data, encode_matrix(np.asfortranarray(codes), 1))
