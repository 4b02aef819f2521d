"""`python -m worker` with the engine that can be told things: `told_worker.py FOLDER MODE [SECONDS]`.

With SECONDS this process, not its engine, believes that it is so much later (or earlier) than it is.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from core import clock
from worker.__main__ import main


def move_the_clock(by_s: float) -> None:
    wall: Callable[[], float] = time.time
    now = clock.now
    time.time = lambda: wall() + by_s
    clock.now = lambda: now() + timedelta(seconds=by_s)


if __name__ == "__main__":
    if len(sys.argv) > 3:
        move_the_clock(float(sys.argv[3]))
    engine = Path(__file__).with_name("told_engine.py")
    sys.exit(main(engine_command=(sys.executable, str(engine), *sys.argv[1:3])))
