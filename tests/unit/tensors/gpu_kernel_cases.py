"""What GPU kernels promise, run by `test_gpu_kernels` in a process of its own: in Triton's interpreter, or on a GPU.

The oracle is the reference in torch on the CPU, which `test_nearest` compares with brute force.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace

import pytest
import torch
from structlog.testing import capture_logs

from core.errors import NonFiniteWeights
from core.formats.elements import ElementTable, element_table, shared_weights
from core.recipe.tensor_format import TensorFormat, parse
from core.tensors.encoded import EncodedTensor
from core.tensors.kernels import gpu
from core.tensors.nearest import encode_nearest
from core.tensors.passes import OnGpu

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = [
    "int4-asym@64",
    "int4-asym@32:signmax:fp16",
    "int4-sym@64:absmax:fp32",
    "int2@16",
    "int3@24",
    "int6@32:absmax:fp16",
    "int8-asym@64",
    "int8-sym@32:absmax:fp32",
    "int4-mx@32:absmax:e8m0",
    "int8-mx@32:absmax:e8m0-rceil",
    "nf4@64",
    "t5_4@64:signmax",
    "t7_6@32:absmax:fp32",
    "normal4@channel",
    "normal4-sym@64:rms",
    "laplace8@48:absmax:e8m0",
    "float4_e2m1@32:absmax:e8m0",
    "float4_e2m1@16:absmax:e8m0-even",
    "float8_e4m3@32:absmax:e8m0-midmax",
    "float8_e5m2@16:signmax:bf16",
    "float6_e3m2@64:absmax:fp32",
    "float3_e1m1@8:absmax:fp16",
]
ONLY_CODES = ["float4_e2m1@16:absmax:e4m3", "nf4@64:absmax:dq8", "int4@tensor", "int4@32:search"]
WHOLE = [
    "t_4@32:signmax",
    "power4@32",
    "lloyd4@64",
    "float4@32",
    "nf4@64",
    "nf4@64:search",
    "int4@32:absmax:fp16",
    "q4_1",
    "t7_4@32:signmax-search:e4m3",
    "nf4@64:absmax:dq8",
    "int4@tensor:rms-search",
    "int4@32+outliers0.01+rotate",
]
REFUSED = ["int3.58@64", "int12@64", "int4@7", "q4_k"]


def table_of(fmt: TensorFormat, shape: tuple[int, ...]) -> ElementTable:
    return element_table(fmt, shared_weights(fmt, shape))


def awkward(fmt: TensorFormat, dtype: torch.dtype, shape: tuple[int, int] = (12, 192)) -> torch.Tensor:
    """Random rows, zeros of both signs, denormals, huge numbers, equal magnitudes, and all limits with neighbours."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(5)) * 0.02
    smallest, largest = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    weight[2] = 0.0
    weight[3] = -0.0
    weight[4] *= 64 * smallest
    weight[5] *= 8 * smallest * torch.finfo(dtype).eps
    weight[6] *= largest if fmt.scale_format != "fp16" else 2.0**14  # larger scales than fp16 has are refused
    weight[7] = 0.5 * (-1.0) ** torch.arange(shape[1])
    weight[8] = -weight[7]
    table = table_of(fmt, shape)
    limits = torch.tensor(table.limits, dtype=torch.float32)
    step = torch.where(limits == 0, 2.0**-30, limits.abs() * 2.0**-23)
    near = torch.cat((limits, limits - step, limits + step))
    weight[9:12] = near[torch.arange(3 * shape[1]) * 7 % near.numel()].reshape(3, -1)
    weight[9:12, ::8] = table.signmax_end if fmt.base_statistic == "signmax" else table.absmax_end
    return weight.to(dtype)


def on_device(encoded: EncodedTensor) -> EncodedTensor:
    parts = {name: part.to(DEVICE) for name, part in encoded.parts().items()}
    return EncodedTensor(encoded.format, encoded.shape, encoded.dtype, parts)


def scales_of(fmt: TensorFormat, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Stored scales as fp32; the sign of a zero is not looked at by `torch.equal`."""
    return EncodedTensor(fmt, tuple(weight.shape), "F32", {"scales": scales.cpu()}).scale_values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text", FORMATS)
def test_encoding_gives_the_bits_of_the_reference(text: str, dtype: torch.dtype) -> None:
    fmt = parse(text)
    weight = awkward(fmt, dtype)
    expected = encode_nearest(weight, fmt)
    found = gpu.encode(weight.to(DEVICE), fmt, table_of(fmt, tuple(weight.shape)))
    assert found is not None
    assert found.scales.dtype == expected.scales.dtype
    assert found.scales.shape == expected.scales.shape
    assert torch.equal(scales_of(fmt, weight, found.scales), expected.scale_values)
    assert torch.equal(found.codes.cpu(), expected.codes)
    assert bool(found.finite)


@pytest.mark.parametrize("text", ["int4@64", "int8@24", "int5@8", "t5_4@16:signmax", "float4_e2m1@32:absmax:e8m0"])
@pytest.mark.parametrize("shape", [(5, 40), (1, 72), (2, 3, 88), (7,), (1, 1), (24, 8)], ids=str)
def test_ragged_rows_and_last_bytes_are_those_of_the_reference(text: str, shape: tuple[int, ...]) -> None:
    fmt = parse(text)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    expected, found = encode_nearest(weight, fmt), gpu.encode(weight.to(DEVICE), fmt, table_of(fmt, shape))
    assert found is not None
    assert torch.equal(found.codes.cpu(), expected.codes)
    assert torch.equal(scales_of(fmt, weight, found.scales), expected.scale_values)


@pytest.mark.parametrize("text", ["int4@channel", "int3@channel:signmax", "normal4-sym@channel:rms"])
def test_rows_longer_than_a_tile_are_walked_in_chunks(text: str) -> None:
    fmt = parse(text)
    weight = torch.randn((3, 20_000), generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    weight[1, 100] = weight[1, 19_000] = 9.0
    weight[2, 100], weight[2, 19_000] = -9.0, 9.0
    expected, found = encode_nearest(weight, fmt), gpu.encode(weight.to(DEVICE), fmt, table_of(fmt, (3, 20_000)))
    assert found is not None
    assert torch.equal(scales_of(fmt, weight, found.scales), expected.scale_values)
    assert torch.equal(found.codes.cpu(), expected.codes)


def test_a_tensor_that_is_not_contiguous_is_encoded_in_its_own_order() -> None:
    fmt = parse("int4@32")
    weight = torch.randn((64, 32), generator=torch.Generator().manual_seed(3)).T
    found = gpu.encode(weight.to(DEVICE), fmt, table_of(fmt, (32, 64)))
    assert found is not None
    assert torch.equal(found.codes.cpu(), encode_nearest(weight, fmt).codes)


def test_the_first_of_equal_magnitudes_gives_the_sign_wherever_it_lies() -> None:
    """int4 under signmax puts the extreme at -8: a positive extreme has a negative scale."""
    fmt = parse("int4@64:signmax:fp32")
    for first, second in [(0, 1), (7, 8), (8, 7), (31, 32), (40, 3), (5, 63)]:
        weight = torch.zeros(1, 64)
        weight[0, first], weight[0, second] = 1.0, -1.0
        found = gpu.encode(weight.to(DEVICE), fmt, table_of(fmt, (1, 64)))
        assert found is not None
        assert found.scales.item() == (-0.125 if first < second else 0.125)


def test_int4_rounds_half_to_even() -> None:
    fmt = parse("int4@8:absmax:fp32")
    weight = torch.tensor([[-7.0, -1.5, -0.5, 0.5, 1.5, 2.5, 6.5, 7.0]])
    found = gpu.encode(weight.to(DEVICE), fmt, table_of(fmt, (1, 8)))
    assert found is not None
    assert found.scales.item() == 1.0
    levels = [byte >> shift & 15 for byte in found.codes.tolist() for shift in (0, 4)]
    assert [level - 8 for level in levels] == [-7, -2, 0, 0, 2, 2, 6, 7]


@pytest.mark.parametrize(("text", "columns"), [("int4@64", 128), ("int8@16:rms", 64), ("nf4@channel", 16_448)])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_told(text: str, value: float, columns: int) -> None:
    fmt = parse(text)
    weight = torch.ones((2, columns), dtype=torch.bfloat16)
    weight[1, columns - 3] = value
    found = gpu.encode(weight.to(DEVICE), fmt, table_of(fmt, (2, columns)))
    assert found is not None
    assert not bool(found.finite)


@pytest.mark.parametrize("text", ONLY_CODES)
def test_codes_for_scales_that_were_chosen_elsewhere_are_those_of_the_reference(text: str) -> None:
    fmt = parse(text)
    weight = awkward(fmt, torch.float32)
    expected = encode_nearest(weight, fmt)
    table = table_of(fmt, tuple(weight.shape))
    assert gpu.encode(weight.to(DEVICE), fmt, table) is None
    factors = expected.scale_values
    if fmt.scale_format == "dq8":  # codes are chosen before scales are coded twice
        factors = encode_nearest(weight, replace(fmt, scale_format="fp32")).scale_values
    found = gpu.encode_codes(weight.to(DEVICE), fmt, table, factors.to(DEVICE))
    assert found is not None
    assert torch.equal(found.cpu(), expected.codes)


@pytest.mark.parametrize("text", [*FORMATS, *ONLY_CODES, "int4@7", "int3@5:rms:fp32"])
def test_decoding_gives_the_bits_of_the_reference(text: str) -> None:
    fmt = parse(text)
    encoded = encode_nearest(awkward(fmt, torch.float32, (12, 200)), fmt)
    for dtype in (torch.float32, torch.bfloat16):
        found = gpu.decode(on_device(encoded), dtype)
        assert found is not None
        assert found.dtype == dtype
        assert torch.equal(found.cpu(), encoded.decode().reshape(-1).to(dtype))


def test_any_bytes_decode_within_the_table() -> None:
    fmt = parse("float4_e2m1@16:absmax:bf16")
    data = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    parts = {"codes": data, "scales": torch.full((2, 16), torch.nan, dtype=torch.bfloat16)}
    parts["scales"][0] = 3e38
    encoded = EncodedTensor.from_parts(fmt, (2, 256), "BF16", parts)
    found = gpu.decode(on_device(encoded), torch.bfloat16)
    assert found is not None
    assert torch.equal(found.cpu().nan_to_num(7.0), encoded.decode().reshape(-1).to(torch.bfloat16).nan_to_num(7.0))


@pytest.mark.parametrize("text", REFUSED)
def test_what_kernels_do_not_take_is_said_once(text: str) -> None:
    fmt = parse(text)
    weight = torch.ones((3, 256), device=DEVICE)
    table = ElementTable((-1.0, 1.0), (False,))
    with capture_logs() as said:
        assert [gpu.encode(weight, fmt, table) for _ in range(3)] == [None] * 3
    assert len(said) <= 1
    assert all(line["event"] == "gpu_kernel_not_taken" and line["log_level"] == "info" for line in said)


def test_dtypes_that_kernels_do_not_know_are_left_to_the_reference() -> None:
    fmt = parse("int4@64")
    weight = torch.ones((1, 64), dtype=torch.float64)
    assert gpu.encode(weight.to(DEVICE), fmt, table_of(fmt, (1, 64))) is None
    assert gpu.decode(on_device(encode_nearest(weight, fmt)), torch.float16) is None
    assert gpu.encode(torch.ones((0, 64), device=DEVICE), fmt, table_of(fmt, (0, 64))) is None


@pytest.mark.parametrize("text", WHOLE)
def test_the_whole_coder_writes_the_parts_of_the_reference(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is fitted is fitted before kernels see a table."""
    weight = torch.randn((24, 192), generator=torch.Generator().manual_seed(6)).to(torch.bfloat16)
    expected = encode_nearest(weight, parse(text), seed=3)
    monkeypatch.setattr("core.tensors.nearest.passes_for", OnGpu)
    found = encode_nearest(weight.to(DEVICE), parse(text), seed=3)
    assert found.parts().keys() == expected.parts().keys()
    for name, part in expected.parts().items():
        assert torch.equal(
            found.parts()[name].cpu().reshape(-1).view(torch.uint8), part.reshape(-1).view(torch.uint8)
        ), name


def test_the_whole_coder_names_the_first_weight_that_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.zeros(4, 64)
    weight[2, 5] = math.nan
    monkeypatch.setattr("core.tensors.nearest.passes_for", OnGpu)
    with pytest.raises(NonFiniteWeights, match=r"\[2, 5\]"):
        encode_nearest(weight.to(DEVICE), parse("nf4@64"))
