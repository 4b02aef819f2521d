"""Tensor formats: the one name that says how a tensor is stored.

    format       = element "@" granularity [":" statistic] [":" scale_format] *( "+" option ) | alias | block type
    element      = family bits [ "-" mode ]        int4-asym, float4_e2m1, normal4-sym, t5_3.5, nf4, bof4-s-mae
    granularity  = "tensor" | "channel" | block size along the input dimension
    statistic    = "absmax" | "signmax" | "rms", each also searched: "search", "signmax-search", "rms-search";
                   "fouroversix"
    scale_format = "bf16" | "fp16" | "fp32" | "e8m0" [ "-" rule ] | "e4m3" | "dq8"
    option       = "outliers" ratio | "threshold" multiple | "opq" quantile | "iqr" multiple | "hadamard" | "rotate" |
                   "unbiased" | "columns" | "rans" | "huffman"
                   (in artefacts, what was found stands behind the option: outliers "opq0.95x1234", coded bytes
                   "ransx5678")

`grid3` is a uniform grid whose codes are entropy coded (by rans where nothing is said) and whose step is solved so that
all that is stored takes 3 bits per weight. `t_4`, `float4` and `power4` leave a parameter open (nu, exponent bits,
exponent), `lloyd4` its whole codebook: that is fitted to each tensor, `lloyd4-rows` a codebook to each row.
`higgs3-p2` is a grid of vectors: two weights share a code, the number of one of 2^6 points, after a rotation. A
`TensorFormat` that exists can be encoded: impossible combinations are refused when it is made
(`core.recipe.format_rules`), with the reason and the nearest format that works. Every format has one canonical text,
and `parse(str(f)) == f`. Values and codes: `core.formats`; bytes: `core.tensors`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

from core.errors import InvalidFormat
from core.recipe import format_grammar, format_rules
from core.recipe.format_names import (
    ALIASES,
    BLOCK_FAMILY,
    CODEBOOKS,
    COLUMN_SCALES,
    ENTROPY_CODES,
    FAMILIES,
    GRID_FAMILY,
    MAX_BITS,
    OUTLIER_RULES,
    ROOT_DENSITIES,
    ROTATIONS,
    SCALE_FORMATS,
    STATISTICS,
    VECTOR_FAMILY,
    VECTOR_MODES,
    found_by,
    number_text,
    split_option,
)

__all__ = [
    "ALIASES",
    "BLOCK_FAMILY",
    "CODEBOOKS",
    "ENTROPY_CODES",
    "FAMILIES",
    "GRID_FAMILY",
    "MAX_BITS",
    "ROOT_DENSITIES",
    "SCALE_FORMATS",
    "STATISTICS",
    "VECTOR_FAMILY",
    "TensorFormat",
    "number_text",
    "parse",
]


@dataclass(frozen=True)
class TensorFormat:
    """Element format + granularity + statistic + scale format + options.

    `bits`: log2 of the number of codes, may be fractional: `codes = round(2**bits)`; of a grid, all bits that a weight
    is stored in; of a grid of vectors log2 of the number of points for each weight. `mode`: "" asks for the family's
    default, which then stands here: int asym, root-density codebooks asym under absmax and sym under rms, sym for an
    odd number of codes (optimal formats, section 3, rule 7), none ("") under signmax and for the other families. `nu`:
    degrees of freedom of t, None when fitted. `alpha`: exponent of power, None when fitted. `exponent_bits`,
    `mantissa_bits`: of float, with 1 + exponent + mantissa = bits, None when fitted. `granularity`: "tensor", "channel"
    (an output row) or a number of consecutive elements of a row. `options`: canonical texts in canonical order. Raises
    InvalidFormat.
    """

    family: str
    bits: float
    mode: str = ""
    nu: float | None = None
    alpha: float | None = None
    exponent_bits: int | None = None
    mantissa_bits: int | None = None
    granularity: str | int = "channel"
    statistic: str = ""
    scale_format: str = ""
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", float(self.bits))
        format_rules.require_names(self)
        for name, value in format_rules.completed(self).items():
            object.__setattr__(self, name, value)
        format_rules.check(self)

    @property
    def codes(self) -> int:
        """The number of code points."""
        return round(2 ** (self.bits * self.vector))

    @property
    def element_bits(self) -> float:
        """log2 of the number of codes; of a block type, its stored bits; of a grid, those that its scales leave."""
        if self.is_grid:
            return self.bits - format_rules.scale_share(self)
        return self.bits if self.is_block_type else math.log2(self.codes) / self.vector

    @property
    def bits_label(self) -> str:
        """The bits as they are written in the format."""
        return number_text(self.bits)

    @property
    def is_codebook(self) -> bool:
        """Whether the element is a stored table of values with indices as codes (not int or float)."""
        return self.family in CODEBOOKS

    @property
    def has_row_codebooks(self) -> bool:
        """Whether every output row has a codebook of its own."""
        return self.family == "lloyd" and self.mode == "rows"

    @property
    def is_block_type(self) -> bool:
        """Whether the format is a container of its own, such as `q4_k`, whose name is its mode."""
        return self.family == BLOCK_FAMILY

    @property
    def is_grid(self) -> bool:
        """Whether values are all multiples of a step, and `bits` the rate that is stored."""
        return self.family == GRID_FAMILY

    @property
    def is_vector_grid(self) -> bool:
        """Whether several weights share a code, that of a point for all of them."""
        return self.family == VECTOR_FAMILY

    @property
    def vector(self) -> int:
        """How many weights share a code."""
        return VECTOR_MODES.index(self.mode) + 1 if self.is_vector_grid and self.mode in VECTOR_MODES else 1

    @property
    def entropy_code(self) -> str | None:
        """rans, huffman, or None for codes of a fixed length."""
        return next((name for name in self._names if name in ENTROPY_CODES), None)

    @property
    def coded_bytes(self) -> int | None:
        """How many bytes the entropy-coded codes of one tensor take, where its format says so."""
        return self._found(ENTROPY_CODES)

    def with_coded_bytes(self, count: int) -> TensorFormat:
        """The format of a tensor whose codes take so many bytes; the same where nothing has to be found out."""
        return self if self.is_grid else self._with_found(ENTROPY_CODES, count)

    @property
    def without_code(self) -> TensorFormat:
        """The same with codes of a fixed length."""
        return replace(self, options=tuple(one for one in self.options if split_option(one)[0] not in ENTROPY_CODES))

    @property
    def table_size(self) -> int:
        """How many values a codebook has: one fewer than codes where the levels are symmetric about a zero."""
        return self.codes - 1 if self.family == "power" and self.codes % 2 == 0 else self.codes

    @property
    def fitted(self) -> str | None:
        """The parameter that is fitted to each tensor and stored with it: nu, alpha, exponent_bits or None."""
        name = {"t": "nu", "power": "alpha", "float": "exponent_bits"}.get(self.family)
        return name if name and getattr(self, name) is None else None

    @property
    def base_statistic(self) -> str:
        """absmax, signmax or rms: what a search of the scale starts from."""
        if self.statistic in ("search", "fouroversix"):
            return "absmax"
        return self.statistic.removesuffix("-search")

    @property
    def is_searched(self) -> bool:
        """Whether the scale is chosen among candidates by the squared error."""
        return self.statistic.endswith("search") or self.statistic == "fouroversix"

    @property
    def outlier_rule(self) -> tuple[str, float] | None:
        """("outliers" | "threshold" | "opq" | "iqr", number), or None without sparse outliers."""
        found = [split_option(option) for option in self.options]
        return next(((name, value) for name, value in found if name in OUTLIER_RULES and value is not None), None)

    @property
    def outliers_found(self) -> int | None:
        """How many outliers a rule found whose number only the data tell; in the format of one tensor."""
        return self._found(OUTLIER_RULES)

    def with_outliers_found(self, count: int) -> TensorFormat:
        """The format of a tensor in which the rule finds so many; the same where it gives the number itself."""
        given = (self.outlier_rule or ("outliers", 0.0))[0] == "outliers"
        return self if given else self._with_found(OUTLIER_RULES, count)

    @property
    def kind(self) -> str:
        """The text without what each tensor has of its own: numbers that were found, and the rate of a grid."""
        if self.is_block_type:
            return str(self)
        options = (f"+{option.partition('x')[0]}" for option in self.options)
        element = self.family if self.is_grid else self.element
        return f"{element}@{self.granularity}:{self.statistic}:{self.scale_format}{''.join(options)}"

    @property
    def _names(self) -> tuple[str, ...]:
        return tuple(split_option(option)[0] for option in self.options)

    def _found(self, names: tuple[str, ...]) -> int | None:
        """What stands behind the option of one of these names."""
        return next((found_by(option) for option in self.options if split_option(option)[0] in names), None)

    def _with_found(self, names: tuple[str, ...], count: int) -> TensorFormat:
        """The format with a number behind the option of one of these names."""
        options = [
            f"{option.partition('x')[0]}x{count}" if split_option(option)[0] in names else option
            for option in self.options
        ]
        return replace(self, options=tuple(options))

    @property
    def rotation(self) -> str | None:
        """hadamard, rotate or None."""
        return next((option for option in self.options if option in ROTATIONS), None)

    @property
    def is_unbiased(self) -> bool:
        """Whether scales are corrected so that decoded rows have the inner product of the rows with themselves."""
        return "unbiased" in self.options

    @property
    def has_column_scales(self) -> bool:
        """Whether every input dimension has a scale of its own, beside those of rows or the tensor."""
        return COLUMN_SCALES in self.options

    @property
    def with_column_scales(self) -> TensorFormat:
        """The same with a scale for every input dimension."""
        return self if self.has_column_scales else replace(self, options=(*self.options, COLUMN_SCALES))

    @property
    def element(self) -> str:
        """The element's text, such as `t5_4-asym`."""
        known = {"t": self.nu, "power": self.alpha}
        name = self.family
        if self.family == "t" or (self.family == "power" and self.alpha is not None):
            value = known[self.family]
            name += ("" if value is None else number_text(value)) + "_"
        has_split = self.family == "float" and self.exponent_bits is not None
        kind = f"_e{self.exponent_bits}m{self.mantissa_bits}" if has_split else ""
        return f"{name}{self.bits_label}{kind}" + (f"-{self.mode}" if self.mode else "")

    def __str__(self) -> str:
        if self.is_block_type:
            return self.mode
        options = "".join(f"+{option}" for option in self.options)
        return f"{self.element}@{self.granularity}:{self.statistic}:{self.scale_format}{options}"

    def with_bits(self, bits: float) -> TensorFormat:
        """The same kind of format with another width. A float keeps its exponent bits and changes its mantissa.

        A mode that an odd number of codes cannot have becomes sym, so widths are best derived from one base format;
        under signmax a codebook's mode always follows from its number of codes.
        """
        if bits == self.bits:
            return self
        if self.is_block_type:
            raise InvalidFormat("a block type has one width", where=str(self), hint="another block type")
        if self.family == "float" and self.exponent_bits is not None:
            mantissa = bits - 1 - self.exponent_bits
            if mantissa != int(mantissa) or mantissa < 0:
                reason = f"a float with {self.exponent_bits} exponent bits has no {bits:g}-bit form"
                raise InvalidFormat(reason, where=str(self))
            return replace(self, bits=bits, mantissa_bits=int(mantissa))
        return replace(self, bits=bits, mode=format_rules.mode_at(self, bits))

    def with_fitted(self, value: float) -> TensorFormat:
        """The format with its fitted parameter given; InvalidFormat for a value that the family cannot have."""
        if self.fitted == "exponent_bits":
            if not math.isfinite(value) or value != int(value):
                raise InvalidFormat(f"{value:g} exponent bits", where=str(self), hint="a whole number")
            return replace(self, exponent_bits=int(value), mantissa_bits=int(self.bits) - 1 - int(value))
        if self.fitted is None:
            raise InvalidFormat("nothing is fitted", where=str(self))
        return replace(self, nu=value) if self.fitted == "nu" else replace(self, alpha=value)

    def allowed_widths(self) -> tuple[float, ...]:
        """The widths, ascending, that an allocator should choose from.

        Integers of 2 to 8 bits for int (3 for mx), every mantissa from 0 up to 8 bits for float. Codebooks: 2 (3 under
        absmax, where clipped block maxima make 2 bits useless, but of rows) to 8 bits in steps of about a half below 7;
        the half steps have 3 * 2^k codes, an even number (odd ones lose the zero code or waste one) that packs with
        little loss. Grids: 1 to 8 bits in half steps, between which all rates exist. Grids of vectors: 2 to 8 bits
        with 2^k points. A block type has its own.
        """
        if self.is_block_type or self.statistic == "fouroversix":
            return (self.bits,)
        if self.is_grid:
            least = format_rules.least_grid_bits(self)
            return tuple(half / 2 for half in range(2, 17) if half / 2 >= least) or (self.bits,)
        if self.is_vector_grid:
            return tuple(_point_bits(k, self.vector) for k in range(2 * self.vector, 13) if k <= 8 * self.vector)
        if self.family == "int":
            return tuple(float(bits) for bits in range(3 if self.mode == "mx" else 2, 9))
        if self.family == "float":
            least = max(3, 1 + (self.exponent_bits or 0)) + (self.mode == "ieee")
            return tuple(float(bits) for bits in range(least, 9)) or (self.bits,)
        least = 3 if self.base_statistic == "absmax" and not self.has_row_codebooks else 2
        widths = sorted([*map(float, range(least, 9)), *(_half_step(bits) for bits in range(least, 7))])
        return tuple(bits for bits in widths if self._has_width(bits)) or (self.bits,)

    def _has_width(self, bits: float) -> bool:
        """Whether the same kind of format exists in that width."""
        try:
            self.with_bits(bits)
        except InvalidFormat:
            return False
        return True


@lru_cache(maxsize=1 << 14)
def parse(text: str) -> TensorFormat:
    """The format of a text or alias. InvalidFormat says what is wrong and names the nearest thing that works."""
    fields = format_grammar.fields(text)
    try:
        return TensorFormat(**fields)
    except InvalidFormat as error:
        raise error.at(text) from None


def _half_step(bits: int) -> float:
    """The bits, to two decimals, of 3 * 2**(bits - 1) codes."""
    return round(math.log2(3 << (bits - 1)), 2)


def _point_bits(exponent: int, vector: int) -> float:
    """Bits of each of `vector` weights that share one of 2**exponent points, to two decimals or as many as it takes."""
    decimals = 2
    while round(2 ** ((bits := round(exponent / vector, decimals)) * vector)) != 1 << exponent:
        decimals += 1
    return bits
