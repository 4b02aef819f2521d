"""What a tensor format may combine, and the defaults that complete it; every refusal says why and what works."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from core.errors import InvalidFormat
from core.recipe.format_grammar import nearest_name
from core.recipe.format_names import (
    BLOCK_FAMILY,
    BLOCK_NAMES,
    ENTROPY_CODES,
    FAMILIES,
    GRID_FAMILY,
    MAX_BITS,
    MAX_GRID_BITS,
    NUMBER,
    OPTIONS,
    OUTLIER_RULES,
    ROOT_DENSITIES,
    ROTATIONS,
    SCALE_BITS,
    SCALE_FORMATS,
    STATISTICS,
    VECTOR_FAMILY,
    VECTOR_MODES,
    found_by,
    number_text,
    split_option,
)

if TYPE_CHECKING:
    from core.recipe.tensor_format import TensorFormat

_MODES = {
    "int": ("asym", "sym", "mx"),
    "float": ("", "ns", "ieee"),
    "nf": ("",),
    "af": ("", "l1"),
    "bof": ("", "mae", "s", "s-mae"),
    "lloyd": ("", "weighted", "rows"),
    "power": ("", "power"),
    GRID_FAMILY: ("",),
    VECTOR_FAMILY: VECTOR_MODES,
}
_SPELLINGS = {("bof", "mse"): "", ("bof", "s-mse"): "s"}
_SF_MODE = re.compile(rf"nu({NUMBER})")
_ON_UNIT_INTERVAL = ("nf", "sf", "af", "bof", "power")
_ABSOLUTE = ("af",)
_SIGNED = ("signmax", "signmax-search")
_UNSIGNED_SCALES = ("e8m0", "dq8")
_WITH_EXPONENT = ("float", "int-mx")
_LEAST_LEVELS = 4
_MOST_SOLVED = 256
_MOST_IN_BLOCK = 10**10
_MOST_CODED = 4096
_LEAST_GRID_BITS = 0.1
_GRID_STATISTICS = ("rms", "absmax")
_ROW_SCALES = ("bf16", "fp16", "fp32", "e8m0")
_VECTOR_SCALES = ("fp16", "bf16", "fp32")
_MOST_POINTS = 4096  # of up to 6 numbers in fp16: tables of 48 KiB
_MOST_LEVELS = 1024  # likewise where vectors have one number


def require_names(fmt: TensorFormat) -> None:
    """InvalidFormat for a name that is not one of the grammar."""
    if fmt.family == BLOCK_FAMILY and fmt.mode in BLOCK_NAMES:
        if fmt.options:
            raise InvalidFormat(f"the block type {fmt.mode} takes no options", hint=fmt.mode)
        return
    wanted = [
        (fmt.family, FAMILIES, "format family"),
        (fmt.statistic or "absmax", STATISTICS, "statistic"),
        (fmt.scale_format or "bf16", SCALE_FORMATS, "scale format"),
        *((split_option(option)[0] or option, OPTIONS, "option") for option in fmt.options),
    ]
    for name, known, what in wanted:
        if name not in known:
            raise InvalidFormat(f"no {what} {name!r}", hint=nearest_name(name, known))


def completed(fmt: TensorFormat) -> dict[str, Any]:
    """The fields that defaults and canonical spellings change."""
    if fmt.family == BLOCK_FAMILY:
        return {"statistic": "own", "scale_format": "own"}
    _check_numbers(fmt)
    mode = _SPELLINGS.get((fmt.family, fmt.mode), fmt.mode)
    if found := _SF_MODE.fullmatch(mode):
        mode = "" if float(found[1]) == 5 else f"nu{number_text(float(found[1]))}"
    signed = fmt.family == "bof" and mode.startswith("s")
    has_rms = fmt.is_grid or fmt.is_vector_grid
    statistic = fmt.statistic or ("signmax" if signed else "rms" if has_rms else "absmax")
    statistic = "signmax-search" if signed and statistic == "search" else statistic
    is_odd_integer = fmt.family == "int" and fmt.codes % 2 == 1 and mode == "asym"
    if not mode or is_odd_integer:
        mode = _default_mode(fmt.family, fmt.codes, statistic)
    scale_format = _scale_format(fmt, mode, fmt.scale_format or ("fp16" if fmt.is_vector_grid else "bf16"))
    return {"mode": mode, "statistic": statistic, "scale_format": scale_format, "options": _options(fmt)}


def scale_share(fmt: TensorFormat) -> float:
    """Bits per weight of the scales of blocks of one size; 0 for scales of rows or a tensor."""
    shared = fmt.granularity if isinstance(fmt.granularity, int) else math.inf
    return SCALE_BITS[fmt.scale_format.partition("-")[0]] / shared


def least_grid_bits(fmt: TensorFormat) -> float:
    """The lowest rate of a grid: what its scales take, and a little for its codes."""
    return _LEAST_GRID_BITS + scale_share(fmt)


def mode_at(fmt: TensorFormat, bits: float) -> str:
    """The mode that a format of another width has; "" for the default."""
    if fmt.mode == "sym" and fmt.codes % 2:  # all that an odd number of codes can have: no choice
        return ""
    parity_fits = fmt.mode in ("", "sym", "opt") or round(2**bits) % 2 == 0
    if fmt.family not in ROOT_DENSITIES:
        return fmt.mode
    is_free = fmt.base_statistic != "signmax" or fmt.mode == "opt"
    return fmt.mode if parity_fits and is_free else ""


def check(fmt: TensorFormat) -> None:
    """InvalidFormat for a combination that cannot be encoded."""
    if fmt.family == BLOCK_FAMILY:
        return
    _check_mode(fmt)
    _check_table(fmt)
    _check_statistic(fmt)
    _check_scale(fmt)
    _check_double(fmt)
    _check_options(fmt)
    _check_code(fmt)
    if fmt.is_vector_grid:
        _check_vectors(fmt)


def _options(fmt: TensorFormat) -> tuple[str, ...]:
    """Options in canonical spelling and order."""
    named = []
    is_bare_grid = fmt.is_grid and fmt.entropy_code is None
    is_unturned = fmt.is_vector_grid and fmt.rotation is None
    implied = (*ENTROPY_CODES[:1] * is_bare_grid, *ROTATIONS[:1] * is_unturned)
    for option in (*fmt.options, *implied):
        (name, value), count = split_option(option), found_by(option)
        text = name if value is None else f"{name}{number_text(value)}"
        named.append((OPTIONS.index(name), text if count is None else f"{text}x{count}"))
    return tuple(text for _, text in sorted(named))


def _check_numbers(fmt: TensorFormat) -> None:
    if fmt.is_grid and not _LEAST_GRID_BITS <= fmt.bits <= MAX_GRID_BITS:
        raise InvalidFormat(f"a grid of {fmt.bits:g} bits", hint=f"{_LEAST_GRID_BITS:g} to {MAX_GRID_BITS} bits")
    if not fmt.is_grid and not 1 <= fmt.bits <= MAX_BITS:
        raise InvalidFormat(f"{fmt.bits:g} bits", hint=f"1 to {MAX_BITS} bits")
    if isinstance(fmt.granularity, int) and not 1 <= fmt.granularity < _MOST_IN_BLOCK:
        raise InvalidFormat(f"a block of {fmt.granularity} elements", hint="a block size from 1 to 9999999999")
    if isinstance(fmt.granularity, str) and fmt.granularity not in ("tensor", "channel"):
        raise InvalidFormat(f"no granularity {fmt.granularity!r}", hint="tensor, channel or a block size")
    if fmt.nu is not None and fmt.family != "t":
        raise InvalidFormat("only t has degrees of freedom", hint="t5_4, or sf4-nu4")
    if fmt.nu is not None and not 2 < fmt.nu < math.inf:
        raise InvalidFormat(f"t with {fmt.nu:g} degrees of freedom has no variance", hint="more than 2, for instance 5")
    if fmt.alpha is not None and (fmt.family != "power" or not 0.05 <= fmt.alpha <= 4):
        raise InvalidFormat(f"an exponent of {fmt.alpha:g}", hint="power0.7_4: 0.05 to 4, and only for power")
    if fmt.family == "float":
        _check_float(fmt)
    elif fmt.exponent_bits is not None or fmt.mantissa_bits is not None:
        raise InvalidFormat("only float has exponent and mantissa bits", hint="float4_e2m1")


def _check_float(fmt: TensorFormat) -> None:
    exponent, mantissa = fmt.exponent_bits, fmt.mantissa_bits
    if exponent is None and mantissa is None:
        if fmt.bits != int(fmt.bits) or not 3 <= fmt.bits <= 8 or fmt.mode:
            raise InvalidFormat(
                "exponent bits are fitted for whole widths from 3 to 8 bits, without a mode", hint="float4"
            )
        return
    if exponent is None or mantissa is None or 1 + exponent + mantissa != fmt.bits:
        raise InvalidFormat(
            f"1 sign + {exponent} exponent + {mantissa} mantissa bits are not {fmt.bits:g}", hint="float4_e2m1"
        )
    least = 1 if not fmt.mode else 2
    if not least <= exponent <= 8 or mantissa < 0:
        raise InvalidFormat(f"{exponent} exponent bits", hint=f"{least} to 8 exponent bits")


def _default_mode(family: str, codes: int, statistic: str) -> str:
    if family == VECTOR_FAMILY:
        return "p2"
    if family == "int":
        return "sym" if codes % 2 else "asym"
    if family not in ROOT_DENSITIES or (statistic in _SIGNED and codes % 2 == 0):
        return ""
    return "sym" if codes % 2 or statistic.startswith("rms") else "asym"


def _scale_format(fmt: TensorFormat, mode: str, name: str) -> str:
    """e8m0 without the rule that the element has anyway."""
    kind = f"{fmt.family}-{mode}" if fmt.family == "int" else fmt.family
    default = "e8m0-floor" if kind in _WITH_EXPONENT else "e8m0-rceil"
    return "e8m0" if name == default else name


def _modes(fmt: TensorFormat) -> tuple[str, ...]:
    """The modes that fit family, statistic and number of codes."""
    if fmt.family in _MODES:
        return _MODES[fmt.family]
    if fmt.codes % 2:
        return ("sym",)
    return ("", "opt") if fmt.base_statistic == "signmax" else ("asym", "sym", "repeat_zero", "opt")


def _check_mode(fmt: TensorFormat) -> None:
    if fmt.family == "sf":
        found = _SF_MODE.fullmatch(fmt.mode or "nu5")
        if not found or not 0.5 <= float(found[1]) < 1e6:
            raise InvalidFormat(f"sf has no mode {fmt.mode!r}", hint="sf4 (nu 5), sf4-nu4")
        return
    modes = _modes(fmt)
    if fmt.mode not in modes:
        implied = " (signmax implies the mode)" if fmt.base_statistic == "signmax" and fmt.is_codebook else ""
        parity = " with an odd number of codes" if fmt.codes % 2 and fmt.is_codebook else ""
        allowed = " or ".join(f"-{mode}" if mode else "no mode" for mode in modes)
        raise InvalidFormat(f"{fmt.family}{parity} has no mode {fmt.mode!r}{implied}", hint=allowed)
    if fmt.has_row_codebooks:
        _check_rows(fmt)
    if fmt.mode == "mx" and not (fmt.bits == int(fmt.bits) and 2 <= fmt.bits <= 8):
        raise InvalidFormat("int in the mx mode has whole widths from 2 to 8 bits", hint="int4-mx@32:e8m0")
    if fmt.mode == "opt" and (fmt.nu is None and fmt.family == "t"):
        raise InvalidFormat("the optimal codebook needs a given nu", hint="t7_4-opt@64")


def _check_rows(fmt: TensorFormat) -> None:
    """A row's scale only brings its codebook into the range of fp16: there is nothing to choose about it."""
    if fmt.granularity != "channel":
        raise InvalidFormat("a codebook for every row has a scale for every row", hint=f"{fmt.element}@channel")
    if fmt.statistic != "absmax":
        raise InvalidFormat(f"codebooks of rows are fitted, {fmt.statistic} does not apply", hint="absmax")
    if fmt.scale_format.partition("-")[0] not in _ROW_SCALES:
        raise InvalidFormat(f"codebooks of rows with {fmt.scale_format} scales", hint=" or ".join(_ROW_SCALES))
    if fmt.codes > _MOST_SOLVED:
        raise InvalidFormat(f"a codebook for every row has up to {_MOST_SOLVED} codes", hint="8 bits at most")


def _check_table(fmt: TensorFormat) -> None:
    if fmt.family in ("nf", "sf", "af", "bof") and (fmt.codes % 2 or fmt.codes < _LEAST_LEVELS):
        raise InvalidFormat(
            f"{fmt.family} is a table with an even number of at least 4 codes", hint=f"{fmt.family}4@64"
        )
    if (fmt.family in ("bof", "af") or fmt.mode == "opt") and fmt.codes > _MOST_SOLVED:
        raise InvalidFormat(f"{fmt.element} is solved for up to {_MOST_SOLVED} codes", hint="8 bits at most")
    if fmt.mode == "opt" and fmt.codes < _LEAST_LEVELS:
        raise InvalidFormat("the optimal codebook has at least 4 codes", hint="2 bits or more")
    if fmt.family in ("lloyd", "power") and not 3 <= fmt.codes <= 4096:
        raise InvalidFormat(f"{fmt.family} has from 3 to 4096 codes", hint=f"{fmt.family}4@64")
    if not fmt.is_grid and fmt.codes < _least_codes(fmt):
        raise InvalidFormat(
            f"{fmt.element} under {fmt.statistic} needs at least 4 codes", hint="2 bits or more, or -sym"
        )


def _check_statistic(fmt: TensorFormat) -> None:
    if fmt.family in _ON_UNIT_INTERVAL and fmt.base_statistic == "rms":
        raise InvalidFormat(
            f"{fmt.family} is a table on [-1, 1], which rms does not scale to", hint=f"{fmt.element}@64"
        )
    if fmt.fitted == "exponent_bits" and fmt.statistic == "rms":
        raise InvalidFormat("exponent bits are fitted together with a scale", hint=f"{fmt.element}@channel:rms-search")
    is_signed = fmt.family == "bof" and fmt.mode.startswith("s")
    if is_signed and fmt.base_statistic != "signmax":
        raise InvalidFormat("bof-s is made for the signed maximum", hint=f"{fmt.element}@64:signmax")
    if fmt.base_statistic == "signmax" and (fmt.family in _ABSOLUTE or (fmt.family == "bof" and not is_signed)):
        raise InvalidFormat(f"{fmt.family} is made for the absolute maximum", hint="absmax, or bof4-s for signmax")
    if fmt.statistic == "fouroversix" and (fmt.element != "float4_e2m1" or fmt.scale_format != "e4m3"):
        raise InvalidFormat("fouroversix chooses between NVFP4's two scales", hint="float4_e2m1@16:fouroversix:e4m3")


def _check_scale(fmt: TensorFormat) -> None:
    name, _, rule = fmt.scale_format.partition("-")
    if fmt.base_statistic == "signmax" and name in _UNSIGNED_SCALES:
        raise InvalidFormat(f"signmax needs a signed scale, {name} has no sign", hint=f"{fmt.element}@...:signmax:bf16")
    kind = f"{fmt.family}-{fmt.mode}" if fmt.family == "int" else fmt.family
    if rule and rule != "rceil" and kind not in _WITH_EXPONENT:
        raise InvalidFormat(f"the rule {rule} needs an element with an exponent", hint="e8m0, or float4_e2m1, int4-mx")
    if rule and fmt.base_statistic == "rms":
        raise InvalidFormat(f"the rule {rule} starts from the absmax", hint="absmax, or e8m0 without a rule")


def _check_double(fmt: TensorFormat) -> None:
    """Scales of dq8 are never exactly 0: only a zero among the values decodes zeros to zeros."""
    has_none = fmt.family == "lloyd" or fmt.mode == "opt" or (fmt.mode == "sym" and fmt.codes % 2 == 0)
    if fmt.scale_format == "dq8" and has_none:
        raise InvalidFormat("dq8 scales need a table with a zero", hint="nf4@64:dq8, or bf16 scales")


def _check_code(fmt: TensorFormat) -> None:
    """What an entropy code and the grid, which is nothing without one, ask for."""
    if fmt.entropy_code == "huffman" and not fmt.is_grid and fmt.codes > _MOST_CODED:
        raise InvalidFormat(f"a Huffman code of {fmt.codes} codes", hint="at most 12 bits, or rans")
    if not fmt.is_grid:
        return
    least = least_grid_bits(fmt)
    if fmt.bits < least:
        more = f"{math.ceil(100 * least) / 100:g} bits or more, or a larger block"
        raise InvalidFormat(
            f"a grid of {fmt.bits:g} bits, of which scales take {scale_share(fmt):g}",
            hint=more if least <= MAX_GRID_BITS else "a larger block",
        )
    if fmt.statistic not in _GRID_STATISTICS:
        raise InvalidFormat(f"a grid's step is solved for its rate, {fmt.statistic} does not apply", hint="rms, absmax")
    if fmt.coded_bytes is not None:
        raise InvalidFormat("the bytes of a grid follow from its bits", hint=f"+{fmt.entropy_code}")


def _check_vectors(fmt: TensorFormat) -> None:
    """Points for independent Normal weights of a known RMS, in codes of a fixed length."""
    most = _MOST_LEVELS if fmt.vector == 1 else _MOST_POINTS
    if fmt.codes > most:
        widest = math.floor(100 * math.log2(most) / fmt.vector) / 100
        raise InvalidFormat(f"a grid of {fmt.codes} points", hint=f"{widest:g} bits at most for {fmt.mode}")
    if fmt.statistic != "rms":
        raise InvalidFormat(f"grids of vectors are made for weights of a known RMS, not {fmt.statistic}", hint="rms")
    if fmt.scale_format not in _VECTOR_SCALES:
        raise InvalidFormat(f"grids of vectors with {fmt.scale_format} scales", hint=" or ".join(_VECTOR_SCALES))
    if fmt.entropy_code is not None:
        raise InvalidFormat("codes of vectors have a fixed length", hint="grid3@tensor, which errs less anyway")


def _check_options(fmt: TensorFormat) -> None:
    names = [split_option(option)[0] for option in fmt.options]
    exclusive = [(OUTLIER_RULES, "rule for outliers"), (ROTATIONS, "rotation"), (ENTROPY_CODES, "entropy code")]
    for several, what in exclusive:
        if sum(name in several for name in names) > 1:
            raise InvalidFormat(f"more than one {what}", hint=" or ".join(several))
    if len(set(names)) < len(names):
        raise InvalidFormat("an option is given twice", hint="leave one out")
    rule, value = fmt.outlier_rule or ("", 0.5)
    if rule in ("outliers", "opq") and not 0 < value < 1:
        raise InvalidFormat(f"{rule}{value:g}: a number between 0 and 1", hint="outliers0.001, opq0.95")
    if rule == "outliers" and fmt.outliers_found is not None:
        raise InvalidFormat("outliers gives the number itself", hint=f"outliers{number_text(value)}")
    if rule == "threshold" and not 0 < value < math.inf:
        raise InvalidFormat(f"threshold{value:g}: a positive multiple of the tensor's RMS", hint="threshold6")
    if rule == "iqr" and not 0 < value < math.inf:
        raise InvalidFormat(f"iqr{value:g}: a positive multiple of the distance of the quartiles", hint="iqr1.6")
    if fmt.has_column_scales and (not fmt.is_grid or isinstance(fmt.granularity, int) or len(names) > 2):
        hint = "grid3@tensor+columns, grid3@channel+columns"
        raise InvalidFormat("scales of columns go with a grid's scales of rows or of the tensor alone", hint=hint)
    if fmt.is_unbiased and fmt.scale_format not in ("bf16", "fp16", "fp32"):
        raise InvalidFormat("unbiased corrects scales of bf16, fp16 or fp32", hint="bf16 scales, or leave it out")


def _least_codes(fmt: TensorFormat) -> int:
    """Two codes are 0 and one negative or positive end in asym, and one side has no end for the statistic."""
    one_sided = fmt.mode in ("asym", "repeat_zero")
    return 4 if one_sided and not (fmt.family == "int" and fmt.base_statistic == "signmax") else 2
