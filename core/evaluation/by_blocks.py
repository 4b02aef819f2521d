"""Two checkpoints' networks compared on the same windows, of which neither is ever held whole.

Each is walked through to its head (`core.sensitivity.walk`), a block's weights at a time; then logits are made and
compared batch by batch. Promise: the metrics of `core.evaluation.divergence.evaluate`, up to how matrices of other
sizes round. Memory: a block and the activations between blocks; at the end both heads and the logits of one batch.
Networks that cannot be walked through are loaded whole.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from core.errors import UnsupportedArchitecture
from core.evaluation.divergence import Comparison, Metrics, batch_size, evaluate, float32_head
from core.evaluation.text import Windows
from core.network_tensors import Weights
from core.networks import load_network
from core.sensitivity.walk import BlockWalk
from core.storage.checkpoint import CheckpointIndex

Progress = Callable[[float, str], None]
Log = Callable[[str, dict[str, Any]], None]

_BATCH_ELEMENTS_CPU = 1 << 24  # of logits held at a time, per network, unless one sequence has more
_BATCH_ELEMENTS_ELSEWHERE = 1 << 26
_WALKED = 0.45  # of the time, per network


@dataclass(frozen=True)
class Side:
    """A checkpoint, with `weights(name)` in the place of its tensors if given."""

    index: CheckpointIndex
    weights: Weights | None = None


def evaluate_checkpoints(
    reference: Side,
    candidate: Side,
    windows: Windows,
    progress: Progress,
    *,
    device: str,
    dtype: torch.dtype,
    log: Log,
    batch: int | None = None,
) -> Metrics:
    """Compare two checkpoints, `batch` sequences at a time; `log` is told why networks had to be loaded whole.

    Raises what `load_network` and `evaluate` raise.
    """
    try:
        return _by_blocks((reference, candidate), windows, progress, device, dtype, batch)
    except UnsupportedArchitecture as error:
        log("evaluate.whole_network", {"reason": error.detail})
    models = [
        load_network(one.index, device=device, dtype=dtype, weights=one.weights) for one in (reference, candidate)
    ]
    return evaluate(models[0], models[1], windows, progress, batch)


def _by_blocks(
    sides: tuple[Side, Side],
    windows: Windows,
    progress: Progress,
    device: str,
    dtype: torch.dtype,
    batch: int | None,
) -> Metrics:
    comparison = Comparison()
    with ExitStack() as stack:
        walks = []
        for number, side in enumerate(sides):
            walk = BlockWalk(side.index, windows, device=device, dtype=dtype, weights=side.weights)
            batches = torch.split(windows.ids, batch or _batch_size(walk, windows.ids.shape[1]))
            walk.split(batches)
            stack.enter_context(walk)
            stack.enter_context(float32_head(walk.network))
            walks.append(_AtHead(walk, progress, number * _WALKED))
        for at, ids in enumerate(batches):
            progress(2 * _WALKED + (1 - 2 * _WALKED) * at / len(batches), f"logits, batch {at + 1} of {len(batches)}")
            comparison.add(walks[0].logits(at), walks[1].logits(at), ids.to(device))
    return comparison.metrics()


def _batch_size(walk: BlockWalk, length: int) -> int:
    on_cpu = torch.device(walk.device).type == "cpu"
    vocabulary = max(parameter.shape[0] for parameter in walk.network.parameters())
    return batch_size(length, vocabulary, _BATCH_ELEMENTS_CPU if on_cpu else _BATCH_ELEMENTS_ELSEWHERE)


class _AtHead:
    """A walk that has come to its head, at which every batch waits. `progress` is told from `low` on."""

    def __init__(self, walk: BlockWalk, progress: Progress, low: float) -> None:
        self._walk, self._blocks = walk, iter(walk)
        for at, block in enumerate(self._blocks):
            if walk.is_head(block.module):
                self._head = block
                return
            block.run(partial(self._tell, progress, low, at, block.name), last=True)
        raise UnsupportedArchitecture("the network does not say which layer answers logits", where="config.json")

    def _tell(self, progress: Progress, low: float, at: int, name: str, batch: int) -> None:
        share = (at + batch / self._walk.batches) / max(len(self._walk), at + 1)
        progress(low + _WALKED * share, f"{name}, batch {batch + 1} of {self._walk.batches}")

    @torch.no_grad()
    def logits(self, batch: int) -> torch.Tensor:
        """Of a batch, which ends; on the device."""
        output, _ = self._walk.run_call(self._head.call(batch))
        return self._walk.conclude(batch, output)
