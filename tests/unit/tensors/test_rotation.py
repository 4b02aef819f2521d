"""Rotations: orthogonal, undone to rounding, the same bits everywhere, for any size; and they mix.

Oracles: Sylvester's matrices from scipy in float64, and the published outputs of splitmix64.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import linalg

from core.tensors.rotation import (
    RandomRotation,
    hadamard_blocks,
    random_words,
    rotate_rows,
    rotate_rows_,
    splitmix64,
)

SIZES = (1, 2, 3, 31, 48, 64, 96, 100, 576, 1000, 1024, 1536)
EPS = 2.0**-24  # the unit roundoff of fp32


def matrix_of(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32))


def transform(size: int) -> NDArray[np.float64]:
    """The block-diagonal Hadamard matrix of a dimension, float64."""
    return np.asarray(linalg.block_diag(*(linalg.hadamard(one) / math.sqrt(one) for one in hadamard_blocks(size))))


def relative_error(found: torch.Tensor, expected: NDArray[np.float64] | torch.Tensor) -> float:
    exact = np.asarray(expected, dtype=np.float64)
    return float(np.linalg.norm(found.double().numpy() - exact) / np.linalg.norm(exact))


def rounding(size: int) -> float:
    """Relative error in norm that one transform of a dimension may make.

    Each of log2(n) butterflies rounds once, and so do the last product and its constant: at most log2(n) + 2 unit
    roundoffs of the norm, which all steps keep.
    """
    return (math.log2(max(hadamard_blocks(size))) + 2) * EPS


@given(st.integers(1, 10**6))
def test_blocks_are_powers_of_two_that_fill_the_dimension_largest_first(size: int) -> None:
    sizes = hadamard_blocks(size)
    assert sum(sizes) == size
    assert all(one & (one - 1) == 0 for one in sizes)
    assert list(sizes) == sorted(sizes, reverse=True)
    assert max(sizes) >= 64 or size < 128


def test_blocks_are_equal_where_they_can_be_large_and_digits_of_the_size_otherwise() -> None:
    assert hadamard_blocks(4096) == (4096,)
    assert hadamard_blocks(576) == (64,) * 9
    assert hadamard_blocks(1536) == (512,) * 3
    assert hadamard_blocks(14336) == (2048,) * 7
    assert hadamard_blocks(1000) == (512, 256, 128, 64, 32, 8)
    assert hadamard_blocks(100) == (64, 32, 4)
    assert hadamard_blocks(3) == (2, 1)
    assert hadamard_blocks(0) == ()


@pytest.mark.parametrize("columns", SIZES)
def test_rows_are_multiplied_by_the_orthogonal_hadamard_matrix(columns: int) -> None:
    weight = matrix_of(5, columns)
    exact = weight.double().numpy() @ transform(columns)
    assert relative_error(rotate_rows(weight), exact) <= rounding(columns)


@pytest.mark.parametrize("columns", SIZES)
def test_the_same_transform_takes_it_back(columns: int) -> None:
    weight = matrix_of(5, columns)
    assert relative_error(rotate_rows(rotate_rows(weight)), weight) <= 2 * rounding(columns) < 2e-6


def dense(rotation: RandomRotation, size: int, *, side: str) -> NDArray[np.float64]:
    """The matrix of one side: what becomes of unit vectors."""
    one_sided = RandomRotation(rotation.seed, both_sides=False)
    identity = torch.eye(size)
    if side == "columns":
        return np.asarray(one_sided.rotate(identity).double())
    return np.asarray(rotation.rotate(identity).double() @ one_sided.rotate(identity).double().T).T


@pytest.mark.parametrize("size", [one for one in SIZES if one < 1000])
@pytest.mark.parametrize("side", ["rows", "columns"])
def test_random_rotations_are_orthogonal_and_none_is_left_out(size: int, side: str) -> None:
    matrix = dense(RandomRotation(0), size, side=side)
    assert np.abs(matrix @ matrix.T - np.eye(size)).max() < 2e-6
    assert size == 1 or np.abs(matrix - np.eye(size)).max() > 0.1  # seed 0 is a seed


@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize("columns", [1, 3, 100, 576])
@pytest.mark.parametrize("both_sides", [False, True])
def test_random_rotations_are_undone_to_rounding(rows: int, columns: int, *, both_sides: bool) -> None:
    weight = matrix_of(rows, columns)
    rotation = RandomRotation(3, both_sides)
    rotated = rotation.rotate(weight)
    assert relative_error(rotation.restore(rotated), weight) < 1e-6
    assert float(rotated.double().norm()) == pytest.approx(float(weight.double().norm()), rel=1e-6)


def test_both_sides_are_rotated_unless_the_output_dimension_is_left_alone() -> None:
    weight = torch.zeros(64, 128)
    weight[5, 7] = 64 * math.sqrt(2)
    assert (RandomRotation(1).rotate(weight) != 0).all()
    only_rows = RandomRotation(1, both_sides=False).rotate(weight)
    assert set(torch.nonzero(only_rows)[:, 0].tolist()) == {5}
    assert (only_rows[5] != 0).all()


@given(seed=st.integers(-(2**70), 2**70), other=st.integers(-(2**70), 2**70))
@settings(max_examples=50, deadline=None)
def test_a_seed_is_a_rotation(seed: int, other: int) -> None:
    weight = matrix_of(96, 40)
    same = torch.equal(RandomRotation(seed).rotate(weight), RandomRotation(other).rotate(weight))
    assert same == ((seed - other) % 2**64 == 0)


def test_the_random_words_are_those_of_splitmix64() -> None:
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert splitmix64(1234567, 5).tolist() == known


@given(seed=st.integers(0, 2**64 - 1), stream=st.integers(0, 10))
@settings(max_examples=50)
def test_streams_of_a_seed_follow_their_documentation(seed: int, stream: int) -> None:
    start = splitmix64((seed + (stream - 1) * 0x9E3779B97F4A7C15) % 2**64, 1)[0]
    assert random_words(seed, stream, 9).tolist() == splitmix64(int(start), 9).tolist()
    assert random_words(seed, stream, 9)[:4].tolist() == random_words(seed, stream, 4).tolist()


def test_signs_are_fair_and_differ_between_sides_rounds_and_seeds() -> None:
    signs = [
        np.where(random_words(seed, stream, 1 << 14) >> np.uint64(63), -1.0, 1.0)
        for seed in (0, 1)
        for stream in range(2, 6)
    ]
    for one, first in enumerate(signs):
        assert abs(first.mean()) < 5 / 2**7  # five standard deviations of a fair mean of 2^14 signs
        for second in signs[:one]:
            assert abs((first * second).mean()) < 5 / 2**7


def spread_of_variances(weight: torch.Tensor) -> float:
    """Largest over mean variance of the columns."""
    variances = weight.double().square().mean(dim=0)
    return float(variances.max() / variances.mean())


@pytest.mark.parametrize("columns", [96, 576, 640, 1000, 1536])
def test_the_weights_of_a_loud_block_are_spread_over_the_whole_dimension(columns: int) -> None:
    """One round leaves each block its variance; two rounds mix no worse than a dense random matrix."""
    weight = matrix_of(4096, columns)
    weight[:, : hadamard_blocks(columns)[0]] *= 20
    gauss = np.random.default_rng(1).standard_normal((columns, columns))
    ideal = weight @ torch.from_numpy(np.linalg.qr(gauss)[0]).float()
    rotated = RandomRotation(2, both_sides=False).rotate(weight)
    assert spread_of_variances(rotate_rows(weight)) == pytest.approx(spread_of_variances(weight), rel=0.1)
    assert spread_of_variances(rotated) < 1.1 * spread_of_variances(ideal)


def test_one_outlier_is_spread_over_every_weight_of_a_dimension_that_is_one_block() -> None:
    weight = torch.zeros(8, 256)
    weight[3, 100] = 1
    assert RandomRotation(9, both_sides=False).rotate(weight)[3].abs().tolist() == [1 / 16] * 256


@pytest.mark.parametrize("shape", [(), (1,), (100,), (0,), (3, 0), (0, 3), (2, 3, 40), (2, 1, 5, 8)])
def test_any_shape_is_a_matrix_of_its_last_dimension(shape: tuple[int, ...]) -> None:
    weight = torch.from_numpy(np.asarray(np.random.default_rng(0).standard_normal(shape), dtype=np.float32))
    before = weight.clone()
    rows = weight.reshape(-1, shape[-1] if shape else 1) if weight.numel() else weight
    rotation = RandomRotation(4)
    for rotated, flat in ((rotate_rows(weight), rotate_rows(rows)), (rotation.rotate(weight), rotation.rotate(rows))):
        assert rotated.shape == weight.shape
        assert torch.equal(rotated.flatten(), flat.flatten())
    assert torch.allclose(rotation.restore(rotation.rotate(weight)), weight, atol=1e-5)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_rotated_as_fp32(dtype: torch.dtype) -> None:
    weight = matrix_of(10, 48).to(dtype)
    assert rotate_rows(weight).dtype == torch.float32
    assert torch.equal(rotate_rows(weight), rotate_rows(weight.float()))
    assert torch.equal(RandomRotation(0).rotate(weight), RandomRotation(0).rotate(weight.float()))


def test_a_transposed_tensor_is_rotated_as_its_copy() -> None:
    weight = matrix_of(48, 10)
    assert torch.equal(rotate_rows(weight.t()), rotate_rows(weight.t().contiguous()))


def test_in_place_is_the_same_without_a_second_tensor() -> None:
    weight, rotation = matrix_of(30, 100), RandomRotation(8)
    for function, method in ((rotate_rows, rotate_rows_), (rotation.rotate, rotation.rotate_)):
        copy = weight.clone()
        assert method(copy) is copy
        assert torch.equal(copy, function(weight))
    rotated = rotation.rotate(weight)
    assert torch.equal(rotation.restore_(rotated.clone()), rotation.restore(rotated))


@pytest.mark.parametrize("shape", [(700, 1000), (3000, 576)])
def test_neither_threads_nor_pieces_change_a_bit(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    weight, rotation = matrix_of(*shape), RandomRotation(6)
    rotated, rows, before = rotation.rotate(weight), rotate_rows(weight), torch.get_num_threads()
    restored = rotation.restore(rotated)
    try:
        for threads, piece in ((1, 1 << 19), (2, 1), (3, 1 << 16)):
            torch.set_num_threads(threads)
            monkeypatch.setattr("core.tensors.rotation.PIECE", piece)
            assert torch.equal(rotation.rotate(weight), rotated)
            assert torch.equal(rotation.restore(rotated), restored)
            assert torch.equal(rotate_rows(weight), rows)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("power", [-10, -1, 3, 12])
def test_scaling_by_a_power_of_two_scales_the_result(power: int) -> None:
    weight = matrix_of(7, 100)
    assert torch.equal(rotate_rows(weight * 2.0**power), rotate_rows(weight) * 2.0**power)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_device_rotates_to_the_same_bits() -> None:
    for shape in ((1000, 576), (64, 4096)):
        weight, rotation = matrix_of(*shape), RandomRotation(6)
        on_device = rotation.rotate(weight.cuda())
        assert torch.equal(on_device.cpu(), rotation.rotate(weight))
        assert torch.equal(rotation.restore(on_device).cpu(), rotation.restore(rotation.rotate(weight)))
