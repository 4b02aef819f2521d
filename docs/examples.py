"""The console blocks of the documentation that show what a command really prints, and their refreshing.

A block is marked by an HTML comment on the line before it:

    <!-- shown: quick -->           the test suite executes it and compares every line
    <!-- shown: quick, 12 lines --> of each command only the first 12 lines are shown, then `...`
    <!-- shown: slow -->            refreshed by this script only (`make picture`)

A block holds lines `$ bitmill ...`, each with what follows it: standard output, then standard error. Commands are
executed in this process, in the root of the clone, at a fixed width; the folder `out/` of a command is a temporary one
that all blocks of a page share.

    python docs/examples.py [--slow] [PAGE ...]
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
WIDTH = "100"
_BLOCK = re.compile(
    r"<!-- shown: (?P<kind>quick|slow)(?:, (?P<lines>\d+) lines)? -->\n```console\n(?P<text>.*?)```\n", re.DOTALL
)


@dataclass(frozen=True)
class Block:
    """A marked block: `text` as it stands, `lines` how much of each answer is shown (None: all of it)."""

    kind: str
    lines: int | None
    text: str
    start: int
    end: int

    @property
    def commands(self) -> list[str]:
        return [line.removeprefix("$ ") for line in self.text.splitlines() if line.startswith("$ ")]


def pages() -> list[Path]:
    """Every page of the documentation."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: str) -> list[Block]:
    """The marked blocks of a page's text, in order."""
    return [
        Block(
            found["kind"],
            int(found["lines"]) if found["lines"] else None,
            found["text"],
            found.start("text"),
            found.end("text"),
        )
        for found in _BLOCK.finditer(page)
    ]


def shown_now(block: Block, out: Path) -> str:
    """What the block has to say: its commands with what they answer now."""
    parts = []
    for command in block.commands:
        answer = answer_of(command, out)
        if block.lines is not None and len(answer) > block.lines:
            answer = [*answer[: block.lines], "..."]
        parts.append("\n".join([f"$ {command}", *answer]) + "\n")
    return "".join(parts)


def answer_of(command: str, out: Path) -> list[str]:
    """The lines that a `bitmill` command prints, without progress bars; the temporary folder is shown as `out`."""
    from cli.main import run

    program, *arguments = shlex.split(command.replace(" out/", f" {out}/"))
    if program != "bitmill":
        raise ValueError(f"only `bitmill` is executed, not {program!r}")
    printed, said = io.StringIO(), io.StringIO()
    with _surroundings(), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said):
        run(arguments)
    text = printed.getvalue() + "".join(line for line in said.getvalue().splitlines(True) if "━" not in line)
    return [line.rstrip() for line in text.replace(str(out), "out").splitlines()]


@contextlib.contextmanager
def _surroundings() -> Iterator[None]:
    """The root of the clone, a fixed width, and no progress bars that know of a terminal."""
    wanted = {"COLUMNS": WIDTH, "TERM": "dumb", "NO_COLOR": "1"}
    before, folder = {name: os.environ.get(name) for name in wanted}, Path.cwd()
    os.environ.update(wanted)
    os.chdir(ROOT)
    try:
        yield
    finally:
        os.chdir(folder)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def refreshed(page: str, out: Path, *, slow: bool) -> str:
    """The page with its blocks as the commands answer now; slow ones only when asked for."""
    for block in reversed([(one, shown_now(one, out)) for one in blocks(page) if slow or one.kind == "quick"]):
        page = page[: block[0].start] + block[1] + page[block[0].end :]
    return page


def main(arguments: list[str]) -> None:
    """Rewrite the pages whose answers have changed."""
    named = [Path(one).absolute() for one in arguments if not one.startswith("--")]
    for path in named or pages():
        with tempfile.TemporaryDirectory() as folder:
            before = path.read_text("utf-8")
            after = refreshed(before, Path(folder), slow="--slow" in arguments)
        if after != before:
            path.write_text(after, "utf-8")
            sys.stderr.write(f"refreshed {path.relative_to(ROOT)}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
