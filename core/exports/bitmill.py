"""The `bitmill` export: a folder that stands alone, from the weight files and the evidence.

Pure functions: they answer bytes, the step stores them. Everything is a function of the job's content; no time stamp,
host name or id of a job is in any file, so that the same work gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import PurePosixPath
from typing import Any

import core
from core.exports.card import model_card
from core.exports.layout import LAYOUT_VERSION
from core.storage.checkpoint import FileEntry, is_weight_file

QUANT_METHOD = "bitmill"
FORMAT_VERSION = LAYOUT_VERSION
CONFIG, CARD, MANIFEST, REPORT, SUMS = "config.json", "README.md", "manifest.json", "report.json", "SHA256SUMS"
OURS = (CONFIG, CARD, MANIFEST, REPORT, SUMS)


_ASIDE = re.compile(
    "|".join(
        rf"({re.escape(PurePosixPath(name).stem)})((?:\.source)*)({re.escape(PurePosixPath(name).suffix)})"
        for name in OURS
        if name != CONFIG
    )
)


@dataclass(frozen=True)
class Evidence:
    """What the documents are written from; `source` lists the checkpoint's files."""

    checkpoint_sha: str
    source: tuple[FileEntry, ...]
    config: dict[str, Any]
    source_card: str
    recipe: dict[str, Any]
    calibration: dict[str, Any] | None
    report: dict[str, Any]


def copied_files(source: Iterable[FileEntry]) -> dict[str, FileEntry]:
    """The source's non-weight files by their path in the export; one with the name of ours is kept beside it."""
    copied = {}
    for entry in source:
        if entry.path == CONFIG or is_weight_file(entry.path):
            continue
        copied[_set_aside(entry.path)] = entry
    return copied


def _set_aside(path: str) -> str:
    """`README.md` as `README.source.md`, and that as `README.source.source.md`: no two files meet under one name."""
    if not (found := _ASIDE.fullmatch(path)):
        return path
    stem, more, suffix = (part for part in found.groups() if part is not None)
    return f"{stem}{more}.source{suffix}"


def original_name(path: str) -> str | None:
    """The name in the source of a file that was copied to an export; None for one that is ours."""
    found = _ASIDE.fullmatch(path)
    if not found:
        return None if path == CONFIG else path
    stem, more, suffix = (part for part in found.groups() if part is not None)
    return f"{stem}{more.removesuffix('.source')}{suffix}" if more else None


def documents(evidence: Evidence, stored: dict[str, FileEntry]) -> dict[str, bytes]:
    """Our own files by name; `stored` are the other files of the export, which the manifest and the digests cover."""
    texts = {
        CONFIG: _json(export_config(evidence.config, evidence.report), theirs=True),
        REPORT: _json(evidence.report),
        CARD: model_card(evidence.report, evidence.recipe, evidence.source_card, evidence.config).encode(),
    }
    digests = {path: (entry.sha256, entry.size) for path, entry in stored.items()}
    digests |= {path: _digest(data) for path, data in texts.items()}
    texts[MANIFEST] = _json(manifest(evidence, digests))
    digests[MANIFEST] = _digest(texts[MANIFEST])
    texts[SUMS] = "".join(f"{sha}  {path}\n" for path, (sha, _) in sorted(digests.items())).encode()
    return texts


def export_config(config: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    """The source's config with what says how its weights are stored."""
    return config | {
        "quantization_config": {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "bits_per_param": report["summary"]["bits_per_param"],
            "formats": [row["format"] for row in report["coverage"]],
        }
    }


def plain_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config of a checkpoint whose weights are stored as they are."""
    return {key: value for key, value in config.items() if key != "quantization_config"}


def manifest(evidence: Evidence, outputs: dict[str, tuple[str, int]]) -> dict[str, Any]:
    """What went in, how, and what came out."""
    return {
        "format": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "source": {
            "checkpoint_sha": evidence.checkpoint_sha,
            "files": [{"path": entry.path, "size": entry.size, "sha256": entry.sha256} for entry in evidence.source],
        },
        "calibration": evidence.calibration,
        "recipe": evidence.recipe,
        "seeds": {
            "recipe": evidence.recipe.get("seed"),
            "calibration": (evidence.calibration or {}).get("seed"),
        },
        "versions": versions(),
        "outputs": [{"path": path, "size": size, "sha256": sha} for path, (sha, size) in sorted(outputs.items())],
        "tensors": evidence.report["tensors"],
        "warnings": evidence.report["warnings"],
    }


def versions() -> dict[str, str]:
    """The versions of everything whose code decides a result."""
    names = ("numpy", "scipy", "tokenizers", "torch", "transformers")
    return {"bitmill": core.__version__} | {name: metadata.version(name) for name in names}


def _digest(data: bytes) -> tuple[str, int]:
    return hashlib.sha256(data).hexdigest(), len(data)


def _json(value: dict[str, Any], *, theirs: bool = False) -> bytes:
    """Sorted where values may have come through a database, which keeps no order of keys.

    `theirs`: in the source's order, with the infinities that some architectures write into their configs.
    """
    return (json.dumps(value, indent=2, sort_keys=not theirs, ensure_ascii=False, allow_nan=theirs) + "\n").encode()
