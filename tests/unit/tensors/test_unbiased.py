"""Scales freed of their bias: what the correction promises, and where it keeps its hands off."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.recipe.tensor_format import parse
from core.tensors.nearest import encode_nearest

FORMATS = ["t7_3@16:signmax:fp32", "int3@16:absmax:fp32", "nf4@channel:absmax:fp32", "normal3@tensor:rms:fp32"]


def products(weight: torch.Tensor, text: str) -> tuple[torch.Tensor, torch.Tensor]:
    """<decoded, w> and <w, w> of each row, or of the tensor where it has one scale."""
    decoded = encode_nearest(weight, parse(text)).decode().double()
    own, met = weight.double().square(), decoded * weight.double()
    return (met.sum(), own.sum()) if "tensor" in text else (met.sum(dim=1), own.sum(dim=1))


@pytest.mark.parametrize("text", FORMATS)
def test_rows_have_the_inner_product_that_they_have_with_themselves(text: str) -> None:
    weight = torch.randn((20, 50), generator=torch.Generator().manual_seed(0))
    met, own = products(weight, f"{text}+unbiased")
    torch.testing.assert_close(met, own, rtol=1e-6, atol=0)
    shrunk, _ = products(weight, text)
    assert not torch.allclose(shrunk, own, rtol=1e-4)


@pytest.mark.parametrize("text", FORMATS)
def test_codes_and_bytes_stay(text: str) -> None:
    weight = torch.randn((7, 33), generator=torch.Generator().manual_seed(1))
    plain, corrected = encode_nearest(weight, parse(text)), encode_nearest(weight, parse(f"{text}+unbiased"))
    assert torch.equal(plain.codes, corrected.codes)
    assert plain.nbytes == corrected.nbytes


@given(
    rows=st.lists(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=5, max_size=5), min_size=1, max_size=4)
)
@settings(max_examples=60, deadline=None)
def test_scales_stay_finite_and_no_row_is_more_than_doubled(rows: list[list[float]]) -> None:
    weight = torch.tensor(rows)
    for text in ("int3@2", "t5_4@5:signmax:fp32", "nf4@tensor"):
        plain, corrected = encode_nearest(weight, parse(text)), encode_nearest(weight, parse(f"{text}+unbiased"))
        before, after = plain.scale_values, corrected.scale_values
        assert bool(after.isfinite().all())
        assert bool((after.abs() <= 2.02 * before.abs()).all())


def test_zeros_stay_zeros() -> None:
    weight = torch.zeros(3, 32)
    weight[1] = torch.randn(32, generator=torch.Generator().manual_seed(2))
    decoded = encode_nearest(weight, parse("nf4@16+unbiased")).decode()
    assert torch.equal(decoded[[0, 2]], torch.zeros(2, 32))


def test_rotations_and_outliers_come_before_it() -> None:
    weight = torch.randn((64, 64), generator=torch.Generator().manual_seed(3))
    weight[5, 7] = 40.0
    text = "int3@16:absmax:fp32+outliers0.001+rotate"
    plain = encode_nearest(weight, parse(text), seed=4)
    corrected = encode_nearest(weight, parse(f"{text}+unbiased"), seed=4)
    dense = weight.clone()
    dense[5, 7] = 0

    def bias(decoded: torch.Tensor) -> float:
        decoded[5, 7] = 0
        return abs(float((decoded.double() * dense).sum() / dense.double().square().sum()) - 1)

    assert bias(corrected.decode()) < 0.2 * bias(plain.decode())
