"""What decoding on a GPU promises, run by `test_gpu_entropy` in a process of its own: in the interpreter, or on a GPU.

The oracle of numbers is what was encoded; that of values is a matrix indexed and multiplied in torch, and that of
damage is the decoder for CPUs.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from core.errors import InvalidCheckpoint
from core.tensors.blocks import BlockGrid
from core.tensors.entropy import layout
from core.tensors.entropy.coder import encode, encode_segments
from core.tensors.entropy.decoder import CodedSequence, decode
from core.tensors.entropy.layout import Reader, Segment
from core.tensors.entropy.matrix import CodedMatrix, encode_matrix
from core.tensors.entropy.models import SymbolModel
from core.tensors.entropy.windows import histogram_model
from core.tensors.kernels import gpu_entropy
from core.tensors.kernels.gpu_entropy import Target, decode_codes, dequantise, launch_of, number_records, value_records

Bytes = NDArray[np.uint8]
Numbers = NDArray[np.int32]
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if IS_INTERPRETED else "cuda")
ESCAPING = SymbolModel(-2, 12, np.array([500, 900, 1200, 900, 500, 96]), has_escape=True)
OUTPUTS = (torch.float32, torch.bfloat16, torch.float16)


def normal(count: int, std: float, seed: int = 0) -> Numbers:
    drawn: NDArray[np.float64] = np.random.default_rng(seed).standard_normal(count)
    return np.rint(drawn * std).astype(np.int32)


def coded(codes: Numbers, *models: SymbolModel, counts: tuple[int, ...] = (), lanes: int = 32) -> CodedSequence:
    """In streams of 2^10, the first shape that has several of them; segments take models in turn."""
    used = models or (histogram_model(codes),)
    segments = [Segment(i % len(used), count) for i, count in enumerate(counts or (codes.size,))]
    return CodedSequence.parse(encode_segments(codes, used, segments, lanes, 10), codes.size)


def everything(sequence: CodedSequence) -> range:
    return range(len(sequence.places))


def decoded(sequence: CodedSequence, dtype: torch.dtype = torch.int32) -> list[int]:
    return list(decode_codes(sequence, DEVICE, everything(sequence), dtype).cpu().tolist())


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names the kernels that are launched."""
    names: list[str] = []
    run = gpu_entropy.StreamsLaunch.run

    def noted(self: gpu_entropy.StreamsLaunch) -> None:
        names.append(self.kernel)
        run(self)

    monkeypatch.setattr(gpu_entropy.StreamsLaunch, "run", noted)
    return names


@given(
    low=st.integers(-(2**31), 2**31 - 5000),
    size=st.one_of(st.integers(2, 40), st.sampled_from([64, 65, 255, 256, 257, 600, 4096])),
    lanes=st.sampled_from([1, 2, 4, 8, 16, 32]),
    steps=st.integers(1, 20),
    short=st.integers(0, 31),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_any_numbers_come_back(low: int, size: int, lanes: int, steps: int, short: int, seed: int) -> None:
    count = max(steps * lanes - short % lanes, 1)
    codes = (low + np.random.default_rng(seed).integers(0, size, count)).astype(np.int32)
    model = SymbolModel(low, 15, frequencies(size, seed))
    assert decoded(coded(codes, model, lanes=lanes)) == codes.tolist()


def frequencies(size: int, seed: int) -> NDArray[np.int64]:
    """Positive ones that add up to 2^15."""
    found = 1 + np.random.default_rng(seed).multinomial((1 << 15) - size, np.full(size, 1 / size))
    return np.asarray(found, np.int64)


@pytest.mark.parametrize("precision", [10, 12, 14])
def test_any_precision_is_decoded(precision: int, launched: list[str]) -> None:
    shares = np.array([1, 2, 4, 6, 2, 1], np.int64) * (1 << precision) // 16
    codes = np.clip(normal(200, 1.2), -3, 2)
    assert decoded(coded(codes, SymbolModel(-3, precision, shares))) == codes.tolist()
    assert launched == ["streams_kernel"]


def test_a_model_of_one_symbol_uses_no_words() -> None:
    codes = np.full(70, -5, np.int32)
    assert decoded(coded(codes, SymbolModel(-5, 15, np.array([1 << 15])))) == codes.tolist()


@pytest.mark.parametrize("dtype", gpu_entropy.NUMBERS)
@pytest.mark.parametrize("count", [2048, 1500])
def test_streams_follow_each_other_in_every_dtype(dtype: torch.dtype, count: int) -> None:
    codes = normal(count, 20.0)
    assert decoded(coded(codes), dtype) == codes.tolist()


def test_some_streams_give_their_numbers() -> None:
    codes = normal(3500, 3.0)
    sequence = coded(codes)
    assert decode_codes(sequence, DEVICE, range(1, 3)).tolist() == codes[1024:3072].tolist()
    assert decode_codes(sequence, DEVICE, range(3, 4)).tolist() == codes[3072:].tolist()
    assert decode_codes(sequence, DEVICE, range(2, 2)).tolist() == []
    with pytest.raises(ValueError, match="of 4"):
        decode_codes(sequence, DEVICE, range(2, 5))


@pytest.mark.parametrize("lanes", [4, 32])
def test_segments_use_their_models(lanes: int) -> None:
    parts = [normal(100, 1.0), normal(33, 90.0, seed=1), normal(1, 1.0, seed=2), normal(150, 300.0, seed=3)]
    codes = np.concatenate(parts)
    models = [histogram_model(np.concatenate(parts[::2])), histogram_model(np.concatenate(parts[1::2]))]
    assert decoded(coded(codes, *models, counts=(100, 33, 1, 150), lanes=lanes)) == codes.tolist()


@pytest.mark.parametrize("dtype", gpu_entropy.NUMBERS)
def test_escaped_numbers_stand_in_their_places(dtype: torch.dtype) -> None:
    codes = np.concatenate([normal(1400, 3.0), normal(100, 1.0), normal(90, 3.0, seed=4)])
    models = (ESCAPING, histogram_model(codes[1400:1500]))
    sequence = coded(codes, *models, counts=(1400, 100, 90))
    assert decoded(sequence, dtype) == codes.tolist()
    first = sequence.firsts[1]
    assert decode_codes(sequence, DEVICE, range(1, 2), dtype).tolist() == codes[first:].tolist()


def test_the_last_symbol_of_a_model_stands_for_escaped_numbers_at_the_edge_of_a_dtype() -> None:
    codes = np.array([127, 126, -128, 5, 127, 126] * 10, np.int32)
    model = SymbolModel(126, 10, np.array([400, 400, 224]), has_escape=True)
    assert decoded(coded(codes, model), torch.int8) == codes.tolist()


@pytest.mark.parametrize("codes", [np.full(60, 7, np.int32), np.array([9, -300, 4], np.int32), np.zeros(0, np.int32)])
def test_kinds_without_streams_are_decoded_too(codes: Numbers, launched: list[str]) -> None:
    assert decoded(CodedSequence.parse(encode(codes), codes.size)) == codes.tolist()
    assert launched == []


def test_numbers_that_do_not_fit_are_an_error() -> None:
    with pytest.raises(InvalidCheckpoint, match="do not fit int8"):
        decoded(coded(normal(100, 200.0)), torch.int8)
    with pytest.raises(InvalidCheckpoint, match="escaped numbers that do not fit int8"):
        decoded(coded(np.array([0, 1, 700], np.int32), ESCAPING), torch.int8)


CODES = normal(400, 3.0)
WHOLE = encode_segments(CODES, [histogram_model(CODES)], [Segment(0, CODES.size)], 32, 10)
ESCAPED = encode_segments(CODES, [ESCAPING], [Segment(0, CODES.size)], 32, 10)


def opened(data: Bytes) -> tuple[int, layout.Place]:
    """Where the directory begins, and the place of the only stream."""
    reader = Reader(data)
    count = (reader.byte(), reader.byte(), reader.varint(1 << 20, "count"))[2]
    plan, models, is_wide = layout.read_plan(reader, count)
    return reader.at, layout.read_places(data, reader.at, plan, models, is_wide)[0]


def rebuilt(data: Bytes, states: Bytes, words: Bytes, escaped: Bytes) -> Bytes:
    """The same head over another stream, its checksum right."""
    at, place = opened(data)
    body = np.concatenate([states, escaped, words])
    body = np.concatenate([body, np.zeros(-body.size % 4, np.uint8)])
    row = [words.size // 2, layout.checksum(body, layout.checksum(data[:at].copy()))]
    if place.states - at == 12:
        row.append(escaped.size // 2)
    return np.concatenate([data[:at], np.array(row, "<u4").view(np.uint8), body])


def changed(data: Bytes, change: Callable[[Bytes, Bytes, Bytes], tuple[Bytes, Bytes, Bytes]]) -> Bytes:
    _, place = opened(data)
    parts = data[place.states : place.escapes], data[place.words : place.stop], data[place.escapes : place.words]
    return rebuilt(data, *change(*(part.copy() for part in parts)))


def flipped(part: Bytes, at: int, bit: int = 0) -> Bytes:
    part[at] ^= 1 << bit
    return part


DAMAGE: dict[str, tuple[Bytes, Callable[[Bytes, Bytes, Bytes], tuple[Bytes, Bytes, Bytes]]]] = {
    "a word is another": (WHOLE, lambda states, words, escaped: (states, flipped(words, 20), escaped)),
    "words are missing": (WHOLE, lambda states, words, escaped: (states, words[:-8], escaped)),
    "there are no words": (WHOLE, lambda states, words, escaped: (states, words[:0], escaped)),
    "a word is left": (WHOLE, lambda states, words, escaped: (states, np.append(words, words[:2]), escaped)),
    "very many are left": (WHOLE, lambda states, words, escaped: (states, np.tile(words, 50), escaped)),
    "a state is another": (WHOLE, lambda states, words, escaped: (flipped(states, 41), words, escaped)),
    "a state is too small": (WHOLE, lambda states, words, escaped: (states * 0, words, escaped)),
    "an escaped number is missing": (ESCAPED, lambda states, words, escaped: (states, words, escaped[:-2])),
    "escaped numbers are left": (ESCAPED, lambda states, words, escaped: (states, words, np.tile(escaped, 2))),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_raises_what_the_cpu_raises(damage: str) -> None:
    data = changed(*DAMAGE[damage])
    with pytest.raises(InvalidCheckpoint) as expected:
        decode(data, CODES.size)
    with pytest.raises(InvalidCheckpoint) as found:
        decoded(CodedSequence.parse(data, CODES.size))
    assert str(found.value) == str(expected.value)


def test_a_wrong_checksum_is_found_before_anything_runs(launched: list[str]) -> None:
    data = flipped(WHOLE.copy(), WHOLE.size - 6)
    with pytest.raises(InvalidCheckpoint, match="checksum of stream 0"):
        decoded(CodedSequence.parse(data, CODES.size))
    assert launched == []


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=15, deadline=None)
def test_bytes_of_any_kind_give_what_the_cpu_gives(seed: int) -> None:
    """Checksums made right over bits flipped anywhere in the stream: an error in both, or the same numbers."""
    random = np.random.default_rng(seed)

    def change(*parts: Bytes) -> tuple[Bytes, Bytes, Bytes]:
        states, words, escaped = parts
        for _ in range(random.integers(1, 4)):
            part = states if random.random() < 0.5 else words
            flipped(part, int(random.integers(part.size)), int(random.integers(8)))
        return states, words[: words.size - 2 * int(random.integers(0, 3))], escaped

    sequence = CodedSequence.parse(changed(WHOLE, change), CODES.size)
    expected = outcome(lambda: decode(sequence.data, CODES.size).tolist())
    assert outcome(lambda: decoded(sequence)) == expected


def outcome(work: Callable[[], list[int]]) -> list[int] | str:
    try:
        return work()
    except InvalidCheckpoint as error:
        return str(error)


def reference(
    codes: Numbers, shape: tuple[int, int], values: torch.Tensor, low: int, factors: torch.Tensor, width: int
) -> torch.Tensor:
    """Values in fp32 of a matrix whose rows are cut into blocks."""
    places = (torch.from_numpy(codes.astype(np.int64)) - low).clamp(0, values.numel() - 1)
    looked_up = values[places].reshape(shape)
    if factors.numel() == 1:
        return (looked_up * factors).reshape(-1)
    per_row = factors.reshape(shape[0], -1)
    return (looked_up * per_row.repeat_interleave(width, dim=1)[:, : shape[1]]).reshape(-1)


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.cpu().view(torch.int32 if values.dtype is torch.float32 else torch.int16)


GRIDS = {
    "one factor": ((6, 70), 70, True),
    "blocks fill rows": ((5, 96), 32, False),
    "small blocks": ((7, 64), 8, False),
    "rows": ((6, 70), 70, False),
    "thirds of rows": ((4, 120), 40, False),
    "ragged": ((4, 100), 32, False),
    "ragged and odd": ((4, 100), 30, False),
}
LOW = -9


@pytest.mark.parametrize("dtype", OUTPUTS)
@pytest.mark.parametrize("grid", GRIDS)
def test_values_are_those_of_the_reference_bit_for_bit(grid: str, dtype: torch.dtype, launched: list[str]) -> None:
    shape, width, is_one = GRIDS[grid]
    codes, (values, factors) = normal(math.prod(shape), 3.0), scaled(shape, width, is_one)
    expected = reference(codes, shape, values, LOW, factors, width).to(dtype)
    out = torch.empty(codes.size, dtype=dtype, device=DEVICE)
    sequence = coded(codes)
    dequantise(sequence, everything(sequence), out, values.to(DEVICE), LOW, factors.to(DEVICE), shape[1], width)
    assert torch.equal(bits(out), bits(expected))
    assert launched == ["streams_kernel"]


def scaled(shape: tuple[int, int], width: int, is_one: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Values of 15 numbers, so that some are beyond either end, and factors from denormal to overflowing ones."""
    random = torch.Generator().manual_seed(3)
    blocks = 1 if is_one else shape[0] * -(-shape[1] // width)
    powers = torch.randint(-140, 60, (blocks,), generator=random)
    factors = torch.ldexp(1 + torch.rand(blocks, generator=random), powers)
    factors[0] = 1.37
    return torch.randn(15, generator=random), factors


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("grid", GRIDS)
def test_lines_in_an_order_of_their_own_come_to_their_rows_or_columns(
    grid: str, axis: int, launched: list[str]
) -> None:
    shape, width, is_one = GRIDS[grid]
    shape = (33, shape[1] // 3) if axis else shape  # lines of 32 numbers and more
    matrix = normal(math.prod(shape), 3.0).reshape(shape)
    order = np.random.default_rng(2).permutation(shape[axis])
    lines = np.ascontiguousarray((matrix.T if axis else matrix)[order])
    assert_values(coded(lines.reshape(-1)), matrix, width, is_one, order, axis)
    assert launched == ["streams_kernel"]


@pytest.mark.parametrize("axis", [0, 1])
def test_coded_matrices_with_classes_come_to_their_rows_or_columns(axis: int, launched: list[str]) -> None:
    shape = (8, 160)[:: 1 - 2 * axis]
    stds = 40.0 ** (np.arange(8) % 2)
    turned = normal(math.prod(shape), 1.0).reshape(8, 160) * stds[:, None]
    matrix = (turned.T if axis else turned).astype(np.int32)
    found = CodedMatrix.parse(encode_matrix(matrix, axis), (shape[0], shape[1]))
    assert len(found.sequence.models) > 1
    assert_values(found.sequence, matrix, 3, False, found.order, axis)
    assert launched == ["streams_kernel"]


def assert_values(
    sequence: CodedSequence, matrix: Numbers, width: int, is_one: bool, order: NDArray[np.int64], axis: int
) -> None:
    shape, dtype = (matrix.shape[0], matrix.shape[1]), torch.bfloat16
    width = min(width, shape[1])
    values, factors = scaled(shape, width, is_one)
    expected = reference(matrix.reshape(-1), shape, values, LOW, factors, width).to(dtype)
    out, placed = torch.empty(matrix.size, dtype=dtype, device=DEVICE), torch.from_numpy(order.astype(np.int32))
    tensors = values.to(DEVICE), LOW, factors.to(DEVICE), shape[1], width, placed.to(DEVICE)
    dequantise(sequence, everything(sequence), out, *tensors, axis)
    assert torch.equal(bits(out), bits(expected))


def test_streams_write_only_their_own_elements() -> None:
    codes = normal(3000, 2.0)
    sequence, out = coded(codes), torch.full((3000,), -1.0, device=DEVICE)
    values, factors = torch.arange(20.0, device=DEVICE), torch.ones(1, device=DEVICE)
    dequantise(sequence, range(1, 2), out, values, LOW, factors, 100, 100)
    expected = torch.full((3000,), -1.0)
    expected[1024:2048] = torch.from_numpy(codes[1024:2048] - LOW).float()
    assert torch.equal(out.cpu(), expected)


@pytest.mark.parametrize("what", ["escapes", "short lines", "plain"])
def test_what_the_kernel_does_not_take_gives_the_same_values(what: str) -> None:
    shape = (80, 5)
    codes = CODES if what != "plain" else np.random.default_rng(0).permutation(400).astype(np.int32)
    data = {"escapes": ESCAPED, "short lines": WHOLE}.get(what)
    sequence = CodedSequence.parse(encode(codes) if data is None else data, codes.size)
    values, factors = scaled(shape, 2, False)
    expected = reference(codes, shape, values, LOW, factors, 2).to(torch.float16)
    out = torch.empty(codes.size, dtype=torch.float16, device=DEVICE)
    dequantise(sequence, everything(sequence), out, values.to(DEVICE), LOW, factors.to(DEVICE), 5, 2)
    assert torch.equal(bits(out), bits(expected))


def test_damage_of_values_is_found_too() -> None:
    data = changed(*DAMAGE["a word is left"])
    out, ones = torch.empty(CODES.size, device=DEVICE), torch.ones(1, device=DEVICE)
    with pytest.raises(InvalidCheckpoint, match="does not end where it should"):
        dequantise(CodedSequence.parse(data, CODES.size), range(1), out, ones, 0, ones, 20, 20)


@pytest.mark.parametrize(
    ("sizes", "match"),
    [
        ({"out": 399}, "399"),
        ({"columns": 30}, "rows of 30"),
        ({"factors": 7}, "7 factors"),
        ({"order": 19}, "order"),
    ],
)
def test_sizes_that_do_not_agree_are_refused(sizes: dict[str, int], match: str) -> None:
    tensors = {"out": 400, "columns": 20, "factors": 20, "order": 20} | sizes
    out, factors = (torch.ones(tensors[name], device=DEVICE) for name in ("out", "factors"))
    order = torch.arange(tensors["order"], dtype=torch.int32, device=DEVICE)
    sequence = CodedSequence.parse(WHOLE, CODES.size)
    with pytest.raises(ValueError, match=match):
        dequantise(sequence, range(1), out, factors, 0, factors, tensors["columns"], 20, order)


def test_blocks_are_those_of_a_grid() -> None:
    """What `BlockGrid.kernel_blocks` says means the same to the kernel."""
    for grid in (BlockGrid(480, 96, 32), BlockGrid(400, 100, 32), BlockGrid(420, 420, 420, one_scale=True)):
        codes, factors = normal(grid.elements, 3.0), 1 + torch.arange(grid.blocks, dtype=torch.float32)
        out = torch.empty(grid.elements, device=DEVICE)
        sequence, values = coded(codes), torch.arange(-20.0, 21.0)
        columns, width = grid.kernel_blocks
        dequantise(sequence, everything(sequence), out, values.to(DEVICE), -20, factors.to(DEVICE), columns, width)
        wanted = grid.from_blocks(grid.to_blocks(torch.from_numpy(codes).float()) * factors[:, None])
        assert torch.equal(out.cpu(), wanted)


@pytest.mark.skipif(IS_INTERPRETED, reason="the interpreter has no PTX")
@pytest.mark.parametrize("dtype", [*gpu_entropy.NUMBERS, *OUTPUTS])
def test_both_forms_of_the_vote_give_the_same_bits(dtype: torch.dtype) -> None:
    codes = normal(1 << 18, 3.0)
    sequence = coded(codes)
    results: list[Any] = []
    for is_inline in (True, False):
        out = torch.empty(codes.size, dtype=dtype, device=DEVICE)
        target = Target(out, torch.ones(codes.size // 64, device=DEVICE), 64, 64)
        records = (
            number_records(sequence.models, out)
            if dtype in gpu_entropy.NUMBERS
            else value_records(sequence.models, torch.arange(-20.0, 21.0, device=DEVICE), -20)
        )
        launch, ended = launch_of(sequence, everything(sequence), 0, records, target, is_inline=is_inline)
        launch.run()
        results += [out, ended]
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])
    assert results[0].float().cpu().tolist() == codes.tolist()
