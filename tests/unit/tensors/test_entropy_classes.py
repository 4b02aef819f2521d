"""Classes: models that two bytes name, whose frequencies are those of their family and the same on every machine."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from core.errors import InvalidCheckpoint
from core.tensors.entropy import layout
from core.tensors.entropy.choice import nearest_class, shortest_model, total_bits
from core.tensors.entropy.classes import (
    CLASSES,
    LAPLACE,
    NORMAL,
    ClassModel,
    class_model,
    class_number_bits,
    class_probabilities,
)
from core.tensors.entropy.classes_jit import best_classes
from core.tensors.entropy.coder import encode, encode_segments
from core.tensors.entropy.decoder import CodedSequence, decode
from core.tensors.entropy.layout import Segment
from core.tensors.entropy.matrix import CodedMatrix, decode_matrix, encode_matrix
from core.tensors.entropy.models import expected_bits
from core.tensors.entropy.windows import counted, histogram_model

ALL = list(product((NORMAL, LAPLACE), CLASSES))
FAMILIES = {NORMAL: stats.norm, LAPLACE: stats.laplace(scale=0.5**0.5)}
FOUR_BITS = 3.862  # standard deviation of Normal variables whose integers have four bits of entropy
Doubles = NDArray[np.float64]
Longs = NDArray[np.int64]


def probabilities(family: int, k: int, numbers: Longs) -> Doubles:
    """Of integers, by scipy; the far side of 0 is left out of differences so that tails keep their digits."""
    magnitudes, std = np.abs(numbers), 2 ** (k / 8)
    inner, outer = (FAMILIES[family].sf((magnitudes + end) / std) for end in (-0.5, 0.5))
    return np.asarray(np.where(magnitudes == 0, 1 - 2 * outer, inner - outer))


def columns(shape: tuple[int, int], std: float = 2.0, seed: int = 0) -> NDArray[np.int16]:
    """Normal numbers whose columns have scales with a log-normal spread of 0.4."""
    random = np.random.default_rng(seed)
    scales = np.exp(0.4 * random.standard_normal(shape[1]))
    return np.rint(random.standard_normal(shape) * scales * std).astype(np.int16)


@pytest.mark.parametrize(("family", "k"), ALL)
def test_probabilities_are_those_of_the_family(family: int, k: int) -> None:
    one_side, beyond = class_probabilities(family, k)
    exact = probabilities(family, k, np.arange(len(one_side)))
    assert np.array([share / 2**96 for share in one_side]) == pytest.approx(exact, rel=1e-6)
    farther = 2 * FAMILIES[family].sf((len(one_side) - 0.5) / 2 ** (k / 8))
    assert beyond / 2**96 == pytest.approx(farther, rel=1e-6)
    assert sum(one_side[1:]) * 2 + one_side[0] + beyond == pytest.approx(2**96, rel=1e-24)


@pytest.mark.parametrize(("family", "k"), ALL)
def test_frequencies_are_the_probabilities_rounded_and_at_least_one(family: int, k: int) -> None:
    model = class_model(family, k)
    frequencies = model.frequencies[:-1]
    assert model.has_escape
    assert model.frequencies.min() >= 1
    assert frequencies.tolist() == frequencies[::-1].tolist()
    assert model.low == -model.high
    assert model.frequencies.sum() == 1 << model.precision
    exact = probabilities(family, k, np.arange(model.low, model.high + 1)) * (1 << model.precision)
    others = np.arange(frequencies.size) != frequencies.size // 2
    inside = others & (exact > 2)
    assert np.abs(frequencies[inside] / exact[inside] - 1).max(initial=0) <= 0.5 / 2 + 0.05
    assert exact[-1] >= 1 / 8 > probabilities(family, k, np.array([model.high + 1]))[0] * (1 << model.precision)


@pytest.mark.parametrize(
    ("family", "last", "most"), [(NORMAL, 8, 6e-4), (NORMAL, 27, 1e-3), (LAPLACE, 8, 8e-4), (LAPLACE, 20, 1.5e-3)]
)
def test_numbers_of_a_class_take_hardly_more_than_their_entropy(family: int, last: int, most: float) -> None:
    """Numbers that escape and what states lose are counted."""
    for k in range(CLASSES.start, last + 1):
        exact = probabilities(family, k, np.arange(-300, 301))
        costs = class_number_bits(family, k)
        magnitudes = np.minimum(np.abs(np.arange(-300, 301)), costs.size - 1)
        bits = float(exact @ (costs[magnitudes] + 16 * (magnitudes == costs.size - 1)))
        assert 0 <= bits + float(exact[exact > 0] @ np.log2(exact[exact > 0])) <= most


@pytest.mark.parametrize(("family", "k"), ALL)
def test_bits_of_numbers_are_those_that_the_model_gives_them(family: int, k: int) -> None:
    model, costs = class_model(family, k), class_number_bits(family, k)
    once = np.eye(model.size, dtype=np.int64)[model.high :]  # 0 to the largest symbol, and the escape
    assert costs == pytest.approx([expected_bits(model, counts) for counts in once], abs=1e-12)


@pytest.mark.parametrize(("family", "k"), ALL)
def test_a_class_is_stored_in_two_bytes_and_read_back(family: int, k: int) -> None:
    model, codes = class_model(family, k), np.array([0, -1, 300, 1, -(2**20)])
    assert layout.model_bytes(model) == bytes([family, k + 16])
    data = encode(codes, model)
    (read,) = CodedSequence.parse(data, codes.size).models
    assert isinstance(read, ClassModel)
    assert (read.family, read.k) == (family, k)
    assert np.array_equal(decode(data, codes.size), codes)


@pytest.mark.parametrize(("family", "k"), [(NORMAL, -17), (LAPLACE, 57), (2, 0), (-1, 0)])
def test_classes_that_are_none_are_refused(family: int, k: int) -> None:
    with pytest.raises(InvalidCheckpoint, match=f"class {k} of family {family}"):
        class_model(family, k)


@pytest.mark.parametrize("family", [NORMAL, LAPLACE])
def test_bytes_that_name_no_class_are_refused(family: int) -> None:
    data = encode(np.array([0, 1, -1, 0]), class_model(family, -16))
    at = data.tobytes().index(bytes([2, family, 0])) + 2
    for byte in range(len(CLASSES), 256):
        data[at] = byte
        with pytest.raises(InvalidCheckpoint, match="class"):
            CodedSequence.parse(data, 4)


def test_models_that_take_no_bytes_of_their_own_share_their_tables() -> None:
    assert class_model(NORMAL, 3) is class_model(NORMAL, 3)


@pytest.mark.parametrize("family", [NORMAL, LAPLACE])
@pytest.mark.parametrize("k", [-12, -3, 0, 9, 20, 40, 56])
def test_the_nearest_class_is_the_best_of_all(family: int, k: int) -> None:
    counts = np.rint(probabilities(family, k, np.arange(-900, 901)) * 5000).astype(np.int64)
    values = np.arange(-900, 901)[counts > 0]
    used = counts[counts > 0]
    found = nearest_class(values, used)
    assert found is not None
    best = min(total_bits(class_model(*other), values, used) for other in ALL)
    assert total_bits(found, values, used) == pytest.approx(best, rel=1e-12)
    assert found.family == family
    assert abs(found.k - k) <= 1


@given(
    numbers=st.lists(st.integers(-6, 6) | st.integers(-3000, 3000) | st.integers(-(2**31), 2**31 - 1), min_size=1),
)
@settings(deadline=None)
def test_the_nearest_class_codes_any_numbers_and_none_where_none_is_negative(numbers: list[int]) -> None:
    codes = np.array(numbers)
    found = nearest_class(*counted(codes))
    assert (found is None) == (codes.min() >= 0)
    if found is not None:
        assert np.array_equal(decode(encode(codes, found), codes.size), codes)


def test_few_numbers_take_a_class_and_many_a_model_of_their_own() -> None:
    random = np.random.default_rng(0)
    few, many = (np.rint(FOUR_BITS * random.standard_normal(count)).astype(np.int8) for count in (2000, 1 << 20))
    assert isinstance(shortest_model(*counted(few)), ClassModel)
    assert not isinstance(shortest_model(*counted(many)), ClassModel)
    own = encode_segments(few, [histogram_model(few)], [Segment(0, few.size)])
    assert encode(few).size < own.size


def test_codes_of_a_table_take_no_class() -> None:
    """Its symbols would be codes that the format has not, below 0 for one."""
    codes = np.abs(columns((100, 60))) + 20
    for model in CodedMatrix.parse(encode_matrix(codes), codes.shape).sequence.models:
        assert model.low >= 0
    assert not isinstance(shortest_model(*counted(codes.reshape(-1))), ClassModel)


@pytest.mark.parametrize(
    ("shape", "most"), [((192, 192), (0.034, 0.036)), ((576, 192), (0.015, 0.016)), ((4096, 512), (0.0036, 0.005))]
)
def test_classes_cost_small_matrices_little(shape: tuple[int, int], most: tuple[float, float]) -> None:
    """Bits a number, every byte counted, above those of probabilities that know each column's deviation."""
    for std, limit in zip((0.93, FOUR_BITS), most, strict=True):
        codes, random = columns(shape, std), np.random.default_rng(0)
        stds = np.exp(0.4 * random.standard_normal(shape[1])) * std
        ends = codes[None] + np.array([-0.5, 0.5])[:, None, None]
        ideal = -np.log2(np.maximum(np.diff(stats.norm.cdf(ends / stds), axis=0), 1e-30)).sum()
        data = encode_matrix(codes)
        assert np.array_equal(decode_matrix(data, shape, np.int16), codes)
        assert (8 * data.size - ideal) / codes.size <= limit


def bits_of(groups: int, seed: int) -> Doubles:
    """Of groups in seven classes, each of which is good for some."""
    random = np.random.default_rng(seed)
    return np.asarray(100 + random.exponential(40, (groups, 7)) + 60 * np.abs(np.arange(7) - random.integers(0, 7)))


def total(bits: Doubles, ids: Longs, fixed: float) -> float:
    """What stands for the numbers of the classes: a plain list, or a code with its head."""
    counts = np.unique(ids, return_counts=True)[1]
    plain = ids.size * int(counts.size - 1).bit_length()
    coded = 104 + 6 * counts.size - float((counts * np.log2(counts / ids.size)).sum())
    return float(bits[np.arange(ids.size), ids].sum()) + fixed * counts.size + min(plain, coded)


@given(groups=st.integers(1, 60), seed=st.integers(0, 500), fixed=st.sampled_from([0.0, 16.0, 400.0, 1e9]))
@settings(deadline=None)
def test_classes_are_worth_what_they_cost(groups: int, seed: int, fixed: float) -> None:
    """The size is that of what was found: no more than with the best class alone, or with the best of each group."""
    bits, found = bits_of(groups, seed), np.empty(groups, np.int64)
    size = best_classes(bits, fixed, found)
    assert size == pytest.approx(total(bits, found, fixed), rel=1e-12)
    assert size <= total(bits, bits.argmin(axis=1), fixed) + 1e-6
    if fixed == 1e9:
        assert np.unique(found).size == 1
    kept = np.unique(found)
    assert (bits[np.arange(groups), found] == bits[:, kept].min(axis=1)).all()


def two_columns(are_known: bool, classes: list[int]) -> bytes:
    """A matrix of 300 x 4, its columns of two classes, with the segments or without."""
    codes = columns((300, 4)).T
    order = np.argsort(classes, kind="stable")
    models = [class_model(NORMAL, 6), class_model(LAPLACE, 12)]
    segments = [Segment(0, 600), Segment(1, 600)]
    data = encode_segments(codes[order].reshape(-1), models, segments, are_known=are_known)
    ids = encode(np.array(classes)).tobytes()
    start = bytes([1, 4, 1, len(ids)]) + ids
    return layout.sealed(start + bytes(-len(start) % 4)).tobytes() + data.tobytes()


def test_segments_of_a_matrix_may_be_left_out_and_need_not_be() -> None:
    """The classes of the columns say what they are; matrices with both are read."""
    short, long = two_columns(are_known=True, classes=[0, 1, 1, 0]), two_columns(are_known=False, classes=[0, 1, 1, 0])
    assert len(short) < len(long)
    for data in (short, long):
        assert np.array_equal(decode_matrix(data, (300, 4)), columns((300, 4)))


@pytest.mark.parametrize(
    ("classes", "are_known"),
    [
        ([0, 2, 2, 0], True),
        ([0, 2, 2, 0], False),
        ([-1, 1, 1, -1], True),
        ([-1, 1, 1, -1], False),
        ([0, 1, 1, 1], False),
    ],
)
def test_classes_without_models_and_segments_of_other_lengths_are_refused(classes: list[int], are_known: bool) -> None:
    with pytest.raises(InvalidCheckpoint, match=r"segments|classes"):
        decode_matrix(two_columns(are_known, classes), (300, 4))


def test_a_sequence_of_its_own_does_not_leave_its_segments_out() -> None:
    models = [class_model(NORMAL, 6), class_model(LAPLACE, 12)]
    data = encode_segments(np.arange(-5, 5), models, [Segment(0, 4), Segment(1, 6)], are_known=True)
    with pytest.raises(InvalidCheckpoint, match="cover"):
        CodedSequence.parse(data, 10)
