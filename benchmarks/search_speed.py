"""Speed of encoding with searched block scales on one CPU core, beside the same format without a search.

All work by turns within each round, pinned to one core, so that a noisy machine disturbs all; rounds alternate in
order. Rates are millions of weights per second of processor time. `encode` is all of `encode_nearest`, bf16 in, packed
codes and stored scales out; `plain` the same with the statistic itself; `choose` the choice among candidates that are
there; `exact` what it replaces, the exact errors of all candidates, of fewer rows. Prints a JSON line per format with
medians, candidates, and exact errors that the choice computed per block; the promise is at least 60 million weights per
second.

    python benchmarks/search_speed.py [--rows 1024] [--columns 4096] [--rounds 7] [--formats nf4@64:search ...]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from core.recipe.tensor_format import TensorFormat

ROOT = Path(__file__).parents[1]
FORMATS = (
    "nf4@64:search",
    "t7_4@32:signmax-search:e4m3",
    "int4@64:search",
    "float4_e2m1@16:search:e4m3",
    "float4_e2m1@32:search:e8m0",
)
LIMIT = 60.0
SHARE = 16  # the slow one gets one row of this many

Work = Callable[[], object]


def without_search(fmt: TensorFormat) -> TensorFormat:
    """The same format with the statistic that the search starts from."""
    from dataclasses import replace

    return replace(fmt, statistic=fmt.base_statistic)


def tried(weight: torch.Tensor, fmt: TensorFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """(blocks, width) of a matrix in fp32 and the decoded scales that are tried, (candidates, blocks)."""
    import torch

    from core.formats.elements import element_table, shared_weights
    from core.tensors.blocks import BlockGrid
    from core.tensors.scale_formats import decoded_scales, tensor_scale
    from core.tensors.scales import extreme_of, sum_of_squares
    from core.tensors.search import candidates

    shape = tuple(weight.shape)
    blocks = BlockGrid.of(fmt, shape).to_blocks(weight.reshape(-1)).float()
    table = element_table(fmt, shared_weights(fmt, shape))
    rms = (sum_of_squares(blocks) / blocks.shape[1]).sqrt().float()
    extreme = rms if fmt.base_statistic == "rms" else extreme_of(blocks, fmt.base_statistic)
    constant = tensor_scale(fmt, table, extreme.abs().max())
    return blocks, torch.stack(
        [decoded_scales(fmt, one, constant) for one in candidates(fmt, table, extreme, constant)]
    )


def contenders(weight: torch.Tensor, fmt: TensorFormat) -> dict[str, tuple[Work, float]]:
    """What is timed, and which share of the weights it works on."""
    from core.formats.elements import element_table, shared_weights
    from core.tensors.indices import uses_quotients
    from core.tensors.kernels import cpu_search
    from core.tensors.nearest import encode_nearest

    quotients, plain = uses_quotients(fmt), without_search(fmt)
    table = element_table(fmt, shared_weights(fmt, tuple(weight.shape)))
    part, whole = tried(weight[: len(weight) // SHARE], fmt), tried(weight, fmt)
    return {
        "encode": (lambda: encode_nearest(weight, fmt), 1.0),
        "plain": (lambda: encode_nearest(weight, plain), 1.0),
        "choose": (lambda: cpu_search.best_candidates(*whole, fmt, table, quotients=quotients), 1.0),
        "exact": (lambda: cpu_search.block_errors(*part, fmt, table, quotients=quotients), 1 / SHARE),
    }


def measure(weight: torch.Tensor, fmt: TensorFormat, rounds: int) -> dict[str, float]:
    """Median millions of weights per second of each."""
    from benchmarks.one_core import medians

    return medians(contenders(weight, fmt), rounds, weight.numel() / 1e6)


def computed(weight: torch.Tensor, fmt: TensorFormat) -> dict[str, float]:
    """Candidates, and how many exact errors are computed per block."""
    from core.formats.elements import element_table, shared_weights
    from core.tensors.kernels import cpu_search

    blocks, scales = tried(weight, fmt)
    table = element_table(fmt, shared_weights(fmt, tuple(weight.shape)))
    asked, _ = cpu_search.undecided(fmt, table, blocks.numpy(), scales.numpy())
    return {"candidates": len(scales), "errors_per_block": round(float(asked.sum()) / len(blocks), 3)}


def report(fmt: str, rates: dict[str, float]) -> dict[str, object]:
    """The line of a format."""
    line: dict[str, object] = {"format": fmt} | {f"{name}_m_s": round(rate, 1) for name, rate in rates.items()}
    line["of_plain"] = round(rates["encode"] / rates["plain"], 3)
    line["choose_of_exact"] = round(rates["choose"] / rates["exact"], 1)
    line["within_limits"] = rates["encode"] >= LIMIT
    return line


def main() -> None:
    """Measure and print."""
    from benchmarks.one_core import arguments, weights
    from core.recipe.tensor_format import parse

    given = arguments((__doc__ or "").splitlines()[0], 1024, FORMATS)
    weight = weights(given.rows, given.columns)
    about = {"benchmark": "search_speed", "rows": given.rows, "columns": given.columns, "rounds": given.rounds}
    for text in given.formats:
        fmt = parse(text)
        line = about | report(text, measure(weight, fmt, given.rounds)) | computed(weight[: given.rows // SHARE], fmt)
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
