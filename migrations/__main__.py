"""`python -m migrations upgrade|downgrade|check`, on the database of `BITMILL_DATABASE_URL`."""

from __future__ import annotations

import argparse
import sys

from core.config import Settings
from core.jobs.sessions import connect
from migrations import runner


def main(arguments: list[str]) -> int:
    """0 done, 1 `check` found differences, 2 no database is named."""
    parser = argparse.ArgumentParser(prog="python -m migrations", description=__doc__)
    parser.add_argument("action", choices=("upgrade", "downgrade", "check"))
    parser.add_argument("revision", nargs="?", help="default: head for upgrade, base for downgrade")
    chosen = parser.parse_args(arguments)
    url = Settings().database_url
    if not url:
        sys.stderr.write("BITMILL_DATABASE_URL is not set\n")
        return 2
    engine = connect(url)
    if chosen.action == "check":
        found = runner.differences(engine)
        sys.stderr.write("".join(line + "\n" for line in found))
        return 1 if found else 0
    if chosen.action == "upgrade":
        runner.upgrade(engine, chosen.revision or "head")
    else:
        runner.downgrade(engine, chosen.revision or "base")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
