"""Published numbers of MX, NVFP4 and block floating point.

Seeded errors and worked blocks are reached by the real coder; exact ones by quadrature over our tables and our scale
rules (`tests.golden.block_scaled_error`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from core.formats.elements import element_table
from core.formats.stored import stored_parts
from core.recipe.tensor_format import TensorFormat, parse
from core.tensors.indices import nearest_indices
from core.tensors.nearest import encode_nearest
from core.tensors.scale_formats import decoded_scales, stored_scales
from tests.golden.block_scaled_error import expected_mse
from tests.golden.seeded_data import DATA_SETS, ENTRIES, coder_mse

ELEMENTS = {
    "MXFP4-E2M1": "float4_e2m1",
    "MXFP6-E3M2": "float6_e3m2",
    "MXFP8-E5M2": "float8_e5m2",
    "MXINT8": "int8-mx",
    "MXINT4": "int4-mx",
}
RULES = ("floor", "ceil", "rceil", "even", "midmax")
BFP_BLOCKS = (4, 8, 16, 32, 64, 128, 256, 512, 1024)


def scale_of(fmt: TensorFormat) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    """Our decoded scale of a block's maximum."""
    table = element_table(fmt, 1)

    def found(maxima: NDArray[np.float64]) -> NDArray[np.float64]:
        stored = stored_scales(fmt, table, torch.from_numpy(maxima).float())
        return decoded_scales(fmt, stored).double().numpy()

    return found


def exact_mse(fmt: TensorFormat, block: int) -> float:
    values = element_table(fmt, block).values
    largest = values[-1] / 2.0 ** math.floor(math.log2(values[-1]))
    mantissa_bits = fmt.mantissa_bits if fmt.mantissa_bits is not None else int(fmt.bits) - 2
    even = 2 - 2.0 ** -(mantissa_bits + 1)
    thresholds = [] if fmt.scale_format == "fp32" else [1.0, largest, even, 1 + largest / 2]
    return expected_mse(values, scale_of(fmt), block, thresholds)


@pytest.mark.parametrize("data", DATA_SETS)
@pytest.mark.parametrize("rule", [*RULES, "best_of_three"])
@pytest.mark.parametrize("name", ELEMENTS)
def test_mx_reaches_the_seeded_errors_by_every_rule(name: str, rule: str, data: str) -> None:
    entry = ENTRIES[f"mx/seeded-mse/{name}"]
    scale = "search:e8m0" if rule == "best_of_three" else f"absmax:e8m0-{rule}"
    found = coder_mse(data, parse(f"{ELEMENTS[name]}@32:{scale}"))
    assert found == pytest.approx(entry["value"][rule][data], rel=entry["rel_tol"])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ELEMENTS)
def test_mx_has_the_exact_errors_on_normal_weights(name: str, rule: str) -> None:
    entry = ENTRIES[f"mx/exact-mse/{name}"]
    found = exact_mse(parse(f"{ELEMENTS[name]}@32:absmax:e8m0-{rule}"), 32)
    assert found == pytest.approx(entry["value"][rule], rel=entry["rel_tol"])


def test_larger_blocks_make_mxfp4_better() -> None:
    entry = ENTRIES["mx/exact-mse-by-block/MXFP4-floor"]
    for block, expected in entry["value"].items():
        fmt = parse(f"float4_e2m1@{block}:absmax:e8m0")
        assert exact_mse(fmt, int(block)) == pytest.approx(expected, rel=entry["rel_tol"]), block


def first_of_a_block(values: list[float], text: str) -> list[float]:
    """The decoded first elements of a block of 32 whose other elements are 0."""
    block = torch.tensor([values + [0.0] * (32 - len(values))])
    return encode_nearest(block, parse(text)).decode()[0, : len(values)].tolist()


def test_ties_and_saturation_of_mxfp4() -> None:
    given = ENTRIES["mx/edge/MXFP4-floor"]["value"]
    assert first_of_a_block(given["input"], "mxfp4") == given["output"]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("top", ENTRIES["mx/edge/MXFP4-scale-rules"]["value"])
def test_scale_rules_differ_where_they_should(top: str, rule: str) -> None:
    expected = ENTRIES["mx/edge/MXFP4-scale-rules"]["value"][top][rule]
    assert first_of_a_block([float(top), 1, 0.3, 0.1], f"float4_e2m1@32:absmax:e8m0-{rule}") == expected


def test_e4m3_rounds_to_even_and_saturates() -> None:
    given = ENTRIES["mx/edge/E4M3-rne"]["value"]
    fmt = parse("mxfp8_e4m3")
    table = element_table(fmt, 32)
    indices = nearest_indices(torch.tensor([given["input"]]), torch.ones(1), fmt, table)
    assert [table.values[index] for index in indices[0].tolist()] == given["output"]


def test_ties_of_mxint8() -> None:
    given = ENTRIES["mx/edge/MXINT8-floor"]["value"]
    assert first_of_a_block(given["input"], "mxint8") == given["output"]


def test_the_worked_example_of_nvfp4() -> None:
    given = ENTRIES["nvfp4/worked-example"]["value"]
    block = torch.tensor(given["input"])
    encoded = encode_nearest(torch.stack((block, block / 10)), parse("nvfp4"))
    constant = float(encoded.parts()["tensor_scale"])
    assert constant == pytest.approx(given["tensor_scale"], rel=1e-6)
    assert encoded.scales.float().reshape(-1).tolist() == given["block_scales"]
    elements = encoded.decode() / (encoded.scales.float() * constant)
    assert elements[0].tolist() == pytest.approx(given["elements_block1"], rel=1e-6)
    assert elements[1].tolist() == pytest.approx(given["elements_block2"], rel=1e-6)


def snr(text: str, block: int) -> float:
    return -10 * math.log10(exact_mse(parse(text), block))


BFP = {"bfp": "int{p}-mx@{block}:absmax:e8m0-rceil", "sbfp": "int{p}-mx@{block}:absmax:fp32"}


@pytest.mark.parametrize("kind", BFP)
@pytest.mark.parametrize("p", [3, 4, 6, 8])
def test_block_floating_point_has_the_exact_signal_to_noise_ratios(kind: str, p: int) -> None:
    entry = ENTRIES[f"bfp/snr-db/{kind}/p={p}"]
    for block, expected in entry["value"].items():
        found = snr(BFP[kind].format(p=p, block=block), int(block))
        assert found == pytest.approx(expected, abs=entry["abs_tol"]), block


@pytest.mark.parametrize("case", ENTRIES["bfp/best-block"]["value"])
def test_the_best_block_size_weighs_error_against_bits(case: str) -> None:
    kind, _, size = case.partition(",s=")
    for p, expected in ENTRIES["bfp/best-block"]["value"][case].items():
        merits = {
            block: snr(BFP[kind].format(p=p, block=block), block) - 20 * math.log10(2) * (int(p) + int(size) / block)
            for block in BFP_BLOCKS
        }
        assert max(merits, key=lambda block: merits[block]) == expected, p


BITS = {
    "MXFP4": "mxfp4",
    "MXFP6": "mxfp6_e2m3",
    "MXFP8": "mxfp8_e4m3",
    "MXINT8": "mxint8",
    "NVFP4": "nvfp4",
    "NF4-64-fp32-scale": "nf4@64:fp32",
    "BOF4-S-64-bf16-scale": "bof4-s@64:signmax:bf16",
    "NF4-64-double-quant": "nf4@64:dq8",
}
OF_THE_TENSOR = ("tensor_scale", "scale_offset", "codebook")
SIZES: dict[str, int] = {"U8": 8, "F8_E4M3": 8, "BF16": 16, "F32": 32}


@pytest.mark.parametrize("name", BITS)
def test_bits_per_value_are_the_published_ones(name: str) -> None:
    parts: dict[str, Any] = dict(stored_parts(parse(BITS[name]), (4096, 4096)))
    bits = sum(SIZES[kind] * math.prod(size) for part, (kind, size) in parts.items() if part not in OF_THE_TENSOR)
    assert bits / 4096**2 == ENTRIES["bits-per-value"]["value"][name]


TENSORCAST = {
    "mxfp8e5": ("float8_e5m2@32:absmax:e8m0-floor", "float8_e5m2@32:absmax:e8m0-midmax"),
    "mxfp6e3": ("float6_e3m2@32:absmax:e8m0-floor", "float6_e3m2@32:absmax:e8m0-midmax"),
    "mxfp5e2": ("float5_e2m2@32:absmax:e8m0-floor", "float5_e2m2@32:absmax:e8m0-midmax"),
    "mxfp4e2": ("float4_e2m1@32:absmax:e8m0-floor", "float4_e2m1@32:absmax:e8m0-midmax"),
    "mxint8": ("int8-mx@32:absmax:e8m0-floor",) * 2,  # the library ignores midmax for integers
    "mxint4": ("int4-mx@32:absmax:e8m0-floor",) * 2,
    "bfp16": ("int8-mx@8:absmax:e8m0-floor",) * 2,
    "int4_b32": ("int4-asym@32:absmax:bf16",) * 2,
    "bfloat16": ("float16_e8m7@tensor:absmax:e8m0-floor",) * 2,
}


@pytest.mark.parametrize("name", TENSORCAST)
def test_types_of_tensorcast_reach_its_seeded_errors(name: str) -> None:
    entry = ENTRIES["tensorcast/seeded-mse"]
    for text, mode in zip(TENSORCAST[name], ("max", "midmax"), strict=True):
        found = coder_mse("torch0", parse(text))
        assert found == pytest.approx(entry["value"][name][mode], rel=entry["rel_tol"]), mode
