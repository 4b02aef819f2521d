"""Allocation `baq`: widths by the closed form for errors of layers' outputs that fall by a factor of 4 a bit.

The loss of tensor l with d_l weights at R bits a weight is taken for c_l d_l 4^-R, and c_l from one measurement: the
squared error of the outputs, tr(E S E^T) with S the covariance of the inputs and E the error of nearest rounding at a
reference width, the middle one. Then the best widths for a mean are R_l = mean + 1/2 log2(c_l / GM(c)), at which all
losses of a weight are equal and their sum is GM/AM of that at one width for all (BAQ, arXiv 2506.05664, which does it
for columns and reports log2 of numbers of levels). Here widths are real: closed form, widths of the format within a bit
of it, and of these the solver's choice under the budget in stored bytes. Outputs of all layers count alike, which they
do not for the model: `fisher` and `higgs` weigh them. Tensors without a covariance get what `uniform` gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property

import torch

from core.allocation.budget import Option, bounded_widths
from core.allocation.fisher import topped_up
from core.allocation.forecast import MEASURED_WEIGHTS
from core.allocation.sizes import Formats, Sizes, fit
from core.allocation.space import Group
from core.allocation.uniform import uniform
from core.errors import BitmillError, InvalidFormat
from core.recipe.tensor_format import TensorFormat, parse
from core.sensitivity.covariance import InputStatistics
from core.tensors.nearest import encode_nearest
from core.tensors.reader import read_tensor

WINDOW = 1.0  # bits from the closed form within which the solver chooses
_LEAST = 1e-300  # of c
_WIDE = 1024.0
_DIGITS = 9


def rates(
    losses: Sequence[float],
    elements: Sequence[int],
    mean: float,
    bounds: Sequence[tuple[float, float]] | None = None,
) -> list[float]:
    """Bits of each tensor with the least sum of c_l d_l 4^-R_l for a mean of `mean` bits a weight.

    `losses`: c_l; `elements`: d_l; `bounds`: (least, most) bits of each. Without bounds R_l = mean + 1/2 log2(c_l /
    GM(c)), GM weighted by elements.
    """
    if not losses:
        return []
    gains = [0.5 * math.log2(max(one, _LEAST)) for one in losses]
    low, high = zip(*(bounds or [(mean - _WIDE, mean + _WIDE)] * len(gains)), strict=True)
    return bounded_widths(gains, elements, low, high, mean * sum(elements))


class Baq:
    """The method on one checkpoint; measured once, solved for any budget.

    `inputs(name)`: of a tensor, None where they are not known. `before_each` is called before a tensor is read.
    """

    def __init__(
        self,
        sizes: Sizes,
        base: TensorFormat,
        inputs: Callable[[str], InputStatistics | None],
        device: str = "cpu",
        before_each: Callable[[str], None] = lambda _name: None,
    ) -> None:
        self._sizes, self._base, self._inputs = sizes, base, inputs
        self._device, self._before_each = device, before_each

    def __call__(self, budget: int) -> Formats:
        """Format by group for a budget in bytes."""
        even = uniform(self._sizes, self._base, budget)
        known = [group for group in self._sizes.space.groups if group.name in self._losses]
        options = {group.name: [self._option(group, even[group.name])] for group in self._sizes.space.groups}
        for group, bits in zip(known, self._closed_form(known, even), strict=True):
            options[group.name] = [self._option(group, text) for text in _near(group, bits)]
        return topped_up(self._sizes, fit(self._sizes, options, budget), budget)

    def _closed_form(self, groups: Sequence[Group], even: Formats) -> list[float]:
        """Bits of each group, at the mean that `even` has, within what its formats allow."""
        elements = [self._sizes.elements(group) for group in groups]
        total = sum(count * _bits(even[one.name]) for count, one in zip(elements, groups, strict=True))
        bounds = [(_bits(one.formats[0]), _bits(one.formats[-1])) for one in groups]
        return rates([self._losses[one.name] for one in groups], elements, total / max(sum(elements), 1), bounds)

    def _option(self, group: Group, text: str) -> Option:
        loss = self._losses.get(group.name, 0.0) * self._sizes.elements(group) * 4.0 ** -_bits(text)
        return Option(self._sizes.group(group, text), loss, text)

    @cached_property
    def _losses(self) -> dict[str, float]:
        """c by group, the mean over the weights of members whose inputs are known; without groups that have none."""
        found: dict[str, float] = {}
        for group in self._sizes.space.groups:
            rows = [(self._sizes.index.tensors[name].elements, self._loss(group, name)) for name in group.members]
            known = [(count, loss) for count, loss in rows if loss is not None]
            if known:
                total = math.fsum(count * loss for count, loss in known)
                found[group.name] = float(f"{total / sum(count for count, _ in known):.{_DIGITS}g}")
        return found

    def _loss(self, group: Group, name: str) -> float | None:
        self._before_each(name)
        inputs = self._inputs(name)
        if inputs is None:
            return None
        whole, fmt = read_tensor(self._sizes.index, name), parse(group.formats[len(group.formats) // 2])
        try:
            return output_loss(whole.reshape(-1, whole.shape[-1]).to(self._device), fmt, inputs)
        except BitmillError as error:
            raise error.at(name) from None


def output_loss(weights: torch.Tensor, fmt: TensorFormat, inputs: InputStatistics) -> float:
    """c = tr(E S E^T) 4^bits / weights, E the error of nearest rounding of `weights` (rows, columns) in that format.

    Of large tensors from evenly spaced rows. InvalidFormat for a covariance of another number of inputs.
    """
    count = weights.shape[0 if inputs.transposed else 1]
    if inputs.covariance.shape[0] != count:
        raise InvalidFormat(f"a covariance of {inputs.covariance.shape[0]} inputs for {count}")
    rows = len(weights) if inputs.transposed else min(len(weights), max(1, MEASURED_WEIGHTS // weights.shape[1]))
    places = torch.arange(rows, device=weights.device) * len(weights) // rows
    is_whole = fmt.granularity == "tensor" and not fmt.is_grid
    part = weights if is_whole else weights[places]
    error = (encode_nearest(part, fmt).decode().double() - part.double())[places if is_whole else slice(None)]
    error = error.T if inputs.transposed else error
    loss = float(((error @ inputs.covariance.to(error.device, torch.float64)) * error).sum())
    return float(max(loss, 0.0) * 4.0**fmt.element_bits / error.numel())


def _near(group: Group, bits: float) -> list[str]:
    """Formats within `WINDOW` of that many bits, and the narrowest and widest."""
    fine = group.rates if group.base.is_grid or group.base.entropy_code else group.ladder
    texts = dict.fromkeys([group.formats[0], *(group.text(width) for width in fine), group.formats[-1]])
    ends = (group.formats[0], group.formats[-1])
    return [text for text in texts if text in ends or abs(_bits(text) - bits) <= WINDOW]


def _bits(text: str) -> float:
    return parse(text).element_bits
