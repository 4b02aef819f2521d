"""Numbers of the relatives of data-aware rounding: rotated grids, allocation by linearity, BAQ, SqueezeLLM's outliers.

Source: data_aware.json (data-aware rounding, section 9).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import special

from core.allocation.baq import rates
from core.allocation.budget import Option, choose
from core.formats.block_lloyd import lloyd_max
from core.recipe.tensor_format import parse
from core.tensors.nearest import encode_nearest
from core.tensors.outliers import select_by_iqr

GOLDEN: dict[str, Any] = json.loads(Path(__file__).with_name("data_aware.json").read_text())
HIGGS, BAQ, IQR = GOLDEN["higgs"], GOLDEN["baq"], GOLDEN["squeezellm_iqr"]
GRIDS = [row for row in HIGGS["lloyd_max"]["rows"] if row["n"] <= 64]
SOURCES = [row["source"] for row in HIGGS["rotation_test"]["rows"]]


def normal_error(values: tuple[float, ...]) -> float:
    """E (x - Q(x))^2 of a standard Normal x at its nearest value, in closed form."""
    codes = np.array(values)
    edges = np.concatenate(([-np.inf], (codes[1:] + codes[:-1]) / 2, [np.inf]))
    density, below = np.exp(-(edges**2) / 2) / math.sqrt(2 * math.pi), special.ndtr(edges)
    bounded = np.where(np.isfinite(edges), edges, 0.0)
    mass, first = np.diff(below), -np.diff(density)
    return float((mass - np.diff(bounded * density) - 2 * codes * first + codes**2 * mass).sum())


@pytest.mark.parametrize("row", GRIDS, ids=[str(row["n"]) for row in GRIDS])
def test_optimal_grids_of_one_dimension(row: dict[str, Any]) -> None:
    found = lloyd_max("normal", None, row["n"])
    assert normal_error(found) == pytest.approx(row["t2"], rel=GOLDEN["tolerances"]["lloyd_max_rel"])
    positive = [value for value in found if value > 1e-9]
    if "positive_levels" in row:
        assert positive == pytest.approx(row["positive_levels"], abs=2e-6)


def rotation_sources() -> dict[str, torch.Tensor]:
    """The matrices of the recipe, in its order of draws."""
    chance = np.random.default_rng(42)
    shape = (256, 1024)
    made = [chance.standard_normal(shape), chance.standard_t(4, shape), chance.laplace(size=shape)]
    normal = chance.standard_normal(shape)
    made.append(normal * np.where(chance.random(shape) < 0.002, 30.0, 1.0))
    return {name: torch.from_numpy(one) for name, one in zip(SOURCES, made, strict=True)}


@pytest.mark.parametrize("source", SOURCES)
def test_a_rotation_gives_every_source_the_error_of_the_grid(source: str) -> None:
    row = next(one for one in HIGGS["rotation_test"]["rows"] if one["source"] == source)
    weight = rotation_sources()[source].float()
    signs = torch.from_numpy(np.random.default_rng(43).choice([-1, 1], 1024)).float()
    for turned, option, expected in ((weight, "", row["t2_plain"]), (weight * signs, "+hadamard", row["t2_rotated"])):
        decoded = encode_nearest(turned, parse(f"normal4-opt@channel:rms:fp32{option}")).decode()
        t2 = float((decoded - turned).square().sum() / turned.square().sum())
        assert t2 == pytest.approx(expected, rel=HIGGS["rotation_test"]["tolerance_rel"])


def test_the_knapsack_of_the_linearity_theorem() -> None:
    golden = HIGGS["knapsack"]
    groups = {
        str(at): [Option(d * bits, a * t2, str(bits)) for bits, t2 in golden["options"]]
        for at, (a, d) in enumerate(zip(golden["a"], golden["d"], strict=True))
    }
    found = choose(groups, golden["budget_bits"])
    assert [int(found[str(at)].label) for at in range(len(groups))] == golden["best_bits"]
    assert sum(one.loss for one in found.values()) == pytest.approx(golden["best_objective"], rel=1e-7)
    at_three_bits = sum(row[1].loss for row in groups.values())
    assert at_three_bits == pytest.approx(golden["uniform_3bit_objective"], rel=1e-6)


def test_the_closed_form_of_baq() -> None:
    losses, tolerance = BAQ["c"], BAQ["tolerance"]
    found = rates(losses, [1] * len(losses), BAQ["R_mean"])
    assert found == pytest.approx(BAQ["R"], abs=tolerance)
    left = [loss * 4**-bits for loss, bits in zip(losses, found, strict=True)]
    assert left == pytest.approx([BAQ["equal_loss"]] * len(left), abs=tolerance)
    even = [loss * 4.0 ** -BAQ["R_mean"] for loss in losses]
    assert sum(left) / sum(even) == pytest.approx(BAQ["gain_GM_over_AM"], abs=tolerance)


@pytest.mark.parametrize("row", IQR["rows"], ids=[str(row["r"]) for row in IQR["rows"]])
def test_outliers_by_quartiles_of_normal_weights(row: dict[str, Any]) -> None:
    """On evenly spaced quantiles: the share of outliers, and the threshold between the last two that differ."""
    count = 1 << 20
    values = special.ndtri((np.arange(count) + 0.5) / count)
    found = select_by_iqr(torch.from_numpy(values).float(), row["r"])
    assert len(found) / count == pytest.approx(row["fraction"], abs=2e-6)
    outside = torch.zeros(count, dtype=torch.bool).index_fill_(0, found, 1).numpy()
    assert np.abs(values[~outside]).max() <= row["threshold"] + 1e-4
    assert np.abs(values[outside]).min() >= row["threshold"] - 1e-4
