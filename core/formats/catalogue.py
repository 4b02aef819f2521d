"""The catalogue of number formats for people and programs: families, aliases, and one format described in numbers."""

from __future__ import annotations

import math
from typing import Any

from core.errors import InvalidFormat
from core.formats.block_types import BLOCK_TYPES
from core.formats.elements import ASSUMED_CHANNEL, depends_on_block, element_table
from core.formats.limits import entropy_coded_grid
from core.formats.sparse_index import index_bytes, outlier_count
from core.formats.stored import LEAST_SHARE, packed_bits, scale_bits
from core.formats.vector_grid import stored_grid
from core.recipe.format_names import ALIASES, BLOCK_NAMES, FAMILIES, SCALE_FORMATS, STATISTICS, VECTOR_FAMILY
from core.recipe.tensor_format import TensorFormat, parse

# family: (example, description)
_FAMILIES = {
    "int": ("int4-asym@128", "integers: asym with a zero, sym without, mx for shared exponents (BFP, OCP MX)"),
    "float": (
        "float4_e2m1@32:absmax:e8m0",
        "floating point, OCP conventions; float4 fits the exponent bits to the data",
    ),
    "normal": ("normal4@64", "cube-root-density codebook for Normal weights; -opt: the block-scaled optimum"),
    "laplace": ("laplace4@64", "cube-root-density codebook for Laplace weights; -opt: the block-scaled optimum"),
    "t": ("t7_4@64:signmax", "cube-root-density codebook for Student-t weights; t_4 fits nu; -opt: the optimum"),
    "nf": ("nf4@64", "NF4: the Normal's quantiles by QLoRA's rule"),
    "sf": ("sf4@64", "SF4: Student-t quantiles by the same rule, nu 5 or -nu<number>"),
    "af": (
        "af4-l1@64",
        "AF4: least absolute error of a normalised block; the published rule, or -l1 for the true optimum",
    ),
    "bof": ("bof4-s@64", "BOF4: least error of a block of Normal weights; -mae, and -s for the signed maximum"),
    "lloyd": (
        "lloyd4@64",
        "Lloyd-Max codebook fitted to each tensor; -weighted by sensitivities; -rows: a codebook for each row",
    ),
    "power": (
        "power4@64",
        "powers of a uniform grid (PowerQuant, NUPES); power0.7_4 gives the exponent, power4 fits it",
    ),
    "grid": (
        "grid3@tensor:rms",
        "uniform grid with entropy-coded codes; its step is solved so that all that is stored takes the bits named",
    ),
    "higgs": (
        "higgs3-p2@1024",
        "grid of vectors for Normal weights (HIGGS): after a rotation, p weights share one of 2^(p bits) points",
    ),
}
_OUTLIER_VALUE_BITS = 16
_CODEBOOK_BITS = 16  # a value, where every row has a codebook; a number of a point
_GRID_SHOWN = 4.0  # RMS
_LONG = 1 << 24  # elements of the tensor that shares of outliers are counted on


def catalogue() -> list[dict[str, Any]]:
    """One entry per family, alias and block type: name, kind, description, an example, widths for an allocator."""
    families = [
        {
            "name": name,
            "kind": "family",
            "description": _FAMILIES[name][1],
            "example": str(parse(_FAMILIES[name][0])),
            "widths": list(parse(_FAMILIES[name][0]).allowed_widths()),
            "statistics": _accepted(name, "statistic", STATISTICS),
            "scale_formats": _accepted(name, "scale_format", SCALE_FORMATS),
        }
        for name in FAMILIES
    ]
    aliases = [
        {"name": name, "kind": "alias", "description": f"stands for {parse(text)}", "example": str(parse(text))}
        for name, text in ALIASES.items()
    ]
    blocks = [
        {"name": name, "kind": "block", "description": _block_sentence(name), "example": name}
        for name in BLOCK_NAMES
        if name not in ALIASES
    ]
    return families + aliases + blocks


def describe(fmt: TensorFormat) -> dict[str, Any]:
    """A format in numbers: codebook ascending for scale 1, bits of element, scale and stored parameter.

    Where only a tensor's shape tells how many weights share a scale, the codebook is that of `assumed_shared` weights
    and `bits_per_param` leaves the scales out. Of what is fitted to each tensor the start is shown and `fitted` named.
    A grid is shown for Normal weights; of a grid of vectors the codebook are its points as they are stored, in
    lexicographic order.
    """
    if fmt.is_block_type:
        return _described_block(fmt)
    if fmt.is_grid:
        return _described_grid(fmt)
    if fmt.is_vector_grid:
        return _described_vectors(fmt)
    known = isinstance(fmt.granularity, int)
    shared = fmt.granularity if isinstance(fmt.granularity, int) else ASSUMED_CHANNEL
    described = {
        "format": str(fmt),
        "codebook": list(element_table(fmt, shared).values),
        "element_bits": fmt.element_bits,
        "scale_bits": scale_bits(fmt),
        "block_size": fmt.granularity,
        "bits_per_param": packed_bits(fmt.codes) + (scale_bits(fmt) / shared if known else 0) + _outlier_bits(fmt),
        "description": _sentence(fmt),
    }
    described |= {"assumed_shared": shared} if not known and depends_on_block(fmt) else {}
    unknown = _unknown_outliers(fmt)
    unknown += [f"{fmt.entropy_code}: what it saves only the data tell"] if fmt.entropy_code else []
    unknown += [f"codebooks: {_CODEBOOK_BITS * fmt.codes} bits a row"] if fmt.has_row_codebooks else []
    described |= {"not_counted": "; ".join(unknown)} if unknown else {}
    fitted = "codebook" if fmt.family == "lloyd" else fmt.fitted
    return described | ({"fitted": fitted} if fitted else {})


def _described_block(fmt: TensorFormat) -> dict[str, Any]:
    kind = BLOCK_TYPES[fmt.mode]
    return {
        "format": str(fmt),
        "codebook": sorted(kind.levels),
        "element_bits": kind.bits,
        "scale_bits": 0.0,
        "block_size": kind.elements,
        "bits_per_param": kind.bits,
        "description": _block_sentence(fmt.mode),
    }


def _described_grid(fmt: TensorFormat) -> dict[str, Any]:
    """A grid with the step that Normal weights would have under the statistic rms, out to where few of them are."""
    step = entropy_coded_grid("normal", None, fmt.element_bits).delta
    last = math.ceil(_GRID_SHOWN / step)
    return {
        "format": str(fmt),
        "codebook": [step * number for number in range(-last, last + 1)],
        "element_bits": fmt.element_bits,
        "scale_bits": scale_bits(fmt),
        "block_size": fmt.granularity,
        "bits_per_param": max(fmt.bits, fmt.bits - (1 - LEAST_SHARE) * fmt.element_bits + _outlier_bits(fmt)),
        "description": _sentence(fmt),
        "fitted": "step",
    }


def _described_vectors(fmt: TensorFormat) -> dict[str, Any]:
    shared = fmt.granularity if isinstance(fmt.granularity, int) else math.inf
    found = {
        "format": str(fmt),
        "codebook": stored_grid(fmt.vector, fmt.codes).tolist(),
        "element_bits": fmt.element_bits,
        "scale_bits": scale_bits(fmt),
        "block_size": fmt.granularity,
        "bits_per_param": packed_bits(fmt.codes) / fmt.vector + scale_bits(fmt) / shared + _outlier_bits(fmt),
        "description": _sentence(fmt),
    }
    unknown = [f"points: {_CODEBOOK_BITS * fmt.codes * fmt.vector} bits a tensor", *_unknown_outliers(fmt)]
    return found | {"not_counted": "; ".join(unknown)}


def _unknown_outliers(fmt: TensorFormat) -> list[str]:
    """What is to say about outliers whose number only the data tell."""
    rule = (fmt.outlier_rule or ("outliers", 0.0))[0]
    return [] if rule == "outliers" else [f"outliers: how many {rule} finds only the data tell"]


def _outlier_bits(fmt: TensorFormat) -> float:
    """Bits per parameter that outliers add to a long tensor; 0 where the data decide how many there are."""
    rule, ratio = fmt.outlier_rule or ("", 0.0)
    if rule != "outliers":
        return 0.0
    count = outlier_count(_LONG, ratio)
    return (count * _OUTLIER_VALUE_BITS + 8 * index_bytes(_LONG, count)) / _LONG


def _accepted(family: str, field: str, names: tuple[str, ...]) -> list[str]:
    """The names with which an element of the family, plain or signed, makes a format."""
    return [name for name in names if any(_exists(text) for text in _with_name(family, field, name))]


def _with_name(family: str, field: str, name: str) -> list[str]:
    elements = {"t": ["t7_4"], "float": ["float4_e2m1"], "bof": ["bof4", "bof4-s"], "int": ["int4", "int4-mx"]}
    fixed = "rms" if family == VECTOR_FAMILY else "absmax"
    statistic, scale = (name, "bf16") if field == "statistic" else (fixed, name)
    scale = "e4m3" if name == "fouroversix" else scale
    return [f"{element}@16:{statistic}:{scale}" for element in elements.get(family, [f"{family}4"])]


def _exists(text: str) -> bool:
    try:
        parse(text)
    except InvalidFormat:
        return False
    return True


def _sentence(fmt: TensorFormat) -> str:
    place = {"tensor": "per tensor", "channel": "per output row"}.get(str(fmt.granularity))
    options = f"; with {', '.join(fmt.options)}" if fmt.options else ""
    scale = f"one {fmt.scale_format} scale {place or f'per block of {fmt.granularity}'}, by {fmt.statistic}"
    return f"{_FAMILIES[fmt.family][1]}; {scale}{options}"


def _block_sentence(name: str) -> str:
    kind = BLOCK_TYPES[name]
    return f"blocks of {kind.elements} weights in {kind.nbytes} bytes with their own scales"
