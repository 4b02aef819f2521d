"""The published codebooks NF4, SF4, AF4, BOF4 and the power grids: their values, and their exact errors on N(0, 1).

Tables are compared with values computed elsewhere; errors are computed from our tables by an exact oracle.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from core.formats.block_lloyd import lloyd_max
from core.formats.block_optimal import absmax_float, block_optimal
from core.formats.limits import entropy_coded_uniform_limit, r_of_table, shannon
from core.formats.power import power_edges, power_levels
from core.formats.quantile import normal_float, student_float
from tests.golden.gaussian_block_error import (
    block_error,
    distribution,
    index_probabilities,
    maxima,
    midpoints,
    quantile_of_maximum,
    residuals,
)

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "formats.json").read_text())["entries"]
E2M1 = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def named(prefix: str) -> list[str]:
    return [name for name in GOLDEN if name.startswith(prefix)]


def code(name: str, block: int) -> tuple[float, ...]:
    """The code of that name in the literature, for that block size."""
    if name == "NF4":
        return normal_float(16)
    if name == "SF4":
        return student_float(16, 5)
    if name == "INT4":
        return tuple(k / 7 for k in range(-7, 8))
    if name == "FP4":
        return (*(-one / 6 for one in reversed(E2M1)), 0.0, *(one / 6 for one in E2M1))
    if name.startswith("AF4"):
        return absmax_float(16, block, "l1" if name == "AF4star" else "published")
    return block_optimal(16, block, signed="-S" in name, metric="mae" if "MAE" in name else "mse")


def entropy(probabilities: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    return float(stats.entropy(probabilities, base=2))


def test_nf4_is_the_released_table_bit_for_bit() -> None:
    given = GOLDEN["codebook/NF4"]["value"]
    assert list(normal_float(16)) == given
    assert [float(np.float32(value)) for value in normal_float(16)] == given


def test_regenerating_nf4_by_its_rule_misses_the_constants() -> None:
    def side(points: int) -> list[float]:
        return [float(one) for one in stats.norm.ppf(np.linspace(0.9677083, 0.5, points))[:-1]]

    values = np.sort([*side(9), 0.0, *(-one for one in side(8))])
    entry = GOLDEN["codebook/NF4-regenerated-maxdiff"]
    difference = np.abs(values / values.max() - normal_float(16)).max()
    assert difference == pytest.approx(entry["value"], abs=entry["abs_tol"])


@pytest.mark.parametrize("name", named("codebook/SF4"))
def test_sf4_is_the_same_construction_with_student_quantiles(name: str) -> None:
    entry = GOLDEN[name]
    assert student_float(16, float(name.partition("-nu")[2])) == pytest.approx(entry["value"], abs=entry["abs_tol"])


SOLVED = [name for name in named("codebook/") if "/I=" in name and not name.startswith("codebook/BOF4-M")]
SOLVED += [f"codebook/BOF4-{metric}/I={block}" for metric in ("MSE", "MAE") for block in (64, 128)]


@pytest.mark.parametrize("name", [name for name in SOLVED if "BOF4" not in name or "published" not in name])
def test_block_codes_are_the_roots_computed_elsewhere(name: str) -> None:
    _, kind, size = name.split("/")
    assert code(kind, int(size[2:])) == pytest.approx(GOLDEN[name]["value"], abs=GOLDEN[name]["abs_tol"])


def test_the_tables_printed_for_bof4_differ_from_the_exact_ones_as_known() -> None:
    known = GOLDEN["codebook/published-vs-exact-maxdiff"]
    assert len(known["value"]) == len([name for name in named("codebook/BOF4") if "published" in name])
    for label, difference in known["value"].items():
        kind, block = label.split("/")
        printed = GOLDEN[f"codebook/{kind}-published/I={block}"]["value"]
        ours = np.asarray(code(kind.removesuffix("-theoretical"), int(block)))
        assert np.abs(ours - printed).max() == pytest.approx(difference, rel=known["rel_tol"]), label


def test_the_distribution_of_the_oracle_is_normalised() -> None:
    assert maxima(64)[1].sum() == pytest.approx(GOLDEN["block/normalisation/I=64"]["value"], abs=1e-12)
    below_one = float(distribution(np.asarray([1 - 1e-16]), 64)[0])
    assert below_one == pytest.approx(GOLDEN["block/cdf-below-one/I=64"]["value"], abs=1e-12)
    entry = GOLDEN["block/quantile-of-max/q=0.95"]
    for block, quantile in entry["value"].items():
        assert quantile_of_maximum(int(block), 0.95) == pytest.approx(quantile, abs=entry["abs_tol"])


@pytest.mark.parametrize("kind", ["NF4", "AF4-published"])
def test_indices_are_used_as_often_as_computed_elsewhere(kind: str) -> None:
    entry = GOLDEN[f"block/index-entropy-bits/{kind}"]
    for block, bits in entry["value"].items():
        probabilities = index_probabilities(code(kind, int(block)), int(block))
        assert entropy(probabilities) == pytest.approx(bits, abs=entry["abs_tol"])
    each = GOLDEN["block/index-probabilities/NF4/I=64"]
    assert index_probabilities(normal_float(16), 64) == pytest.approx(each["value"], abs=each["abs_tol"])


def test_published_af4_misses_the_median_conditions_next_to_zero_only() -> None:
    entry = GOLDEN["af4/published-median-residual/I=64"]
    given, tolerance = entry["value"], entry["abs_tol"]
    missed = residuals(GOLDEN["codebook/AF4-published/I=64"]["value"], 64, 0, "mae") * 63 / 64
    assert missed[6] == pytest.approx(given["index6"], abs=tolerance)
    assert missed[7] == pytest.approx(given["index7_fixed"], abs=tolerance)
    assert missed[8] == pytest.approx(given["index8"], abs=tolerance)
    free = np.abs(np.delete(missed, [0, 6, 7, 8, 15]))
    assert free.max() < given["max_of_other_free_levels"] + tolerance


ERRORS = {"mae": (1, False), "mse": (2, False), "normalised-mae": (1, True), "normalised-mse": (2, True)}
EXACT = [name for key in ERRORS for name in named(f"exact/{key}/")]


@pytest.mark.parametrize("name", EXACT)
def test_errors_of_block_codes_are_exact(name: str) -> None:
    _, metric, kind = name.split("/")
    power, normalised = ERRORS[metric]
    entry = GOLDEN[name]
    for block, expected in entry["value"].items():
        found = block_error(code(kind, int(block)), int(block), power, normalised=normalised)
        assert found == pytest.approx(expected, abs=entry["abs_tol"]), block


def test_ratios_of_errors_to_those_of_nf4() -> None:
    entry = GOLDEN["exact/ratio-to-NF4/I=64"]
    for metric, ratios in entry["value"].items():
        power = ERRORS[metric][0]
        reference = block_error(normal_float(16), 64, power)
        for kind, ratio in ratios.items():
            assert block_error(code(kind, 64), 64, power) / reference == pytest.approx(ratio, abs=entry["abs_tol"])


def test_the_lloyd_max_quantiser_of_sixteen_levels() -> None:
    entry = GOLDEN["reference/lloyd-max-16"]
    given, tolerance = entry["value"], entry["abs_tol"]
    values = lloyd_max("normal", None, 16)
    assert r_of_table("normal", None, values) ** 2 == pytest.approx(given["mse"], abs=tolerance)
    assert values[8:] == pytest.approx(given["positive_levels"], abs=tolerance)
    shares = np.diff(np.concatenate(([0.0], stats.norm.cdf(midpoints(values)), [1.0])))
    assert entropy(shares) == pytest.approx(given["index_entropy_bits"], abs=tolerance)


def test_the_limits_of_squared_error_for_a_normal_source() -> None:
    entry = GOLDEN["reference/rate-distortion"]
    given, tolerance = entry["value"], entry["rel_tol"]
    lower = shannon("normal", None)
    assert (lower * 2**-4) ** 2 == pytest.approx(given["4bit"], rel=tolerance)
    assert (lower * 2**-4.25) ** 2 == pytest.approx(given["4.25bit"], rel=tolerance)
    coded = entropy_coded_uniform_limit("normal", None) * 2**-4
    assert coded**2 == pytest.approx(given["ecsq_high_rate_4bit"], rel=tolerance)


def power_error(alpha: float, block: int, bits: int, *, nearest: bool) -> float:
    codes = 2**bits
    return block_error(power_levels(codes, alpha), block, 2, edges=None if nearest else power_edges(codes, alpha))


def assert_best_exponent(alpha: float, expected: float, tolerance: float, block: int, bits: int, nearest: bool) -> None:
    """The error is locally convex in the exponent: a best one lies where neighbours on both sides are worse."""
    least = power_error(alpha, block, bits, nearest=nearest)
    assert least == pytest.approx(expected, rel=1e-6)
    for neighbour in (alpha - tolerance, alpha + tolerance):
        assert power_error(neighbour, block, bits, nearest=nearest) > least


def size_of(label: str) -> tuple[int, int]:
    block, bits = label.split(",")
    return int(block[2:]), int(bits[2:])


@pytest.mark.parametrize("name", named("power/exact/"))
def test_power_grids_rounded_in_the_power_domain(name: str) -> None:
    entry = GOLDEN[name]
    given, (block, bits) = entry["value"], size_of(name.removeprefix("power/exact/"))
    assert_best_exponent(given["a_star"], given["mse"], entry["a_star_abs_tol"], block, bits, nearest=False)
    for key, alpha in [("mse_a1", 1.0), ("mse_a05", 0.5)]:
        found = power_error(alpha, block, bits, nearest=False)
        assert found == pytest.approx(given[key], rel=entry["rel_tol"])


@pytest.mark.parametrize("label", GOLDEN["power/exact-nearest-level"]["value"])
def test_power_grids_with_the_nearest_level(label: str) -> None:
    given, (block, bits) = GOLDEN["power/exact-nearest-level"]["value"][label], size_of(label)
    assert_best_exponent(given["a_star"], given["mse"], 5e-4, block, bits, nearest=True)


def test_every_entry_about_codebooks_is_looked_at() -> None:
    seen = {"codebook/NF4", "codebook/NF4-regenerated-maxdiff", "codebook/published-vs-exact-maxdiff"}
    seen |= {*named("codebook/SF4"), *SOLVED, *named("codebook/BOF4-"), *named("block/"), *named("af4/")}
    seen |= {*EXACT, "exact/ratio-to-NF4/I=64", *named("reference/"), *named("power/exact")}
    groups = ("codebook/", "block/", "af4/", "exact/", "reference/", "power/exact")
    assert seen == {name for group in groups for name in named(group)}
