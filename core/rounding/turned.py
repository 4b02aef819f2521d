"""The frame of a tensor whose rows are a layer's inputs, seen as the layer's matrix (out, in).

What is stored stays as it is: blocks run along the outputs, so in the layer's matrix each weight has the scale of its
row and of a run of outputs. Promise: nearest indices of the one are those of the other, transposed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from core.tensors.frame import Frame


@dataclass(frozen=True)
class TurnedFrame(Frame):
    """`matrix` (outputs, inputs); `scales` fp32 likewise, one for each weight. A rotation of the tensor's rows is one
    of inputs here, and the other way round.
    """

    @classmethod
    def seen(cls, frame: Frame) -> TurnedFrame:
        """Of a frame, or of some of its rows."""
        columns, width = frame.matrix.shape[1], max(frame.width, 1)
        scales = frame.scales.repeat_interleave(width, dim=1)[:, :columns]
        return cls(
            format=frame.format,
            shape=frame.shape,
            dtype=frame.dtype,
            matrix=frame.matrix.T.contiguous(),
            table=frame.table,
            scales=scales.T.contiguous(),
            width=1,
            parts=frame.parts,
        )

    def turned(self, inputs: torch.Tensor) -> torch.Tensor:
        """Statistics of inputs along the last dimension, in the basis in which weights are coded."""
        return super().turned_outputs(inputs.T).T

    def turned_outputs(self, outputs: torch.Tensor) -> torch.Tensor:
        """What has a row for each output, likewise."""
        return super().turned(outputs.T).T
