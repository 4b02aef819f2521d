"""What entropy coding costs, against numbers computed elsewhere; and the page about its bytes, which says what is.

`entropy_rates.json` has entropies of discretised variables, what models, classes and integer frequencies lose, and bits
of correlated matrices. The page's decoder, which knows only the page, reads what the coder writes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import optimize

from core.tensors.entropy import classes
from core.tensors.entropy.coder import encode, encode_segments
from core.tensors.entropy.decoder import CodedSequence
from core.tensors.entropy.families import probabilities
from core.tensors.entropy.huffman import huffman_encode
from core.tensors.entropy.layout import Segment
from core.tensors.entropy.matrix import decode_matrix, encode_matrix
from core.tensors.entropy.models import SymbolModel, normalised

HERE = Path(__file__).parent
GOLDEN: dict[str, Any] = json.loads((HERE / "entropy_rates.json").read_text())
REFERENCE: dict[str, Any] = json.loads((HERE / "entropy_v1.json").read_text())["reference"]
UNIFORM: dict[str, Any] = json.loads((HERE / "optimal_formats.json").read_text())["entropy_coded_uniform"]
DISCRETE: dict[str, Any] = GOLDEN["discretised_gaussian"]
CLASSES: dict[str, Any] = GOLDEN["column_classes"]
DOCS = HERE.parents[1] / "docs"
PAGE = (DOCS / "entropy.md").read_text("utf-8")
NUMBERS = np.arange(-4000, 4001)
FAMILIES = {"gaussian": ("normal", 5.0), "laplace": ("laplace", 5.0), "t5": ("t", 5.0), "t7": ("t", 7.0)}
FAMILIES |= {"normal": FAMILIES["gaussian"], "student_t5": FAMILIES["t5"], "student_t8": ("t", 8.0)}
Doubles = NDArray[np.float64]


def rounded(family: str, std: float, numbers: NDArray[np.int64] = NUMBERS) -> Doubles:
    """Probabilities of the integers of a variable, as the coder's models have them."""
    name, nu = FAMILIES[family]
    return probabilities(name, std, numbers, nu)


def entropy(weights: NDArray[Any]) -> float:
    used = weights[weights > 0] / weights.sum()
    return float(-(used * np.log2(used)).sum())


def std_of_entropy(family: str, bits: float) -> float:
    found = optimize.brentq(lambda std: entropy(rounded(family, std)) - bits, 0.05, 40, xtol=1e-12)
    return float(found)


@pytest.mark.parametrize("entry", DISCRETE["entropy_of_std"], ids=lambda entry: str(entry["std"]))
def test_the_entropy_of_a_rounded_normal_variable(entry: dict[str, float]) -> None:
    found = entropy(rounded("normal", entry["std"]))
    assert found == pytest.approx(entry["H"], rel=1e-8, abs=1e-12)


@pytest.mark.parametrize("entry", UNIFORM["entries"], ids=lambda entry: f"{entry['family']} {entry['H']}")
def test_the_entropy_of_a_uniform_grid(entry: dict[str, Any]) -> None:
    numbers = np.arange(-200_000, 200_001)
    found = entropy(rounded(entry["family"], 1 / entry["delta_over_sigma"], numbers))
    assert found == pytest.approx(entry["H"], rel=1e-6)


def drawn(family: str, count: int) -> Doubles:
    """Numbers of standard deviation 1."""
    random, (name, nu) = np.random.default_rng(0), FAMILIES[family]
    if name == "t":
        return np.asarray(random.standard_t(nu, count) * math.sqrt((nu - 2) / nu))
    return random.standard_normal(count) if name == "normal" else random.laplace(size=count) / math.sqrt(2)


@pytest.mark.parametrize("entry", UNIFORM["entries"], ids=lambda entry: f"{entry['family']} {entry['H']}")
def test_the_error_of_a_uniform_grid_at_the_bits_that_are_stored(entry: dict[str, Any]) -> None:
    """R * 2^bits of a sample of 2^22, every byte counted: half a percent for the sample, 0.1 % of the bits for us."""
    values, step = drawn(entry["family"], 1 << 22), entry["delta_over_sigma"]
    codes = np.rint(values / step).astype(np.int32)
    error = math.sqrt(float(np.mean((codes * step - values) ** 2)))
    bits = 8 * encode(codes).size / codes.size
    assert error == pytest.approx(entry["R"], rel=0.005)
    assert bits == pytest.approx(entry["H"], rel=0.0025)
    ratio = error * 2**bits / entry["R_times_2powH"]
    assert 0.995 <= ratio <= 1.005 * 2 ** (entry["H"] / 1000)


@pytest.mark.parametrize("entry", DISCRETE["class_spacing_mean_loss"], ids=lambda entry: str(entry["octave_fraction"]))
def test_what_the_spacing_of_classes_loses(entry: dict[str, float]) -> None:
    """The mean over standard deviations that belong to a class, for the worst of the classes from 1 to 16 steps."""
    m = int(entry["octave_fraction"])
    losses = [spacing_loss(k, m) for k in range(0, 4 * m + 1, m // 4)]
    assert 0.85 * entry["max_loss"] <= max(losses) <= entry["max_loss"]


def spacing_loss(k: int, m: int) -> float:
    """Bits that the class 2^(k/m) loses on average."""
    numbers = np.arange(-600, 601)
    model, total = rounded("normal", 2 ** (k / m), numbers), 0.0
    for place, weight in zip(*np.polynomial.legendre.leggauss(8), strict=True):
        exact = rounded("normal", 2 ** ((k + place / 2) / m), numbers)
        used = exact > 0
        total += weight / 2 * float((exact[used] * np.log2(exact[used] / np.maximum(model[used], 1e-300))).sum())
    return total


@pytest.mark.parametrize(
    "entry", DISCRETE["shape_mismatch_bits"], ids=lambda entry: f"{entry['true']} as {entry['coded_as']}"
)
def test_what_another_family_loses(entry: dict[str, Any]) -> None:
    for bits in (1, 2, 3, 4):
        std = std_of_entropy(entry["true"], bits)
        exact = rounded(entry["true"], std)

        def cost(log_std: float, exact: Doubles = exact) -> float:
            model = np.maximum(rounded(entry["coded_as"], math.exp(log_std)), 2.0**-15)
            return float(-(exact * np.log2(model)).sum())

        around = (math.log(std) - 1, math.log(std) + 1)
        found = optimize.minimize_scalar(cost, bounds=around, method="bounded").fun - bits
        assert found == pytest.approx(entry[f"R{bits}"], abs=2e-4)


@pytest.mark.parametrize("entry", GOLDEN["scale_mixture_loss"]["rows"], ids=lambda entry: str(entry["s"]))
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_what_one_model_for_lines_of_different_scales_loses(entry: dict[str, float], bits: int) -> None:
    places, weights = np.polynomial.hermite_e.hermegauss(40)
    weights = weights / weights.sum()

    def parts(base: float) -> list[Doubles]:
        return [rounded("normal", base * math.exp(entry["s"] * place)) for place in places]

    def together(base: float) -> float:
        return entropy(np.asarray(sum(weight * part for weight, part in zip(weights, parts(base), strict=True))))

    base = optimize.brentq(lambda base: together(base) - bits, 0.05, 20, xtol=1e-6)
    apart = sum(weight * entropy(part) for weight, part in zip(weights, parts(base), strict=True))
    assert bits - apart == pytest.approx(entry[f"R{bits}"], abs=2e-4)


@pytest.mark.parametrize("row", GOLDEN["rans"]["precision_overhead_percent"], ids=lambda row: f"{row['H']} bits")
def test_what_integer_frequencies_lose(row: dict[str, float]) -> None:
    """Never more than the greedy frequencies of the reference: ours are the optimum."""
    std = std_of_entropy("normal", row["H"])
    reach = math.ceil(5.5 * std)
    exact = rounded("normal", std, np.arange(-reach, reach + 1))
    exact /= exact.sum()
    counts = np.rint(exact * 2**40).astype(np.int64)
    used = counts > 0
    for precision in range(10, 16):
        bits = float((exact[used] * (precision - np.log2(normalised(counts, precision)[used]))).sum())
        percent, expected = 100 * (bits / entropy(exact) - 1), row[f"P{precision}"]
        assert percent == pytest.approx(expected, rel=GOLDEN["rans"]["precision_overhead_tolerance_rel"])
        assert percent <= 1.01 * expected


GRANULARITY: dict[str, Any] = GOLDEN["rans"]["state_granularity_percent"]


@pytest.mark.parametrize("row", GRANULARITY["rows"], ids=lambda row: f"{row['H']} bits")
def test_what_states_of_32_bits_lose(row: dict[str, float]) -> None:
    """What is written, less what the model gives the same numbers: 2^23 of them, so the last digit is the sample's."""
    std = std_of_entropy("normal", row["H"])
    reach = math.ceil(5.5 * std)
    counts = np.rint(rounded("normal", std, np.arange(-reach, reach + 1)) * 2**40).astype(np.int64)
    numbers = np.clip(np.rint(std * drawn("normal", 1 << 23)), -reach, reach).astype(np.int8)
    for precision in (12, 13, 14, 15):
        model = SymbolModel(-reach, precision, normalised(counts, precision))
        found = 100 * (written_bits(numbers, model) / model_bits(numbers, model) - 1)
        assert found == pytest.approx(row[f"P{precision}"], rel=GRANULARITY["tolerance_rel"], abs=2e-4)


def model_bits(numbers: NDArray[np.int8], model: SymbolModel) -> float:
    counts = np.bincount(numbers.astype(np.int64) - model.low, minlength=model.size)
    return float((counts[counts > 0] * model.costs[counts > 0]).sum())


def written_bits(numbers: NDArray[np.int8], model: SymbolModel) -> float:
    """Of the words, and what the states carry."""
    data = encode_segments(numbers, [model], [Segment(0, numbers.size)], stream_bits=23)
    total = 0.0
    for place in CodedSequence.parse(data, numbers.size).places:
        states = data[place.states : place.escapes].copy().view("<u4")
        total += 8 * (place.stop - place.words) + float((np.log2(states) - 16).sum())
    return total


def test_the_worked_example_stands_in_the_bytes_of_a_sequence() -> None:
    """States and words of the reference, and nothing else, are the stream."""
    model, symbols = SymbolModel(0, REFERENCE["P"], np.array(REFERENCE["freq"])), np.array(REFERENCE["symbols"])
    data = encode_segments(symbols, [model], [Segment(0, symbols.size)], lanes=32, stream_bits=10)
    (place,) = CodedSequence.parse(data, symbols.size).places
    states, words = data[place.states : place.escapes].copy(), data[place.words : place.stop].copy()
    assert [f"{state:08x}" for state in states.view("<u4").tolist()] == REFERENCE["states"]
    assert [f"{word:04x}" for word in words.view("<u2").tolist()] == REFERENCE["words"]


ROWS, COLUMNS = 4096, 256


def ar(r: float) -> Doubles:
    places = np.arange(COLUMNS)
    return np.asarray(r ** np.abs(places[:, None] - places))


def power(exponent: float) -> Doubles:
    q, r = np.linalg.qr(np.random.default_rng(1).standard_normal((COLUMNS, COLUMNS)))
    values = np.arange(1.0, COLUMNS + 1) ** -exponent
    turned = q * np.sign(np.diag(r))
    return np.asarray(turned @ np.diag(values / values.mean()) @ turned.T)


def scaled(log_scales: Doubles, correlation: Doubles) -> Doubles:
    scales = np.exp(log_scales)
    found = scales[:, None] * correlation * scales
    return np.asarray(found * COLUMNS / np.trace(found))


def factors() -> Doubles:
    random = np.random.default_rng(21)
    log_scales, loads = 0.5 * random.standard_normal(COLUMNS), random.standard_normal((COLUMNS, 16)) / 4
    mixed = np.eye(COLUMNS) + loads @ loads.T
    spread = np.sqrt(np.diag(mixed))
    return scaled(log_scales, mixed / spread[:, None] / spread)


COVARIANCES: dict[str, Callable[[], Doubles]] = {
    "ar1_0.9": lambda: ar(0.9),
    "pow1_haar": lambda: power(1),
    "pow2_haar": lambda: power(2),
    "scaled_ar1": lambda: scaled(0.6 * np.random.default_rng(11).standard_normal(COLUMNS), ar(0.9)),
    "factor_mix": factors,
}


@lru_cache(maxsize=1)
def weights() -> Doubles:
    found, about = np.random.default_rng(1234).standard_normal((ROWS, COLUMNS)), GOLDEN["fingerprints"]["W_4096x256"]
    assert float((found**2).sum()) == pytest.approx(about["sum_sq"], rel=GOLDEN["fingerprints"]["tolerance_rel"])
    return found


def successive_codes(row: dict[str, Any]) -> NDArray[np.int64]:
    """Weights rounded column by column from the last on, the error carried to those before it, as the recipe says."""
    covariance, step = COVARIANCES[row["family"]](), row["step"]
    order = np.argsort(-np.diag(covariance), kind="stable") if row["order"] == "desc" else np.arange(COLUMNS)
    lower = np.linalg.cholesky(covariance[np.ix_(order, order)])
    left, codes = weights()[:, order] @ lower, np.empty((ROWS, COLUMNS), np.int64)
    for i in reversed(range(COLUMNS)):
        z = np.rint(left[:, i] / step)
        codes[:, i] = z
        norm = float(z @ z)
        shrunk = float(z @ left[:, i]) / (step * norm) if norm else 0.0
        left[:, :i] -= (shrunk * step / lower[i, i] * z)[:, None] * lower[i, :i]
    return codes


def class_bits(counts: NDArray[np.int64], numbers: NDArray[np.int64], m: int) -> float:
    """Bits of all numbers by the best class of each column."""
    ks = range(-6 * m, 7 * m + 1)
    costs = np.stack([-np.log2(np.maximum(rounded("normal", 2 ** (k / m), numbers), 2.0**-15)) for k in ks])
    return float((counts @ costs.T).min(axis=1).sum())


@pytest.mark.parametrize("row", CLASSES["rows"], ids=lambda row: f"{row['family']} {row['R_nominal']} bits")
def test_columns_of_a_correlated_matrix_are_coded_at_their_own_entropies(row: dict[str, Any]) -> None:
    """All bytes within 0.012 bit of the columns' entropies (0.01 from two bits on), and below that of one model."""
    codes = successive_codes(row)
    reach = int(np.abs(codes).max())
    numbers = np.arange(-reach, reach + 1)
    counts = np.stack([np.bincount(column + reach, minlength=numbers.size) for column in codes.T])
    for m in (4, 8, 16):
        found = class_bits(counts, numbers, m) / codes.size
        assert found == pytest.approx(row[f"bits_m{m}"], abs=CLASSES["tolerance_bits"])
    data, one_model = encode_matrix(codes), encode(codes)
    assert np.array_equal(decode_matrix(data, codes.shape), codes)
    assert entropy(counts.sum(axis=0)) == pytest.approx(row["H_joint"], abs=1e-4)
    assert data.size < min(one_model.size, row["H_joint"] * codes.size / 8)
    assert 8 * data.size / codes.size <= row["H_col_mm"] + (0.0102 if row["R_nominal"] >= 2 else 0.012)


def fenced(mark: str) -> list[str]:
    return re.findall(rf"(?m)^<!-- {mark} -->\n```python\n(.*?)^```$", PAGE, re.DOTALL)


def rows(mark: str) -> list[list[str]]:
    """The cells of the table after a mark, without its heading."""
    found = re.search(rf"<!-- {mark} -->\n((?:\|.*\n)+)", PAGE)
    assert found, mark
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in found[1].splitlines()[2:]]


def decoder() -> dict[str, Any]:
    """What the page's decoder defines."""
    names: dict[str, Any] = {}
    exec("\n".join(fenced("decoder")), names)
    return names


DECODER = decoder()


def test_the_decoder_on_the_page_needs_nothing_but_the_language() -> None:
    assert "import" not in "\n".join(fenced("decoder"))


def test_the_decoder_on_the_page_reads_what_the_page_tries_it_with() -> None:
    (tried,) = fenced("tried")
    exec(tried, decoder())


@given(
    numbers=st.lists(st.integers(-5, 5) | st.sampled_from([-(2**31), 30_000, 2**31 - 1]), max_size=300),
    copies=st.integers(1, 6),
)
def test_the_decoder_on_the_page_reads_any_sequence(numbers: list[int], copies: int) -> None:
    expected = numbers * copies
    assert DECODER["sequence"](encode(np.array(expected, np.int64)).tobytes(), len(expected)) == expected


@given(
    numbers=st.lists(st.integers(-3, 3), min_size=12, max_size=12),
    shape=st.sampled_from([(1, 12), (3, 4), (12, 1)]),
    axis=st.sampled_from([0, 1]),
    width=st.integers(1, 4),
)
def test_the_decoder_on_the_page_reads_any_matrix(
    numbers: list[int], shape: tuple[int, int], axis: int, width: int
) -> None:
    data = encode_matrix(np.array(numbers).reshape(shape), axis, width).tobytes()
    assert DECODER["matrix"](data, *shape) == numbers
    assert DECODER["codes"](len(data).to_bytes(8, "little") + data + bytes(width), *shape, is_huffman=False) == numbers
    huffman = huffman_encode(np.array(numbers)).tobytes()
    assert DECODER["codes"](len(huffman).to_bytes(8, "little") + huffman, *shape, is_huffman=True) == numbers


@pytest.mark.parametrize("family", [classes.NORMAL, classes.LAPLACE])
def test_the_decoder_on_the_page_has_the_same_classes_of_models(family: int) -> None:
    for k in classes.CLASSES:
        model = classes.class_model(family, k)
        assert DECODER["model_class"](family, k) == (model.precision, model.frequencies.tolist())


def test_a_changed_byte_fails_the_decoder_on_the_page() -> None:
    data = bytearray(encode(np.arange(600) ** 2 % 7 - 3).tobytes())
    assert data[1] == 2
    for at, bit in product(range(len(data)), (0, 7)):
        data[at] ^= 1 << bit
        with pytest.raises((AssertionError, IndexError)):
            DECODER["sequence"](bytes(data), 600)
        data[at] ^= 1 << bit


EXAMPLE = [0, -1, 3, 0, 0, 1, -2]
EXAMPLE_MODEL = SymbolModel(-3, 12, np.array([1, 40, 900, 2214, 900, 40, 1]))


def test_the_examples_on_the_page_are_the_bytes_that_are_written() -> None:
    ours = encode_segments(np.array(EXAMPLE), [EXAMPLE_MODEL], [Segment(0, 7)], lanes=1, stream_bits=10)
    assert " ".join(row[0].strip("`") for row in rows("bytes")) == ours.tobytes().hex(" ")
    huffman = huffman_encode(np.array(EXAMPLE)).tobytes()
    assert " ".join(row[0].strip("`") for row in rows("huffman bytes")) == huffman.hex(" ")


def test_the_steps_on_the_page_are_those_of_the_decoder() -> None:
    slots, frequencies = DECODER["slots_of"](EXAMPLE_MODEL.frequencies.tolist(), 12), EXAMPLE_MODEL.frequencies.tolist()
    state, shown = 0x0346E5D3, []
    for _ in EXAMPLE:
        slot, before = state % 4096, state
        symbol, rank = slots[slot]
        state = frequencies[symbol] * (state >> 12) + rank
        after = f"{state:08x}" if state >= 1 << 16 else f"{state:x}, which takes the word: {state << 16 | 0xC480:08x}"
        state = state if state >= 1 << 16 else state << 16 | 0xC480
        place, number = f"{slot // 128}, {slot % 128}", str(symbol - 3).replace("-", "−")
        shown.append([f"{before:08x}", str(slot), place, f"{symbol}, {rank}", number, after])
    assert shown == rows("steps")
    assert state == 1 << 16


MEASURED = [json.loads(line) for line in (DOCS / "images" / "entropy_speed.jsonl").read_text().splitlines()]
LONG = [line for line in MEASURED if line["log2_numbers"] == 24]
CODERS = ("ours", "htscodecs", "zstd_1", "huffman")


def test_the_sizes_on_the_page_are_those_that_were_measured() -> None:
    short = {(line["family"], line["bits"]): line for line in MEASURED if line["log2_numbers"] == 16}
    shown = [
        [line["family"], f"{line['bits']:g}"]
        + [f"{line[f'{name}_over_percent']:.3f}" for name in CODERS]
        + [f"{short[line['family'], line['bits']][f'{name}_over_bits']:.4f}" for name in CODERS]
        for line in LONG
        if line["loops"] == "avx512"
    ]
    assert shown == rows("sizes")


def test_the_rates_on_the_page_are_those_that_were_measured() -> None:
    peers = ("htscodecs", "zstd_1", "constriction", "huffman")
    shown = [
        [line["loops"], line["family"], f"{line['bits']:g}", f"{line['ours_encode']:.0f} / {line['ours_decode']:.0f}"]
        + [f"{line[f'encode_of_{name}']:.2f} / {line[f'decode_of_{name}']:.2f}" for name in peers]
        for line in LONG
    ]
    assert shown == rows("rates")


def test_the_parts_of_the_overhead_on_the_page_are_those_that_were_measured() -> None:
    parts = ("rounding", "granularity", "streams", "model", "over")
    shown = [
        [f"2^{line['log2_numbers']}", line["family"], f"{line['bits']:g}"]
        + [f"{line[f'ours_{part}_percent']:.3f}" for part in parts]
        for line in MEASURED
        if line["loops"] == "avx512" and line["family"] in {"normal", "t5"} and line["bits"] in {2, 4}
    ]
    assert shown == rows("parts")
