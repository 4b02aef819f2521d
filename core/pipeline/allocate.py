"""Step allocate: a tensor format for every tensor, under the recipe's budget.

Files: allocation.json, a `Plan`. Values: {predicted_kl, predicted_bits_per_param, predicted_bytes, warnings, rounds}.
Budgets in bits or bytes are met by the exact size of the weight files. A KL target is met as measured: choices are
encoded in memory by the recipe's rounding and compared with the reference on the calibration text, a few times.
Without calibration nothing is predicted. Nothing of what is encoded here is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch

from core.allocation import higgs
from core.allocation.baq import Baq
from core.allocation.fisher import Fisher
from core.allocation.forecast import Evidence, Floats, Forecast, Scales
from core.allocation.guards import warnings
from core.allocation.heuristic import heuristic
from core.allocation.resolve import Resolved
from core.allocation.search import Round, best, search
from core.allocation.sizes import Formats, Sizes
from core.allocation.space import Space, build_space
from core.allocation.uniform import uniform
from core.errors import BitmillError, InfeasibleTarget
from core.evaluation.by_blocks import Side, evaluate_checkpoints
from core.exports.layout import KEEP
from core.exports.report import rounded
from core.ids import derived_seed
from core.jobs.steps import StepOutput, StepRequest
from core.network_tensors import places_of
from core.pipeline.assemble import open_files
from core.pipeline.calibrate import COVARIANCE_FILE, FISHER_FILE
from core.pipeline.context import StepContext
from core.pipeline.fetch import open_checkpoint
from core.pipeline.forward import dtype_on, listening, network_of, resolve_device, windows_of
from core.pipeline.plan_file import PLAN_FILE, Plan, PlannedTensor
from core.pipeline.sensitivities import Sensitivities
from core.recipe.allocation import AllocationSpec
from core.recipe.override import Override
from core.recipe.rounding import RoundingSpec
from core.recipe.target import Target
from core.recipe.tensor_format import TensorFormat, parse
from core.rounding.base import round_tensor
from core.rounding.expected import ExpectedShare
from core.sensitivity.covariance import Covariances
from core.storage.checkpoint import CheckpointIndex
from core.tensors.dtypes import TORCH_DTYPES
from core.tensors.encoded import EncodedTensor
from core.tensors.reader import read_tensor

Method = Callable[[int], Formats]

_FORECAST_ROUNDS, _MEASURED_ROUNDS = 8, 4
_START_BITS = 4.25
_MEASURED_SEQUENCES = 32


def allocate(request: StepRequest, ctx: StepContext) -> StepOutput:
    """Plan; InfeasibleTarget when no choice meets the target, InvalidRecipe when its bounds leave no width."""
    job = _Job.of(request, ctx)
    plan = job.plan()
    file = ctx.publish_bytes(request, PLAN_FILE, plan.to_bytes())
    values = {
        "predicted_kl": plan.predicted_kl,
        "predicted_bits_per_param": plan.predicted_bits_per_param,
        "predicted_bytes": plan.predicted_bytes,
        "warnings": list(plan.warnings),
        "rounds": list(plan.rounds),
    }
    return StepOutput(files={PLAN_FILE: file}, values=values)


def read_evidence(ctx: StepContext, calibrated: StepOutput, space: Space) -> Evidence:
    """What a finished calibrate step knows about the groups."""
    stored = open_files(ctx, {"fisher": calibrated.files[FISHER_FILE]})

    known = calibrated.values["tensors"]

    def rows(name: str) -> Floats | None:
        key = f"{name}.rows"
        if key not in stored.tensors:
            return None
        sums: Floats = read_tensor(stored, key).double().numpy() * float(known[name]["cross"])
        return sums

    def scales(name: str) -> Scales | None:
        key = f"{name}.row_scales"
        if key not in stored.tensors:
            return None
        return Scales(float(known[name]["scale"]), read_tensor(stored, key).double().numpy())

    means = {name: float(one["mean"]) * float(one["cross"]) for name, one in known.items()}
    return Evidence.of(means, rows, space.groups, calibrated.values.get("halves_bits"), scales)


def method_of(name: str, sizes: Sizes, base: TensorFormat, forecast: Forecast | None) -> Method:
    """The allocation method of that name as a function of a budget in bytes."""
    if name == "uniform":
        return lambda budget: uniform(sizes, base, budget)
    if name == "heuristic":
        return lambda budget: heuristic(sizes, base, budget)
    if forecast is None:
        raise BitmillError("allocation by predicted KL without calibration", where="allocation")
    return Fisher(sizes, base, forecast)


def measured_evidence(
    source: CheckpointIndex, ctx: StepContext, calibration: dict[str, Any], space: Space, seed: int
) -> Evidence:
    """What noise in each tensor of the groups costs, on a few windows of the calibration text (`higgs`)."""
    few = calibration | {"sequences": min(calibration["sequences"], higgs.SEQUENCES)}
    windows, network = windows_of(source, few, "calibration"), network_of(source, ctx.device)
    places, state = places_of(source, network), network.state_dict(keep_vars=True)
    members = [name for group in space.groups for name in group.members if name in places]
    tensors = {name: places[name].of(state[places[name].target]) for name in members}
    return higgs.evidence(higgs.measured(network, tensors, windows.ids, seed, listening(ctx)), space.groups)


def _by_output_errors(ctx: StepContext, calibrated: list[StepOutput], sizes: Sizes, base: TensorFormat) -> Method:
    if not calibrated or COVARIANCE_FILE not in calibrated[0].files:
        raise BitmillError("allocation by the covariance of inputs without one", where="allocation")
    stored = open_files(ctx, {"covariance": calibrated[0].files[COVARIANCE_FILE]})
    return Baq(sizes, base, Covariances.from_index(stored).of, ctx.device, _ticker(ctx.within(0.0, 0.4), sizes.space))


@dataclass(frozen=True)
class _Encoding:
    """(tensor, format) -> the tensor as the step quantise will store it."""

    source: CheckpointIndex
    ctx: StepContext
    rounding: RoundingSpec
    evidence: Evidence | None
    sensitivities: Sensitivities
    format: str
    seed: int

    def expected(self, name: str) -> Callable[[float], float]:
        """By bits, what the rounding is expected to leave of the errors of nearest rounding."""
        shape, is_grid = self.source.tensors[name].shape, parse(self.format).is_grid
        return ExpectedShare(self.rounding, self.sensitivities.of(name, shape), is_grid=is_grid).at

    def __call__(self, name: str, fmt: TensorFormat) -> EncodedTensor:
        weight = read_tensor(self.source, name)
        sensitivity = self.sensitivities.of(name, tuple(weight.shape))
        seed, on_device = derived_seed(self.seed, name), weight.to(self.ctx.device)
        return round_tensor(on_device, fmt, self.rounding, sensitivity=sensitivity, seed=seed)


@dataclass(frozen=True)
class _Job:
    """One allocation: the checkpoint, what may be chosen, and what is known about it."""

    ctx: StepContext
    source: CheckpointIndex
    target: Target
    sizes: Sizes
    forecast: Forecast | None
    method: Method
    by_loss: bool
    calibration: dict[str, Any]
    encoding: _Encoding
    unmatched: tuple[str, ...]

    @classmethod
    def of(cls, request: StepRequest, ctx: StepContext) -> _Job:
        params, calibrated = request.params, request.outputs("calibrate")
        ctx = replace(ctx, device=resolve_device(ctx.device))
        source = open_checkpoint(ctx, request.outputs("fetch")[0])
        base, spec = parse(params["format"]), AllocationSpec.model_validate(params["allocation"])
        overrides = [Override.model_validate(one) for one in params["overrides"]]
        space = build_space(source, base, spec, overrides, params["groups"])
        evidence = read_evidence(ctx, calibrated[0], space) if calibrated else None
        rounding = RoundingSpec.model_validate(params["rounding"])
        sensitivities = Sensitivities.of_step(ctx, calibrated, rounding)
        encoding = _Encoding(source, ctx, rounding, evidence, sensitivities, params["format"], request.seed)
        resolved = Resolved(source, ctx.device, ctx.check, encoding, rounding.stored_format)
        sizes, forecast = Sizes(source, space, resolved), None
        if evidence is not None:
            known, by_noise = evidence, spec.name == "higgs"
            if by_noise:
                known = measured_evidence(source, ctx.within(0.0, 0.4), params["calibration"], space, request.seed)
            tick = _ticker(ctx.within(0.4 * by_noise, 0.5), space)
            forecast = Forecast(source, known, ctx.device, tick, encoding.expected)
        by_output = _by_output_errors(ctx, calibrated, sizes, base) if spec.name == "baq" else None
        return cls(
            ctx=ctx,
            source=source,
            target=Target.model_validate(params["target"]),
            sizes=sizes,
            forecast=forecast,
            method=by_output or method_of(spec.name, sizes, base, forecast),
            by_loss=spec.name in ("fisher", "higgs"),
            calibration=params["calibration"] or {},
            encoding=encoding,
            unmatched=tuple(one.match for one in overrides if not any(fnmatchcase(n, one.match) for n in source.names)),
        )

    def plan(self) -> Plan:
        """The plan that meets the target."""
        if self.target.kl is None:
            return self._described(self.method(self.sizes.target_bytes(self.target)), ())
        formats, rounds = self._towards_kl(self.target.kl)
        return self._described(formats, rounds)

    def _towards_kl(self, target: float) -> tuple[Formats, list[Round]]:
        """Fewest bits at which the measured KL is within the target, beginning where the forecast meets it."""
        found: dict[float, Formats] = {}

        def by(measure: Callable[[Formats, float], float]) -> Callable[[float], Round]:
            def at(bits: float) -> Round:
                formats = self.method(max(self.sizes.budget(bits), self.sizes.least))
                stored = self.sizes.bits(self.sizes.exact(formats))
                return Round(stored, measure(found.setdefault(stored, formats), stored))

            return at

        least, most = self.sizes.bits(self.sizes.least), self.sizes.bits(self.sizes.most + 8)
        guessed = search(
            target,
            by(lambda formats, _: self._predicted(formats)),
            start=_START_BITS,
            least=least,
            most=most,
            rounds=_FORECAST_ROUNDS,
        )
        start = min(guessed, key=lambda one: abs(one.kl - target)).bits
        found.clear()
        measured = _Measured(self)
        rounds = search(target, by(measured.kl), start=start, least=least, most=most, rounds=_MEASURED_ROUNDS)
        reached = best(rounds, target)
        if reached is None:
            lowest = min(rounds, key=lambda one: one.kl)
            raise InfeasibleTarget(
                f"a KL of {target:g} cannot be met, the smallest measured is {lowest.kl:.3g} at {lowest.bits:.3f} bits "
                f"per parameter",
                where="target.kl",
                hint="raise the target, allow larger widths, smaller blocks or a better format",
            )
        return found[reached.bits], rounds

    def _predicted(self, formats: Formats) -> float:
        if self.forecast is None:
            raise BitmillError("a KL target without calibration", where="target.kl")
        return self.forecast.total(_encoded(self.sizes.space.choice(formats)))

    def _described(self, formats: Formats, rounds: list[Round] | tuple[()]) -> Plan:
        """The plan of a choice, with exact sizes and everything that is predicted of it."""
        choice, stored = self.sizes.space.choice(formats), self.sizes.choice(formats)
        size = self.sizes.exact(formats)
        return Plan(
            tensors=tuple(self._planned(name, text, stored[name]) for name, text in choice.items()),
            predicted_bytes=size,
            predicted_bits_per_param=rounded(self.sizes.bits(size)),
            predicted_kl=rounded(self.forecast.total(_encoded(choice))) if self.forecast else None,
            warnings=(
                *(f"the override {match} matches no tensor" for match in self.unmatched),
                *warnings(self.sizes.space, formats, self.forecast, by_fisher=self.by_loss),
            ),
            rounds=tuple({"bits_per_param": rounded(one.bits), "kl": rounded(one.kl)} for one in rounds),
        )

    def _planned(self, name: str, text: str, stored_as: str) -> PlannedTensor:
        """A row of the plan; a tensor about which nothing is known has no prediction."""
        entry, forecast = self.source.tensors[name], self.forecast
        mean = self.encoding.evidence.means.get(name) if self.encoding.evidence else None
        stored = entry.nbytes if text == KEEP else self.sizes.tensor(name, text)
        predicted = 0.0 if forecast and text == KEEP else None
        if forecast and text != KEEP and forecast.evidence.mean(name) > 0:
            predicted = forecast.tensor(name, text)
        return PlannedTensor(
            name=name,
            format=stored_as,
            bits=rounded(8 * stored / max(entry.elements, 1)),
            stored_bytes=stored,
            fisher_mean=rounded(mean),
            predicted_kl=rounded(predicted),
        )


class _Measured:
    """The KL of choices, measured on the calibration text with the weights that quantising would store."""

    def __init__(self, job: _Job) -> None:
        self._job = job
        self._known: dict[float, float] = {}
        spec = job.calibration
        spec = spec | {"sequences": min(spec["sequences"], _MEASURED_SEQUENCES)}
        self._windows = windows_of(job.source, spec, "calibration")

    def kl(self, formats: Formats, stored: float) -> float:
        """Nats per token of a choice that is stored in that many bits per parameter."""
        if stored not in self._known:
            self._known[stored] = self._measure(self._job.sizes.space.choice(formats))
        return self._known[stored]

    def _measure(self, choice: Mapping[str, str]) -> float:
        job, number = self._job, len(self._known)
        low = 0.5 + 0.5 * number / (number + 2)
        part = job.ctx.within(low, 0.5 + 0.5 * (number + 1) / (number + 3))
        part.check()
        return evaluate_checkpoints(
            Side(job.source),
            Side(job.source, lambda name: self._decoded(name, choice[name])),
            self._windows,
            listening(part),
            device=job.ctx.device,
            dtype=dtype_on(job.ctx.device),
            log=job.ctx.log,
        ).kl_mean

    def _decoded(self, name: str, text: str) -> torch.Tensor:
        job = self._job
        job.ctx.check()
        if text == KEEP:
            return read_tensor(job.source, name)
        return job.encoding(name, parse(text)).decode().to(TORCH_DTYPES[job.source.tensors[name].dtype])


def _encoded(choice: Mapping[str, str]) -> dict[str, str]:
    """A choice without what is kept."""
    return {name: text for name, text in choice.items() if text != KEEP}


def _ticker(ctx: StepContext, space: Space) -> Callable[[str], None]:
    """What is called before each tensor is measured: reports, and lets the step be stopped."""
    total, seen = sum(len(group.members) for group in space.groups) or 1, set[str]()

    def tick(name: str) -> None:
        ctx.check()
        seen.add(name)
        ctx.progress(len(seen) / total, name)

    return tick
