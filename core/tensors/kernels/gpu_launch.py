"""Launches of GPU kernels: which kernel, with which arguments, compiled for which constants, how wide.

A launch is data until it is run, so that what a GPU would run can be compiled ahead of time on a machine without one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from core.formats.stored import group_of
from core.recipe.tensor_format import TensorFormat
from core.tensors.kernels.gpu_plan import RUN, Element, Geometry, ScaleRounding

Constants = dict[str, int | str]
Arguments = tuple[torch.Tensor | int | float, ...]

OUTPUTS = {torch.float32: "fp32", torch.bfloat16: "bf16"}
WEIGHTS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
GIVEN_SCALES = ("e4m3", "dq8")  # decoded by `core.tensors.scale_formats`, fp32 to the kernels
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # that hold RUN codes of so many bits
_PATTERNS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


@dataclass(frozen=True)
class Launch:
    """`kernel`: a name in `gpu_encode` or `gpu_decode`."""

    kernel: str
    arguments: Arguments
    constants: Constants
    programs: int
    warps: int

    def run(self) -> None:
        """Put it on the current device's stream."""
        from core.tensors.kernels import gpu_decode, gpu_encode

        home = gpu_decode if hasattr(gpu_decode, self.kernel) else gpu_encode
        getattr(home, self.kernel)[(self.programs,)](*self.arguments, **self.constants, num_warps=self.warps)


@dataclass(frozen=True)
class Encoding:
    """A dense tensor, flat, to be encoded."""

    flat: torch.Tensor
    fmt: TensorFormat
    geometry: Geometry
    element: Element

    def whole(
        self, rounding: ScaleRounding, codes: torch.Tensor, scales: torch.Tensor, damaged: torch.Tensor
    ) -> Launch:
        """Scales and codes in one pass, for blocks of one chunk."""
        limits, upper = _limits_on(self.element, self.flat.device)
        tensors = (self._weights, limits, upper, self._words(codes), _patterns(scales), damaged)
        constants = self._tile | self._statistic(rounding) | self._element
        return self._launch("encode_kernel", (*tensors, *_extents(self.geometry), *_numbers(rounding)), constants)

    def scales(
        self, rounding: ScaleRounding, scales: torch.Tensor, factors: torch.Tensor, damaged: torch.Tensor
    ) -> Launch:
        """Stored scales of long blocks and, as `factors`, what they decode to."""
        sizes = (*_extents(self.geometry), self.geometry.chunks)
        lanes = _lanes(self.geometry) | {"ALIGNED": self.geometry.aligned}
        tensors = (self._weights, _patterns(scales), factors, damaged)
        arguments = (*tensors, *sizes, *_numbers(rounding))
        return Launch(
            "scales_kernel", arguments, lanes | self._statistic(rounding), self.geometry.blocks, self.geometry.warps
        )

    def codes(self, factors: torch.Tensor, codes: torch.Tensor) -> Launch:
        """Codes for decoded scales."""
        limits, upper = _limits_on(self.element, self.flat.device)
        sizes = (*_extents(self.geometry), self.geometry.chunks)
        tensors = (self._weights, factors, limits, upper, self._words(codes))
        constants = self._tile | {"WEIGHTS": WEIGHTS[self.flat.dtype]} | self._element
        return self._launch("codes_kernel", (*tensors, *sizes), constants)

    def _launch(self, kernel: str, arguments: Arguments, constants: Constants) -> Launch:
        return Launch(kernel, arguments, constants, self.geometry.programs, self.geometry.warps)

    @property
    def _in_words(self) -> bool:
        """Whether 8 codes fill a machine word and every block begins and ends with whole words."""
        return self.element.bits in _WORDS and self.geometry.aligned % RUN == 0

    def _words(self, codes: torch.Tensor) -> torch.Tensor:
        return codes.view(_WORDS[self.element.bits]) if self._in_words else codes

    @property
    def _tile(self) -> Constants:
        return _tile(self.geometry) | _lanes(self.geometry) | {"IN_WORDS": self._in_words}

    @property
    def _weights(self) -> torch.Tensor:
        """bf16 as patterns: Triton's interpreter does not compute in bf16."""
        return self.flat.view(torch.int16) if self.flat.dtype is torch.bfloat16 else self.flat

    def _statistic(self, rounding: ScaleRounding) -> Constants:
        kinds: Constants = {"STATISTIC": self.fmt.statistic, "SCALES": rounding.kind}
        return kinds | {"WEIGHTS": WEIGHTS[self.flat.dtype]}

    @property
    def _element(self) -> Constants:
        element = self.element
        return {
            "RULE": element.rule,
            "IS_EVEN": element.is_even,
            "BITS": element.bits,
            "COUNT": element.count,
            "SIGNED": self.fmt.base_statistic == "signmax",
            "ZERO": element.zero,
            "MIDDLE": element.middle,
            "FIRST": element.first,
        }


def decoding(
    fmt: TensorFormat,
    geometry: Geometry,
    codes: torch.Tensor,
    scales: torch.Tensor,
    table: torch.Tensor,
    out: torch.Tensor,
) -> Launch:
    """Packed codes, stored scales (fp32 for `GIVEN_SCALES`) and fp32 values by code, flat, -> `out`."""
    kind = fmt.scale_format.partition("-")[0]
    constants: Constants = {
        "LANES": geometry.lanes,
        "IS_GROUPED": _begins_with_bytes(fmt, geometry),
        "SCALES": "fp32" if kind in GIVEN_SCALES else kind,
        "BITS": fmt.codes.bit_length() - 1,
        "OUT": OUTPUTS[out.dtype],
    }
    target = out.view(torch.int16) if out.dtype is torch.bfloat16 else out
    arguments = (codes, _patterns(scales), table, target, codes.numel(), *_extents(geometry), geometry.chunks)
    return Launch("decode_kernel", arguments, _tile(geometry) | constants, geometry.programs, geometry.warps)


def _begins_with_bytes(fmt: TensorFormat, geometry: Geometry) -> bool:
    """Whether whole codes fill each byte, from the first element of every block on."""
    group = group_of(fmt.codes)
    is_one_row = geometry.blocks == geometry.per_row
    in_row = geometry.per_row == 1 or geometry.width % group == 0
    return fmt.codes in (2, 4, 16, 256) and in_row and (is_one_row or geometry.columns % group == 0)


def _tile(geometry: Geometry) -> Constants:
    return {"ROWS": geometry.rows, "ALIGNED": geometry.aligned, "IS_FULL": geometry.is_full}


def _lanes(geometry: Geometry) -> Constants:
    return {"LANE": geometry.lanes // geometry.parts, "PARTS": geometry.parts}


def _extents(geometry: Geometry) -> tuple[int, int, int, int]:
    return geometry.blocks, geometry.columns, geometry.width, geometry.per_row


def _numbers(rounding: ScaleRounding) -> Arguments:
    return rounding.end, rounding.largest, rounding.rise, rounding.offset


def _patterns(numbers: torch.Tensor) -> torch.Tensor:
    """Numbers as integers of their patterns; bytes as they are."""
    return numbers.view(_PATTERNS[numbers.dtype]) if numbers.dtype in _PATTERNS else numbers


@lru_cache(maxsize=64)
def _limits_on(element: Element, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    limits = torch.tensor(element.limits, dtype=torch.float64, device=device)
    return limits, torch.tensor(element.upper_on_tie, dtype=torch.int32, device=device)
