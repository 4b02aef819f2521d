"""The allocation methods on a small checkpoint: budgets in exact bytes, floors, baselines, predictions."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from core.allocation import forecast as forecast_module
from core.allocation.fisher import Fisher
from core.allocation.forecast import Evidence, Forecast, Scales, grouping_cost_bits, predicted_kl
from core.allocation.heuristic import heuristic, outer_groups
from core.allocation.sizes import Sizes
from core.allocation.space import Group, Space
from core.allocation.uniform import uniform
from core.errors import InfeasibleTarget
from core.exports.layout import layout_bytes
from core.recipe.target import Target
from core.recipe.tensor_format import parse
from core.storage.checkpoint import CheckpointIndex
from core.storage.sources import folder_sources
from core.tensors.nearest import encode_nearest
from core.tensors.reader import read_tensor
from tests.unit.allocation.conftest import fisher_on, pretended_means, space_of

BASE = parse("t7_4@32:signmax")
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def space(index: CheckpointIndex) -> Space:
    return space_of(index)


@pytest.fixture(scope="module")
def sizes(index: CheckpointIndex, space: Space) -> Sizes:
    return Sizes(index, space)


def widths(formats: dict[str, str]) -> dict[str, int]:
    return {name: parse(text).codes for name, text in formats.items()}


@pytest.mark.parametrize("bits", [3.3, 3.5, 4.0, 5.25, 7.0])
def test_the_stored_size_is_just_below_the_budget(index: CheckpointIndex, space: Space, bits: float) -> None:
    sizes = Sizes(index, space)
    budget = sizes.target_bytes(Target(bits_per_param=bits))
    formats = fisher_on(index, space, BASE, pretended_means(space))(budget)
    stored = layout_bytes(index, space.choice(formats))
    assert stored == sizes.exact(formats)
    assert Fraction(8 * stored, index.parameters) <= Fraction(bits)
    assert sizes.bits(stored) > bits - 0.05


@pytest.fixture(scope="module")
def method(index: CheckpointIndex, space: Space) -> Fisher:
    return fisher_on(index, space, BASE, pretended_means(space))


@settings(max_examples=25, deadline=None)
@given(share=st.floats(0, 1), more=st.integers(0, 20_000))
def test_no_budget_is_ever_overrun_and_more_is_never_worse(
    index: CheckpointIndex, space: Space, method: Fisher, share: float, more: int
) -> None:
    sizes = Sizes(index, space)
    budget = sizes.least + int(share * (sizes.most - sizes.least))
    small, large = method(budget), method(budget + more)
    assert sizes.exact(small) <= budget
    assert sizes.exact(large) <= budget + more
    predicted = [method.forecast.total(_encoded(space, formats)) for formats in (small, large)]
    # The header's length depends on the offsets in it by some bytes, which a solver that adds up parts cannot foresee.
    assert predicted[1] <= predicted[0] * 1.01


def _encoded(space: Space, formats: dict[str, str]) -> dict[str, str]:
    return {name: text for name, text in space.choice(formats).items() if text != "keep"}


def test_the_smallest_size_can_be_had_and_one_byte_less_cannot(index: CheckpointIndex, space: Space) -> None:
    sizes, method = Sizes(index, space), fisher_on(index, space, BASE, pretended_means(space))
    for choose in (method, lambda budget: uniform(sizes, BASE, budget), lambda budget: heuristic(sizes, BASE, budget)):
        assert sizes.exact(choose(sizes.least)) == sizes.least
        with pytest.raises(InfeasibleTarget, match=str(sizes.least)):
            choose(sizes.least - 1)


def test_a_target_that_cannot_be_met_names_the_smallest_that_can_in_its_own_unit(sizes: Sizes) -> None:
    with pytest.raises(InfeasibleTarget, match=f"^target.size_bytes: 1000 bytes cannot .* is {sizes.least} "):
        sizes.target_bytes(Target(size_bytes=1000))
    with pytest.raises(InfeasibleTarget) as refused:
        sizes.target_bytes(Target(bits_per_param=1.5))
    named = float(refused.value.detail.split()[-1])
    assert sizes.target_bytes(Target(bits_per_param=named)) >= sizes.least
    with pytest.raises(InfeasibleTarget):
        sizes.target_bytes(Target(bits_per_param=named - 0.001))


def test_uniform_is_one_width_and_the_next_one_would_not_fit(index: CheckpointIndex, space: Space) -> None:
    sizes = Sizes(index, space)
    budget = sizes.budget(4.6)
    formats = uniform(sizes, BASE, budget)
    (codes,) = set(widths(formats).values())
    assert codes % 2 == 0
    wider = {name: str(BASE.with_bits(round(math.log2(codes + 2), 3))) for name in formats}
    assert sizes.exact(formats) <= budget < sizes.exact(wider)


def test_uniform_stays_between_the_bounds_of_each_tensor(index: CheckpointIndex) -> None:
    space = space_of(index, overrides=[{"match": "lm_head.weight", "min_bits": 6}])
    sizes = Sizes(index, space)
    formats = widths(uniform(sizes, BASE, sizes.budget(4.6)))
    assert formats["lm_head.weight"] == 64
    assert len(set(formats.values())) == 2
    assert max(codes for name, codes in formats.items() if name != "lm_head.weight") < 64


def made_group(*members: str) -> Group:
    return Group(members, BASE, BASE.allowed_widths())


def test_the_outer_tensors_are_the_first_and_last_two_layers_embedding_and_head() -> None:
    inner = [f"model.layers.{at}.mlp.up_proj.weight" for at in range(7)]
    groups = [made_group(name) for name in (*inner, EMBEDDING, "lm_head.weight", "model.projector.weight")]
    assert outer_groups(groups) == {*inner[:2], *inner[-2:], EMBEDDING, "lm_head.weight"}
    assert outer_groups([made_group("transformer.h.0.attn.weight")]) == {"transformer.h.0.attn.weight"}
    assert outer_groups([]) == set()


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> CheckpointIndex:
    """Six layers of one matrix each, an embedding and a head."""
    folder = tmp_path_factory.mktemp("deep")
    names = [EMBEDDING, "lm_head.weight", *(f"model.layers.{at}.mlp.up_proj.weight" for at in range(6))]
    save_file({name: torch.randn(64, 64) for name in names}, folder / "model.safetensors")
    return CheckpointIndex.from_files(folder_sources(folder, ()))


@pytest.mark.parametrize("bits", [5.2, 5.8, 6.5])
def test_heuristic_gives_the_outer_tensors_two_more_bits_within_the_budget(deep: CheckpointIndex, bits: float) -> None:
    sizes = Sizes(deep, space_of(deep))
    formats = widths(heuristic(sizes, BASE, sizes.budget(bits)))
    inner = {codes for name, codes in formats.items() if "layers.2" in name or "layers.3" in name}
    outer = {codes for name, codes in formats.items() if "layers.2" not in name and "layers.3" not in name}
    assert outer == {min(4 * codes, 256) for codes in inner}
    assert bits - 0.6 < sizes.bits(sizes.exact(heuristic(sizes, BASE, sizes.budget(bits)))) <= bits


def test_fisher_predicts_no_more_than_the_baselines_at_equal_bytes(index: CheckpointIndex, space: Space) -> None:
    sizes, method = Sizes(index, space), fisher_on(index, space, BASE, pretended_means(space))
    for bits in (4.2, 5.0, 6.0):
        flat = uniform(sizes, BASE, sizes.budget(bits))
        chosen = method(sizes.exact(flat))
        total = method.forecast.total
        assert total(_encoded(space, chosen)) < 0.8 * total(_encoded(space, flat))


def test_the_scale_of_the_fisher_information_changes_no_format(index: CheckpointIndex, space: Space) -> None:
    means = pretended_means(space)
    scaled = {name: mean * 1024 for name, mean in means.items()}
    budget = Sizes(index, space).budget(4.0)
    assert fisher_on(index, space, BASE, means)(budget) == fisher_on(index, space, BASE, scaled)(budget)


def test_a_tensor_that_calibration_never_reached_has_at_least_the_uniform_width(
    index: CheckpointIndex, space: Space
) -> None:
    sizes = Sizes(index, space)
    missed = "model.layers.1.mlp.down_proj.weight"
    means = {name: mean for name, mean in pretended_means(space).items() if name != missed} | {"lm_head.weight": 0.0}
    for bits in (3.4, 3.9, 4.6):
        budget = sizes.budget(bits)
        method = fisher_on(index, space, BASE, means)
        formats = method(budget)
        flat = widths(uniform(sizes, BASE, budget))
        assert widths(formats)[missed] >= flat[missed]
        assert widths(formats)["lm_head.weight"] >= flat["lm_head.weight"]
        assert sizes.exact(formats) <= budget
    assert method.forecast.evidence.not_reached(space.groups) == ["lm_head.weight", missed]


def test_without_any_evidence_every_tensor_has_at_least_the_uniform_width(index: CheckpointIndex, space: Space) -> None:
    sizes = Sizes(index, space)
    budget = sizes.budget(4.1)
    formats = widths(fisher_on(index, space, BASE, {})(budget))
    flat = widths(uniform(sizes, BASE, budget))
    assert all(formats[name] >= flat[name] for name in flat)


def test_a_member_that_was_not_reached_is_taken_for_like_those_it_is_fused_with(space: Space) -> None:
    fused = next(group for group in space.groups if len(group.members) == 3)
    evidence = Evidence.of(dict(zip(fused.members[:2], (1e-6, 3e-6), strict=True)), lambda _: None, space.groups)
    assert evidence.knows(fused)
    assert evidence.mean(fused.members[2]) == pytest.approx(2e-6)
    assert fused.members[2] in evidence.not_reached(space.groups)


def test_the_prediction_is_the_row_wise_formula_with_the_real_encoders_error() -> None:
    chance = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 96, generator=chance).to(torch.bfloat16)
    fisher = np.random.default_rng(0).gamma(0.5, 1.0, 24)
    found = predicted_kl(weight, fisher, np.arange(24), "int3@32")
    delta = encode_nearest(weight, parse("int3@32")).decode().double() - weight.double()
    wanted = 0.5 * sum(f / 96 * float(row @ row) for f, row in zip(fisher, delta, strict=True))
    assert found == pytest.approx(wanted, rel=1e-8)


def test_equal_fisher_in_a_row_makes_it_the_element_wise_formula() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    diagonal = torch.rand(8, 1, generator=torch.Generator().manual_seed(2)).expand(8, 64).double()
    delta = encode_nearest(weight, parse(str(BASE))).decode().double() - weight.double()
    found = predicted_kl(weight, diagonal.sum(1).numpy(), np.arange(8), str(BASE))
    assert found == pytest.approx(0.5 * float((diagonal * delta**2).sum()), rel=1e-8)


def test_rows_without_fisher_information_in_the_sample_count_by_the_mean() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    fisher = np.array([0.0] * 7 + [2.0])
    rows = np.arange(0, 7, 2)
    found = predicted_kl(weight[rows], fisher, rows, "int4@32")
    error = encode_nearest(weight[rows], parse("int4@32")).decode().double() - weight[rows].double()
    assert found == pytest.approx(0.5 * 2.0 * float((error**2).mean()), rel=1e-8)


def test_a_sample_of_rows_predicts_nearly_what_all_rows_do(
    index: CheckpointIndex, space: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {EMBEDDING: np.random.default_rng(3).gamma(2.0, 1e-3, 256)}
    evidence = Evidence.of({EMBEDDING: rows[EMBEDDING].mean() / 64}, rows.get, space.groups)
    whole = Forecast(index, evidence).tensor(EMBEDDING, "int3@32")
    monkeypatch.setattr(forecast_module, "MEASURED_WEIGHTS", 64 * 64)
    sampled = Forecast(index, evidence).tensor(EMBEDDING, "int3@32")
    # Row errors of 64 normal weights scatter by about 18 %, so the mean of 64 of them by 2 %: 8 % is four sigma.
    assert sampled != whole
    assert sampled == pytest.approx(whole, rel=0.08)
    one_scale = [Forecast(index, evidence).tensor(EMBEDDING, "int6@tensor")]
    monkeypatch.undo()
    assert one_scale == [Forecast(index, evidence).tensor(EMBEDDING, "int6@tensor")]


def test_a_models_prediction_is_the_sum_over_its_tensors(index: CheckpointIndex, space: Space) -> None:
    means = pretended_means(space)
    forecast = Forecast(index, Evidence.of(means, lambda _: None, space.groups))
    choice = {name: "int4-asym@32:absmax:bf16" for group in space.groups for name in group.members}
    wanted = 0.0
    for name, text in choice.items():
        weight = read_tensor(index, name)
        delta = encode_nearest(weight, parse(text)).decode().double() - weight.double()
        wanted += 0.5 * means[name] * float((delta**2).sum())
    assert forecast.total(choice) == pytest.approx(wanted, rel=1e-7)
    fused = next(group for group in space.groups if len(group.members) > 1)
    assert forecast.group(fused)[3] == pytest.approx(
        sum(forecast.tensor(name, fused.formats[3]) for name in fused.members)
    )


def test_equal_costs_in_a_group_lose_nothing_and_unequal_ones_the_mean_ratio(
    index: CheckpointIndex, space: Space
) -> None:
    pair = next(group for group in space.groups if len(group.members) == 2)
    text = pair.formats[len(pair.formats) // 2]
    flat = Forecast(index, Evidence.of(dict.fromkeys(pair.members, 1e-6), lambda _: None, space.groups))
    errors = [flat.tensor(name, text) for name in pair.members]
    for ratio in (1.0, 16.0):
        means = {pair.members[0]: 1e-6 / errors[0], pair.members[1]: ratio * 1e-6 / errors[1]}
        forecast = Forecast(index, Evidence.of(means, lambda _: None, space.groups))
        wanted = math.log2((1 + ratio) / 2 / math.sqrt(ratio)) / 2
        assert grouping_cost_bits(forecast, [pair]) == pytest.approx(wanted, abs=1e-6)
    assert grouping_cost_bits(flat, []) == 0


def test_one_poisoned_tensor_stays_within_its_bounds_and_the_budget_holds(index: CheckpointIndex, space: Space) -> None:
    means = pretended_means(space)
    poisoned = means | {EMBEDDING: means[EMBEDDING] * 1000}
    budget = Sizes(index, space).budget(4.0)
    formats = fisher_on(index, space, BASE, poisoned)(budget)
    assert widths(formats)[EMBEDDING] <= 256
    assert all(codes >= 4 for codes in widths(formats).values())
    assert Sizes(index, space).exact(formats) <= budget


def test_the_choice_is_the_best_of_all_for_a_few_groups(index: CheckpointIndex, space: Space) -> None:
    few = tuple(group for group in space.groups if "layers.0" in group.name)[:3]
    kept = tuple(sorted(set(index.names) - {name for group in few for name in group.members}))
    small = Space(few, kept)
    sizes, method = Sizes(index, small), fisher_on(index, small, BASE, pretended_means(small))
    budget = (sizes.least + sizes.most) // 2
    chosen = method.forecast.total(_encoded(small, method(budget)))
    names = [group.name for group in few]
    every = (dict(zip(names, texts, strict=True)) for texts in itertools.product(*(group.formats for group in few)))
    fitting = [formats for formats in every if sizes.exact(formats) <= budget - 16]
    assert chosen <= min(method.forecast.total(_encoded(small, formats)) for formats in fitting)


def test_the_common_part_of_a_rows_error_costs_what_a_factor_costs() -> None:
    """½ (m² S + Σ r_o² S_o) + ½ Σ F_o e_o, written out from the decoded tensor."""
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(3))
    fisher, scales = np.linspace(1, 2, 6), Scales(7.0, np.linspace(3, 1, 6))
    w = weight.double().numpy()
    decoded = encode_nearest(weight, parse("t7_3@64:signmax")).decode().double().numpy()
    shrunk = 1 - (decoded * w).sum(1) / (w * w).sum(1)
    left = decoded - (1 - shrunk)[:, None] * w
    expected = (shrunk.mean() ** 2 * 7.0 + (scales.rows * (shrunk - shrunk.mean()) ** 2).sum()) / 2
    expected += (fisher * (left**2).mean(1)).sum() / 2
    found = predicted_kl(weight, fisher, np.arange(6), "t7_3@64:signmax", scales)
    assert found == pytest.approx(expected, rel=1e-8)
    assert found != pytest.approx(predicted_kl(weight, fisher, np.arange(6), "t7_3@64:signmax"), rel=1e-3)
