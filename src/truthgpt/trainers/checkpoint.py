"""Checkpoints that are whole or not there: commit, digests, links, pruning, and the search for the newest valid one.

A save writes `.step_N.pt.tmp-*`, then the manifest `step_N.json`, then renames the file to `step_N.pt`: the rename is
the moment the checkpoint exists. The manifest goes first so that a process killed in between leaves a manifest without
a file, which says "never finished" and is passed over; a file without a manifest is never the work of a kill, always
damage, and is reported. Valid means: the manifest is there and the file's size and SHA-256 are the manifest's.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError  # only the error: nothing here unpickles
from typing import Any

import torch

from truthgpt.errors import CheckpointError
from truthgpt.runtime.atomic_file import (
    commit_file,
    copy_atomic,
    disk_errors,
    link_atomic,
    temporary_beside,
    write_atomic,
)
from truthgpt.runtime.environment import package_versions, utc_now
from truthgpt.trainers.checkpoint_manifest import (
    CHECKPOINT_VERSION,
    LINKS,
    InvalidCheckpoint,
    Manifest,
    links_in,
    read_manifest,
    step_files,
    step_of,
    verify,
)
from truthgpt.trainers.checkpoint_payload import check_parts, check_plain, write_payload

logger = logging.getLogger(__name__)

_DAMAGE = (
    *(UnpicklingError, ArithmeticError, AttributeError, EOFError, LookupError, OSError, RuntimeError, TypeError),
    ValueError,
)
"""What reading a damaged file raises: where nothing was verified, anything may come out of it."""


@dataclass(frozen=True)
class Found:
    """A checkpoint whose digest was verified."""

    path: Path
    step: int
    manifest: Manifest


class CheckpointStore:
    """The checkpoints of one run, in one folder.

    Args:
        folder: the run directory's `checkpoints`; created by the first save, and again should it be deleted.
        run_id: of the run; a checkpoint of another one in the folder is an error.
        keep_last: how many checkpoints to keep, by step; those `last.pt` and `best.pt` stand for survive in them.
    """

    def __init__(self, folder: Path, *, run_id: str, keep_last: int) -> None:
        self.folder = folder
        self.run_id = run_id
        self.keep_last = keep_last
        self._source: Path | None = None  # another folder, which the run goes on from; until the first save
        self._versions = package_versions()

    def save(self, step: int, payload: dict[str, Any], *, best: bool) -> Path:
        """Write the checkpoint of `step`, point `last.pt` (and `best.pt`) at it, prune; returns its path.

        `payload` holds exactly `PARTS`, made of tensors, numbers, text, None, lists, tuples and dicts. A step that is
        there already is replaced; should the process die meanwhile, its old content lives on in `last.pt`.

        Raises:
            CheckpointError: a part is missing, or holds an object that could not be loaded again.
            RunDirectoryError: the disk is full or not writable; earlier checkpoints are intact.
        """
        check_parts(payload, "the payload")
        needed_bytes = check_plain(payload, "")
        target = self.folder / f"step_{step:08d}.pt"
        temporary = temporary_beside(target)
        with disk_errors(target, needed_bytes):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                sha256, size_bytes = write_payload({"version": CHECKPOINT_VERSION, **payload}, temporary)
                manifest = Manifest(
                    step, sha256, size_bytes, self.run_id, best, CHECKPOINT_VERSION, utc_now(), self._versions
                )
                self._detach_symlinks(target)
                _write_document(target.with_suffix(".json"), asdict(manifest))
                commit_file(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)  # before the error is explained with the space that is free
        for link in LINKS if best else LINKS[:1]:
            self._point(link, target, manifest)
        state: Mapping[str, Any] = payload["state"]
        if not best and "best_step" in state:
            if self._source is None:
                self._settle_best(state["best_step"])
            else:
                self._take_best(self._source, state["best_step"])
        self._source = None
        self._prune(step)
        return target

    def latest(self) -> Found | None:
        """The newest valid checkpoint, or None when there is none at all; a newer one passed over is a warning.

        A save that was killed before its links were swapped is finished, so that `best.pt` is what the state of the
        checkpoint found says it is.

        Raises:
            CheckpointError: there are checkpoints but none is valid (each with its reason), or one is of another run.
        """
        found = _newest_valid(self.folder, self.run_id)
        if found is not None and found.path.name not in LINKS:
            swapped = links_in(self.folder)
            for link in LINKS if found.manifest.best else LINKS[:1]:
                if swapped.get(self.folder / link) != found.step:
                    self._point(link, found.path, found.manifest)
        return found

    def best_or_last(self) -> Path:
        """What the final model is made of: `best.pt`, or `last.pt` where there is no best or it is damaged.

        Raises:
            CheckpointError: neither is valid.
        """
        for path in sorted(links_in(self.folder)):
            try:
                verify(path)
            except InvalidCheckpoint as reason:
                logger.warning("%s %s", path, reason)
                continue
            return path
        raise CheckpointError(f"neither best.pt nor last.pt in {self.folder} is a valid checkpoint")

    def load(self, path: Path) -> dict[str, Any]:
        """`load_checkpoint`, to go on from it: the next save takes the best along, should it be in another folder."""
        payload = load_checkpoint(path)
        self._source = None if path.parent.resolve() == self.folder.resolve() else path.parent
        return payload

    def _detach_symlinks(self, target: Path) -> None:
        """Before `target` is replaced: make symbolic links to it files of their own, as hard links are already."""
        for name in LINKS:
            link = self.folder / name
            if link.is_symlink() and link.readlink().name == target.name:
                copy_atomic(target, link)

    def _point(self, name: str, target: Path, manifest: Manifest) -> None:
        """Swap the link `name` to `target` by rename, then its `{step, sha256}`.

        In between, the file is whole and its digest is that of the step's manifest, which is why verification of a
        link looks there too.
        """
        link = self.folder / name
        link_atomic(target, link)
        _write_document(link.with_suffix(".json"), {"step": manifest.step, "sha256": manifest.sha256})

    def _settle_best(self, best_step: int | None) -> None:
        """Have `best.pt` stand for `best_step`; it does, unless the run went back to an earlier step.

        Then it is of the branch that was left. Where the best step's own checkpoint is gone, there is no best any more.
        """
        best = self.folder / "best.pt"
        try:
            claimed = read_manifest(best.with_suffix(".json")).step
        except InvalidCheckpoint:
            return  # none, or a damaged one, which whoever needs it is told
        if best_step == claimed:
            return
        with contextlib.suppress(InvalidCheckpoint):
            own = self.folder / f"step_{best_step or 0:08d}.pt"
            self._point("best.pt", own, verify(own))
            return
        logger.info("%s of step %d is removed: it is not the best of this run", best, claimed)
        self._remove_best()

    def _take_best(self, source: Path, best_step: int | None) -> None:
        """Have `best.pt` be a copy of that in `source`, if it is of `best_step`; what is here is of another run."""
        best = self.folder / "best.pt"
        for path in (source / "best.pt", source / f"step_{best_step or 0:08d}.pt"):
            with contextlib.suppress(InvalidCheckpoint):
                manifest = verify(path)
                if manifest.step == best_step:
                    copy_atomic(path, best)
                    _write_document(best.with_suffix(".json"), {"step": manifest.step, "sha256": manifest.sha256})
                    return
        if best_step is not None:
            logger.warning(
                "the best so far, of step %d, is not in %s: unless a better one comes, the final model is the last",
                best_step,
                source,
            )
        self._remove_best()

    def _remove_best(self) -> None:
        best = self.folder / "best.pt"
        for path in (best.with_suffix(".json"), best):
            with disk_errors(path):
                path.unlink(missing_ok=True)

    def _prune(self, saved_step: int) -> None:
        """Keep the newest `keep_last` by step. Steps above the one just saved are of a branch that was left."""
        files, manifests = ({step_of(path) for path in step_files(self.folder, kind)} for kind in (".pt", ".json"))
        oldest = sorted((step for step in files & manifests if step <= saved_step), reverse=True)[: self.keep_last][-1]
        links = [self.folder / name for name in LINKS]
        pointed_at = {link.readlink().name for link in links if link.is_symlink()}
        for step in files | manifests:
            path = self.folder / f"step_{step:08d}.pt"
            if oldest <= step <= saved_step or path.name in pointed_at:
                continue
            if step > saved_step:
                logger.info("%s is removed: the run went back to an earlier step", path)
            try:
                path.with_suffix(".json").unlink(missing_ok=True)
                path.unlink(missing_ok=True)
            except OSError as error:
                logger.warning("%s cannot be removed: %s", path, error)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that `path` means: the file itself, or the newest valid one of a checkpoint folder or a run.

    Raises:
        CheckpointError: there is none, none is valid, or a folder mixes those of several runs.
    """
    if path.is_file():
        return path
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if not folder.is_dir():
        raise CheckpointError(f"{path} does not exist; give a checkpoint (.pt), a folder of them, or a run directory")
    found = _newest_valid(folder, None)
    if found is None:
        raise CheckpointError(f"there is no checkpoint in {folder}")
    return found.path


def glance_at_state(path: Path) -> dict[str, Any] | None:
    """The loop state of the checkpoint `find_checkpoint` would choose, before anything is built for it.

    Nothing is verified, and no tensor is read; None where nothing can be read, which whoever resumes will find out.
    """
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    for candidate in [path] if path.is_file() else _candidates(folder):
        try:
            payload = torch.load(candidate, map_location="cpu", weights_only=True, mmap=True)
        except _DAMAGE:
            continue
        state = payload.get("state") if isinstance(payload, dict) else None
        if isinstance(state, dict):
            return state
    return None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU: its digest is verified first, and only tensors and plain values are accepted.

    Returns:
        `version` and `PARTS`.

    Raises:
        CheckpointError: missing, damaged, without its manifest, of another version, or without one of its parts.
    """
    try:
        verify(path)
    except InvalidCheckpoint as reason:
        raise CheckpointError(
            f"{path} {reason}; choose another checkpoint, or --resume auto for the newest valid one (a checkpoint that "
            "is copied needs its .json beside it)"
        ) from None
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds objects that are not tensors or plain values; loading them could run code, so it is refused"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    version = payload.pop("version", None) if isinstance(payload, dict) else None
    if version != CHECKPOINT_VERSION:
        raise CheckpointError(f"{path} has checkpoint format {version}; this truthgpt reads {CHECKPOINT_VERSION}")
    check_parts(payload, str(path))
    return {"version": version, **payload}


def _newest_valid(folder: Path, run_id: str | None) -> Found | None:
    candidates = _candidates(folder)
    _check_owner(candidates, run_id)
    reasons: list[str] = []
    for path in candidates:
        try:
            manifest = verify(path)
        except InvalidCheckpoint as reason:
            reasons.append(f"{path} {reason}")
            continue
        for reason_text in reasons:
            logger.warning("%s; going on with %s", reason_text, path)
        return Found(path, manifest.step, manifest)
    if reasons:
        advice = "resume from another folder (--resume PATH), or start anew with --overwrite"
        raise CheckpointError("\n  ".join([f"no checkpoint in {folder} is valid; {advice}", *reasons]))
    return None


def _candidates(folder: Path) -> list[Path]:
    """The checkpoint files of `folder`, the newest first; of one step, the step's own file before a link."""
    steps = {path: step_of(path) for path in step_files(folder, ".pt")}
    links = links_in(folder)
    claimed = {**steps, **links}
    return sorted(claimed, key=lambda path: (-claimed[path], path in links, path.name == "best.pt"))


def _check_owner(candidates: list[Path], run_id: str | None) -> None:
    """Refuse a folder with checkpoints of another run than `run_id`, or (None) of several runs."""
    for path in candidates:
        try:
            owner = read_manifest(path.with_suffix(".json")).run_id
        except InvalidCheckpoint:
            continue
        run_id = run_id or owner
        if owner not in (None, run_id):
            advice = "move it out of the folder, or start anew with --overwrite"
            raise CheckpointError(f"{path} is of run {owner}, not of run {run_id}; {advice}")


def _write_document(path: Path, document: dict[str, Any]) -> None:
    write_atomic(path, json.dumps(document, indent=2) + "\n")
