"""Entropy-coded bytes that nobody wrote: an error that says so, or the very numbers; no crash, hang or garbage.

Mutations are of two kinds: as they come, which checksums find, and with all checksums made right again, which is what
somebody would do who wants to reach the loops behind them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from core.errors import InvalidCheckpoint
from core.tensors.entropy import coder, decoder, layout
from core.tensors.entropy.classes import class_model
from core.tensors.entropy.coder import encode, encode_segments
from core.tensors.entropy.decoder import CodedSequence, decode
from core.tensors.entropy.huffman import huffman_decode, huffman_encode
from core.tensors.entropy.layout import Reader, Segment
from core.tensors.entropy.machine import has_wide_vectors
from core.tensors.entropy.matrix import decode_matrix, encode_matrix
from core.tensors.entropy.models import SymbolModel
from core.tensors.entropy.windows import histogram_model

Bytes = NDArray[np.uint8]
RANDOM = np.random.default_rng(5)
NORMAL = np.rint(RANDOM.standard_normal(3000) * 2).astype(np.int32)
TWO = np.append(NORMAL[:1500], RANDOM.integers(-400, 401, 700).astype(np.int32))
ESCAPING = SymbolModel(-2, 12, np.array([500, 900, 1200, 900, 500, 96]), has_escape=True)
KINDS: dict[str, tuple[NDArray[np.int32], Bytes]] = {
    "one lane": (NORMAL[:300], encode(NORMAL[:300], histogram_model(NORMAL))),
    "32 lanes": (NORMAL, encode_segments(NORMAL, [histogram_model(NORMAL)], [Segment(0, 3000)], 32, 10)),
    "escapes": (NORMAL, encode_segments(NORMAL, [ESCAPING], [Segment(0, 3000)], 32, 10)),
    "two models": (
        TWO,
        encode_segments(
            TWO, [histogram_model(TWO[:1500]), histogram_model(TWO[1500:])], [Segment(0, 1500), Segment(1, 700)], 32, 11
        ),
    ),
    "classes": (
        TWO,
        encode_segments(TWO, [class_model(0, 8), class_model(1, 56)], [Segment(0, 1500), Segment(1, 700)], 32, 11),
    ),
    "plain": (TWO[-60:], encode(TWO[-60:])),
    "constant": (np.full(60, 7, np.int32), encode(np.full(60, 7, np.int32))),
}


def outcome(data: Bytes, numbers: NDArray[np.int32], is_signed: bool) -> None:
    """Decodes: an error or the numbers; where checksums were made right, any numbers."""
    try:
        found = decode(data, numbers.size)
    except InvalidCheckpoint:
        return
    assert is_signed or np.array_equal(found, numbers)


def signed_again(data: Bytes) -> Bytes:
    """All checksums made right, as far as the bytes can be read."""
    try:
        reader = Reader(data)
        kind, count = (reader.byte(), reader.byte())[1], reader.varint(1 << 20, "count")
        if kind != layout.RANS:
            return layout.sealed(data[:-4].tobytes())
        plan, models, is_wide = layout.read_plan(reader, count)
        seed, columns = layout.checksum(data[: reader.at].copy()), 3 if any(m.has_escape for m in models) else 2
        for number, place in enumerate(layout.read_places(data, reader.at, plan, models, is_wide)):
            right = layout.checksum(data[place.states : place.end].copy(), seed)
            data[reader.at + 4 * columns * number + 4 :][:4].view("<u4")[:] = right
    except InvalidCheckpoint:
        pass
    return data


def mutated(data: Bytes, random: np.random.Generator) -> Bytes:
    """A copy with bits flipped, bytes replaced, a piece moved, cut off or added."""
    found, at = data.copy(), int(random.integers(data.size))
    if random.random() < 0.4:  # the head is where most can go wrong
        at = int(random.integers(min(data.size, 48)))
    what = random.integers(6)
    if what == 0:
        found[at] ^= np.uint8(1 << random.integers(8))
    elif what == 1:
        found[at : at + random.integers(1, 5)] = random.integers(256)
    elif what == 2:
        found = found[:at]
    elif what == 3:
        found = np.concatenate([found[:at], found[at + int(random.integers(1, 5)) :]])
    elif what == 4:
        found = np.insert(found, at, random.integers(0, 256, int(random.integers(1, 5)))).astype(np.uint8)
    else:
        other = int(random.integers(data.size))
        width = min(4, data.size - max(at, other))
        found[at : at + width] = data[other : other + width]
    return found


def fuzz(count: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    kinds = list(KINDS.values())
    for number in range(count):
        numbers, data = kinds[number % len(kinds)]
        damaged, is_signed = mutated(data, random), number // len(kinds) % 2 == 1
        outcome(signed_again(damaged) if is_signed else damaged, numbers, is_signed)


@pytest.mark.parametrize("seed", [1, 2])
def test_two_thousand_mutations_give_an_error_or_the_numbers(seed: int) -> None:
    fuzz(1000, seed)


@pytest.mark.slow
def test_a_hundred_thousand_mutations_give_an_error_or_the_numbers() -> None:
    fuzz(100_000, 3)


def test_portable_loops_stand_mutations_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (coder, decoder):
        monkeypatch.setattr(module, "has_wide_vectors", lambda: False)
    fuzz(1000, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_byte_changed_anywhere_or_data_cut_anywhere_is_an_error(kind: str) -> None:
    numbers, data = KINDS[kind]
    places = range(data.size) if data.size < 200 else [*range(120), *range(120, data.size, 17), data.size - 1]
    for at in places:
        changed = data.copy()
        changed[at] ^= 0x10
        for damaged in (changed, data[:at], np.append(data, changed[: at + 1])):
            with pytest.raises(InvalidCheckpoint):
                decode(damaged, numbers.size)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [0, 1, -1, 1 << 40])
def test_another_number_of_integers_than_expected_is_an_error(kind: str, count: int) -> None:
    numbers, data = KINDS[kind]
    with pytest.raises(InvalidCheckpoint, match="are expected"):
        CodedSequence.parse(data, numbers.size + count if abs(count) == 1 else count)


def crafted(change: Callable[[Bytes, list[Any]], None]) -> Bytes:
    """The 32-lane case with something changed and the checksums made right."""
    data = KINDS["32 lanes"][1].copy()
    sequence = CodedSequence.parse(data, 3000)
    change(data, sequence.places)
    return signed_again(data)


def test_a_state_that_no_encoder_leaves_is_an_error() -> None:
    def change(data: Bytes, places: list[Any]) -> None:
        data[places[1].states : places[1].states + 4].view("<u4")[:] = 0xFFFF

    with pytest.raises(InvalidCheckpoint, match="state of stream 1"):
        decode(crafted(change), 3000)


@pytest.mark.parametrize("is_last", [False, True])
def test_words_that_lead_elsewhere_are_an_error(is_last: bool) -> None:
    def change(data: Bytes, places: list[Any]) -> None:
        place = places[-1 if is_last else 0]
        data[place.words : place.stop] = 0  # states stay small, and ask for word after word

    with pytest.raises(InvalidCheckpoint, match=r"ends early|does not end where it should"):
        decode(crafted(change), 3000)


def test_a_checksum_names_the_stream() -> None:
    data = KINDS["32 lanes"][1].copy()
    data[-6] ^= 1
    with pytest.raises(InvalidCheckpoint, match="stream 2"):
        decode(data, 3000)


def test_streams_that_are_whole_are_read_though_another_one_is_damaged() -> None:
    data = KINDS["32 lanes"][1].copy()
    data[-6] ^= 1
    out = np.zeros(2048, np.int32)
    CodedSequence.parse(data, 3000).decode(out)
    assert np.array_equal(out, NORMAL[:2048])


@pytest.mark.skipif(not has_wide_vectors(), reason="needs AVX-512 with VBMI2")
def test_vectors_read_no_further_than_the_data_though_the_last_stream_asks_for_more() -> None:
    """Four streams at once, the last of which meets zeros: it must stop within the copy of the data's end."""
    numbers = np.rint(np.random.default_rng(1).standard_normal(1 << 14) * 30).astype(np.int32)
    data = encode_segments(numbers, [histogram_model(numbers)], [Segment(0, numbers.size)], 32, 12)
    places = CodedSequence.parse(data, numbers.size).places
    data[places[-1].words : places[-1].stop] = 0
    with pytest.raises(InvalidCheckpoint, match=r"ends early|does not end"):
        decode(signed_again(data), numbers.size)


def test_unknown_versions_and_kinds_are_refused() -> None:
    for at, match in ((0, "version"), (1, "kind")):
        data = KINDS["32 lanes"][1].copy()
        data[at] = 9
        with pytest.raises(InvalidCheckpoint, match=match):
            decode(data, 3000)


def test_a_few_bytes_do_not_ask_for_much_memory() -> None:
    """2^40 numbers of one symbol, in streams that are not there."""
    head = layout.head(layout.RANS, 1 << 40) + bytes([5 + 8 * 24, 2, 2, 0, 12 + 16, 0])
    data = np.frombuffer(bytearray(head + bytes(400 - len(head))), np.uint8)
    with pytest.raises(InvalidCheckpoint, match="streams"):
        CodedSequence.parse(data, 1 << 40)


@pytest.mark.parametrize("axis", [0, 1])
def test_damaged_matrices_are_errors(axis: int) -> None:
    scales = np.repeat([0.4, 3.0], 8)
    codes = np.rint(RANDOM.standard_normal((400, 16)) * scales).astype(np.int32)
    codes = codes if axis else np.ascontiguousarray(codes.T)
    data = encode_matrix(codes, axis)
    for at in [*range(80), *range(80, data.size, 13)]:
        changed = data.copy()
        changed[at] ^= 1
        for damaged in (changed, data[:at]):
            with pytest.raises(InvalidCheckpoint):
                decode_matrix(damaged, codes.shape)


def test_damaged_huffman_codes_are_errors() -> None:
    data = huffman_encode(NORMAL)
    assert np.array_equal(huffman_decode(data, NORMAL.size), NORMAL)
    for at in range(data.size):
        changed = data.copy()
        changed[at] ^= 4
        for damaged in (changed, data[:at]):
            with pytest.raises(InvalidCheckpoint):
                huffman_decode(damaged, NORMAL.size)
        outcome_of_huffman(layout.sealed(changed[:-4].tobytes()))


def outcome_of_huffman(data: Bytes) -> None:
    with suppress(InvalidCheckpoint):
        assert huffman_decode(data, NORMAL.size).size == NORMAL.size
