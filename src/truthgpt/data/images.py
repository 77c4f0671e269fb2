"""Images as training samples: the split, decoding, and transforms that depend on seed, epoch and index only."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from truthgpt.data.base import ImageExample, ImageSample, ImageSource
from truthgpt.data.holdout import held_out_mask, key_hash
from truthgpt.errors import ConfigError, DataError, Problem
from truthgpt.runtime.seeds import derive_seed

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
"""The closed list of formats that are decoded; Pillow knows some that start other programs."""
MAX_PIXELS = 8192 * 8192
"""A larger image is refused before it is decoded: a file of a few kB can unfold into gigabytes."""
CROP_AREA = (0.08, 1.0)
CROP_ASPECT = (3 / 4, 4 / 3)
_CROP_TRIES = 10
_FORMAT_VERSION = 1
"""Part of the fingerprint: raised whenever the same image would give other pixels."""

# What Pillow's decoders raise on malformed files; zlib's and struct's errors are classes of their own.
_DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    ArithmeticError,
    MemoryError,
    struct.error,
    zlib.error,
)

Int64Array = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]
"""`(H, W, 3)`, or `(H, W)` in grey."""
Box = tuple[float, float, float, float]
"""Left, upper, right and lower edge, in pixels of the image before it is resized."""


@dataclass(frozen=True)
class ImageTransform:
    """What becomes of an image: `size` is (height, width); `channels` 3 (RGB) or 1 (grey), as many as `mean` and `std`.

    `random_resized_crop` and `horizontal_flip` are for training only.
    """

    size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    random_resized_crop: bool = False
    horizontal_flip: bool = False


def split_images(
    source: ImageSource, validation_fraction: float, validation_source: ImageSource | None = None
) -> tuple[Int64Array, Int64Array]:
    """Indices of the training images (into `source`) and of the validation images.

    The `round(fraction * images)` images with the smallest SHA-256 of their key are held out, at least one and never
    all, so the choice depends neither on their order nor on a seed; a fraction of 0 or a single image holds none out.
    With a `validation_source` nothing is held out, and the second indices are all of that source's.

    Raises:
        DataError: no image, or a `validation_source` with other classes.
    """
    keys = source.keys()
    if not keys:
        raise DataError("0 images in the training data; set data.path to a folder with one folder of images a class")
    everything = np.arange(len(keys), dtype=np.int64)
    if validation_source is not None:
        _check_same_classes(source.classes, validation_source.classes)
        return everything, np.arange(len(validation_source.keys()), dtype=np.int64)
    hashes = np.array([key_hash(key) for key in keys], dtype=np.uint64)
    held_out = held_out_mask(hashes, validation_fraction)
    return everything[~held_out], everything[held_out]


class ImageDataset:
    """Some images of a source as samples: decoded, resized, cropped and normalised when they are read.

    Validation, and training without augmentation: the shorter edge is resized to the larger of height and width, the
    centre is cropped. `random_resized_crop`: a random part of 8 to 100 % of the area and an aspect ratio of 3/4 to
    4/3 (Szegedy et al. 2015). `horizontal_flip`: every other image is mirrored. What is drawn depends on seed, epoch
    and index only. Resizing is bilinear with antialiasing, as Pillow does it.

    Args:
        source: where the images come from.
        indices: the images of the source that belong to the data set, int64 `(images,)`.
        transform: what becomes of an image.
        seed: seed of the run.
        train: whether the augmentations of `transform` apply.
        source_fingerprint: `source.fingerprint()`, taken by the caller, who needs it for two data sets.

    Raises:
        ConfigError: Pillow is not installed.
    """

    def __init__(
        self,
        source: ImageSource,
        indices: Int64Array,
        transform: ImageTransform,
        seed: int,
        train: bool,
        source_fingerprint: str,
    ) -> None:
        require_pillow()
        self._source = source
        self._indices = indices
        self._transform = transform
        self._seed = seed
        self._augment = train and (transform.random_resized_crop or transform.horizontal_flip)
        std = np.array(transform.std, dtype=np.float64).reshape(-1, 1, 1)
        self._scale = (1 / (255 * std)).astype(np.float32)
        self._shift = (-np.array(transform.mean, dtype=np.float64).reshape(-1, 1, 1) / std).astype(np.float32)
        # The seed of a run changes its samples only where something is drawn.
        drawn = [transform.random_resized_crop, transform.horizontal_flip, seed] if self._augment else []
        pixels = [transform.size, transform.channels, transform.mean, transform.std]
        what = json.dumps([_FORMAT_VERSION, source_fingerprint, pixels, drawn])
        self.fingerprint = hashlib.sha256(what.encode() + indices.tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, index: int, epoch: int = 0) -> ImageSample:
        """Sample `index` as epoch `epoch` sees it.

        Raises:
            DataError: the image cannot be read or decoded, is larger than 67 million pixels or would be when resized,
                or has a class that the source does not know; with the place of the image.
        """
        example = self._source.read(int(self._indices[index]))
        if not 0 <= example.label < len(self._source.classes):
            raise DataError(
                f"{example.where}: class {example.label} is none of the {len(self._source.classes)} classes (from 0)"
            )
        image = decode_image(example, self._transform.channels)
        # Of a file of 163 bytes, 1 x 20,000 pixels, the middle would be cut out of gigabytes.
        if max(image.size) * max(self._transform.size) ** 2 > MAX_PIXELS * min(image.size):
            found = f"{image.width} x {image.height} pixels, too narrow"
            raise DataError(f"{example.where}: {found}: resized it has more than {MAX_PIXELS}; crop it, or delete it")
        pixels = self._augmented(image, epoch, index) if self._augment else _resized_centre(image, self._transform.size)
        pixels = pixels.reshape(*self._transform.size, self._transform.channels)
        values = pixels.transpose(2, 0, 1).astype(np.float32, order="C")  # (C, H, W)
        values *= self._scale
        values += self._shift
        return {"pixel_values": values, "labels": np.array(example.label, dtype=np.int64)}

    def _augmented(self, image: Image.Image, epoch: int, index: int) -> Pixels:
        generator = np.random.Generator(np.random.PCG64(derive_seed(self._seed, "augment", epoch, index)))
        if self._transform.random_resized_crop:
            box = _random_box(image.width, image.height, generator)
            pixels = _resized_part(image, box, self._transform.size)
        else:
            pixels = _resized_centre(image, self._transform.size)
        mirrored = self._transform.horizontal_flip and generator.random() < 0.5
        return pixels[:, ::-1] if mirrored else pixels


def require_pillow() -> None:
    """Raise ConfigError when Pillow, which decodes the images, is not installed."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        problem = Problem(
            key="model.task",
            message="image_classification needs the package pillow",
            suggestion="pip install 'truthgpt[vision]'",
        )
        raise ConfigError([problem]) from error


def decode_image(example: ImageExample, channels: int) -> Image.Image:
    """The image, upright as its EXIF orientation says, in RGB (3 channels) or 8-bit grey (1).

    Transparency is dropped, 16-bit grey loses its low 8 bits, and of several frames the first is taken.

    Raises:
        DataError: not a JPEG, PNG, WebP or BMP file, damaged, truncated, or larger than 67 million pixels.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(example.data), formats=FORMATS) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise _too_large(example.where, f"{opened.width} x {opened.height} pixels")
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I;16"):
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))  # Pillow would clip it at 255
            return image.convert("RGB" if channels == 3 else "L")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(example.where, str(error).split(",", 1)[0]) from error
    except _DECODING_ERRORS as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        if "cannot identify image file" in reason:
            reason = f"not a {', '.join(FORMATS)} file"
        message = f"{example.where}: the image cannot be decoded: {reason}; repair or delete it"
        raise DataError(message) from error


def _too_large(where: str, what: str) -> DataError:
    return DataError(f"{where}: {what}; at most {MAX_PIXELS} pixels are decoded: make the image smaller")


def _resized_centre(image: Image.Image, size: tuple[int, int]) -> Pixels:
    """The middle of the image after its shorter edge became max(size); as transformers' own processors round it."""
    from PIL import Image

    height, width = size
    shorter = max(size)
    longer = int(shorter * max(image.size) / min(image.size))
    resized = (shorter, longer) if image.width <= image.height else (longer, shorter)
    if resized != image.size:
        image = image.resize(resized, Image.Resampling.BILINEAR)
    left, upper = (image.width - width) // 2, (image.height - height) // 2
    return np.asarray(image.crop((left, upper, left + width, upper + height)))


def _resized_part(image: Image.Image, box: Box, size: tuple[int, int]) -> Pixels:
    """The part of the image inside `box`, stretched to `size`."""
    from PIL import Image

    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BILINEAR, box=box))


def _random_box(width: int, height: int, generator: np.random.Generator) -> Box:
    """A part of the image of random area and aspect ratio (Szegedy et al. 2015); the whole image when none fits."""
    # Only `random()`: numpy promises no stable stream for its other distributions.
    low, high = math.log(CROP_ASPECT[0]), math.log(CROP_ASPECT[1])
    for _ in range(_CROP_TRIES):
        area = width * height * (CROP_AREA[0] + (CROP_AREA[1] - CROP_AREA[0]) * generator.random())
        aspect = math.exp(low + (high - low) * generator.random())
        part_width, part_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < part_width <= width and 0 < part_height <= height:
            left = int(generator.random() * (width - part_width + 1))
            upper = int(generator.random() * (height - part_height + 1))
            return left, upper, left + part_width, upper + part_height
    return 0, 0, width, height


def _check_same_classes(train: Sequence[str], validation: Sequence[str]) -> None:
    """Labels are places in the list of classes: with other classes they would mean something else."""
    if list(train) == list(validation):
        return
    missing, unknown = sorted(set(train) - set(validation)), sorted(set(validation) - set(train))
    what = [f"lack {', '.join(missing[:5])}"] if missing else []
    what += [f"have also {', '.join(unknown[:5])}"] if unknown else []
    raise DataError(
        f"the validation images have other classes than the training images: they "
        f"{' and '.join(what) or 'have them in another order'}; give both the same classes"
    )
