"""From a tensor format to its element's table: which values there are, and which way a tie goes.

Everything that rounds, packs, shows or checks an element follows from the table. Codes are indices into it, but for
floats, whose stored code is the bit pattern (`core.tensors.encoded` translates).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from core.formats import floating, integer, quantile, root_density
from core.recipe.tensor_format import TensorFormat

# What `format show` takes for the weights that share a scale where only a tensor's shape would tell.
ASSUMED_CHANNEL = 4096


@dataclass(frozen=True)
class ElementTable:
    """Values of an element, ascending, as decoded for scale 1.

    `upper_on_tie[k]`: whether a number exactly between values k and k + 1 takes the upper one. Codebooks: never
    (section 5.3); integers: the even integer; floats: the even mantissa.
    """

    values: tuple[float, ...]
    upper_on_tie: tuple[bool, ...]

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


def element_table(fmt: TensorFormat, shared: int) -> ElementTable:
    """The table of a format whose scales are shared by `shared` weights each (block, row or tensor)."""
    block = None if fmt.family not in root_density_families() or fmt.statistic == "rms" else shared
    return _table(fmt, block)


def root_density_families() -> tuple[str, ...]:
    """The families whose codebook depends on how many weights share a scale."""
    return ("normal", "laplace", "t")


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
        return ElementTable(numbers, tuple(_even_above(low) for low in numbers[:-1]))
    if fmt.family == "float":
        numbers = floating.values(fmt.exponent_bits or 0, fmt.mantissa_bits or 0, fmt.mode)
        zero = len(numbers) // 2
        return ElementTable(numbers, tuple((index + 1 - zero) % 2 == 0 for index in range(len(numbers) - 1)))
    if fmt.family == "nf":
        numbers = quantile.normal_float(fmt.codes)
    else:
        numbers = root_density.codebook(fmt.family, fmt.nu, fmt.statistic, fmt.mode, fmt.codes, block)
    return ElementTable(numbers, (False,) * (len(numbers) - 1))


def _even_above(low: float) -> bool:
    """Between integers: whether the upper one is even; between halves: counted from one half."""
    return (low + 1) % 2 == 0 if low == int(low) else (low + 0.5) % 2 == 0
