"""The names of the grammar of tensor formats: families, statistics, scale formats, options, aliases."""

from __future__ import annotations

import re

from core.formats.block_types import BLOCK_TYPES

ROOT_DENSITIES = ("normal", "laplace", "t")
CODEBOOKS = (*ROOT_DENSITIES, "nf", "sf", "af", "bof", "lloyd", "power")
GRID_FAMILY = "grid"
VECTOR_FAMILY = "higgs"
FAMILIES = ("int", "float", *CODEBOOKS, GRID_FAMILY, VECTOR_FAMILY)
BLOCK_FAMILY = "block"
BLOCK_NAMES = tuple(BLOCK_TYPES)

STATISTICS = ("absmax", "signmax", "rms", "search", "signmax-search", "rms-search", "fouroversix")
E8M0_RULES = ("floor", "even", "ceil", "rceil", "midmax")
SCALE_FORMATS = ("bf16", "fp16", "fp32", "e8m0", *(f"e8m0-{rule}" for rule in E8M0_RULES), "e4m3", "dq8")

SCALE_BITS = {"bf16": 16.0, "fp16": 16.0, "fp32": 32.0, "e8m0": 8.0, "e4m3": 8.0, "dq8": 8.125}  # of long tensors

OUTLIER_RULES = ("outliers", "threshold", "opq", "iqr")
ROTATIONS = ("hadamard", "rotate")
ENTROPY_CODES = ("rans", "huffman")
COLUMN_SCALES = "columns"
OPTIONS = (*OUTLIER_RULES, *ROTATIONS, "unbiased", COLUMN_SCALES, *ENTROPY_CODES)

MAX_BITS = 16
MAX_GRID_BITS = 10  # more would need more symbols than a model may have
VECTOR_MODES = ("p1", "p2", "p3", "p4", "p5", "p6")  # how many weights share a code

# What stands for a format of the grammar: the value set of a block type of the same name, in our own layout.
ALIASES = {
    "mxfp4": "float4_e2m1@32:absmax:e8m0",
    "mxfp6_e2m3": "float6_e2m3@32:absmax:e8m0",
    "mxfp6_e3m2": "float6_e3m2@32:absmax:e8m0",
    "mxfp8_e4m3": "float8_e4m3@32:absmax:e8m0",
    "mxfp8_e5m2": "float8_e5m2@32:absmax:e8m0",
    "mxint8": "int8-mx@32:absmax:e8m0",
    "mxint4": "int4-mx@32:absmax:e8m0",
    "nvfp4": "float4_e2m1@16:absmax:e4m3",
    "bfp4": "int4-mx@64:absmax:e8m0-rceil",
    "bfp8": "int8-mx@64:absmax:e8m0-rceil",
    "q4_0": "int4-asym@32:signmax:fp16",
    "q5_0": "int5-asym@32:signmax:fp16",
    "q8_0": "int8-asym@32:absmax:fp16",
}

NUMBER = r"[0-9]+(?:\.[0-9]+)?(?:e[-+]?[0-9]+)?"
_RULES, _CODES = "|".join(OUTLIER_RULES), "|".join(ENTROPY_CODES)
_FOUND = r"(?:x([0-9]{1,15}))?"
_OPTION = re.compile(
    rf"({_RULES})({NUMBER}){_FOUND}|({_CODES}){_FOUND}|({'|'.join((*ROTATIONS, 'unbiased', COLUMN_SCALES))})"
)


def number_text(value: float) -> str:
    """The shortest decimal text that reads back as the same number; no ".0"."""
    return repr(float(value)).removesuffix(".0").replace("e+", "e")  # a plus begins an option


def split_option(text: str) -> tuple[str, float | None]:
    """(name, number or None) of an option; ("", None) for a text that is none."""
    found = _OPTION.fullmatch(text)
    if not found:
        return "", None
    return (found[1], float(found[2])) if found[1] else (found[4] or found[6], None)


def found_by(text: str) -> int | None:
    """What was found in a tensor, where the option says so: outliers `opq0.95x1234`, bytes of codes `ransx5678`."""
    found = _OPTION.fullmatch(text)
    count = found and (found[3] or found[5])
    return int(count) if count else None
