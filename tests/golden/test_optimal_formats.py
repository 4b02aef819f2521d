"""The published constants and errors of cube-root-density, integer, float and NF4 formats.

Tables are compared with values computed elsewhere; errors are computed from our tables by an exact oracle, and for a
few formats also by encoding data with the real coder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core.formats import floating, root_density
from core.formats.elements import ElementTable, element_table
from core.formats.quantile import normal_float
from core.formats.stored import stored_parts
from core.recipe.tensor_format import TensorFormat, parse
from core.tensors.encoded import EncodedTensor
from core.tensors.errors import relative_rms_error
from core.tensors.nearest import encode_nearest
from core.tensors.scale_formats import decoded_scales, stored_scales
from tests.golden.exact_error import Source, expected_absmax, r_of_blocks, r_of_table

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "optimal_formats.json").read_text())
Entry = dict[str, Any]


def nu_of(family: str) -> float | None:
    return float(family[1:]) if family.startswith("t") else None


def our_codebook(entry: Entry, alpha: float | None = None) -> tuple[float, ...]:
    nu = nu_of(entry["family"])
    mode = "" if entry["statistic"] == "signmax" else entry["mode"]
    return root_density.codebook(
        "t" if nu else entry["family"],
        nu,
        entry["statistic"],
        mode,
        entry["n"],
        entry["block_size"],
        *([] if alpha is None else [alpha]),
    )


@pytest.mark.parametrize("entry", GOLDEN["codebooks"]["entries"], ids=lambda entry: entry["id"])
def test_codebooks_are_those_of_the_literature(entry: Entry) -> None:
    _, _, exponent = entry["id"].partition("alpha")
    values = our_codebook(entry, float(exponent) if exponent else None)
    assert len(values) == entry["n"]
    for ours, theirs in zip(values, entry["values"], strict=True):
        assert ours == pytest.approx(theirs, abs=2e-9 * max(1, abs(theirs)))
    if entry["format"]:
        fmt = parse(entry["format"])
        assert element_table(fmt, entry["block_size"] or 1).values == values


def test_nf4_is_the_published_table() -> None:
    assert normal_float(16) == pytest.approx(GOLDEN["public_tables"]["NF4"], abs=1e-6)


def test_elements_are_those_of_their_definitions() -> None:
    given = GOLDEN["element_formats"]
    for name, text in [("int4_asym", "int4-asym@8"), ("int4_sym", "int4-sym@8"), ("int3_sym", "int3-sym@8")]:
        assert list(element_table(parse(text), 8).values) == given[name]
    for name, (exponent, mantissa, mode) in {
        "ocp_e2m1": (2, 1, ""),
        "no_specials_e2m1": (2, 1, "ns"),
        "no_specials_e3m0": (3, 0, "ns"),
    }.items():
        assert list(floating.magnitudes(exponent, mantissa, mode)) == given[name]
    for name, (exponent, mantissa) in {"e2m2": (2, 2), "e3m1": (3, 1), "e4m3": (4, 3)}.items():
        assert floating.magnitudes(exponent, mantissa, "ns")[-1] == given[f"no_specials_{name}_max"]


@pytest.mark.parametrize("entry", GOLDEN["R_tensor_rms"]["entries"], ids=lambda one: f"{one['family']}-{one['b']}")
def test_error_per_tensor_rms_is_exact(entry: Entry) -> None:
    family, codes = entry["family"], 2 ** entry["b"]
    nu = nu_of(family)
    for key, mode, alpha in [("crd_sym", "sym", 1 / 3), ("crd_asym", "asym", 1 / 3), ("quantile_sym", "sym", 1.0)]:
        values = root_density.codebook("t" if nu else family, nu, "rms", mode, codes, None, alpha)
        assert r_of_table(Source(family), values) == pytest.approx(entry[key], rel=2e-6)


SF4_PRINTED = tuple(GOLDEN["public_tables"]["SF4_published_3_decimals"])


def block_table(key: str, family: str, block: int, bits: int) -> tuple[float, ...]:
    """The table that a golden key names, with its end code at 1."""
    nu = nu_of(family)
    element = f"t{nu:g}_{bits}" if nu else f"{family}{bits}"
    text = {
        "crd_absmax_sym": f"{element}-sym@{block}",
        "crd_absmax_asym": f"{element}-asym@{block}",
        "crd_signmax": f"{element}@{block}:signmax",
        "int_sym_absmax": f"int{bits}-sym@{block}",
        "int_asym_absmax": f"int{bits}-asym@{block}",
        "int_signmax": f"int{bits}-asym@{block}:signmax",
        "NF4_absmax": f"nf4@{block}",
    }.get(key)
    if text is None:
        exponent, mantissa = int(key[1]), int(key[3])
        text = f"float{bits}_{key[:4].lower()}-ns@{block}"
        assert 1 + exponent + mantissa == bits
    fmt = parse(text)
    table = element_table(fmt, block)
    end = table.signmax_end if fmt.statistic == "signmax" else table.absmax_end
    return tuple(sorted(value / end for value in table.values))


@pytest.mark.parametrize(
    "entry", GOLDEN["R_block"]["entries"], ids=lambda entry: f"{entry['family']}-B{entry['B']}-{entry['b']}"
)
def test_error_of_block_formats_is_exact(entry: Entry) -> None:
    family, block, bits = entry["family"], entry["B"], entry["b"]
    for key in entry.keys() - {"family", "B", "b"}:
        table = SF4_PRINTED if key == "SF4_absmax" else block_table(key, family, block, bits)
        found = r_of_blocks(Source(family), table, block)
        assert found == pytest.approx(entry[key], rel=1e-6), key


@pytest.mark.parametrize("entry", GOLDEN["four_bits_total"]["entries"], ids=lambda e: f"{e['family']}-{e['B']}")
def test_error_at_four_bits_in_all_is_exact_for_any_number_of_codes(entry: Entry) -> None:
    nu = nu_of(entry["family"])
    values = root_density.codebook("t" if nu else entry["family"], nu, "absmax", "sym", entry["n"], entry["B"])
    assert r_of_blocks(Source(entry["family"]), values, entry["B"]) == pytest.approx(entry["R"], rel=1e-6)


@pytest.mark.parametrize("entry", GOLDEN["expected_absmax"]["entries"], ids=lambda e: f"{e['family']}-{e['B']}")
def test_the_closed_form_of_the_expected_maximum(entry: Entry) -> None:
    nu = nu_of(entry["family"])
    closed = root_density.expected_absmax("t" if nu else entry["family"], nu, entry["B"])
    assert closed == pytest.approx(entry["closed_form"], rel=1e-6)
    assert expected_absmax(Source(entry["family"]), entry["B"]) == pytest.approx(entry["exact"], rel=1e-6)


def test_the_cube_root_is_the_best_exponent() -> None:
    sweep = GOLDEN["alpha_sweep_rms_b4"]
    for entry in sweep["entries"]:
        nu = nu_of(entry["family"])
        found = [
            r_of_table(
                Source(entry["family"]),
                root_density.codebook("t" if nu else entry["family"], nu, "rms", "sym", 16, None, alpha),
            )
            for alpha in sweep["alphas"]
        ]
        assert found == pytest.approx(entry["R"], rel=2e-6)
        assert min(found) == found[2]


# Relative tolerances for 2^20 samples: about three standard deviations, twice those given for 2^22.
SAMPLED = [
    ("normal", "normal4-asym@64:absmax:fp32", 0.08964062, 0.004),
    ("normal", "nf4@64:absmax:fp32", 0.09197912, 0.004),
    ("normal", "normal4-sym@tensor:rms:fp32", 0.09748703, 0.004),
    ("t5", "t5_3@64:signmax:fp32", 0.20576233, 0.006),
    ("laplace", "laplace4-asym@128:absmax:bf16", 0.10923447, 0.006),
]


@pytest.mark.parametrize(("family", "text", "expected", "tolerance"), SAMPLED)
def test_the_real_coder_reaches_the_exact_error(family: str, text: str, expected: float, tolerance: float) -> None:
    generator = np.random.default_rng(5)
    draws = {
        "normal": generator.standard_normal(1 << 20),
        "laplace": generator.laplace(scale=0.5**0.5, size=1 << 20),
        "t5": generator.standard_t(5, 1 << 20) * 0.6**0.5,
    }[family]
    weight = torch.from_numpy(draws.astype(np.float32)).view(1024, 1024)
    assert relative_rms_error(weight, encode_nearest(weight, parse(text))) == pytest.approx(expected, rel=tolerance)


def decoded(text: str, values: list[float]) -> tuple[EncodedTensor, list[float]]:
    encoded = encode_nearest(torch.tensor([values], dtype=torch.float32), parse(text))
    return encoded, encoded.decode().reshape(-1).tolist()


def test_the_worked_integer_blocks() -> None:
    absmax, signmax = GOLDEN["block_examples"]["cases"]
    encoded, values = decoded("int2-asym@3:absmax:fp32", absmax["x"])
    assert values == absmax["xq"]
    assert encoded.scales.reshape(-1).tolist() == absmax["scales"]
    encoded, values = decoded("int2-asym@2:signmax:fp32", signmax["x"])
    assert values == signmax["xq"]
    assert encoded.scales.reshape(-1).tolist() == signmax["scales"]


def test_the_worked_ragged_block() -> None:
    given = GOLDEN["ragged_block_example"]
    encoded, values = decoded("nf4@8:absmax:bf16", given["x"])
    assert encoded.scales.float().reshape(-1).tolist() == given["scales_bf16"]
    assert values == pytest.approx(given["xq"], abs=1e-7)
    codes = [code for byte in encoded.codes.tolist() for code in (byte & 15, byte >> 4)]
    assert codes == given["codes"]
    assert 8 * (encoded.codes.numel() + 2 * encoded.scales.numel()) == 80


@pytest.mark.parametrize("case", GOLDEN["scale_rounding"]["cases"], ids=lambda case: str(case["s"]))
def test_scales_round_as_defined(case: Entry) -> None:
    wanted, table = torch.tensor([case["s"]]), ElementTable((-1.0, 1.0), (False,))
    if "bf16_nearest_even" in case:
        assert float(stored_scales(parse("int4@8"), table, wanted)) == case["bf16_nearest_even"]
    if "pow2_up" in case:
        fmt = parse("int4@8:absmax:e8m0")
        assert float(decoded_scales(fmt, stored_scales(fmt, table, wanted))) == case["pow2_up"]


@pytest.mark.parametrize("case", GOLDEN["scale_rounding"]["ocp_shared_exponent"]["e2m1"], ids=lambda one: one["absmax"])
def test_mx_blocks_share_the_exponent_of_the_standard(case: Entry) -> None:
    fmt = parse("mxfp4")
    encoded = encode_nearest(torch.tensor([[case["absmax"]] + [0.0] * 31]), fmt)
    assert float(decoded_scales(fmt, encoded.scales)) == case["X"]
    if "top_element_becomes" in case:
        assert float(encoded.decode()[0, 0]) == case["top_element_becomes"]


def stored_bits(fmt: TensorFormat, shape: tuple[int, int]) -> float:
    sizes = {"U8": 8, "BF16": 16, "F32": 32}
    parts = {name: part for name, part in stored_parts(fmt, shape).items() if name != "codebook"}
    return sum(sizes[dtype] * int(np.prod(size)) for dtype, size in parts.values()) / (shape[0] * shape[1])


def test_bits_are_counted_as_stored() -> None:
    counted = {case["case"]: case["bits"] for case in GOLDEN["bit_counting"]["cases"]}
    for case, text, shape in [
        ("4-bit codes, B=64, 16-bit scale, 4096x4096", "int4@64", (4096, 4096)),
        ("4-bit codes, per row 16-bit scale, 4096x4096", "int4@channel", (4096, 4096)),
        ("4-bit codes, one 16-bit scale, 4096x4096", "int4@tensor", (4096, 4096)),
        ("4-bit codes, B=64, 16-bit scale, rows of 1000 (ragged: 16 blocks per row)", "int4@64", (1000, 1000)),
    ]:
        assert stored_bits(parse(text), shape) == pytest.approx(counted[case], abs=1e-9), case
    ideal = counted["n=13 codes at ideal packing, B=64, 16-bit scale"]
    assert ideal < stored_bits(parse("int3.7@64"), (4096, 4096)) < ideal + 0.04
