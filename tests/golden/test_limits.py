"""Lloyd–Max codebooks, entropy-coded grids and the limits of scalar coding against values computed elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.formats import root_density
from core.formats.block_lloyd import block_lloyd_max, lloyd_max
from core.formats.limits import (
    entropy_coded_grid,
    entropy_coded_uniform_limit,
    huffman_overhead,
    panter_dite,
    r_of_blocks,
    r_of_table,
    shannon,
)
from core.formats.quantile import normal_float, student_float
from tests.golden import exact_error
from tests.golden.exact_error import Source

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "optimal_formats.json").read_text())
Entry = dict[str, Any]


def family_of(name: str) -> tuple[str, float | None]:
    return ("t", float(name[1:])) if name.startswith("t") else (name, None)


def label(entry: Entry) -> str:
    return "-".join(str(entry[key]) for key in ("family", "statistic", "B", "b", "H", "n") if key in entry)


def test_the_public_tables_follow_from_their_rules() -> None:
    given = GOLDEN["public_tables"]
    assert normal_float(16) == pytest.approx(given["NF4"], abs=1e-6)
    assert student_float(16, 5) == pytest.approx(given["SF4"], abs=6e-4)
    assert student_float(16, 5) == pytest.approx(given["SF4_published_3_decimals"], abs=6e-4)


@pytest.mark.parametrize("entry", GOLDEN["constants"]["entries"], ids=label)
def test_the_limits_of_scalar_coding(entry: Entry) -> None:
    source = family_of(entry["family"])
    assert panter_dite(*source) == pytest.approx(entry["panter_dite"], rel=1e-7)
    assert entropy_coded_uniform_limit(*source) == pytest.approx(entry["ecuq"], rel=1e-7)
    assert shannon(*source) == pytest.approx(entry["shannon_lower_bound"], rel=1e-7)
    gap = np.log2(panter_dite(*source) / entropy_coded_uniform_limit(*source))
    assert gap == pytest.approx(entry["gap_bits"], rel=1e-7)


@pytest.mark.parametrize("entry", GOLDEN["lloyd_max"]["entries"], ids=label)
def test_lloyd_max_per_tensor(entry: Entry) -> None:
    values = lloyd_max(*family_of(entry["family"]), 2 ** entry["b"])
    assert values[len(values) // 2 :] == pytest.approx(entry["positive_half"], abs=2e-6)
    assert exact_error.r_of_table(Source(entry["family"]), values) == pytest.approx(entry["R"], rel=1e-6)
    assert r_of_table(*family_of(entry["family"]), values) == pytest.approx(entry["R"], rel=1e-6)


@pytest.mark.parametrize("entry", GOLDEN["block_lloyd_max"]["entries"], ids=label)
def test_lloyd_max_per_block(entry: Entry) -> None:
    source, block = family_of(entry["family"]), entry["B"]
    values = block_lloyd_max(*source, entry["statistic"], 2 ** entry["b"], block)
    assert values == pytest.approx(entry["values"], abs=2e-5)
    assert exact_error.r_of_blocks(Source(entry["family"]), values, block) == pytest.approx(entry["R"], rel=1e-6)
    assert r_of_blocks(*source, values, block) == pytest.approx(entry["R"], rel=1e-6)
    mode = "sym" if entry["statistic"] == "absmax" else ""
    cube_root = root_density.codebook(*source, entry["statistic"], mode, 2 ** entry["b"], block)
    assert r_of_blocks(*source, cube_root, block) == pytest.approx(entry["R_crd"], rel=1e-6)


@pytest.mark.parametrize("entry", GOLDEN["four_bits_total"]["entries"], ids=label)
def test_error_at_four_bits_in_all(entry: Entry) -> None:
    source = family_of(entry["family"])
    values = root_density.codebook(*source, "absmax", "sym", entry["n"], entry["B"])
    assert r_of_blocks(*source, values, entry["B"]) == pytest.approx(entry["R"], rel=1e-6)


@pytest.mark.parametrize("family", ["normal", "laplace", "t5"])
def test_blocks_of_128_are_the_best_power_of_two_at_four_bits_in_all(family: str) -> None:
    found = {}
    for block in (2**k for k in range(4, 13)):
        codes = round(2 ** (4 - 16 / block))
        values = root_density.codebook(*family_of(family), "absmax", "sym", codes, block)
        found[block] = r_of_blocks(*family_of(family), values, block)
    assert min(found, key=lambda block: found[block]) == 128


@pytest.mark.parametrize("entry", GOLDEN["entropy_coded_uniform"]["entries"], ids=label)
def test_entropy_coded_grids(entry: Entry) -> None:
    grid = entropy_coded_grid(*family_of(entry["family"]), float(entry["H"]))
    assert grid.delta == pytest.approx(entry["delta_over_sigma"], rel=1e-6)
    assert grid.r == pytest.approx(entry["R"], rel=1e-6)
    assert grid.r * 2 ** entry["H"] == pytest.approx(entry["R_times_2powH"], rel=1e-6)
    assert grid.r_centroid == pytest.approx(entry["R_centroid"], rel=1e-6)


@pytest.mark.parametrize("entry", GOLDEN["huffman_overhead"]["entries"], ids=label)
def test_what_huffman_codes_cost_over_the_entropy(entry: Entry) -> None:
    grid = entropy_coded_grid(*family_of(entry["family"]), float(entry["H"]))
    assert huffman_overhead(grid.probabilities) == pytest.approx(entry["huffman_overhead_bits"], abs=0.002)


def block_error(kind: str, family: str, bits: int, block: int) -> float:
    statistic, mode = {"signmax": ("signmax", ""), "sym": ("absmax", "sym"), "asym": ("absmax", "asym")}.get(
        kind, ("", "")
    )
    if statistic:
        values = root_density.codebook(*family_of(family), statistic, mode, 2**bits, block)
    else:
        values = normal_float(16) if kind == "NF4" else student_float(16, 5)
    return r_of_blocks(*family_of(family), values, block)


@pytest.mark.parametrize("family", ["normal", "t5"])
@pytest.mark.parametrize("block", [64, 128])
def test_signmax_then_symmetric_then_asymmetric_at_three_bits(family: str, block: int) -> None:
    signed, symmetric, with_zero = (block_error(kind, family, 3, block) for kind in ("signmax", "sym", "asym"))
    assert signed < symmetric < with_zero


@pytest.mark.parametrize("family", ["normal", "t5"])
def test_cube_root_codebooks_then_nf4_then_sf4_in_blocks_of_64(family: str) -> None:
    assert block_error("sym", family, 4, 64) < block_error("NF4", family, 4, 64) < block_error("SF4", family, 4, 64)


@pytest.mark.parametrize("block", [128, 1024])
def test_sf4_overtakes_nf4_for_heavy_tails_in_large_blocks(block: int) -> None:
    assert block_error("SF4", "t5", 4, block) < block_error("NF4", "t5", 4, block)


@pytest.mark.parametrize("family", ["normal", "laplace", "t5", "t7", "t2.5", "t40"])
def test_entropy_coding_is_below_fixed_length_and_above_shannon(family: str) -> None:
    source = family_of(family)
    assert shannon(*source) < entropy_coded_uniform_limit(*source) < panter_dite(*source)
    for bits in (0.5, 2.0, 3.7, 6.0):
        grid = entropy_coded_grid(*source, bits)
        assert grid.r_centroid < grid.r
        assert shannon(*source) < grid.r_centroid * 2**bits


@pytest.mark.parametrize("family", ["normal", "laplace", "t5", "t7"])
def test_the_cube_root_is_the_best_exponent_of_density(family: str) -> None:
    alphas = GOLDEN["alpha_sweep_rms_b4"]["alphas"]
    found = [
        r_of_table(*family_of(family), root_density.codebook(*family_of(family), "rms", "sym", 16, None, alpha))
        for alpha in alphas
    ]
    assert alphas[int(np.argmin(found))] == pytest.approx(1 / 3)


@pytest.mark.parametrize("family", ["normal", "laplace", "t3", "t5", "t40"])
@pytest.mark.parametrize("block", [2, 7, 64, 4096])
def test_errors_agree_with_an_oracle_for_any_table_and_block(family: str, block: int) -> None:
    values = (-1.0, -0.61, -0.2, 0.0, 0.11, 0.35, 0.7, 1.0)
    oracle = exact_error.r_of_blocks(Source(family), values, block, points=20001)
    assert r_of_blocks(*family_of(family), values, block) == pytest.approx(oracle, rel=2e-6)
    assert r_of_table(*family_of(family), values) == pytest.approx(
        exact_error.r_of_table(Source(family), values), rel=1e-9
    )


@pytest.mark.parametrize("family", ["normal", "laplace", "t2.5", "t5"])
@pytest.mark.parametrize("bits", [0.1, 1.0, 3.3, 5.0])
def test_the_entropy_of_a_grid_is_what_was_asked_for(family: str, bits: float) -> None:
    grid = entropy_coded_grid(*family_of(family), bits)
    probabilities = np.asarray(grid.probabilities)
    assert len(probabilities) == 1 - 2 * grid.lowest
    beyond = max(1 - probabilities.sum(), 0.0)
    used = probabilities[probabilities > 0]
    listed = float(-(used * np.log2(used)).sum())
    assert listed <= bits + 1e-9
    # Cells beyond the listed ones: no more than their mass times the bits of the last listed cell and of its tail.
    assert bits - listed < 1e-9 + beyond * (-np.log2(used.min()) + 3)


def test_huffman_codes_of_dyadic_probabilities_cost_nothing() -> None:
    assert huffman_overhead([0.5, 0.25, 0.125, 0.125]) == pytest.approx(0, abs=1e-15)
    assert huffman_overhead([0.9, 0.1, 0.0]) == pytest.approx(1 + 0.9 * np.log2(0.9) + 0.1 * np.log2(0.1))
    assert huffman_overhead([1.0]) == 0
