"""Formats whose codes stand for several weights: the nearest of the stored points, any shape, hostile bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import InvalidCheckpoint, InvalidFormat, NonFiniteWeights
from core.exports.layout import stored_tensor
from core.formats.stored import packed_bits, stored_parts
from core.recipe.tensor_format import TensorFormat, parse
from core.storage.safetensors_header import TensorEntry
from core.tensors import blocks, vector_grid
from core.tensors.blocks import BlockGrid, Piece
from core.tensors.dtypes import TORCH_DTYPES
from core.tensors.encoded import EncodedTensor
from core.tensors.errors import relative_rms_error, squared_error
from core.tensors.frame import Frame
from core.tensors.nearest import encode_nearest, prepared

FORMATS = [
    "higgs2@8",
    "higgs4-p1@channel",
    "higgs3-p2@7:bf16",
    "higgs2.333-p3@tensor",
    "higgs1.7-p3@channel:fp32",
    "higgs2-p4@100+rotate",
    "higgs1-p6@64",
    "higgs1.3-p4@8+outliers0.05",
    "higgs4.5-p2@16",
]
SHAPES = [(3, 24), (5, 17), (1, 1), (4, 1), (2, 3, 10), (13,), (), (0, 8), (3, 0), (64, 129)]


def data(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def turned(weight: torch.Tensor, fmt: TensorFormat, encoded: EncodedTensor) -> torch.Tensor:
    """What was coded: outliers set to 0, rotated, flat."""
    flat = weight.reshape(-1).clone()
    if encoded.format.outlier_rule:
        flat[encoded._outlier_places] = 0
    return prepared(flat, parse(f"int4@64+{fmt.rotation}"), tuple(weight.shape), 7, None)[0]


def scales_of_elements(encoded: EncodedTensor) -> torch.Tensor:
    """The decoded scale of each element, flat."""
    grid, scales = BlockGrid.of(encoded.format, encoded.shape), encoded.scale_values
    width = grid.elements if grid.one_scale else grid.width
    return grid.from_blocks(scales[:, None].expand(-1, width).contiguous())[: encoded.elements]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("text", FORMATS)
def test_every_vector_gets_the_nearest_of_the_stored_points(text: str, shape: tuple[int, ...]) -> None:
    """By brute force over all points, in fp64; the last vector is filled up with zeros."""
    fmt, weight = parse(text), data(shape)
    encoded = encode_nearest(weight, fmt, seed=7)
    points = encoded.parts()["codebook"].double()
    assert tuple(points.shape) == (fmt.codes, fmt.vector)
    scales = scales_of_elements(encoded).double()
    scaled = torch.where(scales > 0, turned(weight, fmt, encoded).double() / scales, 0.0)
    vectors = torch.nn.functional.pad(scaled, (0, -len(scaled) % fmt.vector)).view(-1, fmt.vector)
    codes = encoded.all_codes().long()
    assert codes.numel() == len(vectors) == -(-weight.numel() // fmt.vector)
    distances = (vectors[:, None] - points).square().sum(2)
    reached = distances.gather(1, codes[:, None])[:, 0]
    assert (reached <= distances.amin(1) * (1 + 1e-12) + 1e-15).all()
    decoded = points[codes].float().reshape(-1)[: weight.numel()] * scales.float()
    whole = torch.cat(
        [encoded.decode_piece(encoded.grid, one) for one in encoded.grid.pieces(encoded.group)] or [decoded]
    )
    assert torch.equal(whole, decoded)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("text", FORMATS)
def test_the_parts_are_those_that_were_planned_and_restore_the_tensor(text: str, shape: tuple[int, ...]) -> None:
    fmt, weight = parse(text), data(shape, 3).bfloat16()
    encoded = encode_nearest(weight, fmt, seed=7)
    found = {name: (part.dtype, tuple(part.shape)) for name, part in encoded.parts().items()}
    assert found == {name: (TORCH_DTYPES[kind], size) for name, (kind, size) in stored_parts(fmt, shape).items()}
    again = EncodedTensor.from_parts(fmt, shape, "BF16", encoded.parts())
    assert torch.equal(again.decode(), encoded.decode())
    assert tuple(again.decode().shape) == shape
    assert torch.equal(again.decode(torch.bfloat16), encoded.decode().bfloat16())
    entry = TensorEntry("x", "BF16", shape, 0, 2 * weight.numel())
    assert stored_tensor(entry, str(fmt)).nbytes == encoded.nbytes


@pytest.mark.parametrize(("bits", "vector"), [(2, 1), (2, 2), (4, 2), (5, 2), (2.333, 3), (2, 4), (1.7, 3)])
def test_long_tensors_take_a_share_of_a_code_a_scale_for_a_block_and_the_points(bits: float, vector: int) -> None:
    fmt, shape = parse(f"higgs{bits:g}-p{vector}@1024"), (4096, 4096)
    planned = sum(np.prod(size) * TORCH_DTYPES[kind].itemsize for kind, size in stored_parts(fmt, shape).values())
    wanted = packed_bits(fmt.codes) / vector + 16 / 1024 + 16 * fmt.codes * vector / 4096**2
    assert 8 * planned / 4096**2 == pytest.approx(wanted, rel=1e-6)
    assert packed_bits(fmt.codes) / vector < fmt.element_bits * 1.03


def test_pieces_of_any_size_give_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors that reach from one block, row or packed group into the next included."""
    for text in FORMATS:
        fmt, weight = parse(text), data((37, 129))
        whole = encode_nearest(weight, fmt, seed=7)
        decoded = whole.decode()
        with monkeypatch.context() as patch:
            patch.setattr(BlockGrid.pieces, "__defaults__", (64,))
            cut = encode_nearest(weight, fmt, seed=7)
            assert len(list(cut.grid.pieces(cut.group))) > 1 or cut.grid.one_scale
            assert all(torch.equal(part, whole.parts()[name]) for name, part in cut.parts().items())
            assert torch.equal(cut.decode(), decoded)
    assert blocks.PIECE > 37 * 129


@given(
    shape=st.lists(st.integers(0, 20), max_size=3).map(tuple), text=st.sampled_from(FORMATS), seed=st.integers(0, 99)
)
@settings(max_examples=60, deadline=None)
def test_any_shape_is_restored_and_many_weights_with_less_error_than_they_have(
    shape: tuple[int, ...], text: str, seed: int
) -> None:
    weight, fmt = data(shape, seed), parse(text)
    encoded = encode_nearest(weight, fmt, seed=seed)
    assert encoded.decode().shape == weight.shape
    error, power = squared_error(weight, encoded)
    # Points are made for the norms that vectors of Normal weights have; a few weights alone may lie nearer to 0.
    assert error <= power * (1 if weight.numel() >= 32 * fmt.vector else 1.5)


def test_products_with_all_points_find_what_the_tree_finds() -> None:
    """What other devices than the CPU do, some vectors at a time."""
    for text in FORMATS:
        fmt = parse(text)
        points = vector_grid.codebook_of(fmt, torch.device("cpu")).double()
        vectors = data((3000, fmt.vector), 5).double()
        assert torch.equal(vector_grid.nearest_points(vectors, points), vector_grid._by_tree(vectors, points))
    assert vector_grid.nearest_points(vectors[:0], points).shape == (0,)


def test_products_are_bounded_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    points, vectors = data((64, 2)).double(), data((1000, 2), 1).double()
    wanted, split, steps = vector_grid.nearest_points(vectors, points), torch.split, []

    def noted(one: torch.Tensor, step: int) -> tuple[torch.Tensor, ...]:
        steps.append(step)
        return split(one, step)

    monkeypatch.setattr(vector_grid, "_PRODUCTS", 640)
    monkeypatch.setattr(torch, "split", noted)
    assert torch.equal(vector_grid.nearest_points(vectors, points), wanted)
    assert steps == [10]


@pytest.mark.parametrize("text", FORMATS)
def test_blocks_of_zeros_are_exact_zeros(text: str) -> None:
    assert not encode_nearest(torch.zeros(6, 200), parse(text)).decode().any()


def test_a_block_of_zeros_beside_others_stays_zero_and_changes_no_neighbour() -> None:
    """Vectors of three that reach into it, on rows that the rotation leaves apart."""
    fmt, weight = parse("higgs2.333-p3@channel:fp32"), data((5, 64))
    weight[2] = 0
    decoded = encode_nearest(weight, fmt).decode()
    assert not decoded[2].any()
    assert (decoded[[0, 1, 3, 4]] - weight[[0, 1, 3, 4]]).norm() < 0.5 * weight.norm()


@pytest.mark.parametrize("damage", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("text", FORMATS)
def test_what_is_no_number_is_refused_by_its_place(text: str, damage: float) -> None:
    weight = data((6, 40))
    weight[3, 21] = damage
    with pytest.raises(NonFiniteWeights, match=r"\[3, 21\]"):
        encode_nearest(weight, parse(text))


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e30])
def test_the_unit_of_the_weights_does_not_count_under_fp32_scales(scale: float) -> None:
    weight, fmt = data((8, 256)), parse("higgs3-p2@64:fp32")
    assert relative_rms_error(weight * scale, encode_nearest(weight * scale, fmt)) == pytest.approx(
        relative_rms_error(weight, encode_nearest(weight, fmt)), rel=1e-4
    )


def test_scales_that_fp16_cannot_hold_are_refused() -> None:
    with pytest.raises(InvalidFormat, match="fp16"):
        encode_nearest(data((8, 256)) * 1e6, parse("higgs3@64"))


def hostile(text: str, byte: int = 255) -> EncodedTensor:
    """A tensor whose codes are all the same byte."""
    encoded = encode_nearest(data((6, 70)), parse(text))
    parts = encoded.parts() | {"codes": torch.full_like(encoded.codes, byte)}
    return EncodedTensor.from_parts(encoded.format, encoded.shape, encoded.dtype, parts)


@pytest.mark.parametrize(
    "text", ["higgs1.7-p3@64", "higgs1.3-p4@64", "higgs4.2-p2@64", "higgs2-p2@64", "higgs2.8-p3@64"]
)
def test_codes_beyond_the_points_take_the_last_one(text: str) -> None:
    found = hostile(text)
    codes = found.all_codes().long().clamp(max=found.format.codes - 1)
    values = found.parts()["codebook"].float()[codes].reshape(-1)[: found.elements]
    scaled = values * scales_of_elements(found)
    pieces = [found.decode_piece(found.grid, one) for one in found.grid.pieces(found.group)]
    assert torch.equal(torch.cat(pieces), scaled)
    assert found.decode().isfinite().all()


@pytest.mark.parametrize("shape", [(16,), (2, 16), (15, 2), (17, 2), (16, 3), (16, 1), (0, 2), (16, 2, 1)])
def test_points_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    encoded = encode_nearest(data((6, 70)), parse("higgs2-p2@64"))
    parts = encoded.parts() | {"codebook": torch.zeros(shape, dtype=torch.float16)}
    with pytest.raises(InvalidCheckpoint, match="'codebook' of F16"):
        EncodedTensor.from_parts(encoded.format, encoded.shape, encoded.dtype, parts)


@pytest.mark.parametrize("name", ["codes", "scales", "codebook"])
def test_parts_that_are_missing_of_another_type_or_too_short_are_refused(name: str) -> None:
    encoded = encode_nearest(data((6, 70)), parse("higgs2-p2@64"))
    part = encoded.parts()[name]
    for damaged in (None, part.double(), part[:-1]):
        parts = {key: one for key, one in encoded.parts().items() if key != name}
        with pytest.raises(InvalidCheckpoint, match=name):
            EncodedTensor.from_parts(
                encoded.format, encoded.shape, encoded.dtype, parts | ({} if damaged is None else {name: damaged})
            )


def test_decoding_is_a_function_of_the_stored_points_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = encode_nearest(data((6, 70)), parse("higgs2-p2@64"))
    parts = encoded.parts() | {"codebook": 2 * encoded.parts()["codebook"]}
    doubled = EncodedTensor.from_parts(encoded.format, encoded.shape, encoded.dtype, parts)
    monkeypatch.setattr(vector_grid, "stored_grid", None)
    assert torch.equal(doubled.decode(), 2 * encoded.decode())


def test_there_is_no_frame_in_which_codes_are_chosen_column_by_column() -> None:
    with pytest.raises(InvalidFormat, match="several weights at once"):
        Frame.of(data((6, 70)), parse("higgs2-p2@64"))


def test_unbiased_rows_have_the_inner_product_of_the_weights() -> None:
    weight = data((16, 256))
    decoded = encode_nearest(weight, parse("higgs2-p2@channel:fp32+unbiased")).decode()
    assert (decoded * weight).sum(1) == pytest.approx((weight * weight).sum(1), rel=1e-4)


def test_a_piece_may_begin_at_any_vector() -> None:
    """Of a tensor with one scale, as decoding in pieces asks for it."""
    encoded = encode_nearest(data((30, 50)), parse("higgs2-p4@tensor"))
    whole = encoded.decode_piece(encoded.grid, Piece(0, 1500, 0, 1))
    part = encoded.decode_piece(encoded.grid, Piece(4 * encoded.group, 1500, 0, 1))
    assert torch.equal(part, whole[4 * encoded.group :])


@pytest.mark.parametrize("text", FORMATS)
def test_products_make_the_bytes_of_the_tree(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = data((33, 130))
    by_tree = encode_nearest(weight, parse(text), seed=7).parts()
    monkeypatch.setattr(vector_grid, "_by_tree", vector_grid.nearest_points)
    by_products = encode_nearest(weight, parse(text), seed=7).parts()
    assert all(torch.equal(part, by_products[name]) for name, part in by_tree.items())


@pytest.mark.gpu
@pytest.mark.parametrize("text", FORMATS)
def test_a_gpu_stores_and_decodes_the_same_bytes(text: str) -> None:
    weight = data((257, 1030))
    here = encode_nearest(weight, parse(text), seed=7)
    there = encode_nearest(weight.cuda(), parse(text), seed=7)
    assert all(torch.equal(part, there.parts()[name].cpu()) for name, part in here.parts().items())
    assert torch.equal(there.decode().cpu(), here.decode())
