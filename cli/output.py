"""How commands answer: results on stdout (with `--json` exactly one object), everything else on stderr, exit codes.

0 done, 1 the work failed, 2 the request was wrong. A command raises `BitmillError`; `main` turns it into text with its
place and hint, or with `--json` into `{"error": {...}}` on stdout.
"""

from __future__ import annotations

import errno
import json
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from core.errors import BitmillError, ErrorClass, GateFailed, OutOfDisk, OutOfMemory, UserError

DONE, FAILED, WRONG = 0, 1, 2


def emit(result: dict[str, Any]) -> None:
    """The one JSON object of a `--json` command."""
    json.dump(result, sys.stdout, indent=2, ensure_ascii=False, allow_nan=False, default=str)
    sys.stdout.write("\n")
    sys.stdout.flush()


def say(text: str) -> None:
    """A line for the person at the terminal."""
    print(text, file=sys.stderr, flush=True)


def exit_code(error: BitmillError) -> int:
    """2 when the request was wrong, 1 when it was understood and the work failed."""
    kind = error.to_dict()["class"]
    return WRONG if kind == ErrorClass.USER and not isinstance(error, GateFailed) else FAILED


def named(error: Exception) -> BitmillError:
    """An exception that nobody has named: what the system refused, or a defect of ours, whose traceback is shown."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutOfDisk("the disk is full", where=str(error.filename or ""), hint="free disk space")
    if isinstance(error, OSError) and error.filename is not None:
        return UserError(str(error.strerror).lower(), where=str(error.filename))
    if isinstance(error, MemoryError):
        return OutOfMemory(f"the host has too little memory: {error}"[:500])
    traceback.print_exception(error)
    return BitmillError(f"{type(error).__name__}: {error}"[:1000], hint="a defect of Bitmill: please report it")


def report_error(error: BitmillError, *, as_json: bool) -> None:
    details = error.to_dict()
    if as_json:
        emit({"error": details})
    place = f" [{error.where}]" if error.where else ""
    say(f"error: {details['code']}{place}: {error.detail}")
    for item in error.errors:
        say("  - " + ": ".join(str(item[name]) for name in ("path", "message", "detail") if item.get(name)))
    if error.hint:
        say(f"hint: {error.hint}")


def report_usage(message: str, *, as_json: bool) -> None:
    if as_json:
        emit({"error": {"code": "usage", "class": "user", "retryable": False, "detail": message}})
    say(message if message.startswith("Usage:") else f"error: {message}")


def wants_json(arguments: Sequence[str]) -> bool:
    return "--json" in arguments
