"""The compiled search for a model: which numbers get symbols, at which precision, with how many bits of each frequency.

Sizes are counted in bits, the model's own bytes among them. Logarithms are looked up: `LOGARITHMS` has log2 f in its
first row and log2((f + 1) / f) in its second, for frequencies f up to 2^15. Of equal choices the lowest symbol, the
lowest precision and the fewest bits are taken. `core.tensors.kernels.cpu_jit` explains the style.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from core.tensors.entropy.loops_jit import Longs
from core.tensors.kernels.cpu_jit import Whole, compiled, inlined

Doubles = NDArray[np.float64]

LOST = 2e-4  # bits a symbol that states of 32 bits lose at precision 14; four times as much at 15
_PRECISIONS = (12, 13, 14, 15)  # that are tried
_ESTIMATES = np.int64(14)  # precision by which windows are compared
_MOST_BITS = 15
_WIDTHS = (32, 64, 128, 256, 4096)  # symbols of windows, an escape among them
_RARE_STEPS = 9  # fewer of a number than 1, 4, ..., 4^8 may not deserve a symbol
_SYMBOL_BITS = 5  # of a symbol in the model, about
_FITTED = 4  # windows that are tried
_LARGE, _WORTH = 1 << 18, 1.0001  # of so many numbers a smaller window may cost this much more
_SHORT, _LONG, _SHORT_END = 16, 32, 1 << 15  # bits of escaped values, and the magnitude that needs the longer ones


def _logarithms() -> Doubles:
    frequencies = np.arange(1, (1 << _MOST_BITS) + 2, dtype=np.float64)
    rows = [np.log2(frequencies), np.log2((frequencies + 1) / frequencies)]
    return np.concatenate([[[-np.inf], [np.inf]], rows], axis=1)


LOGARITHMS = _logarithms()


@compiled
def normalise(counts: Longs, precision: Whole, logs: Doubles) -> Longs:
    """`models.normalised`: frequencies that add up to 2^precision, those of positive counts at least 1.

    From rounded down, the units that are given are the first by gain and symbol. All that gain more than an average one
    are given at once, and if these were too many, the last of them taken back: one by one it would be half as many
    units as there are symbols.
    """
    slots, total, given = np.int64(1) << precision, max(np.int64(counts.sum()), np.int64(1)), np.int64(0)
    found = np.zeros(counts.size, np.int64)
    for i in range(counts.size):
        if counts[i] > 0:
            found[i] = max(np.int64(1), counts[i] * slots // total)
            given += found[i]
    units, order = int(slots - given), 1
    least = found.copy() if units > 0 else np.ones_like(found)
    if units > 0:
        units -= _lift(counts, found, total / slots / np.log(2.0), logs)
        order = 1 if units > 0 else -1
    _spend(counts, found, least, units, order, logs)
    _exchange(counts, found, logs)
    return found


@compiled
def _lift(counts: Longs, found: Longs, limit: float, logs: Doubles) -> int:
    """Gives all units that gain as much as `limit`; how many."""
    units = 0
    for i in range(counts.size):
        while counts[i] * logs[1, found[i]] >= limit and counts[i] > 0:
            found[i] += 1
            units += 1
    return units


@compiled
def _spend(counts: Longs, found: Longs, least: Longs, units: int, order: int, logs: Doubles) -> None:
    """Gives so many units, or takes them down to `least`, one at a time where that costs least.

    Of equals to or from the lowest symbol, the highest where `order` is -1: a heap of (cost, symbol).
    """
    step, size, top = (1 if units > 0 else -1), 0, np.int64(0)
    costs, heap = np.empty(counts.size), np.empty(counts.size, np.int64)
    for i in range(counts.size if units else 0):
        if counts[i] > 0:
            costs[i], heap[size] = _step_cost(counts[i], found[i], least[i], step, logs), i
            size += 1
    for at in range(size // 2 - 1, -1, -1):
        _sink(heap, size, costs, order, at)
    for _ in range(abs(units) if size else 0):
        best = heap[0]
        found[best] += step
        costs[best] = _step_cost(counts[best], found[best], least[best], step, logs)
        _sink(heap, size, costs, order, top)


@inlined
def _step_cost(count: int, frequency: int, least: int, step: int, logs: Doubles) -> float:
    """What one unit more gains, negative, or one less costs."""
    if step > 0:
        return float(-count * logs[1, frequency])
    return float(count * logs[1, frequency - 1]) if frequency > least else float(np.inf)


@compiled
def _sink(heap: Longs, size: int, costs: Doubles, order: int, at: Whole) -> None:
    """Moves what stands at a place of the heap down to where it belongs."""
    moved = heap[at]
    while 2 * at + 1 < size:
        child = 2 * at + 1
        if child + 1 < size and _is_before(costs, order, heap[child + 1], heap[child]):
            child += 1
        if _is_before(costs, order, moved, heap[child]):
            break
        heap[at] = heap[child]
        at = child
    heap[at] = moved


@inlined
def _is_before(costs: Doubles, order: int, a: int, b: int) -> bool:
    return bool(costs[a] < costs[b] or (costs[a] == costs[b] and order * a < order * b))


@compiled
def _exchange(counts: Longs, found: Longs, logs: Doubles) -> None:
    """Units moved from where they are missed least to where they gain most, while that is more."""
    moving = counts.size > 1
    while moving:
        to, source, gain, loss = -1, -1, 0.0, np.inf
        for i in range(counts.size):
            if counts[i] > 0:
                up, down = counts[i] * logs[1, found[i]], counts[i] * logs[1, found[i] - 1]
                to, gain = (i, up) if up > gain else (to, gain)
                source, loss = (i, down) if down < loss else (source, loss)
        moving = gain > loss * (1 + 1e-12)
        if moving:
            found[to] += 1
            found[source] -= 1


@inlined
def _length(value: int) -> int:
    """Bits of a number below 2^16."""
    length = 0
    for by in (8, 4, 2, 1):
        more = by if value >> by else 0
        value >>= more
        length += more
    return length + (1 if value else 0)


@compiled
def shorten(frequencies: Longs, kept: int, peak: int, out: Longs) -> bool:
    """`models.shortened` into `out`; False where the others exceed the peak then."""
    rest, largest = np.int64(0), np.int64(0)
    for i in range(frequencies.size):
        dropped = max(_length(frequencies[i]) - kept, 0)
        out[i] = ((frequencies[i] + ((np.int64(1) << dropped) >> 1)) >> dropped) << dropped
        rest += frequencies[i] - out[i]
        largest = max(largest, out[i] if i != peak else np.int64(0))
    out[peak] += rest
    return bool(out[peak] >= max(np.int64(1), largest))


@compiled
def kept_bits(frequencies: Longs, peak: int) -> int:
    """Significant bits of the frequency, but the peak's, that has most of them; at least 1."""
    most = 1
    for i in range(frequencies.size):
        value = frequencies[i]
        if i != peak and value > 0:
            most = max(most, 1 + _length(value) - _length(value & -value))
    return most


@inlined
def _gamma(value: int) -> int:
    return 2 * _length(value) - 1


@compiled
def _written_bits(frequencies: Longs, peak: int, kept: int) -> int:
    """Bits that `tables_jit.write_frequencies` takes."""
    bits, before, i = 0, 1, 0
    while i < frequencies.size:
        length = _length(frequencies[i])
        if i != peak:
            step = length - before
            bits += _gamma(1 + (2 * step if step >= 0 else -2 * step - 1))
        if i != peak and length == 0:
            run = 1
            while i + 1 < frequencies.size and (frequencies[i + 1] == 0 or i + 1 == peak):
                i += 1
                run += 1 if i != peak else 0
            bits += _gamma(run)
        elif i != peak:
            bits += min(kept, length) - 1
            before = length
        i += 1
    return bits


@inlined
def _varint_bytes(value: int) -> int:
    size = 1
    while value > 127:
        value >>= 7
        size += 1
    return size


@compiled
def model_bytes(low: int, frequencies: Longs) -> int:
    """How many `layout.model_bytes` are."""
    peak = int(np.argmax(frequencies))
    written = _written_bits(frequencies, peak, kept_bits(frequencies, peak))
    start = _varint_bytes(2 * frequencies.size) + _varint_bytes(2 * low if low >= 0 else -2 * low - 1)
    return start + 1 + _varint_bytes(peak) + (written + 7) // 8


@compiled
def number_bits(counts: Longs, frequencies: Longs, precision: int, logs: Doubles) -> float:
    """Bits of so many of each symbol, what states of 32 bits lose among them; infinite where one has no frequency."""
    bits, total = 0.0, 0
    for i in range(counts.size):
        if counts[i] > 0:
            bits += counts[i] * (precision - logs[0, frequencies[i]])
            total += counts[i]
    return bits + total * LOST * 4.0 ** (precision - 14)


@compiled
def best_frequencies(low: int, counts: Longs, has_escape: bool, logs: Doubles, best: Longs) -> tuple[int, float]:
    """Frequencies of least total size to `best`; their precision, and the size in bits, of numbers and model.

    An escape gets a frequency even where it was not counted. Precisions that could not be best if their model took no
    bytes are passed over.
    """
    weights, trial, chosen, least = counts.copy(), np.empty_like(counts), 0, np.inf
    if has_escape:
        weights[-1] = max(counts[-1], 1)
    used = np.count_nonzero(weights)
    for precision in _PRECISIONS:
        if used > 1 << precision:
            continue
        exact = normalise(weights, precision, logs)
        if number_bits(counts, exact, precision, logs) >= least:
            continue
        peak = int(np.argmax(exact))
        for kept in range(2, max(kept_bits(exact, peak), 2) + 1):
            if shorten(exact, kept, peak, trial):
                bits = number_bits(counts, trial, precision, logs) + 8 * model_bytes(low, trial)
                if bits < least:
                    least, chosen = bits, precision
                    _copy(trial, best, best.size)
    return chosen, least


@inlined
def _copy(source: Longs, target: Longs, size: int) -> None:
    for i in range(size):
        target[i] = source[i]


@inlined
def _add_range(found: Longs, size: int, low: int, high: int) -> int:
    for i in range(size):
        if found[i, 0] == low and found[i, 1] == high:
            return size
    found[size, 0], found[size, 1] = low, high
    return size + 1


@compiled
def _windows(values: Longs, counts: Longs, is_open: bool, most: int) -> Longs:
    """(n, 2): half-open ranges that are worth a look: without rare numbers, and the fullest of a few widths."""
    found, size = np.empty((_RARE_STEPS + len(_WIDTHS), 2), np.int64), 0
    for step in range(_RARE_STEPS):
        first, last = 0, values.size - 1
        while first <= last and counts[first] < 1 << (2 * step):
            first += 1
        while first <= last and counts[last] < 1 << (2 * step):
            last -= 1
        span = values[last] - values[first] + 1 if first <= last else most + 1
        if span < most or (span == most and step == 0 and not is_open):
            size = _add_range(found, size, values[first], values[last] + 1)
    for width in _WIDTHS:
        start, stop = _fullest(values, counts, width - 1)
        size = _add_range(found, size, values[start], values[stop - 1] + 1)
    return found[:size]


@compiled
def _fullest(values: Longs, counts: Longs, width: int) -> tuple[int, int]:
    """The part of the values that has most numbers within `width`; the first of equals."""
    best, start, stop, end, inside = np.int64(-1), 0, 0, 0, np.int64(0)
    for i in range(values.size):
        while end < values.size and values[end] < values[i] + width:
            inside += counts[end]
            end += 1
        if inside > best:
            best, start, stop = inside, i, end
        inside -= counts[i]
    return start, stop


@compiled
def _dense(values: Longs, counts: Longs, rest: int, low: int, high: int, dense: Longs) -> tuple[int, int]:
    """Counts of low .. high - 1, then of all others where there are any; how many, and bits of the escaped values."""
    size, others, width = high - low, max(rest, 0), _SHORT
    for i in range(min(size + 1, dense.size)):
        dense[i] = 0
    for i in range(values.size):
        if low <= values[i] < high:
            dense[values[i] - low] = counts[i]
        else:
            others += counts[i]
            width = _LONG if abs(values[i]) >= _SHORT_END else width
    if others or rest >= 0:
        dense[size] = others
        size += 1
    return size, width * others


@compiled
def _estimate(dense: Longs, logs: Doubles) -> float:
    """Bits, about, of all numbers coded by a window, and of its model."""
    found, bits = normalise(dense, _ESTIMATES, logs), 0.0
    for i in range(dense.size):
        if dense[i] > 0:
            bits += dense[i] * (_ESTIMATES - logs[0, found[i]])
    return float(bits + _SYMBOL_BITS * dense.size)


@compiled
def _likely(values: Longs, counts: Longs, rest: int, logs: Doubles, dense: Longs) -> Longs:
    """The windows that seem best, best first."""
    windows = _windows(values, counts, rest >= 0, dense.size)
    costs = np.empty(len(windows))
    for i in range(len(windows)):
        size, escaped = _dense(values, counts, rest, windows[i, 0], windows[i, 1], dense)
        costs[i] = _estimate(dense[:size], logs) + escaped
    found = np.empty((min(len(windows), _FITTED), 2), np.int64)
    for i in range(len(found)):
        first = np.argmin(costs)
        found[i, 0], found[i, 1], costs[first] = windows[first, 0], windows[first, 1], np.inf
    return found


@compiled
def best_window(values: Longs, counts: Longs, rest: int, logs: Doubles, best: Longs) -> tuple[int, int, bool, int]:
    """The model of numbers that were counted: frequencies to the front of `best`, which is as long as models may be.

    `rest`: how many others there are, or -1, so that an escape is only there where it is shorter. Answers low, symbols,
    whether there is an escape, and precision.
    """
    dense = np.empty(best.size, np.int64)
    windows = _likely(values, counts, rest, logs, dense)
    found, precisions = np.empty((len(windows), best.size), np.int64), np.empty(len(windows), np.int64)
    sizes, bits = np.empty_like(precisions), np.empty(len(windows))
    for i in range(len(windows)):
        low, high = windows[i, 0], windows[i, 1]
        size, escaped = _dense(values, counts, rest, low, high, dense)
        precisions[i], bits[i] = best_frequencies(low, dense[:size], size > high - low, logs, found[i, :size])
        sizes[i], bits[i] = size, bits[i] + escaped
    most, k = bits.min() * (_WORTH if counts.sum() >= _LARGE else 1.0), int(np.argmin(bits))
    for i in range(len(windows)):
        if bits[i] <= most and (sizes[i], bits[i]) < (sizes[k], bits[k]):
            k = i
    _copy(found[k], best, sizes[k])
    return windows[k, 0], sizes[k], sizes[k] > windows[k, 1] - windows[k, 0], precisions[k]
