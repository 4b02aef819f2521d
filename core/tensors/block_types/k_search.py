"""Fields of K types by least squares: the smallest (weighted) squared error that a bounded search finds.

Two steps for a chunk of blocks. Each sub-block on its own tries inverse scales around the obvious one, and keeps the
least-squares scale (and minimum <= 0) of the best. Then the block's fp16 numbers are fixed so that the largest scale
and minimum just fit, and each sub-block tries the neighbours of its rounded scale (and minimum), all elements quantised
anew with what the decoder will multiply by. Plain squared error without importance weights.

Everything is worked out in arrays (element of the sub-block, sub-block), where numpy sums along the first axis fast.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from core.tensors.block_types.fields import Bytes, Floats, counted, inverse, nearest_half, relative_weights

Signed = NDArray[np.int8]


@dataclass(frozen=True)
class AffineFields:
    """scales, minima (blocks, sub-blocks), codes (blocks, 256), heads d and dmin (blocks, 2) as fp16 numbers."""

    scales: Bytes
    minima: Bytes
    codes: Bytes
    heads: Floats


@dataclass(frozen=True)
class SymmetricFields:
    """scales (blocks, sub-blocks), codes (blocks, 256), both signed, head d (blocks, 1) as fp16 numbers."""

    scales: Signed
    codes: Signed
    heads: Floats


@dataclass(frozen=True)
class Shape:
    """A K type's numbers: elements of a sub-block, the largest code, the largest scale (and minimum).

    Symmetric types: codes from -top - 1 to top, scales from -range - 1 to range.
    """

    sub_block: int
    top: int
    scale_range: int


AFFINE = {"q2_k": Shape(16, 3, 15), "q4_k": Shape(32, 15, 63), "q5_k": Shape(32, 31, 63)}
SYMMETRIC = {"q3_k": Shape(16, 3, 31), "q6_k": Shape(16, 31, 127)}
_AFFINE_TRIES, _SYMMETRIC_TRIES = 21, 19
# The centre first: a neighbour has to be better, not equal.
_NEIGHBOURS = (0, -1, 1)


def search_affine(values: Floats, importance: Floats | None, shape: Shape) -> AffineFields:
    """Fields of x ~ (d sc) q - (dmin mn) for (blocks, 256)."""
    x, w = _columns(values, shape), _weights(importance, shape)
    scale, minimum = _affine_steps(counted(x, w), w, shape.top)
    d = nearest_half(scale.reshape(len(values), -1).max(axis=1) / np.float32(shape.scale_range))
    dmin = nearest_half(minimum.reshape(len(values), -1).max(axis=1) / np.float32(shape.scale_range))
    subs = x.shape[1] // len(values)
    d_each, dmin_each = np.repeat(d, subs), np.repeat(dmin, subs)
    sc = np.clip(np.rint(scale * inverse(d_each)), 0, shape.scale_range)
    mn = np.clip(np.rint(minimum * inverse(dmin_each)), 0, shape.scale_range)
    sc, mn = _affine_neighbours(x, w, (sc, mn), (d_each, dmin_each), shape)
    codes = _quantise(x + dmin_each * mn, inverse(d_each * sc), 0, shape.top)
    return AffineFields(
        scales=sc.astype(np.uint8).reshape(len(values), -1),
        minima=mn.astype(np.uint8).reshape(len(values), -1),
        codes=codes.astype(np.uint8).T.reshape(len(values), -1),
        heads=np.stack((d, dmin), axis=1),
    )


def search_symmetric(values: Floats, importance: Floats | None, shape: Shape) -> SymmetricFields:
    """Fields of x ~ (d sc) q for (blocks, 256)."""
    x, w = _columns(values, shape), _weights(importance, shape)
    scale = _symmetric_steps(counted(x, w), w, shape.top)
    per_block = scale.reshape(len(values), -1)
    largest = np.take_along_axis(per_block, np.abs(per_block).argmax(axis=1)[:, None], axis=1)
    d = nearest_half(largest / np.float32(-shape.scale_range - 1))
    d_each = np.repeat(d[:, 0], per_block.shape[1])
    sc = np.clip(np.rint(scale * inverse(d_each)), -shape.scale_range - 1, shape.scale_range)
    sc = _symmetric_neighbours(x, w, sc, d_each, shape)
    codes = _quantise(x, inverse(d_each * sc), -shape.top - 1, shape.top)
    return SymmetricFields(
        scales=sc.astype(np.int8).reshape(len(values), -1),
        codes=codes.astype(np.int8).T.reshape(len(values), -1),
        heads=d,
    )


def _affine_steps(x: Floats, w: Floats | None, top: int) -> tuple[Floats, Floats]:
    """Unrounded scale and -minimum of each sub-block.

    In units of the sub-block's span, with its lower end lo at 0: y = (x - lo) / span ~ a q + b.
    """
    lo = np.minimum(x.min(axis=0), 0)
    span = x.max(axis=0) - lo
    y = (x - lo) * inverse(span)
    bound = -lo * inverse(span)  # b beyond this would be a positive minimum
    sums = _Sums(y, w)
    best = np.full(len(span), np.inf, dtype=np.float32)
    scale, offset = np.zeros_like(span), np.zeros_like(span)
    for step in range(_AFFINE_TRIES):
        q = np.minimum(np.rint(y * np.float32(top - 1 + 0.1 * step)), np.float32(top))
        a, b, error = sums.line(q, bound)
        better = error < best
        best, scale, offset = np.where(better, error, best), np.where(better, a, scale), np.where(better, b, offset)
    return np.maximum(scale * span, 0), np.maximum(-(offset * span + lo), 0)


class _Sums:
    """Weighted sums over the elements of each sub-block, and the least squares that follow from them."""

    def __init__(self, y: Floats, w: Floats | None) -> None:
        self.y, self.w = y, w
        self.wy = y if w is None else y * w
        self.weight = np.full(y.shape[1], y.shape[0], dtype=np.float32) if w is None else w.sum(axis=0)
        self.sum_y, self.sum_yy = self.wy.sum(axis=0), _dots(self.wy, y)

    def line(self, q: Floats, bound: Floats) -> tuple[Floats, Floats, Floats]:
        """(a, b, squared error) of y ~ a q + b with b <= bound, for codes q."""
        wq = q if self.w is None else q * self.w
        sum_q, sum_qq, sum_yq = wq.sum(axis=0), _dots(wq, q), _dots(wq, self.y)
        spread = self.weight * sum_qq - sum_q * sum_q
        over = inverse(np.maximum(spread, 0))
        a = (self.weight * sum_yq - self.sum_y * sum_q) * over
        b = (sum_qq * self.sum_y - sum_q * sum_yq) * over
        held = (b > bound) | (spread <= 0)  # one code for all determines no line: the one through the bound
        b = np.where(held, bound, b)
        a = np.where(held, (sum_yq - bound * sum_q) * inverse(sum_qq), a)
        error = self.sum_yy + a * (a * sum_qq - 2 * sum_yq + 2 * b * sum_q) + b * (b * self.weight - 2 * self.sum_y)
        return a, b, error


def _symmetric_steps(x: Floats, w: Floats | None, top: int) -> Floats:
    """Unrounded, signed scale of each sub-block: the element of largest magnitude is at the longer, negative end."""
    largest: Floats = np.take_along_axis(x, np.abs(x).argmax(axis=0)[None], axis=0)[0]
    y = x * -inverse(largest)
    best, scale = np.full(len(largest), -1, dtype=np.float32), np.zeros(len(largest), dtype=np.float32)
    for step in range(_SYMMETRIC_TRIES):
        q = _quantise(y, np.float32(top + 1 + 0.1 * (step - 9)), -top - 1, top)
        wq = q if w is None else q * w
        product = _dots(wq, y)
        a = product * inverse(_dots(wq, q))
        better = a * product > best
        best, scale = np.where(better, a * product, best), np.where(better, a, scale)
    return -scale * largest


def _affine_neighbours(
    x: Floats, w: Floats | None, start: tuple[Floats, Floats], heads: tuple[Floats, Floats], shape: Shape
) -> tuple[Floats, Floats]:
    """The best of scales and minima at most one step from where they start."""
    best = np.full(x.shape[1], np.inf, dtype=np.float32)
    found = start
    for down in _NEIGHBOURS:
        mn = np.clip(start[1] + np.float32(down), 0, shape.scale_range)
        raised = x + heads[1] * mn
        for along in _NEIGHBOURS:
            sc = np.clip(start[0] + np.float32(along), 0, shape.scale_range)
            error = _error(raised, w, heads[0] * sc, 0, shape.top)
            better = error < best
            best = np.where(better, error, best)
            found = np.where(better, sc, found[0]), np.where(better, mn, found[1])
    return found


def _symmetric_neighbours(x: Floats, w: Floats | None, start: Floats, head: Floats, shape: Shape) -> Floats:
    """The best of scales at most one step from where they start."""
    best, found = np.full(x.shape[1], np.inf, dtype=np.float32), start
    for along in _NEIGHBOURS:
        sc = np.clip(start + np.float32(along), -shape.scale_range - 1, shape.scale_range)
        error = _error(x, w, head * sc, -shape.top - 1, shape.top)
        better = error < best
        best, found = np.where(better, error, best), np.where(better, sc, found)
    return found


def _error(x: Floats, w: Floats | None, step: Floats, low: int, top: int) -> Floats:
    """Squared error of each sub-block when its elements are quantised with that step."""
    q = _quantise(x, inverse(step), low, top)
    q *= step
    q -= x
    return _dots(q, q if w is None else q * w)


def _quantise(x: Floats, inverse_step: Floats | np.float32, low: int, top: int) -> Floats:
    q: Floats = x * inverse_step
    np.rint(q, out=q)
    np.clip(q, np.float32(low), np.float32(top), out=q)
    return q


def _columns(values: Floats, shape: Shape) -> Floats:
    """(blocks, 256) -> (elements of a sub-block, all sub-blocks)."""
    return np.ascontiguousarray(values.reshape(-1, shape.sub_block).T)


def _weights(importance: Floats | None, shape: Shape) -> Floats | None:
    if importance is None:
        return None
    return np.ascontiguousarray(relative_weights(importance.reshape(-1, shape.sub_block)).T)


def _dots(left: Floats, right: Floats) -> Floats:
    found: Floats = np.einsum("es,es->s", left, right)
    return found
