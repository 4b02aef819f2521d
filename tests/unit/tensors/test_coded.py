"""Entropy-coded formats: the very codes of the format without a code, in fewer bytes, decoded whole or tile by tile."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from core.errors import BitmillError, InvalidCheckpoint
from core.recipe.format_names import BLOCK_FAMILY, ENTROPY_CODES, FAMILIES, GRID_FAMILY, VECTOR_FAMILY
from core.recipe.tensor_format import TensorFormat, parse
from core.tensors import coded
from core.tensors.coded import FORMS, HEAD_BYTES, as_part, coded_bytes, decode_by_kernel
from core.tensors.encoded import EncodedTensor
from core.tensors.entropy import coder
from core.tensors.entropy.decoder import decode
from core.tensors.entropy.matrix import COLUMNS, ROWS
from core.tensors.errors import relative_rms_error
from core.tensors.nearest import encode_nearest

ELEMENTS = [
    "int4@{}",
    "int4-sym@{}",
    "int4-mx@{}:absmax:e8m0",
    "int12@{}:absmax:fp32",
    "int3@{}:rms-search",
    "float4_e2m1@{}:absmax:fp16",
    "float8_e5m2-ieee@{}",
    "float10_e5m4@{}",
    "float4@{}",
    "normal4@{}",
    "normal2.81@{}:rms",
    "laplace3.58@{}",
    "t5_4@{}:signmax",
    "t_4@{}:signmax",
    "nf4@{}",
    "sf4-nu4@{}",
    "af4-l1@{}",
    "bof4-s@{}",
    "lloyd4@{}",
    "lloyd9@{}",
    "power0.7_4@{}",
    "power4@{}",
]
GRANULARITIES = ["tensor", "channel", "8", "7", "64"]
OTHERS = [
    "mxfp4+{}",
    "nvfp4+{}",
    "nf4@8:dq8+{}",
    "int4@64+outliers0.01+{}",
    "nf4@7+opq0.95+{}",
    "int4@channel+threshold2+hadamard+{}",
    "t7_4@64:signmax+rotate+{}",
    "int4@16:absmax:fp32+unbiased+{}",
]
SHAPES = [(24, 50), (1, 300), (300, 1), (2, 3, 40), (77,), (1,), (), (0, 8), (3, 0)]


def weights(shape: tuple[int, ...], axis: int | None = None, seed: int = 0, spread: float = 1.2) -> torch.Tensor:
    """Normal weights in fp32, of which rows (axis 0) or columns (axis 1) may be of different size."""
    random = np.random.default_rng(seed)
    found = np.asarray(random.standard_normal(shape))
    if axis is not None and len(shape) > 1:
        lines = np.exp(spread * random.standard_normal(shape[-1] if axis == COLUMNS else shape[0]))
        found = found * (lines if axis == COLUMNS else lines.reshape(-1, *[1] * (len(shape) - 1)))
    return torch.from_numpy(found).float()


def recoded(plain: EncodedTensor, method: str, form: int | None, room: int = 0) -> EncodedTensor:
    """The tensor with its codes in one form of an entropy code, whichever is shortest, and `room` bytes more."""
    fmt = parse(f"{plain.format}+{method}")
    columns = plain.shape[-1] if plain.shape else 1
    data = coded_bytes(plain.all_codes().numpy().reshape(-1, columns), method, form)
    parts = plain.parts() | {"codes": as_part(data, HEAD_BYTES + data.size + room)}
    return EncodedTensor.from_parts(fmt, plain.shape, plain.dtype, parts)


def entropy(codes: NDArray[np.integer]) -> float:
    """Bits of all the numbers by one histogram."""
    counts = np.unique(codes, return_counts=True)[1]
    return float((counts * np.log2(codes.size / counts)).sum())


def require_same(coded_: EncodedTensor, plain: EncodedTensor) -> None:
    """Everything that decoding gives, and every part but the codes, bit for bit."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(coded_.decode(dtype), plain.decode(dtype))
    assert torch.equal(coded_.all_codes().int(), plain.all_codes().int())
    assert coded_.parts().keys() == plain.parts().keys()
    for name, part in plain.parts().items():
        if name != "codes":
            assert torch.equal(part.reshape(-1).view(torch.uint8), coded_.parts()[name].reshape(-1).view(torch.uint8))


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Streams of 2^10 numbers, tiles of two of them, decoded in pieces of about a hundred; three threads."""
    monkeypatch.setattr(coded, "_TILE", 1 << 11)
    monkeypatch.setattr(coded, "_TOGETHER", 100)
    monkeypatch.setattr(coder, "_USUAL_STREAM_BITS", (10, 10))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_every_family_is_among_the_examples() -> None:
    found = {parse(text.format("64")).family for text in ELEMENTS}
    assert found | {GRID_FAMILY, VECTOR_FAMILY} == {*FAMILIES}
    assert BLOCK_FAMILY not in found


@pytest.mark.parametrize("method", ENTROPY_CODES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("text", ELEMENTS)
def test_codes_are_those_of_the_format_without_a_code(text: str, granularity: str, method: str) -> None:
    fmt = parse(text.format(granularity))
    for shape in SHAPES:
        weight = weights(shape, COLUMNS)
        plain, found = (encode_nearest(weight, one) for one in (fmt, parse(f"{fmt}+{method}")))
        require_same(found, plain)


@pytest.mark.parametrize("method", ENTROPY_CODES)
@pytest.mark.parametrize("text", OTHERS)
def test_a_code_goes_with_every_other_option(text: str, method: str) -> None:
    fmt = parse(text.format(method))
    weight = weights((40, 200), ROWS)
    require_same(encode_nearest(weight, fmt, seed=3), encode_nearest(weight, fmt.without_code, seed=3))


@pytest.mark.parametrize("method", ENTROPY_CODES)
@pytest.mark.parametrize("text", [*(text.format("8") for text in ELEMENTS), "grid3@tensor", "grid4.5@32:absmax"])
def test_parts_restore_the_tensor_and_are_all_that_is_counted(text: str, method: str) -> None:
    encoded = encode_nearest(weights((30, 64)), parse(f"{text}+{method}"))
    fmt = encoded.format.with_coded_bytes(encoded.codes.numel())
    assert parse(str(fmt)) == fmt
    assert fmt.is_grid or fmt.coded_bytes == encoded.codes.numel()
    for one in (fmt, encoded.format):
        again = EncodedTensor.from_parts(one, encoded.shape, encoded.dtype, encoded.parts())
        assert torch.equal(again.decode(), encoded.decode())
        assert again.nbytes == sum(part.numel() * part.element_size() for part in encoded.parts().values())
    planned = EncodedTensor.planned_parts(fmt, encoded.shape)
    assert {name: tuple(part.shape) for name, part in encoded.parts().items()} == {
        name: size for name, (_, size) in planned.items()
    }


@given(
    text=st.sampled_from([text.format(at) for text in ELEMENTS for at in GRANULARITIES]),
    method=st.sampled_from(ENTROPY_CODES),
    shape=st.lists(st.integers(0, 40), max_size=3).map(tuple),
    kind=st.sampled_from(["normal", "zeros", "constant", "rows", "columns", "lowest"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
def test_any_tensor_is_restored(text: str, method: str, shape: tuple[int, ...], kind: str, seed: int) -> None:
    weight = weights(shape, {"rows": ROWS, "columns": COLUMNS}.get(kind), seed)
    weight = {"zeros": torch.zeros(shape), "constant": torch.full(shape, 0.7), "lowest": -torch.ones(shape)}.get(
        kind, weight
    )
    plain, found = (encode_nearest(weight, parse(text + code)) for code in ("", f"+{method}"))
    require_same(found, plain)
    assert relative_rms_error(weight, found) == relative_rms_error(weight, plain)


@pytest.mark.parametrize("text", ["int4@64", "float6_e2m3@channel", "grid3@tensor", "grid4@64"])
@pytest.mark.parametrize("method", ENTROPY_CODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_the_fp32_values_rounded_once(text: str, method: str, dtype: torch.dtype) -> None:
    encoded = encode_nearest(weights((64, 300), COLUMNS), parse(f"{text}+{method}"))
    assert torch.equal(encoded.decode(dtype), encoded.decode().to(dtype))
    memory = torch.full((64 * 300,), 7.0, dtype=dtype)
    assert encoded.decode(dtype, out=memory).data_ptr() == memory.data_ptr()
    assert torch.equal(memory.view(64, 300), encoded.decode(dtype))


@pytest.mark.parametrize("text", ["int4@channel+rans", "grid3@tensor", "lloyd4@64+rans"])
def test_numbers_are_decoded_piece_by_piece_as_whole(text: str) -> None:
    encoded = encode_nearest(weights((70, 90), ROWS), parse(text))
    pieces = torch.cat([values for _, values in encoded.decoded_pieces()])
    assert torch.equal(pieces, encoded.decode().reshape(-1))


@pytest.mark.parametrize("axis", [ROWS, COLUMNS])
@pytest.mark.parametrize(
    "text", ["int4@tensor", "int6@tensor", "nf4@tensor", "float6_e2m3@tensor", "normal4@tensor:rms"]
)
def test_rows_and_columns_of_different_size_have_models_of_their_own(text: str, axis: int) -> None:
    """They take less than one histogram's entropy, and little more than what each line's own would."""
    weight = weights((512, 512), axis, spread=0.7)
    found, plain = (encode_nearest(weight, parse(text + code)) for code in ("+rans", ""))
    assert found.coded is not None
    codes = plain.all_codes().numpy().reshape(512, 512)
    whole, own = entropy(codes), sum(entropy(line) for line in (codes if axis == ROWS else codes.T))
    assert found.coded.axis == axis
    assert own < 8 * found.codes.numel() < whole - 0.6 * (whole - own)


@pytest.mark.parametrize("axis", [ROWS, COLUMNS])
def test_a_grid_of_lines_of_different_size_is_finer_than_one_histogram_allows(axis: int) -> None:
    encoded = encode_nearest(weights((512, 512), axis, spread=0.7), parse("grid4@tensor"))
    assert encoded.coded is not None
    assert encoded.coded.axis == axis
    assert encoded.coded.sequence is not None
    assert len(encoded.coded.sequence.models) > 1
    assert entropy(encoded.coded.indices.numpy()) > 4.25 * 512 * 512


def test_lines_that_are_alike_have_one_model() -> None:
    encoded = encode_nearest(weights((256, 256)), parse("int4@64+rans"))
    assert encoded.coded is not None
    assert encoded.coded.sequence is not None
    assert len(encoded.coded.sequence.models) == 1
    plain = encode_nearest(weights((256, 256)), parse("int4@64"))
    assert 8 * encoded.codes.numel() < 1.01 * entropy(plain.all_codes().numpy())
    assert encoded.nbytes < plain.nbytes


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("axis", [ROWS, COLUMNS, None])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", [(90, 70), (70, 90), (3, 2900), (2900, 3), (5, 8, 60)], ids=str)
def test_tiles_are_parts_of_the_whole(shape: tuple[int, ...], granularity: str, axis: int | None) -> None:
    """For every form of the code, whatever the scales: tiles cover the coded order once, and give the plain values."""
    for text in ("float6_e2m3@{}:absmax:fp32", "int4@{}", "int12@{}:absmax:fp32"):
        plain = encode_nearest(weights(shape, axis), parse(text.format(granularity)))
        for form in FORMS:
            found = recoded(plain, "rans", form)
            assert found.coded is not None
            tiles = found.coded.tiles()
            assert len(tiles) > 1
            assert [tile.start for tile in tiles] == [0, *(tile.stop for tile in tiles[:-1])]
            assert tiles[-1].stop == math.prod(shape)
            assert max(tile.stop - tile.start for tile in tiles) <= 1 << 12
            require_same(found, plain)
        require_same(recoded(plain, "huffman", None), plain)


@pytest.mark.parametrize("axis", [None, ROWS, COLUMNS])
@pytest.mark.parametrize("text", ["grid3@tensor", "grid3@channel", "grid4@16:absmax:e4m3", "int4@48:absmax:bf16+rans"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_door_of_the_gpu_kernel_gives_the_same_numbers(text: str, axis: int | None, dtype: torch.dtype) -> None:
    found = encode_nearest(weights((128, 160), axis, 3), parse(text))
    assert found.coded is not None
    out = torch.zeros(found.elements, dtype=dtype)
    [everything] = found.coded.tiles(at_once=True)
    decode_by_kernel(found.coded, everything, found.table, found.scale_values, found.grid, out)
    assert torch.equal(out.reshape(found.shape), found.decode(dtype))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("axis", [ROWS, COLUMNS, None])
@pytest.mark.parametrize("text", ["grid3@tensor", "grid4@channel", "grid5@64", "grid6@7:absmax", "grid9@16:rms:fp32"])
def test_tiles_of_grids_are_parts_of_the_whole(text: str, axis: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = encode_nearest(weights((90, 150), axis), parse(text))
    tiled = [encoded.decode(dtype) for dtype in (torch.float32, torch.bfloat16)]
    monkeypatch.setattr(coded, "_TILE", 1 << 22)
    monkeypatch.setattr(coded, "_TOGETHER", 1 << 22)
    whole = EncodedTensor.from_parts(encoded.format, encoded.shape, encoded.dtype, encoded.parts())
    assert torch.equal(whole.decode(), tiled[0])
    assert torch.equal(tiled[0].bfloat16(), tiled[1])
    pieces = [values for _, values in whole.decoded_pieces()]
    assert torch.equal(torch.cat(pieces), tiled[0].reshape(-1))


@pytest.mark.parametrize("text", ["int4@64+rans", "float6_e2m3@channel+rans", "nf4@tensor+huffman", "grid3@channel"])
def test_the_same_bytes_for_any_number_of_threads_and_every_time(text: str) -> None:
    weight, before = weights((700, 1000), COLUMNS), torch.get_num_threads()
    found = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        encoded = encode_nearest(weight, parse(text))
        found.append({**encoded.parts(), "decoded": encoded.decode()})
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(found[0][name], part) for name, part in other.items())


@pytest.mark.parametrize("method", ENTROPY_CODES)
@pytest.mark.parametrize("room", [0, 1, 1000])
def test_codes_may_have_more_room_than_they_need(method: str, room: int) -> None:
    plain = encode_nearest(weights((30, 40)), parse("int4@8"))
    found = recoded(plain, method, None, room)
    require_same(found, plain)
    size = found.codes.numel()
    again = encode_nearest(weights((30, 40)), parse(f"int4@8+{method}x{size}"))
    assert torch.equal(again.codes, found.codes)
    assert torch.equal(again.decode(), plain.decode())


@pytest.mark.parametrize("method", ENTROPY_CODES)
def test_codes_that_do_not_fit_the_planned_bytes_are_an_error(method: str) -> None:
    size = encode_nearest(weights((30, 40)), parse(f"int4@8+{method}")).codes.numel()
    with pytest.raises(BitmillError, match=f"{size} bytes where {size - 1} are planned"):
        encode_nearest(weights((30, 40)), parse(f"int4@8+{method}x{size - 1}"))


def test_the_part_is_a_length_a_code_and_zeros() -> None:
    codes = np.arange(12, dtype=np.int32).reshape(3, 4) % 5
    part = as_part(coded_bytes(codes, "rans"), 64).numpy()
    size = int.from_bytes(part[:8].tobytes(), "little")
    assert (part.size, size) == (64, coded_bytes(codes, "rans").size)
    assert decode(part[8 : 8 + size], 12).tolist() == codes.reshape(-1).tolist()
    assert not part[8 + size :].any()


def test_a_tensor_of_any_shape_has_no_codes_where_it_has_no_elements() -> None:
    for shape in [(0,), (3, 0), (0, 5), (2, 0, 4)]:
        encoded = encode_nearest(torch.zeros(shape), parse("int4@8+rans"))
        assert encoded.all_codes().numel() == 0
        assert encoded.decode().shape == shape


@pytest.mark.parametrize("text", ["int12@8:absmax:fp32+rans", "float16_e5m10@8+rans", "lloyd9@8+rans"])
def test_a_table_may_be_longer_than_the_codes_in_use(text: str) -> None:
    for weight in (torch.zeros(8, 16), -torch.ones(8, 16)):
        encoded = encode_nearest(weight, parse(text))
        pieces = torch.cat([values for _, values in encoded.decoded_pieces()])
        assert torch.equal(pieces, encoded.decode().reshape(-1))


def test_a_part_that_is_missing_is_an_invalid_checkpoint() -> None:
    for text in ("int4@8+rans", "int4@8+huffman", "grid3@tensor"):
        parts = encode_nearest(weights((4, 64)), parse(text)).parts()
        for name in parts:
            left = {other: part for other, part in parts.items() if other != name}
            with pytest.raises(InvalidCheckpoint, match=name):
                EncodedTensor.from_parts(parse(text), (4, 64), "F32", left)


def test_a_format_without_its_code_is_the_plain_one() -> None:
    for text in ("int4@8+rans", "nf4@64+outliers0.01+rotate+huffmanx77"):
        fmt = parse(text)
        assert fmt.without_code == parse(text.rpartition("+")[0])
        assert TensorFormat.with_coded_bytes(fmt, 5).coded_bytes == 5
