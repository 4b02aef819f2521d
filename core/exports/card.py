"""The model card of an artefact: README.md with front matter that hubs read.

License, base model and language are taken over from the source's own card where it states them; nothing is guessed.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_TAKEN_OVER = ("license", "license_name", "license_link", "language", "datasets", "base_model")
_HUB_ID = re.compile(r"^[\w.-]{1,96}/[\w.-]{1,96}$")


def source_front_matter(text: str) -> dict[str, Any]:
    """The YAML between the two `---` lines at the top of a card; {} where there is none or it is not a map."""
    match = re.match(r"\A---\r?\n(.*?)\r?\n---\s*$", text, re.DOTALL | re.MULTILINE)
    if not match:
        return {}
    try:
        values = yaml.safe_load(match[1])
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: a date that is none, and the like
        return {}
    return values if isinstance(values, dict) else {}


def front_matter(source_card: str, config: dict[str, Any]) -> dict[str, Any]:
    """The front matter of our card."""
    theirs = source_front_matter(source_card)
    ours: dict[str, Any] = {key: theirs[key] for key in _TAKEN_OVER if theirs.get(key)}
    origin = config.get("_name_or_path")
    if "base_model" not in ours and isinstance(origin, str) and _HUB_ID.match(origin):
        ours["base_model"] = origin
    if "base_model" in ours:
        ours["base_model_relation"] = "quantized"
    return ours | {"library_name": "bitmill", "tags": ["bitmill", "quantized"]}


def model_card(report: dict[str, Any], recipe: dict[str, Any], source_card: str, config: dict[str, Any]) -> str:
    """README.md: what this is, its numbers, how it was made and how to read it."""
    matter = yaml.safe_dump(front_matter(source_card, config), sort_keys=True, allow_unicode=True)
    stated = config.get("architectures")
    named = stated[0] if isinstance(stated, list) and stated else None
    architecture = named or config.get("model_type") or "a checkpoint"
    lines = [
        f"---\n{matter}---",
        f"# {architecture}, quantised by Bitmill",
        f"{report['coverage_line']}.",
        "| measure | value |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in _measures(report)),
        "Bits per parameter count every byte of the weight files: codes, scales, codebooks, kept tensors, headers.",
        *(f"> {warning}" for warning in report["warnings"]),
        "## Recipe",
        f"```yaml\n{yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)}```",
        "## Use",
        "```\nbitmill inspect .\nbitmill dequantise . --out plain   # a checkpoint that transformers loads\n```",
        "`manifest.json` says what went in and came out, `report.json` has the numbers per tensor.",
    ]
    return "\n\n".join(lines) + "\n"


def _measures(report: dict[str, Any]) -> list[tuple[str, str]]:
    summary, metrics = report["summary"], report["metrics"] or {}
    rows = [
        ("bits per parameter", summary["bits_per_param"]),
        ("weight files, bytes", summary["size_bytes"]),
        ("KL divergence, nats per token", summary["kl_mean"]),
        ("  standard error", metrics.get("kl_stderr")),
        ("KL predicted before encoding", summary["predicted_kl"]),
        ("top-1 agreement", metrics.get("top1_agreement")),
        ("perplexity", summary["perplexity"]),
        ("perplexity of the reference", summary["reference_perplexity"]),
    ]
    return [
        (name, f"{value:,}" if isinstance(value, int) else f"{value:.5g}") for name, value in rows if value is not None
    ]
