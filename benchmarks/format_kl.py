"""KL divergence of number formats on the bundled model: every matrix in one format, beside what it stores.

Prints a JSON line per format: stored bits per parameter of the matrices, R over all of them, and measured KL (nats per
token, on the evaluation part of the built-in text). R says what a format does to weights, KL what it does to the model;
the two disagree where a format shrinks rows or clips their largest weights.

    python benchmarks/format_kl.py [--sequences 16] [--format nf4@64 nf4@64:search ...]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).parents[1]
ELEMENTS = (
    "nf4@64",
    "bof4@64",
    "normal4@64",
    "t7_4@64",
    "int4@64",
    "float4_e2m1@64",
    "power4@64",
    "lloyd4@64",
    "af4-l1@64",
)
SIGNED = (
    "t7_4@64:signmax",
    "bof4-s@64",
    "t7_4-opt@64:signmax",
    "t_4@64:signmax",
    "lloyd4@64:signmax",
    "int4@64:signmax",
)
FORMATS = (
    *ELEMENTS,
    *(f"{text}:search" for text in ELEMENTS),
    *(f"{text}+unbiased" for text in ELEMENTS),
    *SIGNED,
    *(f"{text}+unbiased" for text in SIGNED),
    *(f"{text.removesuffix(':signmax')}:signmax-search" for text in SIGNED),
    *(f"{text.replace('4', '3', 1)}{more}" for text in ("t7_4@64:signmax", "bof4-s@64") for more in ("", "+unbiased")),
    *("mxfp4", "float4_e2m1@32:e8m0-even", "float4_e2m1@32:search:e8m0"),
    *("nvfp4", "float4_e2m1@16:fouroversix:e4m3", "float4_e2m1@16:search:e4m3"),
    *("q4_k", "iq4_nl", "t7_4@64:signmax+hadamard", "normal4@64:signmax+rotate", "normal4@64+hadamard"),
    *("t7_4@tensor:rms-search", "t7_4@tensor:rms-search+outliers0.001", "nf4@64+outliers0.001"),
)


class Bench:
    """The bundled model and its evaluation text."""

    def __init__(self, source: Path, sequences: int) -> None:
        from core.pipeline.forward import network_of, windows_of
        from core.storage.checkpoint import CheckpointIndex
        from core.storage.sources import folder_sources

        self.index = CheckpointIndex.from_files(folder_sources(source))
        evaluation = {"text": "builtin", "sequences": sequences, "sequence_length": 512}
        self.windows = windows_of(self.index, evaluation, "evaluation")
        self.reference = network_of(self.index, "cpu")

    def line(self, text: str) -> dict[str, Any]:
        """Encode every matrix, count, measure."""
        from core.evaluation.divergence import evaluate
        from core.pipeline.forward import network_of
        from core.recipe.tensor_format import parse
        from core.tensors.errors import squared_error
        from core.tensors.nearest import encode_nearest
        from core.tensors.reader import read_tensor

        fmt, sums = parse(text), [0.0, 0.0, 0, 0]

        def weights(name: str) -> torch.Tensor:
            weight = read_tensor(self.index, name)
            if weight.dim() < 2:
                return weight
            encoded = encode_nearest(weight, fmt, seed=len(name))
            for at, value in enumerate((*squared_error(weight, encoded), encoded.nbytes, weight.numel())):
                sums[at] += value
            return encoded.decode().to(weight.dtype)

        candidate = network_of(self.index, "cpu", weights)
        kl = evaluate(self.reference, candidate, self.windows, lambda _fraction, _what: None).kl_mean
        error, power, nbytes, elements = sums
        bits, relative = 8 * nbytes / elements, (error / power) ** 0.5
        measured = {"bits_per_param": round(bits, 4), "relative_rms_error": round(relative, 6), "kl": round(kl, 6)}
        return {"benchmark": "format_kl", "format": str(fmt), **measured}


def main() -> None:
    """Measure each format and print."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    arguments.add_argument("--sequences", type=int, default=16)
    arguments.add_argument("--format", nargs="+", default=list(FORMATS))
    given = arguments.parse_args()

    from models import BUNDLED

    bench = Bench(BUNDLED, given.sequences)
    for text in given.format:
        print(json.dumps(bench.line(text)), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
