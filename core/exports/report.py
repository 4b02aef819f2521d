"""The evidence beside an artefact: summary, coverage, forecast against measurement, per-tensor table.

Pure functions from the outputs of the steps to JSON values. Numbers are rounded to six significant digits, so that
noise in the last place of a sum does not change a file. Nothing here measures or reads anything.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

from core.exports.layout import KEEP
from core.recipe.tensor_format import parse


@dataclass(frozen=True)
class TensorResult:
    """One tensor as stored. `bits`: stored bits per element; `predicted_kl` in nats per token, None without Fisher.

    `fitted`: the parameter that its format left open. `notes`: what its rounding had to do otherwise than asked.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    format: str
    nbytes: int
    elements: int
    relative_rms_error: float
    fisher_mean: float | None = None
    predicted_kl: float | None = None
    fitted: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def bits(self) -> float:
        return 8 * self.nbytes / self.elements if self.elements else 0.0

    def to_json(self) -> dict[str, Any]:
        """The row of the per-tensor table."""
        values = {key: rounded(value) for key, value in asdict(self).items() if value or key not in ("fitted", "notes")}
        values |= {"notes": list(self.notes)} if self.notes else {}
        return values | {"shape": list(self.shape), "bits": rounded(self.bits)}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> TensorResult:
        """The result back from its row."""
        fields = {key: value for key, value in row.items() if key not in ("bits", "kl_share")}
        return cls(**fields | {"shape": tuple(row["shape"]), "notes": tuple(row.get("notes", ()))})


def rounded(value: Any) -> Any:
    """Floats to six significant digits, other values as they are."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def with_shares(results: list[TensorResult]) -> list[dict[str, Any]]:
    """Rows of the per-tensor table with each tensor's share of the predicted KL (None without a prediction)."""
    total = sum(result.predicted_kl or 0.0 for result in results)
    shares = [result.predicted_kl / total if result.predicted_kl is not None and total else None for result in results]
    return [result.to_json() | {"kl_share": rounded(share)} for result, share in zip(results, shares, strict=True)]


def coverage(results: list[TensorResult]) -> list[dict[str, Any]]:
    """How many parameters lie in each kind of format, most first; what single tensors have of their own is left out."""
    groups: dict[str, list[TensorResult]] = defaultdict(list)
    for result in results:
        groups[result.format if result.format == KEEP else parse(result.format).kind].append(result)
    total = sum(result.elements for result in results) or 1
    rows = []
    for name, members in groups.items():
        elements = sum(result.elements for result in members)
        rows.append(
            {
                "format": name,
                "bits": rounded(8 * sum(result.nbytes for result in members) / max(elements, 1)),
                "tensors": len(members),
                "parameters": elements,
                "share": rounded(elements / total),
            }
        )
    return sorted(rows, key=lambda row: (-row["parameters"], row["format"]))


def coverage_line(rows: list[dict[str, Any]]) -> str:
    """The same in a sentence: `93.1 % of parameters at 4.25 bits (t7_4@64:signmax:bf16), ...`."""
    return ", ".join(
        f"{100 * row['share']:.1f} % of parameters at {row['bits']:.4g} bits ({row['format']})" for row in rows
    )


def summary(
    assembled: dict[str, Any], metrics: dict[str, Any] | None, predicted_kl: float | None
) -> dict[str, float | int | None]:
    """The job's summary of the public contract; None where the recipe did not ask for a number."""
    measured = metrics or {}
    return {
        "bits_per_param": assembled["bits_per_param"],
        "size_bytes": assembled["size_bytes"],
        "kl_mean": rounded(measured.get("kl_mean")),
        "perplexity": rounded(measured.get("perplexity")),
        "reference_perplexity": rounded(measured.get("reference_perplexity")),
        "predicted_kl": rounded(predicted_kl),
    }


def gate_result(gate: dict[str, Any] | None, metrics: dict[str, Any] | None) -> dict[str, Any]:
    """Whether the exported model passes the recipe's gate; {"ok": True} without one.

    A limit whose number was not measured counts as failed: a gate never passes by omission.
    """
    limits = {name: limit for name, limit in (gate or {}).items() if limit is not None}
    measured = metrics or {}
    values = {"max_kl": measured.get("kl_mean"), "min_top1": measured.get("top1_agreement")}
    failures = []
    for name, limit in sorted(limits.items()):
        value = values.get(name)
        worse = value is None or (value > limit if name.startswith("max_") else value < limit)
        if worse:
            failures.append({"limit": name, "allowed": limit, "measured": rounded(value)})
    return {"ok": not failures, "limits": limits, "failures": failures}


def forecast(predicted_kl: float | None, metrics: dict[str, Any] | None) -> dict[str, Any]:
    """Predicted beside measured KL, nats per token, and their ratio."""
    measured = (metrics or {}).get("kl_mean")
    return {
        "predicted_kl": rounded(predicted_kl),
        "measured_kl": rounded(measured),
        "measured_over_predicted": rounded(measured / predicted_kl) if predicted_kl and measured else None,
    }
