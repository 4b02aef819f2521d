"""Blocks of any known type by name: finite fp32 in, bytes out, and back from any bytes.

Worked on in chunks of a fixed number of elements, so beyond the result memory is some MiB. Only numpy; one core.
Encoders promise finite decoded weights for every finite input: what a type's scales cannot reach saturates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from core.errors import InvalidFormat
from core.formats.block_types import TILE_TYPES, block_type
from core.tensors.block_types import fp4, iq4_nl, k_types, legacy
from core.tensors.block_types.fields import Bytes, Floats
from core.tensors.block_types.tile_scales import ScaleRule
from core.tensors.block_types.tiles import decode_tiles, encode_tiles

CHUNK = 1 << 17  # elements
# Beyond what 65504 times the largest codes of any type reaches, so it changes no byte, and squares stay within fp32.
_REACH = np.float32(2**31)


@dataclass(frozen=True)
class _Codec:
    encode: Callable[[Floats, Floats | None], Bytes]
    decode: Callable[[Bytes], Floats]


def encode_blocks(name: str, values: Floats, importance: Floats | None = None, *, rule: ScaleRule = "midmax") -> Bytes:
    """Weights (blocks, elements), finite -> uint8 (blocks, nbytes).

    `importance`: non-negative finite weights of the squared errors, like `values`; used where the type `is_searched`.
    `rule`: for power-of-two scales of TensorCast's float types, when to raise a scale (`scale_exponents`).
    MethodNotAvailable for an unknown name, InvalidFormat for another shape.
    """
    kind = block_type(name)
    _require_shape(values, kind.elements, name)
    if importance is not None and importance.shape != values.shape:
        raise InvalidFormat(f"importance has shape {importance.shape}, weights {values.shape}", where=name)
    codec = _codec(name, rule)
    out = np.empty((len(values), kind.nbytes), dtype=np.uint8)
    step = CHUNK // kind.elements
    for start in range(0, len(values), step):
        here = slice(start, start + step)
        piece = np.ascontiguousarray(values[here], dtype=np.float32)
        weights = None if importance is None else np.ascontiguousarray(importance[here], dtype=np.float32)
        out[here] = codec.encode(piece, weights)
    return out


def decode_blocks(name: str, data: Bytes) -> Floats:
    """uint8 (blocks, nbytes), any bytes -> fp32 (blocks, elements); bit-identical to the reference decoders of GGUF."""
    kind = block_type(name)
    _require_shape(data, kind.nbytes, name)
    codec = _codec(name, "max")
    out = np.empty((len(data), kind.elements), dtype=np.float32)
    step = CHUNK // kind.elements
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, len(data), step):
            out[start : start + step] = codec.decode(np.ascontiguousarray(data[start : start + step]))
    return out


def _require_shape(array: Bytes | Floats, width: int, name: str) -> None:
    if array.ndim != 2 or array.shape[1] != width:
        raise InvalidFormat(f"blocks of {name} have {width} columns, not shape {array.shape}", where=name)


def _codec(name: str, rule: ScaleRule) -> _Codec:
    if name in _GGUF:
        return _GGUF[name]
    kind = TILE_TYPES[name]
    return _Codec(partial(encode_tiles, kind=kind, rule=rule), partial(decode_tiles, kind=kind))


def _by_rule(encode: Callable[[Floats], Bytes], values: Floats, _importance: Floats | None) -> Bytes:
    return encode(values)


def _within_reach(encode: Callable[[Floats, Floats | None], Bytes], values: Floats, importance: Floats | None) -> Bytes:
    """For types with fp16 scales."""
    largest = max(float(values.max(initial=0)), -float(values.min(initial=0)))
    return encode(np.clip(values, -_REACH, _REACH) if largest > _REACH else values, importance)


def _legacy(encode: Callable[[Floats], Bytes], decode: Callable[[Bytes], Floats]) -> _Codec:
    return _Codec(partial(_within_reach, partial(_by_rule, encode)), decode)


def _searched(encode: Callable[[Floats, Floats | None], Bytes], decode: Callable[[Bytes], Floats]) -> _Codec:
    return _Codec(partial(_within_reach, encode), decode)


_GGUF = {
    "q4_0": _legacy(partial(legacy.encode_symmetric, bits=4), partial(legacy.decode_symmetric, bits=4)),
    "q4_1": _legacy(partial(legacy.encode_affine, bits=4), partial(legacy.decode_affine, bits=4)),
    "q5_0": _legacy(partial(legacy.encode_symmetric, bits=5), partial(legacy.decode_symmetric, bits=5)),
    "q5_1": _legacy(partial(legacy.encode_affine, bits=5), partial(legacy.decode_affine, bits=5)),
    "q8_0": _legacy(legacy.encode_q8_0, legacy.decode_q8_0),
    "q2_k": _searched(k_types.encode_q2_k, k_types.decode_q2_k),
    "q3_k": _searched(k_types.encode_q3_k, k_types.decode_q3_k),
    "q4_k": _searched(k_types.encode_q4_k, k_types.decode_q4_k),
    "q5_k": _searched(k_types.encode_q5_k, k_types.decode_q5_k),
    "q6_k": _searched(k_types.encode_q6_k, k_types.decode_q6_k),
    "iq4_nl": _searched(iq4_nl.encode, iq4_nl.decode),
    "mxfp4": _Codec(partial(_by_rule, fp4.encode_mxfp4), fp4.decode_mxfp4),
    "nvfp4": _Codec(fp4.encode_nvfp4, fp4.decode_nvfp4),
}
