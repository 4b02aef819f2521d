"""Grids of a given rate: exactly the bytes planned, the nearest multiple of the step, decoded where cells have means.

What is stored is read by the entropy decoder alone and decoded again here with numpy.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from core.errors import NonFiniteWeights
from core.formats.limits import entropy_coded_grid
from core.formats.stored import CENTROIDS, LEAST_CODED, scale_shape, stored_parts
from core.recipe.tensor_format import TensorFormat, parse
from core.tensors.blocks import BlockGrid
from core.tensors.coded import HEAD_BYTES
from core.tensors.encoded import EncodedTensor
from core.tensors.entropy.decoder import decode
from core.tensors.entropy.huffman import huffman_decode
from core.tensors.entropy.matrix import KINDS, decode_matrix
from core.tensors.errors import relative_rms_error
from core.tensors.grid import MOST, cell_sums, grid_values, nearest_numbers
from core.tensors.kernels import cpu
from core.tensors.nearest import encode_nearest
from core.tensors.passes import Reference
from core.tensors.rotation import rotate_rows

SCALES = ["bf16", "fp16", "fp32", "e8m0", "e4m3", "dq8"]
OPTIONS = ["", "+outliers0.01", "+opq0.9", "+threshold2.5", "+hadamard", "+rotate", "+outliers0.02+rotate", "+unbiased"]
CODES = ("rans", "huffman")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(), (1,), (13,), (0,), (0, 5), (3, 0), (1, 1), (4, 1), (1, 300), (5, 17), (2, 3, 10), (64, 96), (70, 130)]
KIND_OF_WEIGHTS = st.sampled_from(["normal", "laplace", "zeros", "constant", "giant", "rows", "columns", "half zero"])


def weights(kind: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """fp32 weights of one kind, the same for a seed."""
    random = np.random.default_rng(seed)
    found = random.laplace(size=shape) if kind == "laplace" else random.standard_normal(shape)
    found = np.asarray(found) * 0.02
    if kind in ("zeros", "constant"):
        found = np.full(shape, -0.3 if kind == "constant" else 0.0)
    elif found.ndim and kind in ("rows", "columns"):
        lines = shape[0] if kind == "rows" else shape[-1]
        scales = np.exp(random.standard_normal(lines))
        found *= scales if kind == "columns" else scales.reshape(-1, *[1] * (found.ndim - 1))
    elif kind == "half zero" and found.size:
        found.reshape(-1)[: found.size // 2] = 0
    elif kind == "giant" and found.size:
        found.reshape(-1)[found.size // 2] = 2e4
    return torch.tensor(found, dtype=torch.float32)


def code_of(encoded: EncodedTensor) -> NDArray[np.uint8]:
    """The code in the part, without length and filling."""
    part = encoded.parts()["codes"].numpy()
    size = int.from_bytes(part[:HEAD_BYTES].tobytes(), "little")
    assert not part[HEAD_BYTES + size :].any()
    return np.asarray(part[HEAD_BYTES : HEAD_BYTES + size])


def stored_numbers(encoded: EncodedTensor) -> NDArray[np.int64]:
    """The numbers of the grid, flat, by the entropy decoder alone."""
    data, columns = code_of(encoded), encoded.shape[-1] if encoded.shape else 1
    count = math.prod(encoded.shape)
    if encoded.format.entropy_code == "huffman":
        return huffman_decode(data, count).astype(np.int64)
    if data[1] in KINDS:
        return decode_matrix(data, (count // columns, columns)).astype(np.int64).reshape(-1)
    return decode(data, count).astype(np.int64)


def scale_of_each(encoded: EncodedTensor) -> NDArray[np.float32]:
    """The decoded scale of every weight, flat, spread by index."""
    scales, count = encoded.scale_values.numpy(), math.prod(encoded.shape)
    place, columns = np.arange(count), encoded.shape[-1] if encoded.shape else 1
    granularity = encoded.format.granularity
    if granularity == "tensor":
        return np.full(count, scales[0], np.float32)
    row, column = place // max(columns, 1), place % max(columns, 1)
    if isinstance(granularity, int):
        return np.asarray(scales[row * -(-columns // granularity) + column // granularity])
    return np.asarray(scales[row])


def decoded_again(encoded: EncodedTensor) -> NDArray[np.float32]:
    """fl32(fl32(sign(k) (|k| - centroid) step) * scale), flat."""
    numbers, step = stored_numbers(encoded), float(encoded.parts()["step"])
    centroids = np.append(0.0, encoded.parts()["centroids"].double().numpy())
    below = centroids[np.minimum(np.abs(numbers), CENTROIDS)]
    values = (np.sign(numbers) * (np.abs(numbers) - below) * step).astype(np.float32)
    return np.asarray(values * scale_of_each(encoded), np.float32)


def planned_bytes(fmt: TensorFormat, encoded: EncodedTensor) -> int:
    """All bytes by the promise: those of the rate, or what the other parts and half of the element's bits need."""
    others = sum(part.numel() * part.element_size() for name, part in encoded.parts().items() if name != "codes")
    codes = max(math.floor(fmt.element_bits * encoded.elements / 16), LEAST_CODED)
    return max(math.floor(fmt.bits * encoded.elements / 8), others + codes)


def left_over(encoded: EncodedTensor) -> float:
    """Bits per weight of the filling."""
    return 8 * (encoded.codes.numel() - HEAD_BYTES - code_of(encoded).size) / encoded.elements


@st.composite
def grids(draw: st.DrawFn) -> str:
    granularity = draw(st.sampled_from(["tensor", "channel", "8", "7", "64"]))
    scale = draw(st.sampled_from(SCALES))
    shared = {"8": 8, "7": 7, "64": 64}.get(granularity, math.inf)
    least = 0.1 + {"fp32": 32.0, "e8m0": 8.0, "e4m3": 8.0, "dq8": 8.125}.get(scale, 16.0) / shared
    bits = draw(st.floats(least + 0.01, 10))
    option = draw(st.sampled_from(OPTIONS if scale in ("bf16", "fp16", "fp32") else OPTIONS[:-1]))
    return f"grid{bits:.3f}@{granularity}:{draw(st.sampled_from(['rms', 'absmax']))}:{scale}{option}"


SHAPE = st.sampled_from(SHAPES) | st.lists(st.integers(0, 24), min_size=1, max_size=3).map(tuple)


@given(text=grids(), shape=SHAPE, kind=KIND_OF_WEIGHTS, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 9))
@example(text="grid3@channel", shape=(0, 5), kind="zeros", dtype=torch.float32, seed=0)
@example(text="grid3@tensor", shape=(3, 0), kind="zeros", dtype=torch.float32, seed=0)
@example(text="grid0.2@tensor", shape=(70, 130), kind="giant", dtype=torch.bfloat16, seed=0)
@settings(max_examples=250, deadline=None)
def test_all_parts_take_the_bytes_planned_and_restore_the_tensor(
    text: str, shape: tuple[int, ...], kind: str, dtype: torch.dtype, seed: int
) -> None:
    fmt, weight = parse(text), weights(kind, shape, seed).to(dtype)
    encoded = encode_nearest(weight, fmt, seed=seed)
    assert encoded.nbytes == planned_bytes(fmt, encoded)
    outliers = encoded.parts()["outlier_values"].numel() if fmt.outlier_rule else None
    planned = stored_parts(fmt, shape, outliers)
    assert set(planned) == set(encoded.parts())
    assert {name: tuple(part.shape) for name, part in encoded.parts().items()} == {
        name: size for name, (_, size) in planned.items()
    }
    found = EncodedTensor.from_parts(encoded.format, shape, encoded.dtype, encoded.parts()).decode()
    assert found.shape == shape
    assert torch.equal(found, encoded.decode())


@given(text=grids(), shape=SHAPE, kind=KIND_OF_WEIGHTS, seed=st.integers(0, 9))
@settings(max_examples=200, deadline=None)
def test_values_are_the_stored_numbers_times_step_and_scale(
    text: str, shape: tuple[int, ...], kind: str, seed: int
) -> None:
    fmt = parse(text)
    encoded = encode_nearest(weights(kind, shape, seed), fmt, seed=seed)
    expected = decoded_again(encoded).reshape(shape)
    if fmt.rotation == "hadamard":
        columns = shape[-1] if shape else 1
        matrix = torch.from_numpy(expected.reshape(expected.size // max(columns, 1), columns))
        expected = rotate_rows(matrix).numpy().reshape(shape)
    found = encoded.decode().numpy()
    outliers = encoded.parts()["outlier_values"].numel() if fmt.outlier_rule else 0
    assert fmt.rotation == "rotate" or np.count_nonzero(found != expected) <= outliers


@given(
    text=grids().filter(lambda text: "+" not in text and "dq8" not in text),  # codes before scales are coded
    shape=SHAPE,
    kind=KIND_OF_WEIGHTS,
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=150, deadline=None)
def test_numbers_are_the_nearest_multiples_of_the_step(
    text: str, shape: tuple[int, ...], kind: str, dtype: torch.dtype
) -> None:
    weight = weights(kind, shape, 3).to(dtype)
    encoded = encode_nearest(weight, parse(text))
    units = scale_of_each(encoded).astype(np.float64) * float(encoded.parts()["step"])
    quotients = np.divide(weight.double().numpy().reshape(-1), units, out=np.zeros_like(units), where=units > 0)
    nearest = np.clip(np.rint(quotients), -MOST, MOST).astype(np.int64)
    assert np.array_equal(stored_numbers(encoded), nearest)
    assert np.float32(encoded.parts()["step"]) > 0


@pytest.mark.parametrize("shape", [(5, 17), (3, 64), (1, 1), (64,), (40, 100)], ids=str)
@pytest.mark.parametrize("text", ["grid3@tensor", "grid3@channel", "grid5@8", "grid6@7:absmax:fp32"])
def test_compiled_loops_round_and_sum_as_the_reference_does(text: str, shape: tuple[int, ...]) -> None:
    """`k` is an integer nearest to the quotient, the even one of two; none under a scale of 0; none beyond MOST."""
    fmt, step, random = parse(text), 0.375, np.random.default_rng(8)
    grid = BlockGrid.of(fmt, shape)
    scales = torch.from_numpy(random.choice([0.0, 0.5, 1.0, 2.0, 1.7], math.prod(scale_shape(fmt, shape)))).float()
    spread = grid.from_blocks(scales[:, None].expand(-1, grid.elements if grid.one_scale else grid.width).contiguous())
    halves = torch.from_numpy(random.integers(-40, 41, grid.elements) / 2).float() * spread * step
    noisy = halves + torch.from_numpy(random.standard_normal(grid.elements)).float()
    for flat in (halves, noisy, noisy * 1e9):
        blocks = grid.to_blocks(flat)
        found = cpu.grid_numbers(flat, scales, *grid.kernel_blocks, step, MOST, np.int32)
        reference = grid.from_blocks(nearest_numbers(blocks, scales, step)).numpy()
        assert np.array_equal(found, reference)
        units = spread.double().numpy() * step
        nearest = [round(x / unit) if unit else 0 for x, unit in zip(flat.tolist(), units.tolist(), strict=True)]
        assert found.tolist() == [min(max(k, -MOST), MOST) for k in nearest]
        sums = cpu.grid_sums(flat, scales, *grid.kernel_blocks, step, found, CENTROIDS)
        np.testing.assert_allclose(sums, cell_sums(blocks, scales, step), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32])
def test_numbers_do_not_depend_on_how_wide_they_are_kept(dtype: Any) -> None:
    flat = weights("normal", (1000,)) * 100
    wide = cpu.grid_numbers(flat, torch.ones(1), 1000, 1000, 0.1, MOST, np.int32)
    assert np.array_equal(cpu.grid_numbers(flat, torch.ones(1), 1000, 1000, 0.1, MOST, dtype), wide)


@pytest.mark.parametrize("text", ["grid3@tensor", "grid4.5@32:absmax", "grid6@7:rms:fp32", "grid2@channel+hadamard"])
def test_the_torch_reference_encodes_to_the_same_bytes(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weights("rows", (60, 140))
    compiled = encode_nearest(weight, parse(text))

    def numbers(flat: torch.Tensor, scales: torch.Tensor, columns: int, width: int, *rest: Any) -> NDArray[Any]:
        grid = BlockGrid(flat.numel(), columns, width, one_scale=columns == flat.numel() == width)
        return grid.from_blocks(nearest_numbers(grid.to_blocks(flat), scales, rest[0])).numpy().astype(rest[2])

    monkeypatch.setattr("core.tensors.nearest.passes_for", Reference)
    monkeypatch.setattr(cpu, "grid_numbers", numbers)
    reference = encode_nearest(weight, parse(text))
    for name in ("codes", "scales", "step"):
        assert torch.equal(reference.parts()[name], compiled.parts()[name]), name


@given(k=st.integers(-MOST, MOST), step=st.floats(2.0**-20, 8, width=32), away=st.floats(-0.5, 0.5, width=16))
@settings(max_examples=60, deadline=None)
def test_the_table_has_the_value_of_every_number_in_between(k: int, step: float, away: float) -> None:
    centroids = torch.tensor([away, away / 2, away / 4], dtype=torch.float16)
    low, high = max(k - 3, -MOST), min(k + 3, MOST)
    table = grid_values(torch.tensor([step]), centroids, low, high).tolist()
    for number, value in zip(range(low, high + 1), table, strict=True):
        below = float(centroids[min(abs(number), CENTROIDS) - 1])
        assert value == float(np.float32((abs(number) - below) * step * np.sign(number)))


@pytest.mark.parametrize("kind", ["normal", "laplace", "rows", "half zero"])
@pytest.mark.parametrize(
    "text", ["grid1@tensor", "grid2@channel", "grid3@tensor:absmax", "grid4.5@32", "grid2.8@16:e8m0"]
)
def test_centroids_make_the_error_least(text: str, kind: str) -> None:
    """Without them it is larger, and with others that lie 2 % of a step to either side."""
    weight = weights(kind, (128, 160))
    encoded = encode_nearest(weight, parse(text))
    centroids = encoded.parts()["centroids"]
    found = relative_rms_error(weight, encoded)
    moved = [centroids + change * unit for change in (-0.02, 0.02) for unit in torch.eye(CENTROIDS).half()]
    for others in (torch.zeros_like(centroids), *moved):
        parts = encoded.parts() | {"centroids": others.half()}
        other = EncodedTensor.from_parts(encoded.format, encoded.shape, "F32", parts)
        assert found <= relative_rms_error(weight, other) * (1 + 1e-9)


@pytest.mark.parametrize("bits", [3, 4, 5])
@pytest.mark.parametrize(("family", "nu"), [("normal", None), ("laplace", None), ("t", 5.0)])
def test_errors_are_those_of_an_ideal_code(family: str, nu: float | None, bits: int) -> None:
    """All that is stored counted: as good as a grid without centroids whose entropy alone is so much."""
    random, count = np.random.default_rng(bits), 1 << 20
    flat = random.laplace(size=count) if family == "laplace" else random.standard_normal(count)
    flat = random.standard_t(nu, count) if nu else flat
    weight = torch.from_numpy(flat.reshape(1024, 1024)).float()
    encoded = encode_nearest(weight, parse(f"grid{bits}@tensor"))
    assert 8 * encoded.nbytes == bits * weight.numel()
    assert relative_rms_error(weight, encoded) < 1.005 * entropy_coded_grid(family, nu, float(bits)).r


@pytest.mark.parametrize("bits", [3, 4, 5])
def test_a_huffman_code_loses_a_few_hundredths_of_a_bit(bits: int) -> None:
    weight = weights("normal", (512, 512))
    found = [relative_rms_error(weight, encode_nearest(weight, parse(f"grid{bits}@tensor+{name}"))) for name in CODES]
    assert found[0] < found[1] < 1.06 * found[0]


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(
    "text",
    [
        "grid0.2@tensor",
        "grid1@channel",
        "grid2.34@tensor",
        "grid3@tensor+huffman",
        "grid4.25@64:absmax",
        "grid4.9@16:rms:e4m3",
        "grid5@tensor+outliers0.002",
        "grid6@channel+hadamard",
        "grid8@64",
        "grid10@tensor",
    ],
)
def test_hardly_anything_is_left_over(text: str, seed: int) -> None:
    for shape in ((256, 256), (301, 417)):
        assert left_over(encode_nearest(weights("normal", shape, seed), parse(text))) <= allowed(parse(text).bits)


@pytest.mark.parametrize("text", ["grid4@64", "grid4@channel", "grid3@tensor+outliers0.3"])
def test_short_rows_and_many_outliers_do_not_take_the_bits_of_the_codes(text: str) -> None:
    weight = weights("normal", (4096, 4))
    assert relative_rms_error(weight, encode_nearest(weight, parse(text))) < 0.5


def allowed(bits: float) -> float:
    """Of 2^16 weights; where nearly every one has a symbol of its own, the size of the model jumps."""
    return 0.002 if bits <= 6 else 0.01


@given(bits=st.floats(0.15, 8), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_hardly_anything_is_left_over_at_any_rate(bits: float, seed: int) -> None:
    encoded = encode_nearest(weights("normal", (256, 256), seed), parse(f"grid{bits:.4f}@tensor"))
    assert left_over(encoded) <= allowed(bits)


@given(low=st.floats(0.3, 8), more=st.floats(0.2, 2), kind=st.sampled_from(["normal", "laplace", "columns"]))
@settings(max_examples=40, deadline=None)
def test_more_bits_make_a_smaller_error(low: float, more: float, kind: str) -> None:
    assume(low + more <= 10)
    weight = weights(kind, (128, 128))
    errors = [
        relative_rms_error(weight, encode_nearest(weight, parse(f"grid{b:.3f}@tensor"))) for b in (low, low + more)
    ]
    assert errors[1] < errors[0]


def test_rows_of_different_size_take_bits_from_each_other() -> None:
    """The squared error is least where one step serves all: no row's own scale is needed for that."""
    weight = weights("rows", (256, 256), 5)
    shared, own = (
        relative_rms_error(weight, encode_nearest(weight, parse(f"grid3@{at}"))) for at in ("tensor", "channel")
    )
    assert shared < 0.9 * own


@pytest.mark.parametrize("bits", [0.2, 3, 10])
@pytest.mark.parametrize("text", ["@tensor", "@tensor:absmax", "@channel", "@channel:rms:fp16"])
def test_an_outlier_of_a_million_deviations_is_kept(text: str, bits: float) -> None:
    weight = weights("giant", (256, 256))
    encoded = encode_nearest(weight, parse(f"grid{bits}{text}"))
    assert encoded.nbytes == math.floor(bits * weight.numel() / 8)
    assert relative_rms_error(weight, encoded) < 0.05
    assert int(encoded.decode().abs().argmax()) == int(weight.abs().argmax())


@pytest.mark.parametrize("value", [0.0, 1.0, -0.3, 1e-30, -2e30])
@pytest.mark.parametrize("text", ["grid0.2@tensor", "grid3@64", "grid10@channel:absmax", "grid2@tensor+huffman"])
def test_a_constant_tensor_is_exact_to_the_precision_of_centroids(text: str, value: float) -> None:
    decoded = encode_nearest(torch.full((64, 128), value), parse(text)).decode()
    np.testing.assert_allclose(decoded.numpy(), np.full((64, 128), np.float32(value)), rtol=2.0**-12)


@pytest.mark.parametrize("text", ["grid1.05@tensor", "grid1.1@tensor:absmax", "grid1.5@64", "grid1.3@tensor+huffman"])
def test_two_values_take_a_bit_and_are_nearly_exact(text: str) -> None:
    weight = torch.from_numpy(np.random.default_rng(2).choice([-0.3, 0.3], (64, 128))).float()
    assert relative_rms_error(weight, encode_nearest(weight, parse(text))) < 2.0**-12


@pytest.mark.parametrize("text", ["grid3@tensor", "grid2@channel:absmax", "grid5@tensor:rms:fp32+huffman"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_few_weights_take_what_the_parts_need_at_least(text: str, count: int) -> None:
    weight = weights("normal", (count,))
    encoded = encode_nearest(weight, parse(text))
    assert encoded.codes.numel() == LEAST_CODED
    assert relative_rms_error(weight, encoded) < 0.03


@pytest.mark.timeout(60)
@pytest.mark.parametrize("bits", [0.15, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["normal", "zeros"])
def test_below_a_bit_a_weight_a_huffman_code_holds_what_it_can(bits: float, kind: str) -> None:
    """Its codes have a bit at least, but for a tensor of one number."""
    encoded = encode_nearest(weights(kind, (64, 64)), parse(f"grid{bits}@tensor+huffman"))
    assert encoded.nbytes == math.floor(bits * 4096 / 8)
    assert bool(encoded.decode().isfinite().all())


@pytest.mark.parametrize(
    "text", ["grid3@tensor", "grid4@64:absmax+opq0.95", "grid3@channel+rotate", "grid3.5@tensor+huffman"]
)
def test_the_same_bytes_for_any_number_of_threads_and_every_time(text: str) -> None:
    weight, before = weights("columns", (700, 1000)), torch.get_num_threads()
    found = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        encoded = encode_nearest(weight, parse(text), seed=4)
        found.append({**encoded.parts(), "decoded": encoded.decode()})
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(found[0][name], part) for name, part in other.items())


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_dtypes_do_not_matter(dtype: torch.dtype) -> None:
    weight = weights("normal", (96, 64)).bfloat16()
    straight = encode_nearest(weight, parse("grid3@16"))
    for same in (weight.to(dtype), weight.t().contiguous().t().to(dtype)):
        parts = encode_nearest(same, parse("grid3@16")).parts()
        assert all(torch.equal(part, parts[name]) for name, part in straight.parts().items())
    flat = weights("normal", (4096,))
    encoded = [encode_nearest(one, parse("grid3@tensor")) for one in (flat[::2], flat[::2].contiguous())]
    assert torch.equal(encoded[0].codes, encoded[1].codes)


@given(power=st.integers(-20, 20), kind=st.sampled_from(["normal", "rows", "giant"]))
@settings(max_examples=20, deadline=None)
def test_a_power_of_two_scales_through(power: int, kind: str) -> None:
    weight = weights(kind, (40, 60))
    one, other = (encode_nearest(w, parse("grid3@channel")) for w in (weight, weight * 2.0**power))
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.decode() * 2.0**power, other.decode())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("text", ["grid3@tensor", "grid4@8:absmax", "grid3@channel+outliers0.01"])
def test_weights_that_are_no_numbers_are_refused(text: str, bad: float) -> None:
    weight = weights("normal", (16, 24))
    weight[3, 5] = bad
    with pytest.raises(NonFiniteWeights, match=r"\[3, 5\]"):
        encode_nearest(weight, parse(text))


@pytest.mark.parametrize("text", ["grid3@tensor", "grid3@channel:absmax", "grid8@8:rms:fp32"])
@pytest.mark.parametrize("factor", [1e-42, 1e-30, 1e37])
def test_weights_of_any_size_are_held(text: str, factor: float) -> None:
    weight = (weights("normal", (64, 64)) * 50 * factor).float()
    decoded = encode_nearest(weight, parse(text)).decode()
    assert bool(decoded.isfinite().all())
    if factor > 1e-38:
        assert relative_rms_error(weight, encode_nearest(weight, parse(text))) < 0.3
