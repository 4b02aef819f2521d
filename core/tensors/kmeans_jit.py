"""The compiled loops of exact one-dimensional k-means; `core.tensors.row_codebooks` is the door.

Clusters of the line are runs of sorted values, and the least squared error of runs is the largest sum of S^2 / W, S and
W being sums of weight * value and of weights. With F_c(i) the largest sum of the first i values in c runs,
F_c(i) = max over j of F_{c-1}(j) + (S_i - S_j)^2 / (W_i - W_j), and the best j never falls with i nor with c. So the
values halve the range of those between them: O(n log n) for each c (ckmeans.1d.dp: Wang and Song 2011; Groenlund and
others, arXiv 1701.07204).
"""

from __future__ import annotations

import numpy as np

from core.tensors.kernels.cpu_jit import Doubles, Ints, Whole, compiled, inlined


@compiled
def best_codebooks(values: Doubles, weights: Doubles, out: Doubles) -> None:
    """The best centroids of each row, ascending: `values` and `weights` (rows, n) -> `out` (rows, clusters).

    Values ascend; infinite ones at the end are absent, and so are those of no weight where others have some. Where
    there are fewer different values than clusters, the last one stands more than once; of nothing at all, 0 does.
    """
    count, clusters = values.shape[1], out.shape[1]
    places, mass, first = np.empty(count), np.empty(count + 1), np.empty(count + 1)
    last, following = np.empty(count + 1), np.empty(count + 1)
    cuts = np.zeros((clusters, count + 1), np.int32)
    for row in range(values.shape[0]):
        distinct = _merged(values, weights, row, places, mass)
        if distinct <= clusters:
            for k in range(clusters):
                out[row, k] = places[min(k, distinct - 1)] if distinct else 0.0
            continue
        centre = _sums(places, distinct, mass, first)
        for i in range(1, distinct + 1):
            last[i] = first[i] * first[i] / mass[i]
            cuts[0, i] = 0
        for c in range(1, clusters - 1):
            _one_more(c, distinct - clusters + 1 + c, last, following, mass, first, cuts)
            last, following = following, last
        if clusters > 1:
            low = max(cuts[clusters - 2, distinct - 1], clusters - 1)
            _cut(clusters - 1, distinct, low, distinct - 1, last, following, mass, first, cuts)
        _centroids(cuts, distinct, mass, first, centre, row, out)


@inlined
def _merged(values: Doubles, weights: Doubles, row: Whole, places: Doubles, mass: Doubles) -> int:
    """Different values that weigh something, and at mass[1:] their weights; answers how many."""
    total = 0.0
    for i in range(values.shape[1]):
        if values[row, i] < np.inf:
            total += weights[row, i]
    found = 0
    for i in range(values.shape[1]):
        weight = weights[row, i] if total > 0.0 else 1.0
        if values[row, i] == np.inf or weight == 0.0:
            continue
        if found and values[row, i] == places[found - 1]:
            mass[found] += weight
        else:
            places[found] = values[row, i]
            mass[found + 1] = weight
            found += 1
    return found


@inlined
def _sums(places: Doubles, count: int, mass: Doubles, first: Doubles) -> float:
    """Sums up to each value, of weights and of weight * (value - mean), whose mean is answered."""
    total, moment = 0.0, 0.0
    for i in range(count):
        total += mass[i + 1]
        moment += mass[i + 1] * places[i]
    centre = moment / total
    mass[0], first[0] = 0.0, 0.0
    for i in range(count):
        first[i + 1] = first[i] + mass[i + 1] * (places[i] - centre)
        mass[i + 1] += mass[i]
    return centre


@inlined
def _one_more(c: int, most: int, last: Doubles, following: Doubles, mass: Doubles, first: Doubles, cuts: Ints) -> None:
    """following[i] of c + 1 runs from last[i] of c, for i from c + 1 to `most`: those between come after their ends."""
    stride = 1
    while stride <= most:
        stride *= 2
    while stride >= 1:
        for i in range(stride, most + 1, 2 * stride):
            if i > c:
                low = max(cuts[c - 1, min(i, most - 1)], c)
                if i - stride > c:
                    low = max(low, cuts[c, i - stride])
                high = min(cuts[c, i + stride], i - 1) if i + stride <= most else i - 1
                _cut(c, i, min(low, high), high, last, following, mass, first, cuts)
        stride //= 2


@inlined
def _cut(
    c: int, i: int, low: int, high: int, last: Doubles, following: Doubles, mass: Doubles, first: Doubles, cuts: Ints
) -> None:
    """Where run c begins if it ends before value i: the best j between `low` and `high`, the first of equals."""
    best, place = -np.inf, low
    for j in range(low, high + 1):
        moment = first[i] - first[j]
        found = last[j] + moment * moment / (mass[i] - mass[j])
        if found > best:
            best, place = found, j
    following[i] = best
    cuts[c, i] = place


@inlined
def _centroids(cuts: Ints, count: int, mass: Doubles, first: Doubles, centre: float, row: Whole, out: Doubles) -> None:
    """The weighted means of the runs, from the last one back."""
    stop = count
    for back in range(out.shape[1]):
        c = out.shape[1] - 1 - back
        start = cuts[c, stop]
        out[row, c] = centre + (first[stop] - first[start]) / (mass[stop] - mass[start])
        stop = start
