"""From a tensor format to its element's table: which values there are, and where one ends and the next begins.

Everything that rounds, packs, shows or checks an element follows from the table. What is packed is an index into it,
but for floats, whose stored code is the bit pattern, and for `int-mx`, whose stored code counts from -2^(b-1): see
`stored_codes`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from core.errors import InvalidFormat
from core.formats import block_lloyd, block_optimal, floating, integer, power, quantile, root_density
from core.formats.block_lloyd import Metric
from core.recipe.format_names import ROOT_DENSITIES
from core.recipe.tensor_format import TensorFormat

# What `format show` takes for the weights that share a scale where only a tensor's shape would tell.
ASSUMED_CHANNEL = 4096
_DEPEND_ON_BLOCK = (*ROOT_DENSITIES, "af", "bof")
_SF_NU = 5.0
_START_NU = 7.0  # of weights that nobody looked at (optimal formats, section 12)
_START_ALPHA = 0.7
_START_EXPONENT_BITS = 2
_REACH = 8.0  # RMS, beyond which no point of a grid of vectors lies


@dataclass(frozen=True)
class ElementTable:
    """Values of an element, ascending, as decoded for scale 1.

    `upper_on_tie[k]`: whether a number exactly at limit k takes value k + 1. Codebooks: never (section 5.3); integers:
    the even integer; floats: the even mantissa. `edges`: the limits where they are not the midpoints of the values.
    """

    values: tuple[float, ...]
    upper_on_tie: tuple[bool, ...]
    edges: tuple[float, ...] | None = None

    @property
    def limits(self) -> tuple[float, ...]:
        """Limit k lies between the numbers that take value k and those that take value k + 1."""
        if self.edges is not None:
            return self.edges
        return tuple((low + high) / 2 for low, high in zip(self.values[:-1], self.values[1:], strict=True))

    @property
    def zero(self) -> int:
        """Index of the value nearest to 0, the lower one on a tie."""
        return min(range(len(self.values)), key=lambda index: abs(self.values[index]))

    @property
    def absmax_end(self) -> float:
        """Where absmax puts the largest magnitude: the smaller of the two ends."""
        return min(-self.values[0], self.values[-1])

    @property
    def signmax_end(self) -> float:
        """Where signmax puts it, with its sign: the end of larger magnitude, the positive one of equals."""
        return self.values[-1] if self.values[-1] >= -self.values[0] else self.values[0]


def codebook_table(values: tuple[float, ...]) -> ElementTable:
    """The table of given values with limits half-way; a tie takes the lower one."""
    return ElementTable(values, (False,) * (len(values) - 1))


def element_table(fmt: TensorFormat, shared: int) -> ElementTable:
    """The table of a format whose scales are shared by `shared` weights each (block, row or tensor).

    Of a format that is fitted to each tensor: the table that fitting starts from. Of a grid, which has no ends: the
    interval that an absmax is put at, whatever its step will be. Of a grid of vectors, which is no table of numbers:
    what no number of its points is beyond.
    """
    block = None if not depends_on_block(fmt) else shared
    return _table(started(fmt), block)


def started(fmt: TensorFormat) -> TensorFormat:
    """The format with what would be fitted at its starting value."""
    if fmt.family == "lloyd":
        kind = "" if fmt.base_statistic == "signmax" and fmt.codes % 2 == 0 else "asym" if fmt.codes % 2 == 0 else "sym"
        return TensorFormat("t", fmt.bits, kind, _START_NU, granularity=fmt.granularity, statistic=fmt.base_statistic)
    start = {"nu": _START_NU, "alpha": _START_ALPHA, "exponent_bits": _START_EXPONENT_BITS}
    return fmt if fmt.fitted is None else fmt.with_fitted(start[fmt.fitted])


def is_open(fmt: TensorFormat) -> bool:
    """Whether one table is fitted to each tensor."""
    return fmt.fitted is not None or (fmt.family == "lloyd" and not fmt.has_row_codebooks)


def depends_on_block(fmt: TensorFormat) -> bool:
    """Whether the codebook depends on how many weights share a scale."""
    return fmt.family in (*_DEPEND_ON_BLOCK, "lloyd") and fmt.base_statistic != "rms"


def stored_codes(fmt: TensorFormat, count: int) -> tuple[int, ...] | None:
    """The stored code of each of `count` values in ascending order; None where it is the index."""
    if fmt.family == "float":
        middle = count // 2
        return tuple(fmt.codes // 2 + middle - at if at < middle else at - middle for at in range(count))
    if fmt.family == "int" and fmt.mode == "mx":
        return tuple(range(1, count + 1))
    return None


def shared_weights(fmt: TensorFormat, shape: tuple[int, ...]) -> int:
    """How many weights share a scale in a tensor of that shape; the block size also where a row is shorter."""
    if isinstance(fmt.granularity, int):
        return fmt.granularity
    count = 1
    for size in shape if fmt.granularity == "tensor" else shape[-1:]:
        count *= size
    return count


@lru_cache(maxsize=1024)
def _table(fmt: TensorFormat, block: int | None) -> ElementTable:
    if fmt.family == "int":
        numbers = integer.values(fmt.mode, fmt.codes)
        step = numbers[1] - numbers[0]
        return ElementTable(numbers, tuple(_even_above(low / step) for low in numbers[:-1]))
    if fmt.family == "float":
        numbers = floating.values(fmt.exponent_bits or 0, fmt.mantissa_bits or 0, fmt.mode)
        zero = len(numbers) // 2
        return ElementTable(numbers, tuple((index + 1 - zero) % 2 == 0 for index in range(len(numbers) - 1)))
    if fmt.family == "power":
        levels, alpha = power.power_levels(fmt.codes, fmt.alpha or _START_ALPHA), fmt.alpha or _START_ALPHA
        edges = power.power_edges(fmt.codes, alpha) if fmt.mode == "power" else None
        return ElementTable(levels, (False,) * (len(levels) - 1), edges)
    return codebook_table(_codebook(fmt, block))


def _codebook(fmt: TensorFormat, block: int | None) -> tuple[float, ...]:
    if fmt.family == "nf":
        return quantile.normal_float(fmt.codes)
    if fmt.family == "sf":
        return quantile.student_float(fmt.codes, float(fmt.mode.removeprefix("nu")) if fmt.mode else _SF_NU)
    if fmt.family == "af":
        return block_optimal.absmax_float(fmt.codes, block or 1, "l1" if fmt.mode == "l1" else "published")
    if fmt.family == "bof":
        signed = fmt.mode.startswith("s")
        metric: Metric = "mae" if fmt.mode.endswith("mae") else "mse"
        return block_optimal.block_optimal(fmt.codes, block or 1, signed=signed, metric=metric)
    if fmt.is_grid or fmt.is_vector_grid:
        reach = 1.0 if fmt.is_grid else _REACH
        return (-reach, 0.0, reach)
    if fmt.family in ROOT_DENSITIES:
        return _root_density(fmt, block)
    raise InvalidFormat(f"no table for {fmt.family}", where=str(fmt))


def _root_density(fmt: TensorFormat, block: int | None) -> tuple[float, ...]:
    if fmt.mode != "opt":
        return root_density.codebook(fmt.family, fmt.nu, fmt.base_statistic, fmt.mode, fmt.codes, block)
    if fmt.base_statistic == "rms":
        return block_lloyd.lloyd_max(fmt.family, fmt.nu, fmt.codes)
    return block_lloyd.block_lloyd_max(fmt.family, fmt.nu, fmt.base_statistic, fmt.codes, block or 1)


def _even_above(low: float) -> bool:
    """Between integers: whether the upper one is even; between halves: whether it is, counted from minus one half."""
    return (low + 1) % 2 == 0 if low == int(low) else (low + 0.5) % 2 == 1
