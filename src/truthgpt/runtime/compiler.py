"""The C++ compiler that torch.compile calls. Imports no torch."""

from __future__ import annotations

import os
import shutil


def cxx_candidates() -> list[str]:
    """What is tried, in order: the environment's CXX alone where it is set."""
    return [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++", "cl"]


def cxx_compiler() -> str | None:
    """Path of the first candidate that is installed, or None."""
    return next((path for path in map(shutil.which, cxx_candidates()) if path is not None), None)
