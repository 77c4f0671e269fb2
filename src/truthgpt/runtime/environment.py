"""What a run ran on, and the one redactor that keeps secrets out of every file and log. No torch."""

from __future__ import annotations

import os
import platform
import re
import shlex
import sys
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from truthgpt.version import __version__

_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "pydantic", "numpy")
_EXTRAS = ("datasets", "peft", "tensorboard", "triton", "wandb", "webdataset")

_SECRET_NAME = r"(?:token|secret|passw(?:or)?d|pwd|api[_-]?key|access[_-]?key|private[_-]?key|credentials?)"
_HIDDEN = "[hidden]"
_PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = (
    # Keys and tokens that the well-known services mark with a prefix.
    (re.compile(r"\b(?:hf|ghp|gho|ghs|glpat|github_pat|xox[abprs]|sk|pk)[_-][A-Za-z0-9_-]{12,}"), _HIDDEN),
    (re.compile(r"\bAKIA[A-Z0-9]{16}\b"), _HIDDEN),
    (re.compile(r"\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*"), _HIDDEN),
    # A tracker's key of 40 hexadecimal digits; a commit looks the same and is hidden with it.
    (re.compile(r"\b[0-9a-f]{40}\b"), _HIDDEN),
    (re.compile(r"(?<=://)[^\s/@:]*:[^\s/@]+(?=@)"), _HIDDEN),
    (re.compile(r"(?i)\b(bearer)\s+[\w.~+/=-]{8,}"), rf"\1 {_HIDDEN}"),
    # name=value, name: value, --name value, "name": "value"; `token` only as the last word (not `tokens`, `tokenizer`).
    (re.compile(rf"(?i)([\w.-]*{_SECRET_NAME}[\"']?\s*[=:]\s*)(\"[^\"]*\"|'[^']*'|[^\s,;}}\]]+)"), rf"\1{_HIDDEN}"),
    (re.compile(rf"(?i)(--[\w-]*{_SECRET_NAME}\s+)(?!-)\S+"), rf"\1{_HIDDEN}"),
)
_SECRET_VARIABLE = re.compile(rf"(?i)(?:^|_){_SECRET_NAME}$")
_NO_SECRETS = {"PWD", "OLDPWD"}
"""Variables that look like a password's and hold the working directory."""
_SHORTEST_SECRET = 8


def utc_now() -> str:
    """The time as ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def redact(text: str) -> str:
    """`text` with `[hidden]` for everything that looks like a secret.

    That is: the values of environment variables named like one (`HF_TOKEN`, `WANDB_API_KEY` ...), keys with a known
    prefix, passwords in a URL, and values given to a name that ends in token, secret, password or key.
    """
    for name, value in os.environ.items():
        # A short value would also be a part of innocent words.
        if len(value) >= _SHORTEST_SECRET and name not in _NO_SECRETS and _SECRET_VARIABLE.search(name):
            text = text.replace(value, _HIDDEN)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def package_versions() -> dict[str, str]:
    """Versions of Python, this project, its core dependencies and the extras that are installed."""
    versions = {"python": platform.python_version(), "truthgpt": __version__}  # known also without installing
    for name in (*_PACKAGES, *_EXTRAS):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def describe_environment(fallbacks: list[dict[str, str]], hardware: dict[str, Any]) -> dict[str, Any]:
    """The document of `environment.json`: versions, platform, hardware, command line without secrets, fallbacks."""
    return {
        "versions": package_versions(),
        "platform": platform.platform(),
        "host": platform.node(),
        "hardware": hardware,
        "command_line": redact(shlex.join(sys.argv)),
        "started_at": utc_now(),
        "fallbacks": fallbacks,
    }
