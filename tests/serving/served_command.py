"""A command that serves, seen from outside."""

from __future__ import annotations

import re
import time
from pathlib import Path

READY_S = 60


def url_said(errors: Path) -> str:
    """The address in what a command says, once it is there."""
    for _ in range(READY_S * 20):
        found = re.search(r"http://\S+?(?=;)", errors.read_text()) if errors.exists() else None
        if found:
            return found[0]
        time.sleep(0.05)
    raise AssertionError(f"no address was said:\n{errors.read_text()}")
