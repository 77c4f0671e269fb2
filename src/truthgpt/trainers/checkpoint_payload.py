"""What a checkpoint may hold: its parts, and values that loading cannot turn into code; and the file of them."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import IO, Any, cast

import torch

from truthgpt.errors import CheckpointError
from truthgpt.runtime.atomic_file import HashingWriter, create_exclusive

PARTS = ("state", "model", "ema", "optimizer", "scheduler", "scaler", "data", "rng", "callbacks")
"""What a checkpoint holds, next to `version`; each part comes from its owner's `state_dict`."""

_LEAVES = (type(None), bool, int, float, str, torch.Tensor, torch.nn.Parameter)


def check_parts(payload: dict[str, Any], where: str) -> None:
    """Raise CheckpointError unless `payload` holds exactly `PARTS`; `where` names it."""
    problems = [f"lacks {name}" for name in PARTS if name not in payload]
    problems += [f"has an unknown part {name}" for name in payload if name not in PARTS]
    if problems:
        raise CheckpointError(f"{where} {', '.join(problems)}; a checkpoint holds exactly {', '.join(PARTS)}")


def check_plain(value: Any, where: str) -> int:
    """Bytes of all tensors in `value`; CheckpointError names the first thing that `weights_only` would not load.

    Checked by exact type: a numpy float is a float to `isinstance`, and cannot be loaded.
    """
    if type(value) in _LEAVES:
        return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0
    if type(value) in (dict, OrderedDict):
        return sum(check_plain(key, where) + check_plain(item, f"{where}.{key}") for key, item in value.items())
    if type(value) in (list, tuple):
        return sum(check_plain(item, f"{where}[{index}]") for index, item in enumerate(value))
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    raise CheckpointError(
        f"{where.removeprefix('.')} is a {kind}, which no checkpoint can hold; its state_dict must be made of tensors, "
        "numbers, text, None, lists, tuples and dicts"
    )


def write_payload(payload: dict[str, Any], path: Path) -> tuple[str, int]:
    """Save `payload` to the new file `path`; its SHA-256 and size. OSError when the disk fails."""
    with create_exclusive(path) as file:
        writer = HashingWriter(file)
        try:
            # A file object and not a path: the archive would take its inner name from the path.
            torch.save(payload, cast(IO[bytes], writer))
            file.flush()
        except RuntimeError:
            if writer.error is None:
                raise
            raise writer.error from None
    return writer.sha256, writer.size_bytes
