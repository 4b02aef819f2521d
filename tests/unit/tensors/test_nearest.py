"""Encoding to the nearest code, compared with a brute-force search and with torch's own number formats."""

from __future__ import annotations

import itertools
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import InvalidCheckpoint, InvalidFormat, NonFiniteWeights
from core.formats.elements import element_table, shared_weights
from core.recipe.tensor_format import TensorFormat, parse
from core.tensors.blocks import PIECE, BlockGrid
from core.tensors.dtypes import TORCH_DTYPES
from core.tensors.encoded import EncodedTensor
from core.tensors.errors import relative_rms_error
from core.tensors.nearest import encode_nearest
from core.tensors.passes import Reference

FORMATS = [
    "int4@8",
    "int4-sym@7:absmax:fp32",
    "int3@channel:signmax",
    "int2.58@8",
    "int8@tensor:absmax:fp16",
    "int4@8:rms",
    "nf4@16",
    "normal4@8",
    "normal3-sym@tensor:rms",
    "laplace3.32@5",
    "t5_4@8:signmax",
    "t7_6@32:absmax:fp32",
    "t5_4-repeat_zero@8",
    "int12@16:absmax:fp32",
    "mxfp4",
    "mxfp6_e2m3",
    "mxfp8_e5m2",
    "int4@8:absmax:e8m0",
    "float5_e2m2-ns@9:rms:fp32",
    "float6_e3m2-ieee@channel",
    "float4_e2m1@8:signmax",
    "sf4-nu4@16",
    "af4-l1@16",
    "bof4-s@16",
    "bof3-mae@16:search",
    "power0.7_4@8",
    "normal4-opt@8:signmax",
    "int4-mx@8:absmax:e8m0-rceil",
    "int4@8:rms-search:fp32",
    "float4_e2m1@8:search:e8m0",
    "int4@8:absmax:e4m3",
    "nf4@8:absmax:dq8",
]
SHAPES = [(3, 24), (5, 17), (1, 1), (4, 1), (2, 3, 10), (13,), (), (0, 8)]


def data(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def block_scales(encoded: EncodedTensor) -> torch.Tensor:
    """The decoded scale of each element, in the tensor's shape."""
    grid = BlockGrid.of(encoded.format, encoded.shape)
    scales = encoded.scale_values
    width = grid.elements if grid.one_scale else grid.width
    spread = scales[:, None].expand(-1, width)
    return grid.from_blocks(spread.contiguous()).reshape(encoded.shape)


def distance(value: float, code: float, scale: float) -> Fraction:
    return abs(Fraction(value) - Fraction(code) * Fraction(scale))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("text", [text for text in FORMATS if "dq8" not in text])  # codes before scales are coded
def test_every_element_gets_the_nearest_value_of_its_table(text: str, shape: tuple[int, ...]) -> None:
    fmt, weight = parse(text), data(shape)
    encoded = encode_nearest(weight, fmt)
    table = element_table(fmt, shared_weights(fmt, shape)).values
    decoded, scales = encoded.decode().reshape(-1), block_scales(encoded).reshape(-1)
    assert tuple(encoded.decode().shape) == shape
    for value, got, scale in zip(weight.reshape(-1).tolist(), decoded.tolist(), scales.tolist(), strict=True):
        best = min(distance(value, code, scale) for code in table)
        same = [code for code in table if np.float32(np.float32(code) * np.float32(scale)) == np.float32(got)]
        reached = min(distance(value, code, scale) for code in same)
        assert reached <= best * (1 + Fraction(1, 2**20)) + Fraction(abs(scale)) / 2**22


@pytest.mark.parametrize("text", FORMATS)
def test_the_parts_are_those_that_were_planned_and_restore_the_tensor(text: str) -> None:
    fmt, weight = parse(text), data((6, 50), 3, torch.bfloat16)
    encoded = encode_nearest(weight, fmt)
    planned = EncodedTensor.planned_parts(fmt, (6, 50))
    assert {name: (part.dtype, tuple(part.shape)) for name, part in encoded.parts().items()} == {
        name: (TORCH_DTYPES[dtype], size) for name, (dtype, size) in planned.items()
    }
    again = EncodedTensor.from_parts(fmt, encoded.shape, "BF16", encoded.parts())
    assert torch.equal(again.decode(), encoded.decode())
    assert encoded.nbytes == sum(part.numel() * part.element_size() for part in encoded.parts().values())


@pytest.mark.parametrize(
    ("text", "dtype", "largest"),
    [
        ("float8_e4m3@16:absmax:fp32", torch.float8_e4m3fn, 448.0),
        ("float8_e5m2@16:absmax:fp32", torch.float8_e5m2, 57344.0),
        ("float16_e5m10@16:absmax:fp32", torch.float16, 65504.0),
        ("float4_e2m1@16:absmax:fp32", ml_dtypes.float4_e2m1fn, 6.0),
        ("float6_e2m3@16:absmax:fp32", ml_dtypes.float6_e2m3fn, 7.5),
        ("float6_e3m2@16:absmax:fp32", ml_dtypes.float6_e3m2fn, 28.0),
    ],
)
def test_floats_equal_the_casts_of_torch_and_ml_dtypes(text: str, dtype: object, largest: float) -> None:
    """With its largest value in every block the scale is 1. All midpoints of neighbours are among the numbers."""
    table = np.asarray(element_table(parse(text), 16).values)
    near = [np.nextafter(np.float32(x), np.float32(way)) for x in (table[1:] + table[:-1]) / 2 for way in (-1e9, 1e9)]
    values = np.concatenate((table, (table[1:] + table[:-1]) / 2, near)).astype(np.float32)
    values = np.concatenate((values, np.zeros(-len(values) % 15, np.float32))).reshape(-1, 15)
    blocks = np.concatenate((np.full((len(values), 1), largest, np.float32), values), axis=1)
    got = encode_nearest(torch.from_numpy(blocks), parse(text)).decode()[:, 1:].numpy()
    if isinstance(dtype, torch.dtype):
        wanted = torch.from_numpy(values).to(dtype).float().numpy()
    else:
        wanted = values.astype(dtype).astype(np.float32)  # type: ignore[call-overload]
    np.testing.assert_array_equal(got, wanted)


@given(
    weight=st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=40),
    text=st.sampled_from(["int4@8", "int4@8:signmax", "t5_4@8:signmax", "nf4@8", "normal3@tensor:rms", "mxfp4"]),
    power=st.integers(-8, 8),
)
@settings(max_examples=150, deadline=None)
def test_a_power_of_two_scales_through(weight: list[float], text: str, power: int) -> None:
    original = torch.tensor([weight]).where(torch.tensor([weight]).abs() > 2**-60, torch.zeros(1))
    decoded = encode_nearest(original, parse(text)).decode()
    assert torch.equal(encode_nearest(original * 2.0**power, parse(text)).decode(), decoded * 2.0**power)


@given(weight=st.lists(st.floats(-3, 3, width=32), min_size=8, max_size=8).filter(lambda x: len(set(map(abs, x))) == 8))
@settings(max_examples=100, deadline=None)
def test_signmax_is_symmetric_in_the_sign(weight: list[float]) -> None:
    original = torch.tensor([weight])
    for text in ("t5_4@8:signmax", "int4@8:signmax"):
        mirrored = encode_nearest(-original, parse(text)).decode()
        assert torch.equal(mirrored, -encode_nearest(original, parse(text)).decode())


@pytest.mark.parametrize("text", ["int4@8:signmax:fp32", "t5_4@8:signmax:fp32", "nf4@8:signmax:fp32"])
def test_under_signmax_the_largest_element_is_kept(text: str) -> None:
    weight = data((7, 8), 5)
    decoded = encode_nearest(weight, parse(text)).decode()
    index = weight.abs().argmax(dim=1, keepdim=True)
    torch.testing.assert_close(decoded.gather(1, index), weight.gather(1, index), rtol=2**-22, atol=0)


def test_of_equal_magnitudes_the_first_gives_the_sign() -> None:
    encoded = encode_nearest(torch.tensor([[0.5, -2.0, 2.0, 1.0], [0.5, 2.0, -2.0, 1.0]]), parse("t5_4@4:signmax"))
    assert encoded.scales.flatten().tolist() == [-2.0, 2.0]


@pytest.mark.parametrize("text", FORMATS)
def test_zeros_are_decoded_to_exact_zeros(text: str) -> None:
    decoded = encode_nearest(torch.zeros(3, 20), parse(text)).decode()
    if "e8m0" in str(parse(text)) or element_table(parse(text), 8).values[element_table(parse(text), 8).zero] == 0:
        assert torch.equal(decoded, torch.zeros(3, 20))
    else:
        assert decoded.abs().max() == 0


@pytest.mark.parametrize("text", FORMATS)
def test_a_constant_block_is_decoded_within_half_a_gap_of_the_table(text: str) -> None:
    fmt, weight = parse(text), torch.full((2, 16), -0.75)
    encoded = encode_nearest(weight, fmt)
    table = torch.tensor(element_table(fmt, shared_weights(fmt, (2, 16))).values, dtype=torch.float64)
    level = weight.double() / block_scales(encoded)
    gaps = torch.diff(table)[(torch.bucketize(level, table) - 1).clamp(0, len(table) - 2)]
    overshoot = (level.abs() - table.abs().max()).clamp(min=0)  # what a rounded scale leaves outside the table
    assert bool(((encoded.decode() / block_scales(encoded) - level).abs() <= gaps / 2 + overshoot + 1e-6).all())


def test_a_small_scale_does_not_vanish_in_half_precision() -> None:
    weight = torch.tensor([[1e-9] * 8 + [1.0] * 8])
    assert bool((encode_nearest(weight, parse("int4@8:absmax:fp16")).scales > 0).all())


@pytest.mark.parametrize("factor", [1e-11, 1e9])
@pytest.mark.parametrize("text", ["int4@8:absmax:fp16", "q4_1", "q4_k", "q6_k"])
def test_a_tensor_whose_scales_are_out_of_range_is_refused(text: str, factor: float) -> None:
    with pytest.raises(InvalidFormat, match="range"):
        encode_nearest(factor * data((4, 256)), parse(text))


@pytest.mark.parametrize("text", ["nf4@64", "int4@channel+unbiased", "float4@64", "normal4@64+rotate", "q8_0"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_decoding_to_a_dtype_saturates(text: str, dtype: torch.dtype) -> None:
    weight = torch.full((3, 64), torch.finfo(dtype).max).to(dtype) * torch.tensor([1, -1, 0.5]).to(dtype)[:, None]
    if dtype is torch.bfloat16 and ("q8_0" in text or "rotate" in text):  # scales and sums out of range: refused
        with pytest.raises((InvalidFormat, NonFiniteWeights)):
            encode_nearest(weight, parse(text))
        return
    decoded = encode_nearest(weight, parse(text)).decode(dtype)
    assert bool(decoded.isfinite().all())
    if "rotate" not in text:
        torch.testing.assert_close(decoded.double(), weight.double(), rtol=0.1, atol=0.1 * torch.finfo(dtype).max)


@pytest.mark.parametrize(
    "text",
    ["laplace2.32@16:rms:fp32", "float4_e2m1@16:rms:e4m3", "int4@16:absmax:fp32+unbiased", "t5_4@7:signmax:e4m3"],
)
def test_the_largest_weights_of_fp32_stay_finite(text: str) -> None:
    weight = data((2, 1030)).clamp(-3, 3) * 1.1e38
    assert bool(encode_nearest(weight, parse(text)).decode().isfinite().all())
    assert bool(encode_nearest(torch.full((7,), 3.4e38), parse(text)).decode().isfinite().all())


def test_a_rotation_that_overflows_is_refused() -> None:
    with pytest.raises(NonFiniteWeights, match="rotating"):
        encode_nearest(torch.full((1, 8), 3e38), parse("int4@8+hadamard"))


@pytest.mark.parametrize("text", [*FORMATS, "q4_k", "lloyd4@channel", "nf4@channel:absmax:dq8"])
@pytest.mark.parametrize("shape", [(3, 0), (0,), (0, 5), (2, 0, 4)], ids=str)
def test_empty_tensors_are_encoded_to_nothing(text: str, shape: tuple[int, ...]) -> None:
    encoded = encode_nearest(torch.zeros(shape), parse(text))
    assert EncodedTensor.from_parts(encoded.format, shape, "F32", encoded.parts()).decode().shape == shape


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool])
def test_only_floating_weights_are_taken(dtype: torch.dtype) -> None:
    with pytest.raises(InvalidFormat, match="weights of"):
        encode_nearest(torch.zeros(4, 8).to(dtype), parse("int4@8"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 0.0, 9.0, 1.5])
def test_a_fitted_parameter_that_cannot_be_is_refused(value: float) -> None:
    encoded = encode_nearest(data((4, 64)), parse("float4@64"))
    parts = encoded.parts() | {"fitted": torch.tensor([value], dtype=torch.float64)}
    with pytest.raises(InvalidCheckpoint, match="fitted"):
        EncodedTensor.from_parts(encoded.format, (4, 64), "F32", parts).decode()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("text", ["int4@8", "normal4@tensor:rms", "t5_4@tensor:signmax", "mxfp4"])
def test_weights_that_are_no_numbers_are_refused(text: str, bad: float) -> None:
    weight = data((4, 8))
    weight[2, 3] = bad
    with pytest.raises(NonFiniteWeights):
        encode_nearest(weight, parse(text))


@pytest.mark.parametrize("text", ["int4@64", "t7_3.58@60:signmax", "normal4@tensor:rms", "int3@channel", "int10@48"])
def test_pieces_change_nothing(text: str) -> None:
    """A tensor of several pieces is encoded as its rows are, where rows share nothing."""
    fmt, rows = parse(text), 3 * PIECE // 1000
    weight = data((rows, 1000), 9)
    decoded = encode_nearest(weight, fmt).decode()
    if fmt.granularity == "tensor":
        scale = (weight.double().square().mean().sqrt()).float().to(torch.bfloat16).float()
        table = torch.tensor(element_table(fmt, 1).values)
        nearest = table[(weight[:40, :, None] / scale - table).abs().argmin(dim=2)] * scale
        torch.testing.assert_close(decoded[:40], nearest)
    else:
        for row in (0, rows // 2, rows - 1):
            assert torch.equal(decoded[row : row + 1], encode_nearest(weight[row : row + 1], fmt).decode())


def test_strides_and_dtypes_do_not_matter() -> None:
    weight = data((32, 48), 2, torch.bfloat16)
    straight = encode_nearest(weight, parse("int4@16")).decode()
    assert torch.equal(encode_nearest(weight.t().contiguous().t(), parse("int4@16")).decode(), straight)
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(encode_nearest(weight.to(dtype), parse("int4@16")).decode(), straight)


def test_threads_do_not_matter() -> None:
    weight, before = data((300, 3000), 4), torch.get_num_threads()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append([encode_nearest(weight, parse(text)).decode() for text in ("t5_3@tensor:rms", "int4@channel:rms")])
    torch.set_num_threads(before)
    for one, other in itertools.pairwise(found):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_error_is_that_of_the_decoded_tensor() -> None:
    weight = data((50, 70), 6)
    encoded = encode_nearest(weight, parse("nf4@32"))
    expected = (encoded.decode().double() - weight.double()).norm() / weight.double().norm()
    assert relative_rms_error(weight, encoded) == pytest.approx(float(expected), rel=1e-12)
    assert relative_rms_error(torch.zeros(4, 8), encode_nearest(torch.zeros(4, 8), parse("int4@8"))) == 0


def test_bytes_that_no_encoder_wrote_cannot_read_beyond_the_table() -> None:
    fmt = TensorFormat("nf", 3.58, granularity=8)
    encoded = encode_nearest(data((4, 22)), fmt)
    hostile = encoded.parts() | {"codes": torch.full_like(encoded.codes, 255)}
    assert EncodedTensor.from_parts(fmt, (4, 22), "F32", hostile).decode().shape == (4, 22)
    with pytest.raises(InvalidCheckpoint, match="codes"):
        EncodedTensor.from_parts(fmt, (4, 22), "F32", hostile | {"codes": encoded.codes[:-1]})
    with pytest.raises(InvalidCheckpoint, match="scales"):
        EncodedTensor.from_parts(fmt, (4, 22), "F32", {"codes": encoded.codes})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("text", [*FORMATS, "lloyd3@16", "t_4@8:signmax", "float5@8", "int4-sym@6", "t7_8@32"])
def test_compiled_loops_write_the_bytes_of_the_reference(
    text: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for shape in [(6, 50), (1, 1), (3, 64), (0, 4)]:
        weight = data(shape, 8, dtype)
        if weight.numel() > 20:
            weight[0, 3:9], weight[-1] = 0, weight[-1] * 1e-6
        compiled = encode_nearest(weight, parse(text))
        with monkeypatch.context() as patch:
            patch.setattr("core.tensors.nearest.passes_for", Reference)
            patch.setattr("core.tensors.encoded._KERNEL_CODES", 0)
            reference = encode_nearest(weight, parse(text))
            decoded = reference.decode()
        assert reference.parts().keys() == compiled.parts().keys()
        for name, part in reference.parts().items():
            assert torch.equal(
                part.reshape(-1).view(torch.uint8), compiled.parts()[name].reshape(-1).view(torch.uint8)
            ), name
        assert torch.equal(decoded, compiled.decode())
        assert torch.equal(decoded.bfloat16(), compiled.decode(torch.bfloat16))


@pytest.mark.parametrize("text", ["int4@8", "int12@8", "nf4@tensor", "normal4@8+rotate", "q4_k"])
def test_the_first_weight_that_is_no_number_is_named(text: str) -> None:
    weight = data((4, 2, 64))
    weight[2, 1, 3], weight[3, 0, 0] = float("nan"), float("inf")
    with pytest.raises(NonFiniteWeights, match=r"NaN or infinity|\[2, 1, 3\]") as refused:
        encode_nearest(weight, parse(text))
    assert "[2, 1, 3]" in refused.value.detail


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("text", ["nf4@8", "int12@8", "normal4@8+rotate", "int4@8+outliers0.1", "q4_k", "int4@8:rms"])
def test_memory_that_is_given_is_decoded_into(text: str, dtype: torch.dtype) -> None:
    encoded = encode_nearest(data((6, 50), 4), parse(text))
    memory = torch.full((300,), 7.0, dtype=dtype)
    found = encoded.decode(dtype, out=memory)
    assert found.data_ptr() == memory.data_ptr()
    assert torch.equal(memory.reshape(6, 50), encoded.decode(dtype))
