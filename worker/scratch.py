"""Scratch folders of workers: one each, locked while its worker lives, removed by the next start after a kill."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path
from typing import TextIO

_LOCK = "lock"


def take(root: Path, worker_id: str) -> TextIO:
    """Make the worker's folder and lock it; the lock lasts as long as the returned file is open."""
    folder = root / worker_id
    folder.mkdir(parents=True)
    file = (folder / _LOCK).open("w")
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


def remove_abandoned(root: Path) -> list[str]:
    """Remove the folders of workers that are gone; the names of what was removed."""
    removed = []
    for folder in sorted(root.glob("wrk_*")):
        try:
            handle = os.open(folder / _LOCK, os.O_RDWR)
        except OSError:
            continue  # being made, or being removed, by another worker
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
            removed.append(folder.name)
        except OSError:
            pass  # its worker lives
        finally:
            os.close(handle)
    return removed


def give_back(root: Path, worker_id: str) -> None:
    """Remove the worker's folder: it stops in order."""
    shutil.rmtree(root / worker_id, ignore_errors=True)
