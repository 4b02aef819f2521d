"""Diagonal Fisher information per tensor and per row of it, from one forward and one backward pass over a text.

F is the mean over predicted positions of the squared score of labels drawn from the model itself (the true Fisher, not
the empirical one; Kunstner et al., arXiv 1905.12558). The estimator is per token (arXiv 2505.12988): a matrix W with
inputs x_t and output gradients g_t has tensor sum Σ_t ‖g_t‖² ‖x_t‖² and row sums Σ_t g_t² ‖x_t‖²; an embedding's row v
has Σ ‖g_t‖² over the t with token v. Nothing of the size of a weight is ever made, and no weight has a gradient.
What the tokens of a sequence do together, which these sums leave out, is measured on a part of the sequences and kept
beside them as a factor (`core.sensitivity.sketch`).

Promise: a matrix without an estimate is named with the reason, never left out in silence. Labels depend on the seed and
the sequence, not on how sequences are batched. Hooks are gone and weights untouched afterwards. It estimates no
biases, no norms, and no element-wise diagonal.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from math import log2
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from core.errors import InvalidCheckpoint, NonFiniteWeights, UnsupportedArchitecture
from core.evaluation.text import Windows
from core.ids import derived_seed
from core.networks import check_token_ids, learns_positions, load_network, next_token_logits
from core.sensitivity.backward import BackwardWalk
from core.sensitivity.collector import Collector
from core.sensitivity.shelf import Shelf
from core.storage.checkpoint import CheckpointIndex
from core.storage.sources import LocalFile
from core.tensors.reader import read_tensor
from core.tensors.writer import Part, SafetensorsWriter

Progress = Callable[[float, str], None]
Log = Callable[[str, dict[str, Any]], None]

ESTIMATOR = "sampled labels, per token, times what whole sequences have more"
_FILE_VERSION = 1
_METADATA = "bitmill_fisher"
_BATCH_TOKENS = 1024
_SKETCHED_SHARE, _SKETCHED_LEAST = (
    4,
    8,
)  # of the even ones among the first quarter, or eight, whole sequences are summed
_BATCH_ELEMENTS = 1 << 26  # of logits held at a time, unless one sequence has more
_BATCH_ELEMENTS_CPU = 1 << 24  # where a block at a time is all that is held
_TILE_ELEMENTS = 1 << 20
_BLOCK = 64


@dataclass(frozen=True)
class TensorFisher:
    """One tensor: `sum` of the diagonal over its `elements`, and `rows`, the sums (first dimension,) in fp32.

    Both per predicted position, by single tokens. A tied parameter has the sum over its uses. `cross`: by how much more
    whole sequences have, the factor that makes the estimate unbiased for the diagonal. `scale` and `row_scales` (fp32,
    first dimension): the Fisher information of a factor on the whole tensor and on each row, per predicted position.
    """

    sum: float
    elements: int
    rows: torch.Tensor
    cross: float
    scale: float
    row_scales: torch.Tensor

    @property
    def mean(self) -> float:
        return self.sum / self.elements


@dataclass(frozen=True)
class FisherEstimate:
    """Estimates by tensor name, over `positions` predicted positions.

    `halves_bits`: how far an allocation from one half of the sequences is from that of the other, as RMS over tensors
    of log2(f_A/f_B)/2; None for a single sequence. `reasons`: why a matrix has no estimate.
    """

    tensors: Mapping[str, TensorFisher]
    positions: int
    halves_bits: float | None
    reasons: Mapping[str, str] = field(default_factory=dict)
    estimator: str = ESTIMATOR

    @property
    def not_reached(self) -> tuple[str, ...]:
        """Matrices without an estimate."""
        return tuple(sorted(self.reasons))

    def save(self, path: Path) -> None:
        """Write a new safetensors file: `NAME.rows` and `NAME.row_scales` fp32, everything else in the metadata."""
        parts = [
            Part(f"{name}.{kind}", "F32", tuple(one.rows.shape))
            for name, one in self.tensors.items()
            for kind in ("rows", "row_scales")
        ]
        about = {"version": _FILE_VERSION, "reasons": dict(sorted(self.reasons.items())), **describe(self)}
        with SafetensorsWriter(path, parts, {_METADATA: json.dumps(about, sort_keys=True)}) as writer:
            for name, one in self.tensors.items():
                writer.write(f"{name}.rows", one.rows)
                writer.write(f"{name}.row_scales", one.row_scales)

    @classmethod
    def load(cls, path: Path) -> FisherEstimate:
        """The estimate of a file that `save` wrote; InvalidCheckpoint for another."""
        return cls.from_index(CheckpointIndex.from_files({path.name: LocalFile(path)}))

    @classmethod
    def from_index(cls, index: CheckpointIndex) -> FisherEstimate:
        """The same from an opened file, wherever it lies."""
        try:
            about = json.loads(index.metadata[_METADATA])
            if about["version"] != _FILE_VERSION:
                raise InvalidCheckpoint(f"an estimate of version {about['version']}, not {_FILE_VERSION}")
            tensors = {
                name: TensorFisher(
                    sum=float(one["sum"]),
                    elements=int(one["elements"]),
                    rows=read_tensor(index, f"{name}.rows"),
                    cross=float(one["cross"]),
                    scale=float(one["scale"]),
                    row_scales=read_tensor(index, f"{name}.row_scales"),
                )
                for name, one in about["tensors"].items()
            }
            return cls(tensors, about["positions"], about["halves_bits"], about["reasons"], about["estimator"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InvalidCheckpoint("not a Fisher estimate", where=next(iter(index.headers), "")) from error


def describe(estimate: FisherEstimate) -> dict[str, Any]:
    """{positions, estimator, halves_bits, tensors: {name: {sum, mean, elements, cross, scale}}, not_reached: {..}}."""
    return {
        "positions": estimate.positions,
        "estimator": estimate.estimator,
        "halves_bits": estimate.halves_bits,
        "tensors": {
            name: {
                "sum": one.sum,
                "mean": one.mean,
                "elements": one.elements,
                "cross": one.cross,
                "scale": one.scale,
            }
            for name, one in estimate.tensors.items()
        },
        "not_reached": dict(sorted(estimate.reasons.items())),
    }


@dataclass(frozen=True)
class _Batch:
    """Sequences of one half that pass together, with a seed for the labels of each. `sketched`: also summed whole."""

    half: int
    chosen: list[int]
    seeds: list[int]
    sketched: bool

    def within(self, collector: Collector) -> AbstractContextManager[None]:
        return collector.batch(self.half, self.seeds if self.sketched else None)


def estimate_fisher(
    network: nn.Module, windows: Windows, *, seed: int, progress: Progress, batch: int | None = None
) -> FisherEstimate:
    """Estimate on every window; the last token of each is predicted, and has no successor to predict.

    `batch` sequences at a time, None for what suits their length. Raises NonFiniteWeights with the name of a tensor
    whose sum is not a number, UnsupportedArchitecture when nothing could be measured.
    """
    check_token_ids(network, windows.ids)
    count, length = windows.ids.shape
    batches, done = _batches(count, batch or _batch_size(network, length, _BATCH_ELEMENTS), seed), 0
    with Collector(network) as collector, deterministic():
        for one in batches:
            progress(done / count, f"sequence {done + 1} of {count}")
            with one.within(collector):
                _backward(network, windows.ids[one.chosen], one.seeds)
            done += len(one.chosen)
    return _estimate(collector, batches, count, length - 1)


def fisher_of_checkpoint(
    index: CheckpointIndex,
    windows: Windows,
    *,
    device: str,
    dtype: torch.dtype,
    seed: int,
    progress: Progress,
    folder: Path,
    log: Log,
    batch: int | None = None,
) -> FisherEstimate:
    """The same estimate of a checkpoint's network, a block at a time (`core.sensitivity.backward`).

    `folder`: where inputs of blocks may lie meanwhile. Where a network cannot be walked through it is loaded whole, and
    `log` is told why. Raises what `load_network` and `estimate_fisher` raise, and OutOfDisk.
    """
    try:
        return _by_blocks(index, windows, folder, seed, progress, batch, device=device, dtype=dtype)
    except UnsupportedArchitecture as error:
        log("fisher.whole_network", {"reason": error.detail})
    network = load_network(index, device=device, dtype=dtype)
    return estimate_fisher(network, windows, seed=seed, progress=progress, batch=batch)


def _by_blocks(
    index: CheckpointIndex,
    windows: Windows,
    folder: Path,
    seed: int,
    progress: Progress,
    batch: int | None,
    *,
    device: str,
    dtype: torch.dtype,
) -> FisherEstimate:
    count, length = windows.ids.shape
    elements = _BATCH_ELEMENTS_CPU if torch.device(device).type == "cpu" else _BATCH_ELEMENTS
    with Shelf(folder) as shelf, BackwardWalk(index, windows, shelf, device=device, dtype=dtype) as walk:
        batches = _batches(count, batch or _batch_size(walk.network, length, elements), seed)
        walk.split([windows.ids[one.chosen, :-1] for one in batches])
        with Collector(walk.network, walk.hollow.tensor_names, device) as collector, deterministic():
            walk.backward(
                lambda at, logits: _label_gradients(logits, batches[at].seeds),
                lambda at: batches[at].within(collector),
                progress,
            )
    return _estimate(collector, batches, count, length - 1)


def _batch_size(network: nn.Module, length: int, elements: int) -> int:
    """Sequences at a time; one where they share the output of a layer, which would mix their gradients."""
    if learns_positions(network):
        return 1
    vocabulary = max(parameter.shape[0] for parameter in network.parameters())
    return max(1, min(_BATCH_TOKENS // length, elements // (length * vocabulary)))


def _batches(count: int, size: int, seed: int) -> list[_Batch]:
    """Batches of even and of odd sequences, so that each adds to one half."""
    made = []
    for half in (0, 1):
        members = list(range(half, count, 2))
        for start in range(0, len(members), size):
            chosen = members[start : start + size]
            sketched = half == 0 and chosen[0] < max(_SKETCHED_LEAST, count // _SKETCHED_SHARE)
            made.append(_Batch(half, chosen, [derived_seed(seed, f"sequence {at}") for at in chosen], sketched))
    return made


@contextmanager
def deterministic() -> Iterator[None]:
    """Within it a GPU sums in one order where it has a way to; a CPU always does."""
    before, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(torch.cuda.is_available() or before, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)


def _backward(network: nn.Module, ids: torch.Tensor, seeds: list[int]) -> None:
    """The gradient of Σ -log p(label) at every position but the last, with one sampled label each."""
    ids = ids[:, :-1].to(next(network.parameters()).device)
    logits = next_token_logits(network, ids)
    if not logits.requires_grad:
        raise _nothing_measured()
    torch.autograd.backward([logits], [_label_gradients(logits.detach(), seeds)])


def _label_gradients(logits: torch.Tensor, seeds: list[int]) -> torch.Tensor:
    """That of Σ -log p(label) for logits (sequences, positions, vocabulary), by a seed for each sequence."""
    gradient = torch.empty_like(logits)
    for sequence, seed in enumerate(seeds):
        sampled_label_gradient(logits[sequence], seed, gradient[sequence])
    return gradient


def _nothing_measured() -> UnsupportedArchitecture:
    return UnsupportedArchitecture("no layer of this network can be measured", hint="allocation: uniform needs none")


def sampled_label_gradient(logits: torch.Tensor, seed: int, out: torch.Tensor) -> None:
    """Write ∂(-log p(y))/∂logits = p - 1_y for one y ~ p per position; logits and `out` (positions, vocabulary).

    One uniform number in fp64 per position, in tiles of positions.
    """
    chance = torch.Generator(logits.device).manual_seed(seed)
    uniform = torch.rand(len(logits), 1, dtype=torch.float64, device=logits.device, generator=chance)
    rows = max(1, _TILE_ELEMENTS // logits.shape[-1])
    for tile, wanted, chosen in zip(*(torch.split(one, rows) for one in (logits, out, uniform)), strict=True):
        p = torch.softmax(tile, -1, dtype=torch.float32)
        labels = inverse_cdf(p, chosen)
        wanted.copy_(p.scatter_add_(-1, labels, torch.full_like(labels, -1, dtype=p.dtype)))


def inverse_cdf(p: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The labels (positions, 1) at which the cumulated p (positions, vocabulary) first exceeds `uniform`'s share.

    Cumulated in fp64 by blocks and then within one block, which reads p once; noise per token would cost as much as a
    small network's forward pass.
    """
    missing = -p.shape[-1] % _BLOCK
    blocks = (F.pad(p, (0, missing)) if missing else p).reshape(len(p), -1, _BLOCK)
    before = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    wanted = uniform * before[:, -1:]
    block = torch.searchsorted(before, wanted, right=True).clamp_max_(before.shape[-1] - 1)
    wanted -= torch.where(block > 0, before.gather(-1, (block - 1).clamp_min(0)), 0.0)
    within = blocks.take_along_dim(block[..., None], dim=1)[:, 0].double().cumsum(-1)
    place = torch.searchsorted(within, wanted, right=True).clamp_max_(_BLOCK - 1)
    return (block * _BLOCK + place).clamp_max_(p.shape[-1] - 1)


def _estimate(collector: Collector, batches: list[_Batch], count: int, predicted: int) -> FisherEstimate:
    positions = count * predicted
    sketched = max(sum(len(one.chosen) for one in batches if one.sketched) * predicted, 1)
    per_half = ((count + 1) // 2 * predicted, count // 2 * predicted)
    tensors: dict[str, TensorFisher] = {}
    measured = dict(collector.results())
    reasons = dict(collector.reasons)
    ratios = []
    for name, one in measured.items():
        rows = one.rows
        if not rows.isfinite().all():
            raise NonFiniteWeights("its Fisher information is not a number", where=name)
        first, second = (float(half.sum()) for half in rows)
        if first + second == 0:
            reasons[name] = "no gradient reached it"
            continue
        tensors[name] = TensorFisher(
            sum=(first + second) / positions,
            elements=one.elements,
            rows=(rows.sum(0) / positions).to(torch.float32),
            cross=one.cross,
            scale=one.scale / sketched,
            row_scales=(one.row_scales / sketched).to(torch.float32),
        )
        if first and second:
            ratios.append(log2((first / per_half[0]) / (second / per_half[1])) / 2)
    if not tensors:
        raise _nothing_measured()
    halves = (sum(ratio**2 for ratio in ratios) / len(ratios)) ** 0.5 if ratios else None
    return FisherEstimate(dict(sorted(tensors.items())), positions, halves, reasons)
