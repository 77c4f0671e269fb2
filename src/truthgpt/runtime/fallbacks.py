"""Fallbacks that are never silent: one line each, recorded with the run, or an error in strict mode."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass

from truthgpt.errors import ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fallback:
    """`part` should have been `wanted`, is `used`, because of `reason`."""

    part: str
    wanted: str
    used: str
    reason: str


class Fallbacks:
    """Collects the fallbacks of a run for `environment.json`.

    Args:
        strict: raise ConfigError instead of falling back.
    """

    def __init__(self, strict: bool = False) -> None:
        self._strict = strict
        self._taken: list[Fallback] = []

    def take(self, part: str, wanted: str, used: str, reason: str) -> None:
        """Record a fallback and say it in one line.

        Raises:
            ConfigError: in strict mode.
        """
        if self._strict:
            raise ConfigError(f"{part}: {wanted} cannot be used: {reason} (strict: true allows no fallback to {used})")
        fallback = Fallback(part, wanted, used, reason)
        if fallback in self._taken:  # said already, for example of the loader of the other split
            return
        self._taken.append(fallback)
        logger.warning("%s: using %s instead of %s: %s", part, used, wanted, reason)

    def to_json(self) -> list[dict[str, str]]:
        """All fallbacks taken so far."""
        return [asdict(fallback) for fallback in self._taken]
