"""Speed of encoding and decoding on one CPU core beside memcpy, bitsandbytes' CPU NF4 and the torch reference.

All work by turns within each round, pinned to one core, so that a noisy machine disturbs all; rounds alternate in
order. Rates are bytes of bf16 weights per second of processor time (memcpy: bytes copied, into memory that is there).
Encoding is all of `encode_nearest`, bf16 in, packed codes and stored bf16 scales out; decoding is the way back to bf16
into memory that is there, as memcpy does, and to bf16 and fp32 in new memory. The reference and bitsandbytes get fewer
rows. Prints a JSON line per format with medians and ratios; the promise, for 4 bits in blocks of 64, is at least 0.12
of memcpy's rate and 30 times bitsandbytes', and decoding to bf16 no slower than encoding.

    python benchmarks/encode_speed.py [--rows 4096] [--columns 4096] [--rounds 7] [--formats nf4@64 int4@64 ...]
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from core.recipe.tensor_format import TensorFormat

ROOT = Path(__file__).parents[1]
FORMATS = ("nf4@64", "int4@64", "t7_4@64:signmax", "normal4@64:rms", "float4_e2m1@32", "int3@64", "t7_3.58@64")
MORE = ("int8@64", "float8_e4m3@64", "t7_6@64", "t7_8@64")
MEMCPY_LIMIT, BITSANDBYTES_LIMIT = 0.12, 30.0
SHARE = 32  # the slow ones get one row of this many

Work = Callable[[], object]


def reference(weight: torch.Tensor, fmt: TensorFormat) -> None:
    """Both passes by the readable implementation."""
    from core.formats.elements import element_table, shared_weights
    from core.formats.stored import group_of
    from core.tensors.blocks import BlockGrid
    from core.tensors.passes import Reference
    from core.tensors.scale_formats import decoded_scales, stored_scales

    shape = tuple(weight.shape)
    passes, table = Reference(weight.reshape(-1), fmt, shape), element_table(fmt, shared_weights(fmt, shape))
    for piece in BlockGrid.of(fmt, shape).pieces(group_of(fmt.codes)):
        extreme = passes.statistics(piece)[0]
        passes.codes(piece, decoded_scales(fmt, stored_scales(fmt, table, extreme)), table)


def contenders(weight: torch.Tensor, fmt: TensorFormat) -> dict[str, tuple[Work, float]]:
    """What is timed, and which share of the weights it works on."""
    import torch

    from core.tensors.nearest import encode_nearest

    target, part = torch.zeros_like(weight), weight[: len(weight) // SHARE].contiguous()
    encoded = encode_nearest(weight, fmt)
    works: dict[str, tuple[Work, float]] = {
        "memcpy": (lambda: target.copy_(weight), 1.0),
        "encode": (lambda: encode_nearest(weight, fmt), 1.0),
        "decode": (lambda: encoded.decode(torch.bfloat16, out=target.view(-1)), 1.0),
        "decode_anew": (lambda: encoded.decode(torch.bfloat16), 1.0),
        "decode_fp32": (encoded.decode, 1.0),
        "reference": (lambda: reference(part, fmt), 1 / SHARE),
    }
    if importlib.util.find_spec("bitsandbytes"):
        from bitsandbytes.functional import quantize_4bit

        works["bitsandbytes"] = (lambda: quantize_4bit(part, blocksize=64, quant_type="nf4"), 1 / SHARE)
    return works


def measure(weight: torch.Tensor, fmt: TensorFormat, rounds: int) -> dict[str, float]:
    """Median gigabytes of weights per second of each."""
    from benchmarks.one_core import medians

    return medians(contenders(weight, fmt), rounds, weight.numel() * weight.element_size() / 1e9)


def report(fmt: str, rates: dict[str, float]) -> dict[str, object]:
    """The line of a format."""
    encode, other = rates["encode"], rates.get("bitsandbytes")
    line: dict[str, object] = {"format": fmt} | {f"{name}_gb_s": round(rate, 4) for name, rate in rates.items()}
    line |= {"of_memcpy": round(encode / rates["memcpy"], 4), "of_reference": round(encode / rates["reference"], 1)}
    line["of_bitsandbytes"] = "bitsandbytes is not installed" if other is None else round(encode / other, 1)
    line["decode_of_encode"] = round(rates["decode"] / encode, 2)
    line["within_limits"] = (
        encode >= MEMCPY_LIMIT * rates["memcpy"]
        and (other is None or encode >= BITSANDBYTES_LIMIT * other)
        and rates["decode"] >= encode
    )
    return line


def main() -> None:
    """Measure and print."""
    from benchmarks.one_core import arguments, weights
    from core.recipe.tensor_format import parse

    given = arguments((__doc__ or "").splitlines()[0], 4096, [*FORMATS, *MORE])
    weight = weights(given.rows, given.columns)
    about = {"benchmark": "encode_speed", "rows": given.rows, "columns": given.columns, "rounds": given.rounds}
    for text in given.formats:
        print(json.dumps(about | report(text, measure(weight, parse(text), given.rounds))), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
