"""What a model expects of its images, read from its configuration and its `preprocessor_config.json`, and written."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import cached_file

from truthgpt.errors import ConfigError, Problem
from truthgpt.runtime.atomic_file import write_atomic

logger = logging.getLogger(__name__)

PROCESSOR_FILE = "preprocessor_config.json"
DEFAULT_SIZE = 224
"""Height and width for models that take any size."""
_PROCESSOR_CLASS = "CLIPImageProcessor"
"""transformers' processor that resizes the shorter edge and crops the centre, under this name in all its versions."""
_BILINEAR = 2
"""Pillow's number of the filter."""


@dataclass(frozen=True)
class PixelFormat:
    """Pixels as a model expects them: `size` is (height, width); `mean` and `std` of each channel, of values 0 to 1."""

    size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def save_pretrained(self, folder: str | Path, /) -> None:
        """Write `preprocessor_config.json`: transformers' `AutoImageProcessor` then prepares images as in training.

        It resizes the shorter edge and crops the centre, bilinear, as validation here does.
        """
        height, width = self.size
        processor = {
            "image_processor_type": _PROCESSOR_CLASS,
            "do_convert_rgb": self.channels == 3,
            "do_resize": True,
            "size": {"shortest_edge": max(height, width)},
            "resample": _BILINEAR,
            "do_center_crop": True,
            "crop_size": {"height": height, "width": width},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_atomic(Path(folder) / PROCESSOR_FILE, json.dumps(processor, indent=2) + "\n")


def pixel_format_of(
    architecture: PreTrainedConfig, name_or_path: str | None, image_size: int | None = None
) -> PixelFormat:
    """Size and channels from `architecture`; mean and std from the files of a pretrained model, else 0.5.

    Args:
        name_or_path: hub id or folder of a pretrained model; None: from scratch.
        image_size: height and width where the configuration names none; None: 224.

    Raises:
        ConfigError: an `image_size` other than the configuration's, channels other than 1 or 3, or a
            `preprocessor_config.json` that cannot be read or has other channels.
    """
    # Models of text and images (clip, siglip) keep what concerns images apart.
    vision = getattr(architecture, "vision_config", None) or architecture
    size = _size(getattr(vision, "image_size", None), image_size)
    channels = getattr(vision, "num_channels", None)
    channels = 3 if channels is None else int(channels)
    if channels not in (1, 3):
        message = f"images have 3 channels (RGB) or 1 (grey), not {channels}"
        raise ConfigError([Problem(key="model.config.num_channels", message=message, suggestion="set it to 3 or 1")])
    mean, std = (0.5,) * channels, (0.5,) * channels
    if name_or_path is None:
        return PixelFormat(size, channels, mean, std)
    file = cached_file(
        name_or_path,
        PROCESSOR_FILE,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if file is None:
        logger.warning("%s has no %s: images are normalised with mean 0.5 and std 0.5", name_or_path, PROCESSOR_FILE)
        return PixelFormat(size, channels, mean, std)
    stored = _read_processor(Path(file))
    return PixelFormat(
        size,
        channels,
        _per_channel(stored, "image_mean", mean, file),
        _per_channel(stored, "image_std", std, file),
    )


def _size(configured: int | Sequence[int] | None, wanted: int | None) -> tuple[int, int]:
    if configured is None:
        return (wanted or DEFAULT_SIZE,) * 2
    height, width = (configured, configured) if isinstance(configured, int) else configured
    if wanted is not None and (wanted, wanted) != (height, width):
        message = f"the model takes images of {height} x {width} pixels, not {wanted} x {wanted}"
        hint = f"leave it out, or set model.config.image_size: {wanted}"
        raise ConfigError([Problem(key="data.collate.image_size", message=message, suggestion=hint)])
    return int(height), int(width)


def _read_processor(file: Path) -> dict[str, Any]:
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _bad_processor(file, f"cannot be read: {error}") from error
    if not isinstance(stored, dict):
        raise _bad_processor(file, "holds no JSON object")
    return stored


def _per_channel(stored: dict[str, Any], key: str, default: tuple[float, ...], file: str | Path) -> tuple[float, ...]:
    if stored.get(key) is None:  # the file is a model's, not ours: it may leave it out
        return default
    values = stored[key] if isinstance(stored[key], list) else [stored[key]] * len(default)
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    if not numbers or len(values) != len(default) or (key == "image_std" and min(values) <= 0):
        raise _bad_processor(Path(file), f"{key} is {stored[key]!r}; {len(default)} numbers are needed")
    return tuple(float(value) for value in values)


def _bad_processor(file: Path, reason: str) -> ConfigError:
    hint = "repair or delete it"
    return ConfigError([Problem(key="model.name_or_path", message=f"{file}: {reason}", suggestion=hint)])
