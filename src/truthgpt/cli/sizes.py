"""Sizes of memory as people write them."""

from __future__ import annotations

import re

import typer

_UNITS = {"": 2**30, "gib": 2**30, "gb": 10**9, "mib": 2**20, "mb": 10**6}


def parse_size(size: str, option: str) -> int:
    """Bytes of `80GiB`, `80GB`, `81559MiB` or `80` (GiB), the value of `option`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", size.strip().lower())
    if match is None or match[2] not in _UNITS or not float(match[1]):
        raise typer.BadParameter(f"{size!r} is no size; write 80GiB, 80GB or 81559MiB", param_hint=option)
    return round(float(match[1]) * _UNITS[match[2]])
