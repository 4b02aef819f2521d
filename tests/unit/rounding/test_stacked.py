"""Tensors that are not one layer's matrix: inputs as rows, experts on top of each other. Costs by their definition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from core.errors import InvalidFormat, NonFiniteWeights
from core.formats.stored import stored_parts
from core.recipe.rounding import RoundingSpec
from core.recipe.tensor_format import parse
from core.rounding.base import Sensitivity, round_tensor
from core.rounding.levels import Levels
from core.rounding.objective import Objective
from core.rounding.stacked_layer import StackLayer
from core.rounding.successive import Scales
from core.rounding.turned import TurnedFrame
from core.rounding.views import SILENT, of_experts, views
from core.tensors.dtypes import TORCH_DTYPES
from core.tensors.encoded import EncodedTensor
from core.tensors.frame import Frame
from core.tensors.nearest import encode_nearest

INPUTS, OUTPUTS, EXPERTS = 64, 96, 3
ENOUGH = 64 * INPUTS
FRAMED = [
    ("gptq", "int4@32"),
    ("gptq", "int3@32+hadamard"),
    ("gptq", "int4@tensor"),
    ("gptq", "nvfp4"),
    ("gptq", "lloyd4@64"),
    ("gptq", "nf4@64:absmax:dq8"),
    ("gptq", "int4@32+rans"),
    ("error_diffusion", "mxint4"),
    ("error_diffusion", "int4@channel"),
    ("power_learned", "power4@channel"),
]
GRIDS = [
    ("gptq", "grid3@tensor"),
    ("gptq", "grid3@channel"),
    ("gptq", "grid3@32"),
    ("watersic", "grid3@tensor"),
    ("watersic", "grid3@channel"),
]


def covariance(seed: int, inputs: int = INPUTS) -> Tensor:
    """Of inputs that depend on each other, fp64."""
    chance = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(inputs, inputs, generator=chance, dtype=torch.float64))[0]
    return torch.mm(turn * torch.logspace(0, -3, inputs, dtype=torch.float64), turn.T)


def weights(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rounded(weight: Tensor, text: str, method: str, sensitivity: Sensitivity, **more: Any) -> EncodedTensor:
    spec = RoundingSpec(name=method, **more)
    return round_tensor(weight, parse(text), spec, sensitivity=sensitivity, seed=0)


def spec_of(method: str, **more: Any) -> RoundingSpec:
    return RoundingSpec(name=method, **more)


def cost(weight: Tensor, decoded: Tensor, spread: Tensor) -> float:
    """tr(E S E^T) of a layer (out, in)."""
    error = (weight - decoded).double()
    return float(torch.trace(error @ spread @ error.T))


def stack(*, transposed: bool, tokens: Sequence[int] = (ENOUGH,) * EXPERTS) -> Sensitivity:
    experts = [
        Sensitivity(covariance=covariance(at + 1), tokens=count, transposed=transposed)
        if count
        else Sensitivity(transposed=transposed)
        for at, count in enumerate(tokens)
    ]
    return Sensitivity(experts=experts, transposed=transposed)


def ratios(weight: Tensor, encoded: EncodedTensor, *, transposed: bool) -> list[float]:
    """By expert: the cost over that of nearest rounding in the same format."""
    near = encode_nearest(weight, encoded.format).decode()
    pairs = zip(weight, encoded.decode(), near, strict=True)
    return [
        cost(*((one.T, made.T) if transposed else (one, made)), covariance(at + 1))
        / cost(*((one.T, plain.T) if transposed else (one, plain)), covariance(at + 1))
        for at, (one, made, plain) in enumerate(pairs)
    ]


def has_planned_parts(encoded: EncodedTensor) -> bool:
    """Whether what is stored has names, kinds and shapes as planned, and is read back to the same values."""
    planned = stored_parts(encoded.format, encoded.shape, coded=encoded.codes.numel())
    found = {name: (part.dtype, tuple(part.shape)) for name, part in encoded.parts().items()}
    assert found == {name: (TORCH_DTYPES[kind], shape) for name, (kind, shape) in planned.items()}
    again = EncodedTensor.from_parts(encoded.format, encoded.shape, encoded.dtype, encoded.parts())
    return torch.equal(again.decode(), encoded.decode())


@pytest.mark.parametrize(("method", "text"), [*FRAMED, *GRIDS])
def test_a_matrix_with_its_inputs_as_rows_gains_about_what_it_gains_as_the_layers_own(method: str, text: str) -> None:
    weight, spread = weights(OUTPUTS, INPUTS), covariance(7)
    own = rounded(weight, text, method, Sensitivity(covariance=spread, tokens=ENOUGH))
    turned = rounded(
        weight.T.contiguous(), text, method, Sensitivity(covariance=spread, tokens=ENOUGH, transposed=True)
    )
    assert turned.shape == (INPUTS, OUTPUTS)
    assert has_planned_parts(turned)
    near = encode_nearest(weight.T.contiguous(), turned.format, seed=0).decode().T
    gain = cost(weight, turned.decode().T, spread) / cost(weight, near, spread)
    own_gain = cost(weight, own.decode(), spread) / cost(weight, encode_nearest(weight, own.format).decode(), spread)
    waterfills = method == "watersic" and text == "grid3@channel"
    assert gain < (1.25 * own_gain if method != "watersic" or waterfills else 0.5)
    assert not any("no statistics" in note for note in turned.notes)


def test_one_scale_for_all_makes_turning_exact() -> None:
    weight, spread = weights(OUTPUTS, INPUTS), covariance(7)
    for method, text in (("gptq", "int4@tensor"), ("error_diffusion", "nf4@tensor")):
        own = rounded(weight, text, method, Sensitivity(covariance=spread, tokens=ENOUGH))
        turned = rounded(
            weight.T.contiguous(), text, method, Sensitivity(covariance=spread, tokens=ENOUGH, transposed=True)
        )
        assert torch.equal(turned.decode().T, own.decode()), text


def test_a_turned_rotation_turns_statistics_of_both_sides() -> None:
    weight, spread = weights(OUTPUTS, INPUTS), covariance(7)
    given = Sensitivity(covariance=spread, tokens=ENOUGH, transposed=True)
    for option in ("hadamard", "rotate"):
        turned = rounded(weight.T.contiguous(), f"int3@32+{option}", "gptq", given)
        near = encode_nearest(weight.T.contiguous(), turned.format, seed=0).decode().T
        assert cost(weight, turned.decode().T, spread) < 0.4 * cost(weight, near, spread), option


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 70), st.sampled_from(["int4@32", "nf4@16", "int3@channel", "e2m1@tensor"]))
def test_nearest_codes_of_a_turned_frame_are_those_of_the_frame(rows: int, columns: int, text: str) -> None:
    text = text.replace("e2m1", "float4_e2m1")
    weight = weights(rows, columns, seed=rows * 100 + columns)
    frame = Frame.of(weight, parse(text))
    turned = TurnedFrame.seen(frame)
    found = torch.from_numpy(Levels.of(turned).nearest(turned.matrix.double()))
    assert torch.equal(frame.encoded(found.T.contiguous()).decode(), encode_nearest(weight, parse(text)).decode())


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("method", "text"), [*FRAMED, *GRIDS])
def test_every_expert_of_a_stack_gains_by_its_own_inputs(method: str, text: str, transposed: bool) -> None:
    weight = weights(EXPERTS, *((INPUTS, OUTPUTS) if transposed else (OUTPUTS, INPUTS)))
    encoded = rounded(weight, text, method, stack(transposed=transposed))
    assert encoded.shape == tuple(weight.shape)
    assert has_planned_parts(encoded)
    assert max(ratios(weight, encoded, transposed=transposed)) < 0.5


@pytest.mark.parametrize(
    ("method", "text"),
    [("gptq", "int4@32"), ("error_diffusion", "mxint4"), ("power_learned", "power0.7_4@channel"), ("gptq", "nf4@64")],
)
def test_where_nothing_is_common_to_the_experts_each_is_what_it_is_alone(method: str, text: str) -> None:
    weight, given = weights(EXPERTS, OUTPUTS, INPUTS), stack(transposed=False)
    encoded = rounded(weight, text, method, given)
    assert given.experts is not None
    for one, known, decoded in zip(weight, given.experts, encoded.decode(), strict=True):
        assert torch.equal(rounded(one, text, method, known).decode(), decoded)


@pytest.mark.parametrize(("method", "text"), [("signround", "int4@32"), ("squeezellm", "lloyd3-rows@channel")])
def test_experts_that_share_nothing_are_encoded_one_by_one_and_put_together(method: str, text: str) -> None:
    weight, given = weights(EXPERTS, OUTPUTS, INPUTS), stack(transposed=False)
    more = {"steps": 20} if method == "signround" else {}
    encoded = rounded(weight, text, method, given, **more)
    assert has_planned_parts(encoded)
    assert given.experts is not None
    for one, known, decoded in zip(weight, given.experts, encoded.decode(), strict=True):
        assert torch.equal(rounded(one, text, method, known, **more).decode(), decoded)


@pytest.mark.parametrize(
    ("method", "text", "transposed", "reason"),
    [
        ("signround", "int4@32", True, "signround fits scales to inputs, which are its rows"),
        ("signround", "int4@tensor", False, "what its format has once for all experts"),
        ("gptq", "int4@32+rotate", False, "the rotation mixes its experts"),
    ],
)
def test_what_a_method_cannot_do_stands_in_the_notes(method: str, text: str, transposed: bool, reason: str) -> None:
    weight = weights(EXPERTS, OUTPUTS, INPUTS)
    given = stack(transposed=transposed)
    if transposed:
        weight = weight.mT.contiguous()
    more = {"steps": 2} if method == "signround" else {}
    encoded = rounded(weight, text, method, given, **more)
    assert encoded.notes[-1] == f"no statistics of its inputs ({reason}): all of them count alike"
    plain = rounded(weight, text, method, Sensitivity(), **more)
    assert torch.equal(encoded.decode(), plain.decode())


def test_codebooks_of_rows_that_are_one_input_each_have_nothing_to_gain() -> None:
    weight = weights(INPUTS, OUTPUTS)
    given = Sensitivity(covariance=covariance(7), tokens=ENOUGH, transposed=True)
    encoded = rounded(weight, "lloyd3-rows@channel", "squeezellm", given)
    assert torch.equal(encoded.decode(), encode_nearest(weight, encoded.format).decode())
    assert encoded.notes == ("a codebook's weights share one input, which makes none of them count more",)


def test_watersic_says_where_it_cannot_waterfill() -> None:
    given = Sensitivity(covariance=covariance(7), tokens=ENOUGH, transposed=True)
    notes = {
        text: rounded(weights(INPUTS, OUTPUTS), text, "watersic", given).notes
        for text in ("grid3@tensor", "grid3@channel")
    }
    assert notes["grid3@channel"] == ()
    assert notes["grid3@tensor"] == (
        "one step for all inputs, which are rows: the format has no scales of rows (a grid @channel has)",
    )


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("method", "text"), [("gptq", "int4@32"), ("gptq", "grid3@tensor"), ("watersic", "grid3@channel")]
)
def test_an_expert_without_tokens_is_rounded_as_if_inputs_counted_alike(
    method: str, text: str, transposed: bool
) -> None:
    weight = weights(EXPERTS, *((INPUTS, OUTPUTS) if transposed else (OUTPUTS, INPUTS)))
    encoded = rounded(weight, text, method, stack(transposed=transposed, tokens=(ENOUGH, 0, ENOUGH)))
    assert f"1 of 3 experts: {SILENT} (expert 1)" in encoded.notes
    gains = ratios(weight, encoded, transposed=transposed)
    assert max(gains[0], gains[2]) < 0.5
    plain = encode_nearest(weight, encoded.format).decode()
    error = (weight[1] - encoded.decode()[1]).square().sum() / (weight[1] - plain[1]).square().sum()
    common_columns = method == "watersic" and not transposed  # with steps that suit the other experts
    assert float(error) < (2.0 if common_columns else 1.3)


def test_a_stack_of_which_no_expert_saw_a_token_is_rounded_to_nearest() -> None:
    weight = weights(EXPERTS, OUTPUTS, INPUTS)
    encoded = rounded(weight, "int4@32", "gptq", stack(transposed=False, tokens=(0, 0, 0)))
    assert torch.equal(encoded.decode(), encode_nearest(weight, parse("int4@32")).decode())
    assert encoded.notes == (f"3 of 3 experts: {SILENT} (expert 0)",)


def test_few_tokens_are_named_by_how_many_experts_had_so_few() -> None:
    weight = weights(EXPERTS, OUTPUTS, INPUTS)
    given = stack(transposed=False, tokens=(ENOUGH, 100, 200))
    assert rounded(weight, "int4@32", "gptq", given).notes == (
        f"2 of 3 experts: 100 tokens for {INPUTS} inputs, fewer than 16 each (expert 1)",
    )
    assert rounded(weight, "mxint4", "error_diffusion", given).notes == (
        "2 of 3 experts: rounded to nearest: fewer than 256 tokens (expert 1)",
    )


def test_notes_of_one_layer_stay_as_they_are_and_such_of_several_are_counted() -> None:
    assert of_experts([("a 1", "b")]) == ("a 1", "b")
    assert of_experts([("a 1",), (), ("a 22", "b")]) == (
        "2 of 3 experts: a 1 (expert 0)",
        "1 of 3 experts: b (expert 2)",
    )


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("method", "text"), [*GRIDS, ("gptq", "grid0.5@tensor"), ("watersic", "grid1@tensor")])
def test_a_grid_takes_the_planned_bytes_and_never_costs_more_than_nearest(
    method: str, text: str, transposed: bool
) -> None:
    weight = weights(2, *((24, 40) if transposed else (40, 24)), seed=3)
    weight[0] *= 30
    spreads = [covariance(at + 1, 24) * 10.0 ** (3 * at) for at in range(2)]
    experts = [Sensitivity(covariance=one, transposed=transposed) for one in spreads]
    encoded = rounded(weight, text, method, Sensitivity(experts=experts, transposed=transposed), paths=1)
    near = encode_nearest(weight, encoded.format)
    assert encoded.nbytes == near.nbytes
    total = [
        sum(
            cost(*((one.T, made.T) if transposed else (one, made)), spread)
            for one, made, spread in zip(weight, found.decode(), spreads, strict=True)
        )
        for found in (encoded, near)
    ]
    assert total[0] <= total[1] * (1 + 1e-9)


@pytest.mark.parametrize(
    ("method", "text"), [("gptq", "int4@32"), ("gptq", "grid3@tensor"), ("watersic", "grid3@tensor")]
)
@pytest.mark.parametrize("shape", [(2, 1, 8), (2, 8, 1), (1, 5, 7), (3, 0, 4)])
@pytest.mark.parametrize("transposed", [False, True])
def test_small_and_empty_stacks(method: str, text: str, shape: tuple[int, ...], transposed: bool) -> None:
    inputs = shape[1] if transposed else shape[2]
    experts = [Sensitivity(covariance=covariance(at, inputs), transposed=transposed) for at in range(shape[0])]
    weight = weights(*shape)
    encoded = rounded(weight, text, method, Sensitivity(experts=experts, transposed=transposed))
    assert encoded.decode().shape == shape
    assert bool(encoded.decode().isfinite().all())


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("method", "text"), [*GRIDS, ("gptq", "int4@32"), ("error_diffusion", "mxint4")])
def test_zeros_and_inputs_that_are_always_zero(method: str, text: str, transposed: bool) -> None:
    spread = covariance(1)
    spread[:5], spread[:, :5] = 0, 0
    weight = weights(2, OUTPUTS, INPUTS)
    weight[1] = 0
    experts = [
        Sensitivity(covariance=spread, tokens=ENOUGH, transposed=transposed),
        Sensitivity(covariance=torch.zeros_like(spread), tokens=ENOUGH, transposed=transposed),
    ]
    given = weight.mT.contiguous() if transposed else weight
    encoded = rounded(given, text, method, Sensitivity(experts=experts, transposed=transposed))
    decoded = encoded.decode().mT if transposed else encoded.decode()
    assert float(decoded[1].abs().max()) < 0.05
    near = encode_nearest(given, encoded.format).decode()
    assert cost(weight[0], decoded[0], spread) < 0.6 * cost(weight[0], (near.mT if transposed else near)[0], spread)


def test_statistics_of_another_tensor_are_refused() -> None:
    given = stack(transposed=False)
    for shape in ((EXPERTS + 1, OUTPUTS, INPUTS), (OUTPUTS, INPUTS)):
        with pytest.raises(InvalidFormat, match="statistics of 3 experts"):
            rounded(weights(*shape), "int4@32", "gptq", given)
    for text in ("int4@32", "grid3@tensor"):
        with pytest.raises(InvalidFormat, match="a covariance of"):
            rounded(weights(EXPERTS, OUTPUTS, INPUTS + 1), text, "gptq", given)
    turned = Sensitivity(covariance=covariance(1), transposed=True)
    with pytest.raises(InvalidFormat, match="a covariance of"):
        rounded(weights(OUTPUTS, INPUTS), "int4@32", "gptq", turned)


@pytest.mark.parametrize("text", ["int4@32", "grid3@tensor"])
def test_weights_that_are_not_numbers_are_refused(text: str) -> None:
    weight = weights(EXPERTS, OUTPUTS, INPUTS)
    weight[2, 3, 4] = torch.nan
    with pytest.raises(NonFiniteWeights):
        rounded(weight, text, "gptq", stack(transposed=False))


def test_experts_are_asked_for_one_at_a_time_and_nearest_asks_for_none() -> None:
    class Counted(list[Sensitivity]):
        asked = 0

        def __iter__(self) -> Any:
            for one in super().__iter__():
                type(self).asked += 1
                yield one

    known = stack(transposed=False)
    given = replace(known, experts=Counted(known.experts or ()))
    weight = weights(EXPERTS, OUTPUTS, INPUTS)
    encoded = round_tensor(weight, parse("int4@32"), spec_of("nearest"), sensitivity=given, seed=0)
    assert torch.equal(encoded.decode(), encode_nearest(weight, parse("int4@32")).decode())
    assert (Counted.asked, encoded.notes) == (0, ())
    rounded(weight, "int4@32", "gptq", given)
    assert Counted.asked == EXPERTS


def test_units_of_weights_and_inputs_change_nothing() -> None:
    weight, known = weights(EXPERTS, OUTPUTS, INPUTS), stack(transposed=False)
    scaled = [
        replace(one, covariance=one.covariance * 2.0**40) for one in known.experts or () if one.covariance is not None
    ]
    for method, text in (("gptq", "grid3@tensor"), ("watersic", "grid3@tensor"), ("gptq", "int4@32")):
        plain = rounded(weight, text, method, known)
        other = rounded(weight * 2.0**-20, text, method, Sensitivity(experts=scaled))
        assert torch.equal(other.decode() * 2.0**20, plain.decode()), (method, text)


def test_every_token_counts_alike_whichever_expert_it_was_routed_to() -> None:
    counts, weight = (9700, 1000, 1000), weights(EXPERTS, OUTPUTS, INPUTS)
    spread = torch.logspace(0, -3, INPUTS, dtype=torch.float64)
    known = [torch.diag(one) for one in (spread, spread.flip(0), spread.roll(INPUTS // 2))]
    losses = []
    for told in (counts, (9700,) * EXPERTS):
        experts = [Sensitivity(covariance=one, tokens=count) for one, count in zip(known, told, strict=True)]
        encoded = rounded(weight, "grid3@tensor", "watersic", Sensitivity(experts=experts))
        decoded = encoded.decode().reshape(weight.shape)
        losses.append(sum(n * cost(weight[at], decoded[at], known[at]) for at, n in enumerate(counts)))
    assert losses[0] < 0.9 * losses[1]


def test_fits_that_a_stack_does_not_have_are_named() -> None:
    weight, known = weights(EXPERTS, OUTPUTS, INPUTS), stack(transposed=False)
    assert rounded(weight, "grid3@tensor", "watersic", known).notes == ()
    (note,) = rounded(weight, "grid3@tensor", "watersic", known, rescale=False).notes
    assert "all layers together" in note


def test_a_sample_of_rows_takes_their_share_of_the_residual_stream() -> None:
    objective = Objective.of(
        Sensitivity(covariance=covariance(0), residual=torch.arange(OUTPUTS * 1.0)[:, None].expand(-1, INPUTS))
    )
    weight = weights(OUTPUTS, INPUTS)
    (view,) = views((OUTPUTS, INPUTS), Sensitivity(covariance=covariance(0)))
    layer = StackLayer(view, weight, objective, Scales.ones(OUTPUTS, INPUTS), np.ones(INPUTS))
    few = layer.sampled(4)
    assert few.objective.residual is not None
    assert few.objective.residual[:, 0].tolist() == [0.0, 24.0, 48.0, 72.0]
    assert torch.equal(few.weight, weight[::24])
