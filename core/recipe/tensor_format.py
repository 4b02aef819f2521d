"""Tensor formats: the one name that says how a tensor is stored, and its grammar.

    format       = element "@" granularity [":" statistic] [":" scale_format] *( "+" option ) | alias
    element      = family bits [ "-" mode ]        int4-asym, float4_e2m1, normal4-sym, t5_3.5, nf4
    granularity  = "tensor" | "channel" | block size along the input dimension
    statistic    = "absmax" (default) | "signmax" | "rms"
    scale_format = "bf16" (default) | "fp16" | "fp32" | "e8m0"

A `TensorFormat` that exists can be encoded: impossible combinations are refused when it is made, with the reason and
the nearest format that works; names of the grammar whose method this version lacks raise MethodNotAvailable. Every
format has one canonical text, and `parse(str(f)) == f`. Values and codes: `core.formats`; bytes: `core.tensors`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from difflib import get_close_matches

from core.errors import InvalidFormat, MethodNotAvailable

ROOT_DENSITIES = ("normal", "laplace", "t")
CODEBOOKS = (*ROOT_DENSITIES, "nf")
FAMILIES = ("int", "float", *CODEBOOKS)
LATER_FAMILIES = ("sf", "af", "bof", "lloyd", "power", "grid")
STATISTICS = ("absmax", "signmax", "rms")
LATER_STATISTICS = ("search",)
SCALE_FORMATS = ("bf16", "fp16", "fp32", "e8m0")
MAX_BITS = 16

ALIASES = {
    "mxfp4": "float4_e2m1@32:absmax:e8m0",
    "mxfp6_e2m3": "float6_e2m3@32:absmax:e8m0",
    "mxfp6_e3m2": "float6_e3m2@32:absmax:e8m0",
    "mxfp8_e4m3": "float8_e4m3@32:absmax:e8m0",
    "mxfp8_e5m2": "float8_e5m2@32:absmax:e8m0",
    "q4_0": "int4-asym@32:signmax:fp16",
    "q5_0": "int5-asym@32:signmax:fp16",
    "q8_0": "int8-asym@32:absmax:fp16",
}
LATER_ALIASES = ("mxint8", "nvfp4", "q4_1", "q5_1", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs")

_NUMBER = r"\d+(?:\.\d+)?"
_NAMES = "|".join(sorted({*FAMILIES, *LATER_FAMILIES} - {"t", "float", "power"}))
_ELEMENT = re.compile(
    rf"(?:(?P<plain>{_NAMES})|(?P<t>t)(?P<nu>{_NUMBER})_|(?P<power>power)(?:(?P<alpha>{_NUMBER})_)?|(?P<float>float))"
    rf"(?P<bits>{_NUMBER})(?:_e(?P<exponent>\d+)m(?P<mantissa>\d+))?(?:-(?P<mode>[a-z0-9_-]+))?"
)
_OPTION = re.compile(rf"(?P<name>outliers)(?P<ratio>{_NUMBER}(?:e-?\d+)?)|hadamard|rotate|huffman|rans")
_SCALE_NAME = re.compile(r"u?e\d+m\d+")
_MODES = {"int": ("asym", "sym"), "float": ("", "ns", "ieee"), "nf": ("",)}


@dataclass(frozen=True)
class TensorFormat:
    """Element format + granularity + statistic + scale format.

    `bits`: log2 of the number of codes, may be fractional: `codes = round(2**bits)`. `mode`: "" asks for the family's
    default, which then stands here: int asym, codebooks asym under absmax and sym under rms, sym for an odd number of
    codes (optimal formats, section 3, rule 7), none ("") under signmax, for float and for nf. `nu`: degrees of freedom
    of t. `exponent_bits`, `mantissa_bits`: of float, with 1 + exponent + mantissa = bits; its modes are `ns` (no
    specials) and `ieee` (see `core.formats.floating`). `granularity`: "tensor", "channel" (an output row) or a number
    of consecutive elements of a row. Raises InvalidFormat or MethodNotAvailable.
    """

    family: str
    bits: float
    mode: str = ""
    nu: float | None = None
    alpha: float | None = None
    exponent_bits: int | None = None
    mantissa_bits: int | None = None
    granularity: str | int = "channel"
    statistic: str = "absmax"
    scale_format: str = "bf16"
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", float(self.bits))
        _require_available(self)
        _check_numbers(self)
        if not self.mode or self._is_odd_integer:
            object.__setattr__(self, "mode", _default_mode(self))
        _check_combination(self)

    @property
    def codes(self) -> int:
        """The number of code points."""
        return round(2**self.bits)

    @property
    def element_bits(self) -> float:
        """log2 of the number of codes."""
        return math.log2(self.codes)

    @property
    def bits_label(self) -> str:
        """The bits as they are written in the format."""
        return number_text(self.bits)

    @property
    def is_codebook(self) -> bool:
        """Whether the element is a table of values with indices as codes (not int or float)."""
        return self.family in CODEBOOKS

    @property
    def element(self) -> str:
        """The element's text, such as `t5_4-asym`."""
        name = f"t{number_text(self.nu or 0)}_" if self.family == "t" else self.family
        kind = f"_e{self.exponent_bits}m{self.mantissa_bits}" if self.family == "float" else ""
        return f"{name}{self.bits_label}{kind}" + (f"-{self.mode}" if self.mode else "")

    def __str__(self) -> str:
        return f"{self.element}@{self.granularity}:{self.statistic}:{self.scale_format}"

    def with_bits(self, bits: float) -> TensorFormat:
        """The same kind of format with another width. A float keeps its exponent bits and changes its mantissa.

        A mode that an odd number of codes cannot have becomes sym, so widths are best derived from one base format;
        under signmax a codebook's mode always follows from its number of codes.
        """
        if self.family == "float":
            mantissa = bits - 1 - (self.exponent_bits or 0)
            if mantissa != int(mantissa) or mantissa < 0:
                raise _invalid(f"a float with {self.exponent_bits} exponent bits has no {bits:g}-bit form", str(self))
            return replace(self, bits=bits, mantissa_bits=int(mantissa))
        parity_fits = self.mode in ("", "sym") or round(2**bits) % 2 == 0
        fits = self.family == "int" or (parity_fits and self.statistic != "signmax")
        return replace(self, bits=bits, mode=self.mode if fits else "")

    def allowed_widths(self) -> tuple[float, ...]:
        """The widths, ascending, that an allocator should choose from.

        Integers of 2 to 8 bits for int, every mantissa from 0 up to 8 bits for float. Codebooks: 2 (3 under absmax,
        where clipped block maxima make 2 bits useless) to 8 bits in steps of about a half below 7 bits; the half steps
        have 3 * 2^k codes, an even number (odd ones lose the zero code or waste one) that packs with little loss.
        """
        if self.family == "int":
            return tuple(float(bits) for bits in range(2, 9))
        if self.family == "float":
            least = max(3, 1 + (self.exponent_bits or 0)) + (self.mode == "ieee")
            return tuple(float(bits) for bits in range(least, 9)) or (self.bits,)
        least = 3 if self.statistic == "absmax" else 2
        halves = [_half_step(bits) for bits in range(least, 7)]
        return tuple(sorted([*map(float, range(least, 9)), *halves]))

    @property
    def _is_odd_integer(self) -> bool:
        return self.family == "int" and self.codes % 2 == 1 and self.mode == "asym"


def parse(text: str) -> TensorFormat:
    """The format of a text or alias. InvalidFormat says what is wrong and names the nearest thing that works."""
    alias = ALIASES.get(text.strip().lower())
    if alias is None and text.strip().lower() in LATER_ALIASES:
        raise MethodNotAvailable(f"the format {text.strip()} is not available yet", where=text, hint=_known_aliases())
    return _parse(alias or text.strip())


def number_text(value: float) -> str:
    """The shortest decimal text that reads back as the same number; no ".0"."""
    return repr(float(value)).removesuffix(".0")


def _parse(text: str) -> TensorFormat:
    body, *options = text.split("+")
    element, at, rest = body.partition("@")
    match = _ELEMENT.fullmatch(element)
    if not match:
        raise _unknown_element(element, text)
    if not at or not rest:
        raise _invalid("no granularity", text, f"{element}@64, {element}@channel or {element}@tensor")
    for option in options:
        if not _OPTION.fullmatch(option):
            raise _invalid(f"no option {option!r}", text, "outliers0.001, hadamard, rotate, huffman, rans")
    granularity, *fields = rest.split(":")
    statistic, scale_format = _fields(fields, text)
    family = match["plain"] or match["t"] or match["power"] or match["float"]
    _check_float_name(match, text)
    try:
        return TensorFormat(
            family=family,
            bits=float(match["bits"]),
            mode=match["mode"] or "",
            nu=_optional_float(match["nu"]),
            alpha=_optional_float(match["alpha"]),
            exponent_bits=_optional_int(match["exponent"]),
            mantissa_bits=_optional_int(match["mantissa"]),
            granularity=_granularity(granularity, text),
            statistic=statistic,
            scale_format=scale_format,
            options=tuple(options),
        )
    except (InvalidFormat, MethodNotAvailable) as error:
        raise error.at(text) from None


def _fields(fields: list[str], text: str) -> tuple[str, str]:
    """Statistic and scale format, either of which may be left out."""
    if len(fields) > 2:
        raise _invalid("too many fields", text, "element@granularity:statistic:scale_format")
    statistics = (*STATISTICS, *LATER_STATISTICS)
    if len(fields) == 1 and (fields[0] in SCALE_FORMATS or _SCALE_NAME.fullmatch(fields[0])):
        return "absmax", fields[0]
    statistic, scale = (*fields, "absmax", "bf16")[: len(fields)] + ("absmax", "bf16")[len(fields) :]
    if statistic not in statistics:
        raise _invalid(f"no statistic {statistic!r}", text, _nearest(statistic, (*statistics, *SCALE_FORMATS)))
    if scale not in SCALE_FORMATS and not _SCALE_NAME.fullmatch(scale):
        raise _invalid(f"no scale format {scale!r}", text, _nearest(scale, SCALE_FORMATS))
    return statistic, scale


def _granularity(text: str, whole: str) -> str | int:
    if text in ("tensor", "channel"):
        return text
    if not re.fullmatch(r"[1-9]\d{0,9}", text):
        raise _invalid(f"no granularity {text!r}", whole, "tensor, channel or a block size such as 64")
    return int(text)


def _check_float_name(match: re.Match[str], text: str) -> None:
    is_float, has_split = bool(match["float"]), match["exponent"] is not None
    if is_float != has_split:
        hint = "float4_e2m1" if is_float else match[0].partition("_e")[0]
        raise _invalid("float needs its exponent and mantissa bits, nothing else has them", text, hint)


def _require_available(fmt: TensorFormat) -> None:
    """MethodNotAvailable for a name of the grammar that has no method yet; InvalidFormat for no name at all."""
    wanted = [
        (fmt.family, FAMILIES, LATER_FAMILIES, "format family"),
        (fmt.statistic, STATISTICS, LATER_STATISTICS, "statistic"),
        (fmt.scale_format, SCALE_FORMATS, (), "scale format"),
    ]
    for name, known, later, what in wanted:
        if name in later or (what == "scale format" and name not in known and _SCALE_NAME.fullmatch(name)):
            raise MethodNotAvailable(f"the {what} {name} is not available yet", hint=f"available: {', '.join(known)}")
        if name not in known:
            raise InvalidFormat(f"no {what} {name!r}", hint=_nearest(name, (*known, *later)))
    if fmt.options:
        raise MethodNotAvailable(f"the option {fmt.options[0]} is not available yet", hint="leave it out")


def _check_numbers(fmt: TensorFormat) -> None:
    if not 1 <= fmt.bits <= MAX_BITS:
        raise InvalidFormat(f"{fmt.bits:g} bits", hint=f"1 to {MAX_BITS} bits")
    if isinstance(fmt.granularity, int) and fmt.granularity < 1:
        raise InvalidFormat(f"a block of {fmt.granularity} elements", hint="a positive block size")
    if isinstance(fmt.granularity, str) and fmt.granularity not in ("tensor", "channel"):
        raise InvalidFormat(f"no granularity {fmt.granularity!r}", hint="tensor, channel or a block size")
    if (fmt.family == "t") != (fmt.nu is not None):
        raise InvalidFormat("t, and only t, has degrees of freedom", hint="t5_4")
    if fmt.nu is not None and not 2 < fmt.nu < math.inf:
        raise InvalidFormat(f"t with {fmt.nu:g} degrees of freedom has no variance", hint="more than 2, for instance 5")
    if fmt.family == "float":
        _check_float(fmt)
    elif fmt.exponent_bits is not None or fmt.mantissa_bits is not None:
        raise InvalidFormat("only float has exponent and mantissa bits", hint="float4_e2m1")
    if fmt.alpha is not None:
        raise InvalidFormat("only power has an exponent", hint="leave it out")


def _check_float(fmt: TensorFormat) -> None:
    exponent, mantissa = fmt.exponent_bits, fmt.mantissa_bits
    if exponent is None or mantissa is None or 1 + exponent + mantissa != fmt.bits:
        raise InvalidFormat(
            f"1 sign + {exponent} exponent + {mantissa} mantissa bits are not {fmt.bits:g}", hint="float4_e2m1"
        )
    least = 1 if not fmt.mode else 2
    if not least <= exponent <= 8 or mantissa < 0:
        raise InvalidFormat(f"{exponent} exponent bits", hint=f"{least} to 8 exponent bits")


def _default_mode(fmt: TensorFormat) -> str:
    if fmt.family in ("float", "nf"):
        return ""
    if fmt.family == "int":
        return "sym" if fmt.codes % 2 else "asym"
    if fmt.statistic == "signmax" and fmt.codes % 2 == 0:
        return ""
    return "sym" if fmt.codes % 2 or fmt.statistic == "rms" else "asym"


def _modes(fmt: TensorFormat) -> tuple[str, ...]:
    """The modes that fit family, statistic and number of codes."""
    if fmt.family in _MODES:
        return _MODES[fmt.family]
    if fmt.codes % 2:
        return ("sym",)
    return ("",) if fmt.statistic == "signmax" else ("asym", "sym", "repeat_zero")


def _check_combination(fmt: TensorFormat) -> None:
    modes = _modes(fmt)
    if fmt.mode not in modes:
        implied = " (signmax implies the mode)" if fmt.statistic == "signmax" and fmt.is_codebook else ""
        parity = " with an odd number of codes" if fmt.codes % 2 and fmt.is_codebook else ""
        allowed = " or ".join(f"-{mode}" if mode else "no mode" for mode in modes)
        raise InvalidFormat(f"{fmt.family}{parity} has no mode {fmt.mode!r}{implied}", hint=allowed)
    if fmt.statistic == "signmax" and fmt.scale_format == "e8m0":
        raise InvalidFormat("signmax needs a signed scale, e8m0 has no sign", hint=f"{fmt.element}@...:signmax:bf16")
    if fmt.family == "nf" and (fmt.statistic == "rms" or fmt.codes % 2 or fmt.codes < 4):
        raise InvalidFormat("nf is a table on [-1, 1] with an even number of codes", hint="nf4@64:absmax")
    if fmt.codes < _least_codes(fmt):
        raise InvalidFormat(f"{fmt.element} under {fmt.statistic} needs at least 4 codes", hint=f"{fmt.family} 2-sym")


def _least_codes(fmt: TensorFormat) -> int:
    """Two codes are 0 and one negative or positive end in asym, and one side has no end for the statistic."""
    one_sided = fmt.mode in ("asym", "repeat_zero")
    return 4 if one_sided and not (fmt.family == "int" and fmt.statistic == "signmax") else 2


def _half_step(bits: int) -> float:
    """The bits, to two decimals, of 3 * 2**(bits - 1) codes."""
    return round(math.log2(3 << (bits - 1)), 2)


def _optional_float(text: str | None) -> float | None:
    return None if text is None else float(text)


def _optional_int(text: str | None) -> int | None:
    return None if text is None else int(text)


def _unknown_element(element: str, text: str) -> InvalidFormat:
    name = re.match(r"[a-z]*", element.lower())
    known = (*FAMILIES, *LATER_FAMILIES)
    if "@" not in text and (alias := get_close_matches(text, [*ALIASES, *LATER_ALIASES], 1)):
        return _invalid(f"no format {text!r}", text, f"did you mean {alias[0]}?")
    if name and name[0] in known:
        return _invalid(f"{element!r} is not a family, bits and mode", text, _example(name[0]))
    return _invalid(f"no element format {element!r}", text, _nearest(name[0] if name else "", known))


def _example(family: str) -> str:
    forms = {"t": "t5_4", "float": "float4_e2m1", "power": "power0.7_4", "grid": "grid3.0"}
    return f"for instance {forms.get(family, f'{family}4')}"


def _nearest(name: str, known: tuple[str, ...]) -> str:
    found = get_close_matches(name, known, 1, 0.4)
    return f"did you mean {found[0]}? known: {', '.join(known)}" if found else f"known: {', '.join(known)}"


def _known_aliases() -> str:
    return f"available aliases: {', '.join(ALIASES)}"


def _invalid(reason: str, text: str, hint: str = "") -> InvalidFormat:
    return InvalidFormat(reason, where=text, hint=hint)
