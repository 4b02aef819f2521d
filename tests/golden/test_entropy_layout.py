"""Entropy-coded bytes of version 1, pinned, and read here by a decoder written from the documentation alone.

`entropy_v1.json` holds two kinds of entries. `reference`: the worked example of the 32-lane layout, computed apart from
this code (frequencies, alias tables, final states, words). `pinned`: bytes that this code wrote
(`python -m tests.golden.test_entropy_layout`), which every later version reads and writes the same way. `classes`:
frequencies that follow from a family and a deviation, some in full, and the checksum of all.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from core.tensors.entropy.classes import CLASSES, LAPLACE, NORMAL, class_model
from core.tensors.entropy.coder import encode, encode_segments
from core.tensors.entropy.decoder import decode
from core.tensors.entropy.layout import VERSION, Segment
from core.tensors.entropy.loops_jit import decode_steps, encode_steps
from core.tensors.entropy.matrix import encode_matrix
from core.tensors.entropy.models import SymbolModel

FILE = Path(__file__).with_name("entropy_v1.json")
MASK = 0xFFFFFFFF


def numbers(count: int, spread: int) -> list[int]:
    """Sums of a recurrence, about Normal, so that no generator of random numbers decides them."""
    values, state = [], 1
    for _ in range(count):
        total = 0
        for _ in range(4):
            state = state * 75 % 65537
            total += state - 32768
        values.append(round(total * spread / 65536))
    return values


NARROW = SymbolModel(-3, 12, np.array([1, 40, 900, 2214, 900, 40, 1]))
WIDE = SymbolModel(-300, 14, np.array([27] * 100 + [28] * 400 + [27] * 90 + [54]), has_escape=True)
CASES: dict[str, tuple[list[int], list[SymbolModel], list[Segment], int, int]] = {
    "one lane": ([0, -1, 3, 0, 0, 1, -2], [NARROW], [Segment(0, 7)], 1, 10),
    "four lanes, two streams": (numbers(1100, 1), [NARROW], [Segment(0, 1100)], 4, 10),
    "32 lanes, two models, escapes": (
        [*numbers(70, 1), *numbers(50, 200), 1000, -70000, 0],
        [NARROW, WIDE],
        [Segment(0, 70), Segment(1, 53)],
        32,
        10,
    ),
    "two classes": (
        [*numbers(300, 2), *numbers(100, 30), 5000],
        [class_model(NORMAL, 3), class_model(LAPLACE, 30)],
        [Segment(0, 300), Segment(1, 101)],
        4,
        10,
    ),
}
ALL_CLASSES = [(family, k) for family in (NORMAL, LAPLACE) for k in CLASSES]
GOLDEN: dict[str, Any] = json.loads(FILE.read_text())
REFERENCE, PINNED, NAMED = GOLDEN["reference"], GOLDEN["pinned"], GOLDEN["classes"]


def written() -> dict[str, str]:
    """What this version writes."""
    found = {"constant": encode(np.full(1000, -5)), "empty": encode(np.zeros(0, np.int8))}
    found["plain"] = encode(np.arange(37) * 54321 % 37)
    for name, (values, models, segments, lanes, stream_bits) in CASES.items():
        found[name] = encode_segments(np.array(values), models, segments, lanes, stream_bits)
    return {name: data.tobytes().hex() for name, data in found.items()}


def expected() -> dict[str, list[int]]:
    simple = {"constant": [-5] * 1000, "empty": [], "plain": [i * 54321 % 37 for i in range(37)]}
    return simple | {name: case[0] for name, case in CASES.items()}


def test_the_pinned_version_is_the_current_one() -> None:
    assert VERSION == 1
    assert PINNED.keys() == expected().keys()


@pytest.mark.parametrize("name", expected())
def test_encoding_writes_the_pinned_bytes(name: str) -> None:
    assert written()[name] == PINNED[name]


@pytest.mark.parametrize("name", expected())
def test_pinned_bytes_are_decoded(name: str) -> None:
    values = expected()[name]
    assert decode(bytes.fromhex(PINNED[name]), len(values)).tolist() == values


@pytest.mark.parametrize("name", expected())
def test_a_reader_written_from_the_documentation_agrees(name: str) -> None:
    assert Documented(bytes.fromhex(PINNED[name])).numbers() == expected()[name]


@pytest.mark.parametrize("entry", NAMED["some"], ids=lambda entry: f"{entry['family']}, {entry['k']}")
def test_frequencies_of_classes_are_the_pinned_ones(entry: dict[str, Any]) -> None:
    model = class_model(entry["family"], entry["k"])
    assert model.precision == entry["P"]
    assert model.low == -(model.size // 2 - 1)
    assert model.frequencies.tolist() == entry["frequencies"]


def test_frequencies_of_all_classes_have_the_pinned_checksum() -> None:
    """Of 16 bits each, the lower byte first, Normal classes before those of Laplace."""
    data = b"".join(class_model(family, k).frequencies.astype("<u2").tobytes() for family, k in ALL_CLASSES)
    assert xxh32(data, 0) == NAMED["xxh32"]


@pytest.mark.parametrize("family", [NORMAL, LAPLACE])
def test_frequencies_of_classes_are_those_of_floating_point(family: int) -> None:
    for k in CLASSES:
        low, precision, frequencies, has_escape = named(family, k)
        model = class_model(family, k)
        assert (model.low, model.precision, model.has_escape) == (low, precision, has_escape)
        assert model.frequencies.tolist() == frequencies


def test_a_matrix_says_how_its_columns_are_grouped() -> None:
    data = encode_matrix(np.zeros((5, 6), np.int8), width=2).tobytes()
    assert data[:3] == bytes([1, 4, 2])
    assert Documented(data[4 : 4 + data[3]]).numbers() == [0, 0, 0]
    at = (4 + data[3] + 3) // 4 * 4
    assert int.from_bytes(data[at : at + 4], "little") == xxh32(data[:at], 0)
    assert Documented(data[at + 4 :]).numbers() == [0] * 30


def reference_model() -> SymbolModel:
    return SymbolModel(0, REFERENCE["P"], np.array(REFERENCE["freq"]))


def test_alias_tables_are_those_of_the_worked_example() -> None:
    thresholds, aliases, own, other, frequencies = reference_model().tables.alias.tolist()
    assert thresholds == REFERENCE["thr"]
    assert aliases == REFERENCE["alias"]
    assert own == REFERENCE["own_add"]
    assert other == [value % 65536 for value in REFERENCE["alias_add"]]
    assert frequencies == REFERENCE["freq"] + [0] * 23


def test_the_worked_example_is_encoded_to_its_states_and_words() -> None:
    model, symbols = reference_model(), np.array(REFERENCE["symbols"], np.uint8)
    states, words = np.full(32, 1 << 16, np.uint32), np.zeros(2 * symbols.size, np.uint8)
    tables = (model.tables.frequencies, model.tables.bases, model.tables.slots)
    at = encode_steps(symbols, symbols.size // 32, states, model.precision, *tables, words, words.size)
    assert [f"{state:08x}" for state in states.tolist()] == REFERENCE["states"]
    assert [f"{word:04x}" for word in words[at:].view("<u2").tolist()] == REFERENCE["words"]


def test_the_worked_example_is_decoded_and_all_is_used_up() -> None:
    model, count = reference_model(), len(REFERENCE["symbols"])
    states = np.array([int(state, 16) for state in REFERENCE["states"]], np.uint32)
    words = np.array([int(word, 16) for word in REFERENCE["words"]], "<u2").view(np.uint8)
    out = np.zeros(count, np.uint8)
    tables = (model.precision, model.tables.entries, model.tables.frequencies)
    assert decode_steps(words, 0, states, *tables, 0, out, 0, count) == words.size
    assert out.tolist() == REFERENCE["symbols"]
    assert set(states.tolist()) == {1 << 16}


def test_the_worked_example_has_the_bits_that_its_model_gives_it() -> None:
    costs = reference_model().costs
    ideal = sum(costs[symbol] for symbol in REFERENCE["symbols"])
    states = sum(np.log2(int(state, 16)) - 16 for state in REFERENCE["states"])
    assert ideal == pytest.approx(REFERENCE["ideal_bits"], abs=1e-6)
    assert 16 * len(REFERENCE["words"]) + states == pytest.approx(ideal, abs=1e-3)


def xxh32(data: bytes, seed: int) -> int:
    """The public specification, step by step."""
    p1, p2, p3, p4, p5 = 2654435761, 2246822519, 3266489917, 668265263, 374761393

    def rotl(value: int, by: int) -> int:
        return ((value << by) | (value >> (32 - by))) & MASK

    at, total = 0, (seed + p5) & MASK
    if len(data) >= 16:
        lanes = [(seed + p1 + p2) & MASK, (seed + p2) & MASK, seed, (seed - p1) & MASK]
        while at + 16 <= len(data):
            for i in range(4):
                word = int.from_bytes(data[at + 4 * i : at + 4 * i + 4], "little")
                lanes[i] = rotl((lanes[i] + word * p2) & MASK, 13) * p1 & MASK
            at += 16
        total = sum(rotl(lane, by) for lane, by in zip(lanes, (1, 7, 12, 18), strict=True)) & MASK
    total = (total + len(data)) & MASK
    for at_ in range(at, len(data) - 3, 4):
        total = rotl((total + int.from_bytes(data[at_ : at_ + 4], "little") * p3) & MASK, 17) * p4 & MASK
        at = at_ + 4
    for byte in data[at:]:
        total = rotl((total + byte * p5) & MASK, 11) * p1 & MASK
    total = (total ^ (total >> 15)) * p2 & MASK
    total = (total ^ (total >> 13)) * p3 & MASK
    return total ^ (total >> 16)


class Documented:
    """Reads the bytes of a sequence as `core.tensors.entropy.layout` describes them, number by number."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at, self.bit = data, 0, 0

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def varint(self) -> int:
        value, place = 0, 0
        while (byte := self.byte()) > 127:
            value |= (byte & 127) << place
            place += 7
        return value | byte << place

    def signed(self) -> int:
        value = self.varint()
        return value // 2 if value % 2 == 0 else -(value + 1) // 2

    def bits(self, width: int) -> int:
        value = 0
        for i in range(width):
            value |= (self.data[self.at + self.bit // 8] >> self.bit % 8 & 1) << i
            self.bit += 1
        return value

    def gamma(self) -> int:
        zeros = 0
        while not self.bits(1):
            zeros += 1
        return 1 << zeros | self.bits(zeros)

    def word(self, at: int, width: int) -> int:
        return int.from_bytes(self.data[at : at + width], "little")

    def numbers(self) -> list[int]:
        assert self.byte() == 1
        kind, count = self.byte(), self.varint()
        if kind == 0:
            value = self.signed()
            self.assert_sealed(self.at)
            return [value] * count
        if kind == 1:
            low, width = self.signed(), self.byte()
            found = [low + self.bits(width) for _ in range(count)]
            self.assert_sealed(self.at + (self.bit + 7) // 8)
            return found
        return self.rans(count)

    def assert_sealed(self, stop: int) -> None:
        assert self.word(stop, 4) == xxh32(self.data[:stop], 0)
        assert stop + 4 == len(self.data)

    def model(self) -> tuple[int, int, list[int], bool]:
        size = self.varint()
        if size < 2:
            return named(size, self.byte() - 16)
        low, widths, peak = self.signed(), self.byte(), self.varint()
        precision, kept, found, before = widths % 16, widths // 16, [0] * (size // 2), 1
        others, self.bit = [i for i in range(size // 2) if i != peak], 0
        while others:
            step = self.gamma() - 1
            length = before + (step // 2 if step % 2 == 0 else -(step + 1) // 2)
            if length == 0:
                del others[: self.gamma()]
                continue
            width = min(kept, length)
            found[others.pop(0)] = (1 << width - 1 | self.bits(width - 1)) << length - width
            before = length
        found[peak] = (1 << precision) - sum(found)
        self.at += (self.bit + 7) // 8
        return low, precision, found, bool(size % 2)

    def rans(self, count: int) -> list[int]:
        shape = self.byte()
        lanes, stream = 1 << shape % 8, 1 << shape // 8
        number = self.varint()
        models = [self.model() for _ in range(number // 2)]
        segments = [(0, count)]
        if len(models) > 1:
            segments = [(self.varint(), self.varint()) for _ in range(self.varint())]
        self.at += -self.at % 4
        seed = xxh32(self.data[: self.at], 0)
        steps = [(model, min(lanes, size - i)) for model, size in segments for i in range(0, size, lanes)]
        streams = [steps[i : i + stream // lanes] for i in range(0, len(steps), stream // lanes)]
        escapes = any(model[3] for model in models)
        rows = [[self.word(self.at + 4 * i, 4) for i in range(j, j + 2 + escapes)] for j in self.rows(streams, escapes)]
        self.at += 4 * (2 + escapes) * len(streams)
        found: list[int] = []
        for (words, check, *more), part in zip(rows, streams, strict=True):
            begin, width = self.at, 4 if number % 2 else 2
            escaped_at = begin + 4 * lanes
            words_at = escaped_at + width * sum(more)
            self.at = (words_at + 2 * words + 3) // 4 * 4
            assert xxh32(self.data[begin : self.at], seed) == check
            states = [self.word(begin + 4 * lane, 4) for lane in range(lanes)]
            raw = [self.data[i : i + width] for i in range(escaped_at, words_at, width)]
            outside = [int.from_bytes(one, "little", signed=True) for one in raw]
            found += self.stream(part, states, words_at, outside, [tables(model) for model in models], models)
            assert words_at + 2 * words == self.ended
        assert self.at == len(self.data)
        return found

    @staticmethod
    def rows(streams: list[Any], escapes: bool) -> range:
        return range(0, (2 + escapes) * len(streams), 2 + escapes)

    def stream(
        self,
        steps: list[tuple[int, int]],
        states: list[int],
        at: int,
        outside: list[int],
        slots: list[list[tuple[int, int]]],
        models: list[tuple[int, int, list[int], bool]],
    ) -> list[int]:
        found = []
        for number, size in steps:
            low, precision, frequencies, has_escape = models[number]
            for lane, x in enumerate(states):
                symbol, rank = slots[number][x % (1 << precision)]
                x = frequencies[symbol] * (x >> precision) + rank  # noqa: PLW2901
                if x < 1 << 16:
                    x, at = x << 16 | self.word(at, 2), at + 2  # noqa: PLW2901
                states[lane] = x
                if lane < size:
                    is_escape = has_escape and symbol == len(frequencies) - 1
                    found.append(outside.pop(0) if is_escape else low + symbol)
        assert set(states) == {1 << 16}
        assert outside == []
        self.ended = at
        return found


def named(family: int, k: int) -> tuple[int, int, list[int], bool]:
    """The class of a deviation of 2^(k/8), by scipy: the best that 53 bits give, and good enough for these."""
    law, precision, std = (stats.norm, stats.laplace(scale=0.5**0.5))[family], 14 if k < 28 else 15, 2 ** (k / 8)
    tails = 2 * law.sf((np.arange(1000) + 0.5) / std)
    shares = np.append(1 - tails[0], (tails[:-1] - tails[1:]) / 2)
    symbols = int((shares * 2**precision >= 1 / 8).sum())
    both = np.concatenate([shares[symbols - 1 : 0 : -1], shares[:symbols], tails[symbols - 1 : symbols]])

    def frequencies(slots: int) -> list[int]:
        return [max(1, int(value)) for value in np.floor(both * slots + 0.5)]

    every = range((1 << precision) + 1)
    fitting = bisect_right(every, 1 << precision, key=lambda slots: sum(frequencies(slots))) - 1
    found = frequencies(fitting)
    found[symbols - 1] += (1 << precision) - sum(found)
    return 1 - symbols, precision, found, True


def tables(model: tuple[int, int, list[int], bool]) -> list[tuple[int, int]]:
    """(symbol, rank) of each slot."""
    _, precision, frequencies, _ = model
    if len(frequencies) > 256:
        return [(symbol, rank) for symbol, f in enumerate(frequencies) for rank in range(f)]
    buckets = max(32, 1 << (len(frequencies) - 1).bit_length())
    room, rest = (1 << precision) // buckets, frequencies + [0] * (buckets - len(frequencies))
    threshold, alias = [room] * buckets, list(range(buckets))
    small, large = [b for b in alias if rest[b] < room], [b for b in alias if rest[b] > room]
    while small:
        b, lender = small.pop(), large[-1]
        threshold[b], alias[b] = rest[b], lender
        rest[lender] -= room - rest[b]
        if rest[lender] <= room:
            large.pop()
            small += [lender] if rest[lender] < room else []
    ranks, found = [0] * buckets, []
    for b in range(buckets):
        for place in range(room):
            symbol = b if place < threshold[b] else alias[b]
            found.append((symbol, ranks[symbol]))
            ranks[symbol] += 1
    return found


if __name__ == "__main__":
    FILE.write_text(json.dumps({"reference": REFERENCE, "pinned": written(), "classes": NAMED}, indent=1) + "\n")
