"""Allocation of formats whose codes have variable lengths: fractional rates, budgets met to a hundredth of a bit."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from core.allocation.fisher import Fisher
from core.allocation.forecast import Evidence, Forecast
from core.allocation.resolve import Resolved
from core.allocation.sizes import Sizes
from core.allocation.space import RATE_STEP, ladder, with_least
from core.allocation.uniform import uniform
from core.errors import InfeasibleTarget, InvalidRecipe
from core.recipe.target import Target
from core.recipe.tensor_format import TensorFormat, parse
from core.storage.checkpoint import CheckpointIndex
from core.storage.sources import folder_sources
from core.tensors.encoded import EncodedTensor
from core.tensors.nearest import encode_nearest
from core.tensors.reader import read_tensor
from tests.unit.allocation.conftest import fisher_on, pretended_means, space_of

GRID = "grid3@tensor"


def checkpoint(folder: Path, *shapes: tuple[int, int]) -> CheckpointIndex:
    generator = torch.Generator().manual_seed(0)
    tensors = {f"layer{at}.weight": torch.randn(shape, generator=generator) for at, shape in enumerate(shapes)}
    save_file(tensors, folder / "model.safetensors")
    return CheckpointIndex.from_files(folder_sources(folder, ()))


def encoded(index: CheckpointIndex, name: str, fmt: TensorFormat) -> EncodedTensor:
    return encode_nearest(read_tensor(index, name), fmt)


@pytest.mark.parametrize("bits", [2.2, 3.0, 3.337, 5.25])
@pytest.mark.parametrize("method", ["fisher", "uniform"])
@pytest.mark.parametrize("text", [GRID, "grid3@channel:absmax:fp16", "grid3@32:rms:e8m0+huffman"])
def test_a_budget_is_filled_to_a_hundredth_of_a_bit(
    index: CheckpointIndex, method: str, bits: float, text: str
) -> None:
    space = space_of(index, text)
    sizes = Sizes(index, space)
    budget = sizes.target_bytes(Target(bits_per_param=bits))
    if method == "fisher":
        formats = fisher_on(index, space, parse(text), pretended_means(space))(budget)
    else:
        formats = uniform(sizes, parse(text), budget)
    stored = Fraction(8 * sizes.exact(formats), index.parameters)
    assert Fraction(bits) - Fraction(1, 100) <= stored <= Fraction(bits)


@pytest.mark.parametrize("shapes", [[(256, 300)], [(64, 64), (300, 500)]], ids=["one tensor", "two tensors"])
def test_what_the_solver_leaves_over_is_spent(tmp_path: Path, shapes: list[tuple[int, int]]) -> None:
    index = checkpoint(tmp_path, *shapes)
    space = space_of(index, GRID)
    method = fisher_on(index, space, parse(GRID), pretended_means(space))
    sizes = Sizes(index, space)
    for bits in (2.5, 3.013, 4.777):
        stored = sizes.bits(sizes.exact(method(sizes.budget(bits))))
        assert bits - 0.002 <= stored <= bits


def test_the_planned_bytes_are_those_that_encoding_stores(tmp_path: Path) -> None:
    index = checkpoint(tmp_path, (100, 90), (64, 64))
    space = space_of(index, GRID)
    sizes = Sizes(index, space)
    formats = fisher_on(index, space, parse(GRID), pretended_means(space))(sizes.budget(4.1))
    for name, text in sizes.choice(formats).items():
        assert encoded(index, name, parse(text)).nbytes == sizes.tensor(name, text)


def test_rates_lie_between_the_bounds_and_bounds_are_rates(index: CheckpointIndex) -> None:
    [group, *_] = space_of(index, GRID, min_bits=2.2, max_bits=2.75).groups
    assert group.widths == (2.2, 2.5, 2.75)
    assert group.rates[0] == 2.2
    assert group.rates[-1] == 2.75
    assert max(np.diff(group.rates)) <= RATE_STEP + 1e-9
    assert parse(group.at(2.345)).bits == 2.345
    assert parse(group.at(1.0)).bits == 2.2
    assert parse(group.at(9.0)).bits == 2.75
    assert with_least(group, "grid2.6@tensor").widths == (2.6, 2.75)


def test_the_fine_ladder_of_grids_begins_above_what_their_scales_take() -> None:
    assert ladder(parse("grid3@64"))[0] == 0.35
    assert ladder(parse("grid3@64"))[-1] == 10.0
    assert len(ladder(parse("grid3@tensor"))) == 9901


def test_bounds_that_leave_no_room_for_scales_are_refused(index: CheckpointIndex) -> None:
    with pytest.raises(InvalidRecipe, match="no width"):
        space_of(index, "grid3@16:rms:fp32", max_bits=2)


def test_without_bounds_rates_are_one_to_eight_bits(index: CheckpointIndex) -> None:
    space = space_of(index, GRID)
    sizes = Sizes(index, space)
    assert {parse(text).bits for group in space.groups for text in (group.formats[0], group.formats[-1])} == {1.0, 8.0}
    with pytest.raises(InfeasibleTarget):
        sizes.target_bytes(Target(bits_per_param=0.9))


def test_losses_between_measured_rates_are_near_those_measured_there(tmp_path: Path) -> None:
    index = checkpoint(tmp_path, (128, 256))
    space = space_of(index, GRID)
    [group] = space.groups
    forecast = Forecast(index, Evidence.of({group.name: 1e-5}, lambda _name: None, space.groups))
    options = {
        parse(one.label).bits: one.loss for one in Fisher(Sizes(index, space), parse(GRID), forecast)._known[group.name]
    }
    for bits in (1.24, 2.26, 3.76, 6.24):
        assert options[bits] == pytest.approx(forecast.tensor(group.name, group.text(bits)), rel=0.03)


@pytest.mark.parametrize("text", ["t7_4@64:signmax+rans", "int4@32+opq0.9+huffman", "nf4@channel+threshold2+rans"])
def test_sizes_that_only_the_data_tell_are_found_by_encoding(tmp_path: Path, text: str) -> None:
    index = checkpoint(tmp_path, (80, 96))
    resolved = Resolved(index, "cpu", lambda: None, lambda name, fmt: encoded(index, name, fmt))
    stored = resolved("layer0.weight", text)
    found = encoded(index, "layer0.weight", parse(stored))
    assert parse(stored).coded_bytes == found.codes.numel()
    assert resolved("layer0.weight", stored) == stored
    assert parse(stored).kind == str(parse(text))


def test_uniform_takes_the_widest_coded_format_that_fits(tmp_path: Path) -> None:
    index = checkpoint(tmp_path, (128, 256))
    space, base = space_of(index, "t7_4@64:signmax+rans"), parse("t7_4@64:signmax+rans")
    sizes = Sizes(index, space, Resolved(index, "cpu", lambda: None, lambda name, fmt: encoded(index, name, fmt)))
    formats = uniform(sizes, base, sizes.budget(4.2))
    assert sizes.bits(sizes.exact(formats)) <= 4.2
    [chosen] = {parse(text).codes for text in formats.values()}
    wider = {name: str(base.with_bits(np.log2(chosen + 2))) for name in formats}
    assert sizes.bits(sizes.exact(wider)) > 4.2
