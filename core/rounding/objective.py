"""What data-aware rounding minimises, factored: E || W x + r - What h ||^2 over the inputs of one layer.

Up to a constant that is tr(What H What^T) - 2 tr(What C^T) with H = E[h h^T] and C = W E[x h^T] + E[r h^T]; with H = L
L^T and Y = C L^-T it is || Y - What L ||^2 (data-aware rounding, sections 1, 4.7, 4.8). Columns stand in the order of
rounding, the last one first; inputs that are always zero are left out. Statistics are fp64 on the weight's device; what
is made of rows of a weight has their precision. Rows enter in tiles only, so memory is some matrices of the inputs.

What was done to make H usable stands in `notes`, which belong in the manifest.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from core.errors import InvalidCheckpoint

if TYPE_CHECKING:
    from core.rounding.base import Sensitivity

DEAD = 1e-12  # of the largest variance
_INDEFINITE = 1e-6  # of the largest eigenvalue: more than what sums in fp32 leave
_RETRIES = 9
_FIRST_RETRY = 1e-10  # of the mean variance
_FEW_TOKENS = 16  # per input, below which a calibration is called short
_SHRINK, _MOST_SHRUNK = 0.2, 0.1
TILE_WEIGHTS = 1 << 22  # of rows that are in work at once
_STRIP = 128  # columns of a factor that are multiplied together


@dataclass(frozen=True)
class Objective:
    """`hessian`: H with its diagonal shrinkage, undamped, ordered (m, m). `mixed`: E[x h^T] alike, x along rows, None
    where it is H. `residual`: E[r h^T] (rows, m). `factor`: L. `damping`: what was added to H's diagonal before,
    of which `kept` draws towards W and the rest towards zero. `order`: (m,), the column of W at each place.
    `dead`: columns of W that are left out.
    """

    hessian: torch.Tensor
    mixed: torch.Tensor | None
    residual: torch.Tensor | None
    factor: torch.Tensor
    damping: float
    kept: float
    order: torch.Tensor
    dead: torch.Tensor
    notes: tuple[str, ...] = field(default=())

    @classmethod
    def of(
        cls,
        sensitivity: Sensitivity,
        *,
        columns: str = "natural",
        damping: float = 0.0,
        diagonal: float | None = None,
    ) -> Objective:
        """From the statistics of a layer.

        `damping`: a share of H's mean diagonal. `diagonal`: H is moved so far towards its diagonal; None: by the
        number of tokens. `columns`: natural, reversed, ascending, descending (by variance) or pivot (the largest
        conditional variance next; the last is rounded first). InvalidCheckpoint for statistics that cannot be those of
        any inputs.
        """
        given = sensitivity.covariance
        if given is None:
            raise InvalidCheckpoint("there are no statistics of the layer's inputs", hint="nearest needs none")
        covariance = given.double()
        _require_covariance(covariance)
        variances = covariance.diagonal()
        alive = variances > DEAD * (float(variances.max()) if len(variances) else 0.0)
        live, dead = alive.nonzero()[:, 0], (~alive).nonzero()[:, 0]
        share, notes = _shrinkage(diagonal, sensitivity.tokens, len(live))
        hessian = _shrunk(_picked(covariance, live), share)
        order = _order(hessian, columns)
        hessian, order = _picked(hessian, order), live[order]
        mixed, residual = sensitivity.cross, sensitivity.residual
        if mixed is not None:
            mixed = _picked(_shrunk(mixed.double(), share), order)
        if residual is not None:
            residual = residual.double()[:, order].contiguous()
        factor, added = _factored(hessian, damping * _mean(hessian))
        if added > damping * _mean(hessian):
            notes = (*notes, f"{added / _mean(hessian):.0e} of the mean variance was added to factor the covariance")
        if len(dead):
            notes = (*notes, f"{len(dead)} inputs that are always zero were left out")
        return cls(hessian, mixed, residual, factor, added, added, order, dead, notes)

    def damped(self, amount: float) -> Objective:
        """The same with `amount` more on H's diagonal that draws towards zero (MMSE damping, section 5.3)."""
        factor, added = _factored(self.hessian, self.damping + amount)
        return replace(self, factor=factor, damping=added)

    @property
    def inputs(self) -> int:
        """Places that are rounded."""
        return len(self.order)

    @cached_property
    def units(self) -> torch.Tensor:
        """L_ii."""
        return self.factor.diagonal().clone()

    def cross(self, weight: torch.Tensor, first: int = 0) -> torch.Tensor:
        """C of rows `first`... of W, given as (rows, m) in this order."""
        found = weight @ (self.hessian if self.mixed is None else self.mixed).to(weight.dtype)
        return found if self.residual is None else found + self.residual[first : first + len(weight)].to(weight.dtype)

    def targets(self, weight: torch.Tensor, first: int = 0) -> torch.Tensor:
        """Y^T (m, rows) of the same rows."""
        if self._is_plain:
            return self.times_factor(weight)
        wanted = self._wanted(weight.double(), first).T
        solved: torch.Tensor = torch.linalg.solve_triangular(self.factor, wanted, upper=False)
        return solved.to(weight.dtype)

    def times_factor(self, weight: torch.Tensor) -> torch.Tensor:
        """(V L)^T (m, rows) of rows V (rows, m); what is above the diagonal of L takes no time."""
        factor, turned = self.factor.to(weight.dtype), weight.T
        found = weight.new_empty(self.inputs, len(weight))
        for low in range(0, self.inputs, _STRIP):
            torch.mm(factor[low:, low : low + _STRIP].T, turned[low:], out=found[low : low + _STRIP])
        return found

    def optimum(self, weight: torch.Tensor, first: int = 0) -> torch.Tensor:
        """The least objective's What (rows, m), where all numbers are allowed: C (H + damping)^-1, or W itself."""
        return weight if self._is_plain else torch.cholesky_solve(self._wanted(weight, first).T, self.factor).T

    @property
    def _is_plain(self) -> bool:
        return self.mixed is None and self.residual is None and self.kept == self.damping

    def _wanted(self, weight: torch.Tensor, first: int) -> torch.Tensor:
        return self.cross(weight, first) + self.kept * weight

    def rows(self, weight: torch.Tensor, first: int, last: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """Rows of a matrix of all columns as (rows, m) in this order."""
        found = weight[first:last]
        return (found if _is_all(self.order, weight.shape[1]) else found[:, self.order]).to(dtype)

    def errors(self, error: torch.Tensor, weight: torch.Tensor, first: int = 0) -> torch.Tensor:
        """diag(E H E^T + 2 E P^T), P = C - W H, of rows `first`... of W: the objective of W - E but for a constant."""
        costs = self.times_factor(error).square_().sum(dim=0).double()
        if self.damping:
            costs -= self.damping * error.square().sum(dim=1).double()
        if self.mixed is not None or self.residual is not None:
            pull = self.cross(weight, first) - weight @ self.hessian.to(weight.dtype)
            costs += 2 * torch.sum(error * pull, dim=1, dtype=torch.float64)
        return costs

    def excess(self, decoded: torch.Tensor, cross: torch.Tensor) -> float:
        """tr(What H What^T) - 2 tr(What C^T) of some rows, undamped: the objective without its constant."""
        return float(((decoded @ self.hessian - 2 * cross) * decoded).sum())


def tiles(rows: int, columns: int) -> list[tuple[int, int]]:
    """Rows of a weight in runs that fit in little memory."""
    step = max(1, TILE_WEIGHTS // max(columns, 1))
    return [(first, min(first + step, rows)) for first in range(0, rows, step)]


def _require_covariance(covariance: torch.Tensor) -> None:
    scale = float(covariance.abs().max()) if covariance.numel() else 0.0
    if scale and not _is_symmetric(covariance, _INDEFINITE * scale):
        raise InvalidCheckpoint("the covariance of the inputs is not symmetric")
    if bool((covariance.diagonal() < -_INDEFINITE * scale).any()):
        raise InvalidCheckpoint("the covariance of the inputs has negative variances")


def _is_symmetric(covariance: torch.Tensor, tolerance: float) -> bool:
    """By strips up to the diagonal: they stay in the cache."""
    strips = [(at, min(at + _STRIP, len(covariance))) for at in range(0, len(covariance), _STRIP)]
    differences = (covariance[low:high, :high] - covariance[:high, low:high].T for low, high in strips)
    return all(float(one.abs_().max()) <= tolerance for one in differences)


def _is_all(places: torch.Tensor, count: int) -> bool:
    return len(places) == count and torch.equal(places, torch.arange(count, device=places.device))


def _picked(matrix: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Rows and columns of a square matrix in that order."""
    return matrix.contiguous() if _is_all(places, len(matrix)) else matrix[places][:, places].contiguous()


def _mean(hessian: torch.Tensor) -> float:
    return float(hessian.diagonal().mean()) if len(hessian) else 0.0


def _shrinkage(given: float | None, tokens: int | None, inputs: int) -> tuple[float, tuple[str, ...]]:
    """How far H is moved to its diagonal (section 2.3), and what to say of few tokens."""
    if tokens is None:
        return given or 0.0, ()
    share = min(_MOST_SHRUNK, _SHRINK * inputs / max(tokens, 1)) if given is None else given
    if tokens >= _FEW_TOKENS * inputs:
        return share, ()
    return share, (f"{tokens} tokens for {inputs} inputs, fewer than {_FEW_TOKENS} each",)


def _shrunk(covariance: torch.Tensor, share: float) -> torch.Tensor:
    if not share:
        return covariance
    return (1 - share) * covariance + share * torch.diag(covariance.diagonal())


def _order(hessian: torch.Tensor, columns: str) -> torch.Tensor:
    count, device = len(hessian), hessian.device
    if columns in ("ascending", "descending"):
        return torch.argsort(hessian.diagonal(), descending=columns == "descending", stable=True)
    if columns == "pivot":
        return _pivots(hessian)
    natural = torch.arange(count, device=device)
    return natural.flip(0) if columns == "reversed" else natural


def _pivots(hessian: torch.Tensor) -> torch.Tensor:
    """The order of a pivoted Cholesky factorisation."""
    from scipy.linalg.lapack import dpstrf

    if not len(hessian):
        return torch.arange(0, device=hessian.device)
    pivots = dpstrf(hessian.cpu().numpy(), lower=1)[1]
    return torch.from_numpy(pivots.astype("int64") - 1).to(hessian.device)


def _factored(hessian: torch.Tensor, amount: float) -> tuple[torch.Tensor, float]:
    """The lower factor, and what was added to the diagonal: `amount`, or as much more as it took."""
    if not len(hessian):
        return hessian, amount
    for retry in range(_RETRIES + 1):
        more = 0.0 if not retry else _FIRST_RETRY * 10.0 ** (retry - 1) * _mean(hessian)
        added = max(amount, more)
        matrix = hessian if not added else hessian + added * torch.eye(len(hessian), dtype=hessian.dtype).to(hessian)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not int(failed) and bool((factor.diagonal().square() > 1e-14 * matrix.diagonal()).all()):
            return factor, added
    raise InvalidCheckpoint(
        "the covariance of the inputs is indefinite", hint="more calibration text, or a larger damping"
    )
