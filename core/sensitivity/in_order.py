"""Tensors handed out in the order of the network's computation, each with the statistics of what is in place by then.

Two walks go through the network in lockstep: the reference's, and that of the candidate, in which every tensor that has
been encoded has the values that it will be stored with. So the inputs that a layer is rounded for are those that it
will get, and what earlier layers have lost can be made up for by later ones.

Promise: every wanted tensor is encoded once: first those outside the blocks; in a block, first those that no stage has,
then stage by stage. Memory: two blocks with their activations on the host, and the statistics of a stage. It rounds
nothing itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

import torch

from core.errors import UnsupportedArchitecture
from core.evaluation.text import Windows
from core.sensitivity.drift import BlockPair, DriftStatistics, Mixing, Stage
from core.sensitivity.fisher import deterministic
from core.sensitivity.walk import Block, BlockWalk
from core.storage.checkpoint import CheckpointIndex
from core.tensors.reader import read_tensor

Decode = Callable[[], torch.Tensor]  # a tensor as it is stored, in the checkpoint's shape
Encode = Callable[[str, DriftStatistics | None], Decode]
Progress = Callable[[float, str], None]


def encode_in_order(
    index: CheckpointIndex,
    windows: Windows,
    wanted: Iterable[str],
    encode: Encode,
    *,
    device: str,
    dtype: torch.dtype,
    mixing: Mixing,
    progress: Progress,
) -> None:
    """Call `encode` for each of the wanted tensors; without statistics where its inputs are not those of a stage.

    Raises what `BlockWalk` raises, UnsupportedArchitecture where the network calls a block twice, and NonFiniteWeights.
    """
    job = _Job(index, windows, encode, mixing, progress, set(wanted))
    reference = BlockWalk(index, windows, device=device, dtype=dtype)
    candidate = BlockWalk(index, windows, device=device, dtype=dtype, weights=job.weights)
    if mixing.attention:
        reference.tell_attention()
        candidate.tell_attention()  # another kernel would be another network
    inside = frozenset(reference.hollow.names(reference.network)) - reference.names_outside
    for name in sorted(job.left - inside):  # also what the architecture has no use for
        job.encode_early(name)
    with deterministic(), reference, candidate:
        for at, pair in enumerate(zip(reference, candidate, strict=True)):
            progress(at / max(len(reference), at + 1), pair[0].name)
            job.encode_block((reference, pair[0]), (candidate, pair[1]), at)
    if job.left:
        raise UnsupportedArchitecture(
            "the network does not use it, though it has it", where=min(job.left), hint="rounding with layers: parallel"
        )


@dataclass
class _Job:
    """What is still to be encoded, and how tensors that are used outside of blocks are decoded."""

    index: CheckpointIndex
    windows: Windows
    encode: Encode
    mixing: Mixing
    progress: Progress
    left: set[str]
    early: dict[str, Decode] = field(default_factory=dict)
    passed: set[str] = field(default_factory=set)

    def weights(self, name: str) -> torch.Tensor:
        """The candidate's, where a block or what lies around it gets its weights."""
        return self.early[name]() if name in self.early else read_tensor(self.index, name)

    def encode_early(self, name: str) -> None:
        """A tensor that is used before the blocks, or around them."""
        self.early[name] = self.encode(name, None)
        self.left.discard(name)

    def encode_block(self, reference: tuple[BlockWalk, Block], candidate: tuple[BlockWalk, Block], at: int) -> None:
        """The tensors of one block, in place in the candidate as soon as they are encoded."""
        block, names = candidate[1], frozenset(candidate[1].names)
        if names & self.passed:
            raise UnsupportedArchitecture(
                "the network calls a block more than once", where=block.name, hint="rounding with layers: parallel"
            )
        self.passed |= names - self.early.keys()
        wanted = frozenset(names & self.left)
        pair = BlockPair(reference, candidate)
        stages = pair.stages(wanted) if wanted else []
        staged = frozenset(name for stage in stages for name in stage.names)
        for name in sorted(wanted - staged):
            self._encode(block, name, None)
        for number, stage in enumerate(stages):
            share = (at + number / len(stages)) / max(len(reference[0]), at + 1)
            tell = partial(_tell, self.progress, share, block.name, reference[0].batches)
            self._encode_stage(block, stage, pair.measure(stage, self.mixing, tell))

    def _encode_stage(self, block: Block, stage: Stage, statistics: DriftStatistics | None) -> None:
        for name in stage.names:
            self._encode(block, name, statistics)

    def _encode(self, block: Block, name: str, statistics: DriftStatistics | None) -> None:
        block.load({name: self.encode(name, statistics)()})
        self.left.discard(name)


def _tell(progress: Progress, share: float, name: str, batches: int, batch: int) -> None:
    progress(share, f"{name}, batch {batch + 1} of {batches}")
