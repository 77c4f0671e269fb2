"""The hub of models and data: its client retries every file for half a minute, also those that are in the cache."""

from __future__ import annotations

import logging
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 3.0
"""Without an answer in this time the hub counts as unreachable."""


@contextmanager
def cache_when_unreachable(name_or_path: str) -> Iterator[None]:
    """Inside it the hub is not asked for `name_or_path` when it does not answer, which is said once.

    A folder needs no hub. Whether it answers is tried once a process: a model is several files.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or Path(name_or_path).exists() or not _left_out(name_or_path, constants.ENDPOINT):
        yield
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False


def unreachable(endpoint: str) -> str | None:
    """Why no connection can be made to `endpoint`; None when one can, or when a proxy stands between."""
    if urllib.request.getproxies():
        return None
    address = urllib.parse.urlsplit(endpoint)
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname or endpoint, port), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        return str(error)
    return None


@cache
def _left_out(name: str, endpoint: str) -> bool:
    reason = unreachable(endpoint)
    if reason is not None:
        logger.warning("%s: %s cannot be reached (%s); using the copy in the cache", name, endpoint, reason)
    return reason is not None
