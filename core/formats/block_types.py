"""Self-contained block containers: how many elements and bytes a block has, and which values an element can take.

GGUF's block types, the types of the TensorCast catalogue (plain MX, MSFP with shared offset bits, implicit codebooks,
affine integers) under that library's own names. Pure arithmetic without torch; `core.tensors.block_types` writes and
reads the bytes. It does not choose between types and knows nothing of files.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import frexp, gcd

from core.errors import MethodNotAvailable
from core.formats import floating

IQ4_NL_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
CODEBOOK_SHIFTS = 8
CODEBOOK_LEVELS = 7  # positive magnitudes of an implicit codebook; zero is the eighth

_NUMBER_BYTES = {"e8m0": 1, "e5m3": 1, "int8": 1, "fp16": 2, "bf16": 2}


@dataclass(frozen=True)
class BlockType:
    """A run of `nbytes` bytes that holds `elements` weights and all that decodes them.

    `levels`: the values of an element for scale 1, minimum 0 and no offset, ascending; of an implicit codebook those
    of all its tables. `gguf_id`: the type's number in GGUF files, None outside GGUF. `is_searched`: the encoder looks
    for the smallest squared error and takes importance weights; of the other types every byte is fixed by rule.
    """

    name: str
    elements: int
    nbytes: int
    levels: tuple[float, ...]
    gguf_id: int | None = None
    is_searched: bool = False

    @property
    def bits(self) -> float:
        """Stored bits of a weight."""
        return 8 * self.nbytes / self.elements

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of `columns` weights, padded to whole blocks."""
        return -(-columns // self.elements) * self.nbytes


@dataclass(frozen=True)
class TileElement:
    """What the codes of a tile stand for.

    float: sign and magnitude, `core.formats.floating`'s patterns; int: two's complement k / 2^fraction_bits, symmetric;
    uint: 0 .. 2^bits - 1; codebook: sign and an index into one of sixteen tables over the float (exponent, mantissa).
    """

    kind: str
    bits: int
    exponent_bits: int = 0
    mantissa_bits: int = 0

    @property
    def magnitudes(self) -> tuple[float, ...]:
        """The non-negative values of float elements, and of the float that a codebook selects from."""
        return floating.magnitudes(self.exponent_bits, self.mantissa_bits, "")

    @property
    def fraction_bits(self) -> int:
        """Of an integer below a power-of-two scale: int8 is k/64, one binade below 2."""
        return self.bits - 2

    @property
    def largest(self) -> float:
        """The largest value of a float element; of integers the largest code."""
        if self.kind == "int":
            return float(2 ** (self.bits - 1) - 1)
        return float(2**self.bits - 1) if self.kind == "uint" else self.magnitudes[-1]

    @property
    def largest_exponent(self) -> int:
        """emax: floor(log2) of the largest value below a power-of-two scale."""
        return 0 if self.kind == "int" else frexp(self.magnitudes[-1])[1] - 1

    @property
    def midmax(self) -> float:
        """Above this a block's scale is raised under the rule "midmax": halfway from the largest value to 2^(emax+1).

        Where the top pattern is NaN (E4M3), a quarter of the way, as TensorCast has it.
        """
        top, limit = self.magnitudes[-1], 2.0 ** (self.largest_exponent + 1)
        is_full = limit - top == 2.0 ** (self.largest_exponent - self.mantissa_bits)
        return top + (limit - top) * (0.5 if is_full else 0.25)


@dataclass(frozen=True)
class TileType:
    """A type of the TensorCast catalogue: tiles that share a scale, sub-tiles that share offset bits or a codebook.

    Bytes of a block, in this order: the scales of its tiles (little-endian), for affine types their zero points, the
    sub-tiles' offsets or codebook numbers as one bit stream, the codes as one bit stream; streams are lowest bits
    first. A block is as many tiles as fill whole bytes. `bfp16` and the like have no sub-tiles (`sub_tile` = `tile`).
    """

    name: str
    element: TileElement
    tile: int
    sub_tile: int
    scale: str = "e8m0"
    offset_bits: int = 0
    zero: str = ""

    @property
    def meta_bits(self) -> int:
        """Bits that every sub-tile stores."""
        return 4 if self.element.kind == "codebook" else self.offset_bits

    @property
    def tiles(self) -> int:
        """Tiles in a block."""
        meta = self.meta_bits * (self.tile // self.sub_tile)
        codes = self.element.bits * self.tile
        return max(8 // gcd(8, meta), 8 // gcd(8, codes))

    @property
    def sub_tiles(self) -> int:
        """Sub-tiles in a block."""
        return self.tiles * (self.tile // self.sub_tile)

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scales in a block, without zero points."""
        return self.tiles * _NUMBER_BYTES[self.scale]

    @property
    def zero_bytes(self) -> int:
        """Bytes of the zero points in a block."""
        return self.tiles * _NUMBER_BYTES[self.zero] if self.zero else 0

    @property
    def meta_bytes(self) -> int:
        """Bytes of the offsets or codebook numbers in a block."""
        return self.sub_tiles * self.meta_bits // 8

    @property
    def block_type(self) -> BlockType:
        """The same as every block type is described."""
        elements = self.tiles * self.tile
        nbytes = self.scale_bytes + self.zero_bytes + self.meta_bytes + elements * self.element.bits // 8
        levels = _tile_levels(self.element, self.scale)
        return BlockType(self.name, elements, nbytes, levels, is_searched=self.element.kind == "codebook")


@lru_cache(maxsize=8)
def implicit_codebooks(exponent_bits: int, mantissa_bits: int) -> tuple[tuple[float, ...], ...]:
    """The sixteen tables of seven positive magnitudes that TensorCast's icb44fi selects from, each ascending.

    Patterns "f" (the magnitudes of E2M1) and "i" (1 to 7) are scaled to the top binade of the float, moved up code by
    code until the largest is its largest code, then moved down by 0 to 7 codes. A level that reaches code 0 is 0.
    """
    numbers = floating.magnitudes(exponent_bits, mantissa_bits, "")
    top = 2.0 ** (frexp(numbers[-1])[1] - 3)
    tables = []
    for pattern in (floating.magnitudes(2, 1, "")[1:], tuple(float(level) for level in range(1, CODEBOOK_LEVELS + 1))):
        codes = [numbers.index(level * top) for level in pattern]
        raised = [code + len(numbers) - 1 - codes[-1] for code in codes]
        tables += [tuple(numbers[code - shift] for code in raised) for shift in range(CODEBOOK_SHIFTS)]
    return tuple(tables)


def block_type(name: str) -> BlockType:
    """The block type of that name; MethodNotAvailable for one that is not known."""
    if name not in BLOCK_TYPES:
        raise MethodNotAvailable(f"no block type {name!r}", hint=f"known: {', '.join(BLOCK_TYPES)}")
    return BLOCK_TYPES[name]


def _tile_levels(element: TileElement, scale: str) -> tuple[float, ...]:
    if element.kind == "uint":
        return _integers(0, int(element.largest))
    if element.kind == "int":
        step = 2.0**-element.fraction_bits if scale == "e8m0" else 1.0
        return tuple(step * level for level in _integers(-int(element.largest), int(element.largest)))
    positive = set(element.magnitudes)
    if element.kind == "codebook":
        positive = {
            level for table in implicit_codebooks(element.exponent_bits, element.mantissa_bits) for level in table
        }
    return tuple(sorted({sign * level for level in positive | {0.0} for sign in (-1.0, 1.0)}))


def _integers(low: int, high: int) -> tuple[float, ...]:
    return tuple(float(level) for level in range(low, high + 1))


def _float_element(exponent_bits: int, mantissa_bits: int) -> TileElement:
    return TileElement("float", 1 + exponent_bits + mantissa_bits, exponent_bits, mantissa_bits)


def _codebook_types() -> list[TileType]:
    found = []
    for digit, exponent_bits, mantissa_bits in ((2, 2, 3), (3, 3, 2), (4, 4, 3)):
        element = TileElement("codebook", 4, exponent_bits, mantissa_bits)
        found += [
            TileType(f"icb44fi{digit}_{letter}32{suffix}", element, 32, sub_tile, scale)
            for letter, scale in (("e", "e8m0"), ("f", "e5m3"))
            for suffix, sub_tile in (("", 32), ("s16", 16), ("s8", 8), ("s4", 4))
        ]
    return found


def _tile_types() -> list[TileType]:
    e2m1 = _float_element(2, 1)
    mx = {
        "mxfp8e5": (5, 2),
        "mxfp8e4": (4, 3),
        "mxfp6e3": (3, 2),
        "mxfp6e2": (2, 3),
        "mxfp5e2": (2, 2),
        "mxfp4e2": (2, 1),
    }
    return [
        *(TileType(name, _float_element(*split), 32, 32) for name, split in mx.items()),
        *(TileType(f"mxint{bits}", TileElement("int", bits), 32, 32) for bits in (8, 4)),
        TileType("bfp16", TileElement("int", 8), 8, 8),
        *(TileType(f"mx{bits + 1}", TileElement("int", bits), 16, 2, offset_bits=1) for bits in (8, 5, 3)),
        *(
            TileType(f"e2m1_e32s{sub_tile}o{bits}", e2m1, 32, sub_tile, offset_bits=bits)
            for sub_tile in (8, 4)
            for bits in (1, 2)
        ),
        TileType("e2m1_f32", e2m1, 32, 32, "e5m3"),
        TileType("int4_f32", TileElement("int", 4), 32, 32, "e5m3"),
        TileType("int4_b32", TileElement("int", 4), 32, 32, "bf16"),
        TileType("uint4_ff32", TileElement("uint", 4), 32, 32, "fp16", zero="fp16"),
        TileType("uint4_fi32", TileElement("uint", 4), 32, 32, "fp16", zero="int8"),
        *_codebook_types(),
    ]


_FP4_LEVELS = floating.values(2, 1, "")
GGUF_TYPES = (
    BlockType("q4_0", 32, 18, _integers(-8, 7), 2),
    BlockType("q4_1", 32, 20, _integers(0, 15), 3),
    BlockType("q5_0", 32, 22, _integers(-16, 15), 6),
    BlockType("q5_1", 32, 24, _integers(0, 31), 7),
    BlockType("q8_0", 32, 34, _integers(-127, 127), 8),
    BlockType("q2_k", 256, 84, _integers(0, 3), 10, is_searched=True),
    BlockType("q3_k", 256, 110, _integers(-4, 3), 11, is_searched=True),
    BlockType("q4_k", 256, 144, _integers(0, 15), 12, is_searched=True),
    BlockType("q5_k", 256, 176, _integers(0, 31), 13, is_searched=True),
    BlockType("q6_k", 256, 210, _integers(-32, 31), 14, is_searched=True),
    BlockType("iq4_nl", 32, 18, tuple(float(level) for level in IQ4_NL_LEVELS), 20, is_searched=True),
    BlockType("mxfp4", 32, 17, _FP4_LEVELS, 39),
    BlockType("nvfp4", 64, 36, _FP4_LEVELS, 40, is_searched=True),
)
TILE_TYPES: dict[str, TileType] = {one.name: one for one in _tile_types()}
BLOCK_TYPES: dict[str, BlockType] = {one.name: one for one in GGUF_TYPES} | {
    name: one.block_type for name, one in TILE_TYPES.items()
}
