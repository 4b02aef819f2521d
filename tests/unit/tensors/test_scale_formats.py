"""How scales are rounded and read back: E8M0's rules, E4M3 under a tensor's own scale, 16 bits, double quantisation."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.errors import InvalidFormat
from core.formats.elements import codebook_table, element_table
from core.formats.stored import stored_parts
from core.recipe.tensor_format import TensorFormat, parse
from core.tensors.encoded import EncodedTensor
from core.tensors.nearest import encode_nearest
from core.tensors.scale_formats import (
    decoded_scales,
    double_quantised,
    dynamic_code,
    end_of,
    stored_scales,
    tensor_scale,
    undo_double,
)

FP32_MAX = float(torch.finfo(torch.float32).max)
ELEMENTS = ("float4_e2m1", "float6_e2m3", "float6_e3m2", "float8_e4m3", "float8_e5m2", "int8-mx", "int4-mx")
SCALE_FORMATS = ("bf16", "fp16", "fp32", "e8m0", "e4m3", "dq8")
POSITIVE = st.floats(2.0**-149, FP32_MAX, width=32, allow_subnormal=True)


def mx(element: str, rule: str) -> TensorFormat:
    return parse(f"{element}@32:absmax:e8m0-{rule}")


def bytes_of(fmt: TensorFormat, maxima: torch.Tensor) -> torch.Tensor:
    return stored_scales(fmt, element_table(fmt, 32), maxima)


def random_positive(seed: int) -> torch.Tensor:
    """A million positive finite bit patterns: all exponents, subnormals too."""
    patterns = np.random.default_rng(seed).integers(1, 0x7F800000, 1 << 20, dtype=np.int32)
    return torch.from_numpy(patterns.view(np.float32))


def floor_exponents(maxima: torch.Tensor, largest: float) -> torch.Tensor:
    return torch.frexp(maxima.double())[1] - 1 - (math.frexp(largest)[1] - 1)


@given(st.sampled_from([*ELEMENTS, "int4-asym", "nf4", "t5_4"]), POSITIVE)
def test_rceil_is_the_smallest_power_that_clips_nothing(element: str, top: float) -> None:
    fmt = mx(element, "rceil")
    byte = int(bytes_of(fmt, torch.tensor([top])))
    end = Fraction(end_of(fmt, element_table(fmt, 32)))
    assert byte == 254 or Fraction(2) ** (byte - 127) * end >= Fraction(top)
    assert byte == 0 or Fraction(2) ** (byte - 128) * end < Fraction(top)


@given(st.floats(0.01, 100), st.integers(-20, 20))
def test_rceil_knows_ends_that_fp32_does_not_have(end: float, power: int) -> None:
    top = float(torch.tensor(end * 2.0**power, dtype=torch.float32))
    byte = int(stored_scales(parse("lloyd4@8:absmax:e8m0"), codebook_table((-end, 0.0, end)), torch.tensor([top])))
    assert Fraction(2) ** (byte - 127) * Fraction(end) >= Fraction(top) > Fraction(2) ** (byte - 128) * Fraction(end)


@pytest.mark.parametrize("element", ELEMENTS)
def test_rceil_is_the_rule_of_the_top_binade(element: str) -> None:
    largest = element_table(mx(element, "rceil"), 32).values[-1]
    maxima = random_positive(1)
    exponents = floor_exponents(maxima, largest)
    exponents += (maxima.double() * torch.exp2(-exponents.double()) > largest).int()
    assert torch.equal(bytes_of(mx(element, "rceil"), maxima).int(), exponents.clamp(-127, 127) + 127)


@pytest.mark.parametrize("element", ELEMENTS)
def test_even_and_midmax_differ_only_on_the_threshold_and_for_e4m3(element: str) -> None:
    maxima = random_positive(2)
    even, midmax = (bytes_of(mx(element, rule), maxima).int() for rule in ("even", "midmax"))
    largest = element_table(mx(element, "even"), 32).values[-1]
    top = maxima.double() * torch.exp2(-floor_exponents(maxima, largest).double())
    if element == "float8_e4m3":
        assert torch.equal(midmax - even, ((top > 464) & (top < 496) & (midmax > 0)).int())
    else:
        threshold = (2 ** math.frexp(largest)[1] + largest) / 2
        assert torch.equal(even - midmax, ((top == threshold) & (even > 0)).int())


@pytest.mark.parametrize(
    ("element", "even", "midmax"),
    [
        ("float4_e2m1", 7, 7),
        ("float6_e2m3", 7.75, 7.75),
        ("float6_e3m2", 30, 30),
        ("float8_e5m2", 61440, 61440),
        ("float8_e4m3", 496, 464),
        ("float7_e4m2", 480, 480),  # the same largest value as E4M3, but no NaN that takes a place
        ("int8-mx", 2 - 1 / 128, 2 - 1 / 128),
    ],
)
def test_thresholds_are_those_of_the_standard_and_of_tensorcast(element: str, even: float, midmax: float) -> None:
    tops = torch.tensor([even, midmax, 0.0])
    tops[2] = torch.nextafter(tops[1], torch.tensor(math.inf))
    floor = bytes_of(mx(element, "floor"), tops).int()
    assert int(bytes_of(mx(element, "even"), tops)[0] - floor[0]) == 1
    assert (bytes_of(mx(element, "midmax"), tops).int() - floor).tolist()[1:] == [0, 1]


@pytest.mark.parametrize("rule", ["floor", "ceil", "rceil", "even", "midmax"])
@pytest.mark.parametrize("element", ELEMENTS)
def test_e8m0_reaches_all_of_fp32(element: str, rule: str) -> None:
    tops = torch.tensor([[0.0], [2.0**-149], [2.0**-127], [2.0**-126], [1.0], [2.0**127], [FP32_MAX]])
    weight = tops * torch.tensor([1.0, -0.5, 0.25] + [0.0] * 29)
    encoded = encode_nearest(weight, mx(element, rule))
    decoded, scales = encoded.decode(), encoded.scales.reshape(-1).tolist()
    assert scales[0] == 0
    assert not decoded.isnan().any()
    assert decoded[0].eq(0).all()
    assert max(scales) <= 254
    values = np.array(element_table(encoded.format, 32).values)
    factors = 2.0 ** (np.array(scales, dtype=np.float64) - 127)
    nearest = np.abs(weight.double().numpy()[..., None] - values * factors[:, None, None]).min(axis=2)
    finite = decoded.isfinite().numpy()
    errors = np.abs(weight.double().numpy() - np.where(finite, decoded.double().numpy(), 0))
    assert (errors[finite] <= nearest[finite] + 2.0**-150).all()
    assert finite[:-1].all()
    assert finite.all() or rule != "floor"


@given(st.sampled_from(["int4-asym", "nf4", "float4_e2m1", "int4-sym"]), POSITIVE)
def test_scales_of_16_bits_neither_overflow_nor_vanish(element: str, top: float) -> None:
    for name in ("fp16", "bf16", "fp32"):
        fmt = parse(f"{element}@8:signmax:{name}" if element == "int4-asym" else f"{element}@8:absmax:{name}")
        for extreme in (top, -top) if fmt.base_statistic == "signmax" else (top,):
            table = element_table(fmt, 8)
            stored = stored_scales(fmt, table, torch.tensor([extreme]))
            scale = float(decoded_scales(fmt, stored))
            assert math.isfinite(scale)
            assert scale * extreme / end_of(fmt, table) >= 0
            assert scale != 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", ["bf16", "fp16", "fp32", "e4m3"])
@pytest.mark.parametrize("element", ["int4-asym", "int4-sym", "float4_e2m1", "float8_e5m2", "nf4"])
def test_the_largest_weights_stay_finite(element: str, scale: str, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    weight = (torch.linspace(0.5, 1, 64).repeat(3, 1) * largest).to(dtype)
    weight[:, -1] = largest
    weight[1] = -weight[1]
    if scale == "fp16":
        with pytest.raises(InvalidFormat, match="range of fp16"):
            encode_nearest(weight, parse(f"{element}@16:absmax:{scale}"))
        return
    assert encode_nearest(weight, parse(f"{element}@16:absmax:{scale}")).decode().isfinite().all()


@pytest.mark.parametrize("statistic", ["absmax", "search", "signmax-search"])
@pytest.mark.parametrize("element", ["float4_e2m1", "int4-sym", "nf4", "int4-asym"])
def test_zeros_under_e4m3_are_zeros(element: str, statistic: str) -> None:
    fmt = parse(f"{element}@16:{statistic}:e4m3")
    everything = encode_nearest(torch.zeros(2, 32), fmt)
    assert everything.decode().eq(0).all()
    assert float(everything.parts()["tensor_scale"]) == 1
    some = torch.ones(2, 32)
    some[0, :16] = 0
    assert encode_nearest(some, fmt).decode()[0, :16].eq(0).all()


@pytest.mark.parametrize("top", [2.0**-149, 2.0**-140, 1e-40, 2.0**-126])
def test_tensors_of_subnormals_are_not_lost_under_e4m3(top: float) -> None:
    fmt = parse("float4_e2m1@16:absmax:e4m3")
    weight = torch.full((1, 16), top)
    constant = tensor_scale(fmt, element_table(fmt, 16), torch.tensor(top))
    assert constant is not None
    assert float(constant) > 0
    decoded = encode_nearest(weight, fmt).decode()
    assert float((decoded.double() - weight).abs().max()) <= max(0.1 * top, 2.0**-149)


def block_errors(weight: torch.Tensor, encoded: EncodedTensor, block: int) -> torch.Tensor:
    """Relative RMS error of each block."""
    error = (weight.double() - encoded.decode().double()).view(-1, block)
    found: torch.Tensor = error.square().sum(dim=1) / weight.double().view(-1, block).square().sum(dim=1)
    return found.sqrt()


@pytest.mark.parametrize("scale", ["bf16", "fp16", "fp32", "e8m0", "e4m3", "dq8"])
def test_blocks_that_differ_by_a_million(scale: str) -> None:
    """Scales with an exponent of their own lose nothing; the others lose what is small against the largest block."""
    weight = torch.randn(8, 512, generator=torch.Generator().manual_seed(4)).view(-1, 32)
    weight *= torch.logspace(-6, 0, len(weight))[:, None]
    encoded = encode_nearest(weight, parse(f"nf4@32:absmax:{scale}"))
    errors = block_errors(weight, encoded, 32)
    if scale in ("bf16", "fp16", "fp32", "e8m0"):
        assert float(errors.max()) < 0.25
    total = float((weight.double() - encoded.decode()).norm() / weight.double().norm())
    assert total < 0.13
    assert float(errors[-32:].max()) < 0.3


def test_the_dynamic_code_is_that_of_bitsandbytes() -> None:
    code = dynamic_code()
    assert len(code) == 256
    assert list(code) == sorted(code)
    assert code[127] == 0
    assert code[128] == pytest.approx(5.5e-7)
    assert code[-2:] == pytest.approx((0.99296875, 1.0))
    assert all(-one == other for one, other in zip(code[:127], reversed(code[128:255]), strict=True))


@given(st.integers(0, 2**31), st.integers(1, 700), st.floats(-30, 30))
def test_double_quantised_scales_come_back_within_half_a_step(seed: int, count: int, power: float) -> None:
    """The widest step of the code is 0.9 / 64 of a block's largest deviation from the mean."""
    scales = torch.rand(count, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    parts = double_quantised(scales)
    back = undo_double(parts)
    assert bool((back >= 0).all())
    largest = parts["scale_absmax"].repeat_interleave(256)[:count]
    assert bool(((back - scales).abs() <= largest * (0.45 / 64) + scales.max() * 2.0**-22).all())


def test_double_quantised_scales_cost_an_eighth_of_a_bit_per_weight() -> None:
    parts = stored_parts(parse("nf4@64:dq8"), (4096, 4096))
    sizes = {"U8": 8, "F32": 32}
    bits = sum(sizes[kind] * math.prod(size) for kind, size in parts.values()) / 4096**2
    assert bits == pytest.approx(4.127, abs=5e-5)


def test_double_quantisation_does_not_depend_on_threads() -> None:
    scales = torch.rand(300_001, generator=torch.Generator().manual_seed(8))
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(double_quantised(scales))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("statistic", ["absmax", "search"])
@pytest.mark.parametrize("scale", SCALE_FORMATS)
@pytest.mark.parametrize("element", ["float4_e2m1", "nf4", "int4-asym"])
def test_a_ragged_block_is_a_block_filled_up_with_zeros(element: str, scale: str, statistic: str) -> None:
    weight = torch.randn(5, 70, generator=torch.Generator().manual_seed(6))
    fmt = parse(f"{element}@32:{statistic}:{scale}")
    ragged = encode_nearest(weight, fmt)
    filled = encode_nearest(torch.nn.functional.pad(weight, (0, 26)), fmt)
    assert torch.equal(ragged.scales.view(torch.uint8), filled.scales.view(torch.uint8))
    assert torch.equal(ragged.decode(), filled.decode()[:, :70])
