"""MX and NVFP4 bit for bit as other producers write them: ml_dtypes and torch for elements and E8M0, torchao and
compressed-tensors for whole blocks.

Where a producer departs from the standards the departure is named and cut out of the comparison, never tolerated in it.
"""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from core.errors import NonFiniteWeights
from core.formats.elements import element_table
from core.recipe.tensor_format import TensorFormat, parse
from core.tensors.encoded import EncodedTensor
from core.tensors.indices import nearest_indices
from core.tensors.nearest import encode_nearest
from core.tensors.packing import unpack_planes
from core.tensors.scale_formats import decoded_scales

Floats = NDArray[np.float32]
FP32_MAX = float(torch.finfo(torch.float32).max)
CASTS: dict[str, type] = {
    "float4_e2m1": ml_dtypes.float4_e2m1fn,
    "float6_e2m3": ml_dtypes.float6_e2m3fn,
    "float6_e3m2": ml_dtypes.float6_e3m2fn,
    "float8_e4m3": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
}
MILLION = 1 << 20


def mx(element: str, rule: str = "floor") -> TensorFormat:
    return parse(f"{element}@32:absmax:e8m0-{rule}")


def values_of(element: str) -> Floats:
    return np.array(element_table(mx(element), 32).values, dtype=np.float32)


def decision_points(element: str) -> Floats:
    """Values, the midpoints between them and the fp32 neighbours of the midpoints."""
    values = values_of(element)
    middles = (values[1:] + values[:-1]) / 2
    below, above = np.nextafter(middles, np.float32(-np.inf)), np.nextafter(middles, np.float32(np.inf))
    return np.concatenate((values, middles, below, above))


def awkward_numbers(element: str, count: int, seed: int = 0) -> Floats:
    """All decision points, both zeros, subnormals and the largest numbers of fp32; the rest random bit patterns."""
    generator = np.random.default_rng(seed)
    patterns = generator.integers(0, 1 << 32, count, dtype=np.uint32)
    drawn = patterns.view(np.float32)
    usual = (generator.standard_normal(count) * 4).astype(np.float32)
    drawn = np.where(np.isfinite(drawn) & (np.arange(count) % 2 == 0), drawn, usual)
    ends = np.array([0.0, -0.0, 1e-45, -1e-45, 1e-40, 2**-126, FP32_MAX, -FP32_MAX], dtype=np.float32)
    return np.concatenate((ends, decision_points(element), drawn))


def cast(numbers: Floats, element: str) -> Floats:
    """As another implementation rounds; it overflows to NaN or infinity where MX saturates, so it is clamped first."""
    largest = values_of(element)[-1]
    return np.clip(numbers, -largest, largest).astype(CASTS[element]).astype(np.float32)


def ours(numbers: Floats, element: str) -> Floats:
    """As our table rounds under a scale of 1."""
    fmt = mx(element)
    rows = torch.from_numpy(np.resize(numbers, (-(-len(numbers) // 32), 32)))
    indices = nearest_indices(rows, torch.ones(len(rows)), fmt, element_table(fmt, 32))
    found: Floats = values_of(element)[indices.reshape(-1).long().numpy()]
    return found[: len(numbers)]


@pytest.mark.parametrize("element", CASTS)
def test_elements_are_rounded_as_ml_dtypes_rounds_them(element: str) -> None:
    numbers = awkward_numbers(element, MILLION)
    assert np.array_equal(ours(numbers, element), cast(numbers, element))


@pytest.mark.parametrize(
    ("element", "dtype"), [("float8_e4m3", torch.float8_e4m3fn), ("float8_e5m2", torch.float8_e5m2)]
)
def test_fp8_is_rounded_as_torch_rounds_it(element: str, dtype: torch.dtype) -> None:
    numbers = awkward_numbers(element, MILLION, seed=1)
    largest = float(values_of(element)[-1])
    theirs = torch.from_numpy(numbers).clamp(-largest, largest).to(dtype).float().numpy()
    assert np.array_equal(ours(numbers, element), theirs)


@pytest.mark.parametrize("element", CASTS)
def test_codes_are_the_bit_patterns_of_ml_dtypes(element: str) -> None:
    """With a scale of 1, which a block of the largest value has; +0 stands for both zeros."""
    largest = values_of(element)[-1]
    numbers = np.clip(decision_points(element), -largest, largest)
    blocks = np.full((-(-len(numbers) // 31), 32), largest, dtype=np.float32)
    blocks[:, 1:] = np.resize(numbers, (len(blocks), 31))
    encoded = encode_nearest(torch.from_numpy(blocks), mx(element))
    codes = unpack_planes([encoded.codes], encoded.format.codes, blocks.size).numpy()
    theirs: NDArray[np.generic] = blocks.astype(CASTS[element])
    positive = np.where(theirs.astype(np.float32) == 0, np.zeros_like(theirs), theirs)
    assert np.array_equal(codes.reshape(blocks.shape), positive.view(np.uint8))


def test_every_e8m0_byte_is_read_as_torch_and_ml_dtypes_read_it() -> None:
    bytes_ = torch.arange(256, dtype=torch.uint8)
    found = decoded_scales(mx("float4_e2m1"), bytes_)
    assert np.array_equal(
        found.numpy(), bytes_.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32), equal_nan=True
    )
    assert torch.equal(found[1:255], bytes_.view(torch.float8_e8m0fnu).float()[1:255])
    assert float(found[0]) == 2.0**-127
    assert torch.isnan(found[255])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("text", ["mxfp4", "nvfp4", "nf4@64:dq8", "float8_e4m3@32:search:e8m0", "int8-mx@32:e8m0"])
def test_numbers_that_no_element_has_are_refused(text: str, bad: float) -> None:
    weight = torch.ones(2, 64)
    weight[1, 3] = bad
    with pytest.raises(NonFiniteWeights, match=r"\[1, 3\]"):
        encode_nearest(weight, parse(text))


def elements(encoded: EncodedTensor) -> torch.Tensor:
    """The decoded elements without their scales."""
    codes = unpack_planes([encoded.codes], encoded.format.codes, encoded.elements)
    return encoded.table[codes.long()].reshape(encoded.shape)


def blocks_for(element: str, width: int, blocks: int, seed: int) -> torch.Tensor:
    """Blocks over all of fp32's exponents, a third of them made of decision points; zero, tiny and huge ones too."""
    generator = np.random.default_rng(seed)
    powers = np.exp2(generator.integers(-148, 124, (blocks, 1)).astype(np.float64))
    random = generator.standard_normal((blocks, width)) * powers
    chosen = generator.choice(decision_points(element).astype(np.float64), (blocks, width)) * powers
    mixed = np.where(np.arange(blocks)[:, None] % 3 == 0, chosen, random)
    numbers = np.clip(mixed, -FP32_MAX, FP32_MAX).astype(np.float32)
    numbers[0] = 0
    numbers[1] = np.float32(1e-45)
    numbers[2, :3] = FP32_MAX, -FP32_MAX, FP32_MAX / 2
    numbers[3, 5:] = -0.0
    return torch.from_numpy(numbers)


TORCHAO_RULES = ("floor", "ceil", "rceil", "even")


def torchao_mx(weight: torch.Tensor, element: str, rule: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale bytes, element values) of torchao."""
    pytest.importorskip("torchao", reason="a development dependency")
    from torchao.prototype.mx_formats import constants, kernels
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import to_mx

    kinds: dict[str, tuple[object, Callable[[torch.Tensor], torch.Tensor]]] = {
        "float4_e2m1": (
            torch.float4_e2m1fn_x2,
            lambda codes: kernels.f4_unpacked_to_f32(kernels.unpack_uint4(codes.view(torch.uint8))),
        ),
        "float6_e2m3": (constants.DTYPE_FP6_E2M3, kernels.f6_e2m3_unpacked_to_f32),
        "float6_e3m2": (constants.DTYPE_FP6_E3M2, kernels.f6_e3m2_unpacked_to_f32),
        "float8_e4m3": (torch.float8_e4m3fn, torch.Tensor.float),
        "float8_e5m2": (torch.float8_e5m2, torch.Tensor.float),
    }
    dtype, read = kinds[element]
    scales, codes = to_mx(weight, dtype, 32, ScaleCalculationMode(rule))
    return scales.view(torch.uint8), read(codes)


@pytest.mark.parametrize("rule", TORCHAO_RULES)
@pytest.mark.parametrize("element", CASTS)
def test_mx_blocks_are_those_of_torchao(element: str, rule: str) -> None:
    """Two departures of torchao are cut out. It divides blocks of byte 0 by 2^-126 (by 1 for rceil), so that 2^-127 is
    not what their elements are scaled with: their bytes are compared, not their elements. Its rceil takes a ceiling of
    an fp32 log2 of an fp32 quotient, so that its bytes may be one off where max / largest is next to a power of two.
    """
    weight = blocks_for(element, 32, 1 << 13, seed=3)
    scales, theirs = torchao_mx(weight, element, rule)
    encoded = encode_nearest(weight, mx(element, rule))
    found = encoded.scales.reshape(-1)
    compared = torch.ones(len(found), dtype=torch.bool)
    if rule == "rceil":
        quotients = weight.abs().amax(dim=1).double() / float(values_of(element)[-1])
        mantissas = torch.frexp(quotients)[0]
        is_power = mantissas == 0.5
        compared = is_power | (mantissas > 0.5 + 1e-5) & (mantissas < 1 - 1e-5) | (scales.reshape(-1) == 0)
        assert compared.float().mean() > 0.9
    assert torch.equal(found[compared], scales.reshape(-1)[compared])
    normal = compared & (found > 0)
    assert torch.equal(elements(encoded)[normal], theirs.reshape(weight.shape)[normal])


@pytest.mark.parametrize("element", CASTS)
def test_blocks_of_the_smallest_scale_are_divided_by_it(element: str) -> None:
    """The blocks that torchao treats in its own way, against division in fp64, where it is exact."""
    generator = np.random.default_rng(5)
    largest = float(values_of(element)[-1])
    numbers = (generator.uniform(-largest, largest, (512, 32)) * 2.0**-127).astype(np.float32)
    encoded = encode_nearest(torch.from_numpy(numbers), mx(element))
    assert int(encoded.scales.max()) == 0
    expected = cast((numbers.astype(np.float64) * 2.0**127).astype(np.float32), element)
    assert np.array_equal(elements(encoded).numpy(), expected)


def nvfp4_by_definition(weight: Floats) -> tuple[float, Floats, Floats]:
    """(tensor scale, block scales, elements): hardware formats, section 3, in numpy."""
    blocks = weight.reshape(-1, 16)
    constant = np.float32(np.abs(weight).max() / np.float32(2688))
    wanted = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(6) / constant
    scales = np.clip(wanted, 2.0**-9, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    quotients = np.clip(blocks / (scales * constant), -6, 6)
    return float(constant), scales, quotients.astype(ml_dtypes.float4_e2m1fn).astype(np.float32)


def nvfp4_weight(seed: int) -> torch.Tensor:
    """A million weights whose blocks differ by up to 10^6, with blocks of zeros and of worked ties."""
    generator = np.random.default_rng(seed)
    blocks = generator.standard_normal((MILLION // 16, 16)) * 10 ** generator.uniform(-6, 0, (MILLION // 16, 1))
    blocks[::5] = generator.choice(decision_points("float4_e2m1"), blocks[::5].shape)
    blocks[7] = 0
    return torch.from_numpy(blocks.astype(np.float32)).view(1024, 1024)


def test_nvfp4_is_its_definition() -> None:
    weight = nvfp4_weight(1)
    constant, scales, theirs = nvfp4_by_definition(weight.numpy())
    encoded = encode_nearest(weight, parse("nvfp4"))
    assert float(encoded.parts()["tensor_scale"]) == constant
    assert np.array_equal(encoded.scales.float().numpy().reshape(-1, 1), scales)
    assert np.array_equal(elements(encoded).numpy().reshape(-1, 16), theirs)


def near_a_decision(quotients: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Whether a number lies within four roundings of fp32 of a point where another value begins."""
    distance = (quotients.double().abs()[..., None] - points.double()).abs()
    return (distance <= 4 * 2.0**-24 * points.double()).any(dim=-1)


MIDDLES = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])


def test_nvfp4_is_that_of_torchao() -> None:
    """Two departures: torchao's block scales are at least 2^-6, so blocks below it are left out; and it multiplies with
    a rounded reciprocal, so that elements differ only where the quotient is within rounding of a tie.
    """
    pytest.importorskip("torchao", reason="a development dependency")
    from torchao.prototype.mx_formats.kernels import f4_unpacked_to_f32, unpack_uint4
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize

    weight = nvfp4_weight(2)
    encoded = encode_nearest(weight, parse("nvfp4"))
    constant = encoded.parts()["tensor_scale"]
    scales, packed = nvfp4_quantize(weight, 16, constant)
    found = encoded.scales.float().reshape(-1)
    compared = found > 2.0**-6
    assert compared.float().mean() > 0.3
    assert torch.equal(found[compared], scales.float().reshape(-1)[compared])
    theirs = f4_unpacked_to_f32(unpack_uint4(packed)).view(-1, 16)[compared]
    mine = elements(encoded).view(-1, 16)[compared]
    quotients = weight.view(-1, 16)[compared] / (found[compared] * constant)[:, None]
    different = mine != theirs
    assert different.float().mean() < 0.05
    assert bool(near_a_decision(quotients[different], MIDDLES).all())
    ties = quotients.abs() == 2.5
    assert bool((mine[ties].abs() == 2).all())


def test_nvfp4_is_that_of_compressed_tensors() -> None:
    """It stores 2688 / max and multiplies with it where we divide by max / 2688: scales and elements differ only where
    the quotient is within rounding of a tie. It has no lower clamp, so blocks without a positive scale are left out.
    """
    pytest.importorskip("compressed_tensors", reason="a development dependency")
    from compressed_tensors.quantization.quant_args import FP4_E2M1_DATA, QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    weight = nvfp4_weight(3)
    blocks = weight.view(-1, 16)
    args = QuantizationArgs(
        num_bits=4, type="float", strategy="tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn
    )
    factor = generate_gparam(weight.min(), weight.max())
    theirs, _ = calculate_qparams(blocks.amin(dim=1), blocks.amax(dim=1), args, factor)
    encoded = encode_nearest(weight, parse("nvfp4"))
    found = encoded.scales.float().reshape(-1)
    assert float(encoded.parts()["tensor_scale"] * factor) == pytest.approx(1, rel=2.0**-23)
    wanted = blocks.abs().amax(dim=1) / 6 * factor
    positive = element_table(mx("float8_e4m3"), 32).values[127:]
    grid = torch.tensor(positive)
    same = theirs.float() == found
    assert bool((near_a_decision(wanted, (grid[1:] + grid[:-1]) / 2) | (wanted < 2.0**-9))[~same].all())
    assert same.float().mean() > 0.7
    quotients = (blocks / (theirs.float() / factor)[:, None])[same]
    cast_ = FP4_E2M1_DATA.cast_to_fp4(quotients.clamp(-6, 6))
    different = elements(encoded).view(-1, 16)[same] != cast_
    assert bool(near_a_decision(quotients[different], MIDDLES).all())
    assert different.float().mean() < 0.05


def test_mxfp4_is_that_of_compressed_tensors() -> None:
    """Its scale rule is `even`. Left out: blocks of byte 0, and those that its fp32 exponent overflows for."""
    pytest.importorskip("compressed_tensors", reason="a development dependency")
    from compressed_tensors.quantization.quant_args import FP4_E2M1_DATA
    from compressed_tensors.quantization.utils import generate_mx_scales

    weight = blocks_for("float4_e2m1", 32, 1 << 15, seed=9)
    encoded = encode_nearest(weight, mx("float4_e2m1", "even"))
    theirs = generate_mx_scales(weight.abs().amax(dim=1), 4)
    found = encoded.scales.reshape(-1)
    normal = (found > 0) & torch.isfinite(theirs)
    assert normal.float().mean() > 0.9
    assert torch.equal(found[normal].int(), theirs[normal].int())
    quotients = weight[normal] / encoded.scale_values[normal][:, None]
    cast_ = FP4_E2M1_DATA.cast_to_fp4(quotients.clamp(-6, 6))
    assert torch.equal(elements(encoded)[normal], cast_)
