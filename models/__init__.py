"""The language models of the project: the bundled one, and the scripts that make models.

Importing this package is cheap: it promises to need neither torch nor transformers.
"""

from pathlib import Path

BUNDLED = Path(__file__).parent / "bitmill_5m"
"""Folder of the bundled model: a Llama checkpoint that transformers loads as it is."""


def smollm2_folder() -> Path:
    """Folder of SmolLM2-135M-Instruct, downloaded and converted on first use."""
    from models.smollm2 import folder

    return folder()


__all__ = ["BUNDLED", "smollm2_folder"]
