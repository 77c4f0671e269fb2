"""What says that a checkpoint is whole: the manifest beside it, with its size and digest."""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from truthgpt.runtime.atomic_file import sha256_of

CHECKPOINT_VERSION = 1
"""Format of the payload; a checkpoint of another version is refused."""

_STEP_NAME = re.compile(r"step_(\d{8,})\.(?:pt|json)")
LINKS = ("last.pt", "best.pt")


@dataclass(frozen=True)
class Manifest:
    """The document beside a checkpoint. Those of `last.pt` and `best.pt` are `{step, sha256}` only."""

    step: int
    sha256: str
    size_bytes: int | None = None
    run_id: str | None = None
    best: bool = False
    """It was the best of its run when it was saved, so `best.pt` is to point at it."""
    format_version: int = CHECKPOINT_VERSION
    created_at: str | None = None
    versions: dict[str, str] = field(default_factory=dict)


class InvalidCheckpoint(Exception):
    """Why a file is no valid checkpoint; the text completes the sentence "FILE ..."."""


def verify(path: Path) -> Manifest:
    """The manifest whose size and digest `path` has; `InvalidCheckpoint` says what is wrong with it."""
    problem = "is damaged: its SHA-256 is not that of its manifest"
    manifest: Manifest | None = None
    try:
        manifest = read_manifest(path.with_suffix(".json"))
    except InvalidCheckpoint as reason:
        problem = str(reason)
    manifests = [] if manifest is None else [manifest]
    if path.name in LINKS:
        for other in step_files(path.parent, ".json"):
            with contextlib.suppress(InvalidCheckpoint):
                manifests.append(read_manifest(other))
    try:
        size_bytes = path.stat().st_size
        if manifest is not None and manifest.size_bytes not in (None, size_bytes):
            raise InvalidCheckpoint(f"is {size_bytes} bytes long, its manifest says {manifest.size_bytes}")
        digest = sha256_of(path) if manifests else ""
    except OSError as error:
        raise InvalidCheckpoint(f"cannot be read: {error.strerror}") from None
    for manifest in manifests:
        if manifest.sha256 == digest:
            return manifest
    raise InvalidCheckpoint(problem)


def read_manifest(path: Path) -> Manifest:
    """The manifest at `path`; `InvalidCheckpoint` when it is missing, torn, or lacks what its kind must have."""
    try:
        manifest = Manifest(**json.loads(path.read_bytes()))
    except FileNotFoundError:
        raise InvalidCheckpoint(f"has no manifest ({path.name})") from None
    except (OSError, ValueError, TypeError, RecursionError):
        raise InvalidCheckpoint(f"has a damaged or foreign manifest ({path.name})") from None
    of_step = _STEP_NAME.fullmatch(path.name)
    complete = isinstance(manifest.size_bytes, int) and isinstance(manifest.run_id, str)
    if not isinstance(manifest.step, int) or (of_step and not complete):
        raise InvalidCheckpoint(f"has a damaged or foreign manifest ({path.name})")
    if of_step and int(of_step[1]) != manifest.step:
        raise InvalidCheckpoint(f"has a manifest of step {manifest.step} ({path.name})")
    return manifest


def step_files(folder: Path, suffix: str) -> list[Path]:
    """The `step_N.pt` or `step_N.json` of `folder`; ordered by nothing, least of all by time."""
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if path.suffix == suffix and _STEP_NAME.fullmatch(path.name)]


def step_of(path: Path) -> int:
    """N of `step_N.pt` or `step_N.json`."""
    match = _STEP_NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def links_in(folder: Path) -> dict[Path, int]:
    """The links that are there, with the step each claims; -1 (tried last) without a manifest.

    A `best.pt` newer than `last.pt` is left out: the run went back to an earlier step, and it is of the branch it left.
    """
    steps = {}
    for path in (folder / name for name in LINKS):
        if path.is_symlink() or path.exists():
            try:
                steps[path] = read_manifest(path.with_suffix(".json")).step
            except InvalidCheckpoint:
                steps[path] = -1
    last, best = (folder / name for name in LINKS)
    if last in steps and best in steps and steps[best] > steps[last] >= 0:
        del steps[best]
    return steps
