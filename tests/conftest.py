"""What every test shares: one thread per process, so that parallel test processes do not fight over the cores."""

from __future__ import annotations

import os

from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Other tests share the cores: how long one example takes says nothing. Where CI is set, hypothesis's own profile draws
# the same examples every time.
settings.register_profile("shared-cores", deadline=None)
if not os.environ.get("CI"):
    settings.load_profile("shared-cores")
