"""`python -m worker` with the pretended engine: `pretended_worker.py FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

from worker.__main__ import main

if __name__ == "__main__":
    engine = Path(__file__).with_name("pretended_engine.py")
    sys.exit(main(engine_command=(sys.executable, str(engine), sys.argv[1])))
