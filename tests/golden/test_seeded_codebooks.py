"""Published errors of absmax codebooks on seeded data, reached by the real coder: with fp32, bf16 and doubly quantised
scales, and with searched ones.
"""

from __future__ import annotations

import pytest
import torch

from core.formats.elements import codebook_table
from core.recipe.tensor_format import parse
from core.tensors.indices import nearest_indices
from core.tensors.scales import extreme_of
from tests.golden.seeded_data import DATA_SETS, ENTRIES, coder_mse, seeded

CODES = {
    "NF4": "nf4",
    "AF4-published": "af4",
    "AF4star": "af4-l1",
    "SF4": "sf4",
    "BOF4-MSE": "bof4",
    "BOF4-MAE": "bof4-mae",
    "BOF4-S-MSE": "bof4-s",
    "BOF4-S-MAE": "bof4-s-mae",
    "INT4": "power1_4",  # k / 7, so that the scale is the rounded maximum itself
}
BLOCKS = ("64", "128", "1024")
DOUBLE = ENTRIES["seeded/mse/NF4-double-quant"]
PRINTED = ENTRIES["seeded/mse/published-tables/I=64"]


@pytest.mark.parametrize("data", DATA_SETS)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("name", [name for name in CODES if name != "INT4"])
def test_codebooks_reach_their_published_errors(name: str, block: str, data: str) -> None:
    entry = ENTRIES[f"seeded/mse/{name}"]
    found = coder_mse(data, parse(f"{CODES[name]}@{block}:fp32"))
    assert found == pytest.approx(entry["value"][block][data], rel=entry["rel_tol"])


@pytest.mark.parametrize("data", DATA_SETS)
@pytest.mark.parametrize("block", BLOCKS)
def test_scales_of_bf16_are_rounded_before_weights_are_divided_by_them(block: str, data: str) -> None:
    entry = ENTRIES["seeded/mse/NF4-bf16-scale"]
    assert coder_mse(data, parse(f"nf4@{block}")) == pytest.approx(entry["value"][block][data], rel=entry["rel_tol"])


@pytest.mark.parametrize("data", DATA_SETS)
@pytest.mark.parametrize("name", ENTRIES["seeded/mse/scale-search/I=64"]["value"])
def test_a_searched_scale_reaches_the_published_gain(name: str, data: str) -> None:
    entry = ENTRIES["seeded/mse/scale-search/I=64"]
    expected = entry["value"][name][data]
    statistic = "signmax" if name.startswith("BOF4-S") else "absmax"
    search = "signmax-search" if name.startswith("BOF4-S") else "search"
    for named, key in [(statistic, "absmax"), (search, "search")]:
        found = coder_mse(data, parse(f"{CODES[name]}@64:{named}:bf16"))
        assert found == pytest.approx(expected[key], rel=entry["rel_tol"]), key


@pytest.mark.parametrize("block", BLOCKS)
def test_double_quantisation_reaches_the_published_error(block: str) -> None:
    """Codes are chosen by the fp32 maximum and decoded with the doubly quantised one, as its authors do."""
    found = coder_mse("torch0", parse(f"nf4@{block}:absmax:dq8"))
    assert found == pytest.approx(DOUBLE["value"][block], rel=DOUBLE["rel_tol"])


@pytest.mark.parametrize("data", DATA_SETS)
@pytest.mark.parametrize("name", PRINTED["value"])
def test_the_printed_tables_of_bof4_reach_their_errors(name: str, data: str) -> None:
    """Tables designed by sampling, which we read and never write: nearest indices of a given codebook."""
    fmt = parse(f"{CODES[name]}@64:fp32")
    table = codebook_table(tuple(ENTRIES[f"codebook/{name}-published/I=64"]["value"]))
    blocks = seeded(data).view(-1, 64)
    scales = extreme_of(blocks, fmt.base_statistic)
    values = torch.tensor(table.values, dtype=torch.float64)
    decoded = values[nearest_indices(blocks, scales, fmt, table).long()] * scales.double()[:, None]
    found = float((decoded - blocks).square().mean())
    assert found == pytest.approx(PRINTED["value"][name][data], rel=PRINTED["rel_tol"])
