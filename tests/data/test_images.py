"""Images to samples: the split, what is decoded and refused, pixels against float64, and exact augmentation."""

from __future__ import annotations

import hashlib
import io
import logging
import sys
import tracemalloc
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from truthgpt.data.base import ImageExample, ImageSample
from truthgpt.data.image_collate import ImageCollator
from truthgpt.data.image_folder import ImageFolder
from truthgpt.data.images import MAX_PIXELS, ImageDataset, ImageTransform, decode_image, split_images
from truthgpt.errors import ConfigError, DataError

PLAIN = ImageTransform(size=(8, 12), channels=3, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.5))
AUGMENTED = replace(PLAIN, random_resized_crop=True, horizontal_flip=True)


class MemoryImages:
    """Images from memory, all of class 1."""

    def __init__(self, images: Sequence[bytes], classes: Sequence[str] = ("a", "b"), label: int = 1) -> None:
        self.classes = classes
        self._images = images
        self._label = label

    def keys(self) -> Sequence[str]:
        return [f"{index}.png" for index in range(len(self._images))]

    def read(self, index: int) -> ImageExample:
        return ImageExample(self._images[index], self._label, where=f"images/{index}.png")

    def fingerprint(self) -> str:
        return "memory"


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, size=(height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def dataset(
    images: Sequence[bytes], transform: ImageTransform = PLAIN, seed: int = 0, train: bool = False
) -> ImageDataset:
    source = MemoryImages(images)
    return ImageDataset(source, np.arange(len(images)), transform, seed, train, source.fingerprint())


def denormalised(sample: ImageSample, transform: ImageTransform = PLAIN) -> npt.NDArray[np.float64]:
    """Pixels 0 to 255, float64 `(H, W, C)`."""
    values = sample["pixel_values"].astype(np.float64).transpose(1, 2, 0)
    return (values * np.array(transform.std) + np.array(transform.mean)) * 255


# The split


def test_split_takes_the_smallest_hashes_whatever_the_order() -> None:
    source = MemoryImages([b""] * 40)
    train, validation = split_images(source, 0.2)
    assert train.dtype == validation.dtype == np.int64
    by_hash = sorted(range(40), key=lambda index: hashlib.sha256(source.keys()[index].encode()).digest())
    assert sorted(by_hash[:8]) == validation.tolist() and sorted(by_hash[8:]) == train.tolist()


@pytest.mark.parametrize(("images", "fraction", "held_out"), [(40, 0.0, 0), (40, 1e-6, 1), (2, 0.99, 1), (3, 0.5, 2)])
def test_split_sizes(images: int, fraction: float, held_out: int) -> None:
    train, validation = split_images(MemoryImages([b""] * images), fraction)
    assert (len(train), len(validation)) == (images - held_out, held_out)


def test_split_of_one_or_no_image(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "truthgpt"):
        train, validation = split_images(MemoryImages([b""]), 0.5)
    assert (len(train), len(validation)) == (1, 0) and "single document or image" in caplog.text
    with pytest.raises(DataError, match="0 images"):
        split_images(MemoryImages([]), 0.5)


def test_split_with_a_validation_source() -> None:
    train, validation = split_images(MemoryImages([b""] * 4), 0.5, MemoryImages([b""] * 3))
    assert train.tolist() == [0, 1, 2, 3] and validation.tolist() == [0, 1, 2]
    for classes, words in ((("a",), "lack b"), (("a", "b", "c"), "have also c"), (("b", "a"), "another order")):
        with pytest.raises(DataError, match=words):
            split_images(MemoryImages([b""] * 4), 0.5, MemoryImages([b""], classes))


# Pixels


def antialiased_weights(length: int, wanted: int) -> npt.NDArray[np.float64]:
    """Triangle filter, as wide as the scale; `(wanted, length)`."""
    scale = length / wanted
    support = max(scale, 1.0)
    centres = (np.arange(wanted) + 0.5) * scale
    distance = np.abs(np.arange(length)[None] + 0.5 - centres[:, None]) / support
    weights = np.maximum(1 - distance, 0)
    return weights / weights.sum(axis=1, keepdims=True)


@settings(max_examples=40, deadline=None)
@given(st.integers(3, 60), st.integers(3, 60), st.sampled_from([(8, 12), (12, 8), (16, 16), (7, 9)]))
def test_resize_crop_and_normalise_against_float64(width: int, height: int, size: tuple[int, int]) -> None:
    image = noise(width, height, seed=width * 100 + height)
    transform = replace(PLAIN, size=size)
    sample = dataset([encode(image)], transform).read(0)
    assert sample["pixel_values"].dtype == np.float32 and sample["pixel_values"].shape == (3, *size)
    assert sample["pixel_values"].flags.c_contiguous
    assert sample["labels"].dtype == np.int64 and sample["labels"].shape == () and sample["labels"] == 1

    shorter = max(size)
    new_height = shorter if height <= width else shorter * height // width
    new_width = shorter if width <= height else shorter * width // height
    rows, columns = antialiased_weights(height, new_height), antialiased_weights(width, new_width)
    resized = np.einsum("yh,xw,hwc->yxc", rows, columns, np.asarray(image, dtype=np.float64))
    top, left = (new_height - size[0]) // 2, (new_width - size[1]) // 2
    expected = resized[top : top + size[0], left : left + size[1]]
    # Pillow rounds to 8 bits after each of the two directions.
    assert np.abs(denormalised(sample, transform) - expected).max() < 1.6


def test_an_image_of_the_right_size_is_only_normalised() -> None:
    image = noise(12, 12)
    sample = dataset([encode(image)], replace(PLAIN, size=(12, 12))).read(0)
    exact = (np.asarray(image, dtype=np.float64) / 255 - np.array(PLAIN.mean)) / np.array(PLAIN.std)
    assert np.abs(sample["pixel_values"] - exact.transpose(2, 0, 1)).max() < 1e-6


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        (noise(9, 9), "JPEG"),
        (noise(9, 9), "WEBP"),
        (noise(9, 9), "BMP"),
        (noise(9, 9).convert("L"), "PNG"),
        (noise(9, 9).convert("1"), "PNG"),
        (noise(9, 9).convert("P"), "PNG"),
        (noise(9, 9).convert("RGBA"), "PNG"),
        (noise(9, 9).convert("LA"), "PNG"),
        (noise(9, 9).convert("CMYK"), "JPEG"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.mode,
)
def test_formats_and_modes(image: Image.Image, kind: str) -> None:
    data = encode(image, kind)
    for channels, mode in ((3, "RGB"), (1, "L")):
        decoded = decode_image(ImageExample(data, 0, "x"), channels)
        expected = Image.open(io.BytesIO(data)).convert(mode)
        assert decoded.mode == mode and np.array_equal(np.asarray(decoded), np.asarray(expected))


def test_grey_images_have_one_channel() -> None:
    transform = ImageTransform(size=(6, 6), channels=1, mean=(0.5,), std=(0.5,))
    image = noise(6, 6).convert("L")
    sample = dataset([encode(image)], transform).read(0)
    assert sample["pixel_values"].shape == (1, 6, 6)
    assert np.abs(sample["pixel_values"][0] - (np.asarray(image, dtype=np.float64) / 127.5 - 1)).max() < 1e-6


def test_sixteen_bits_become_eight() -> None:
    """Pillow's own conversion clips at 255: nearly everything would be white."""
    values = np.arange(0, 2**16, 2**10, dtype=np.uint16).reshape(8, 8)
    decoded = decode_image(ImageExample(encode(Image.fromarray(values)), 0, "x"), 1)
    assert np.array_equal(np.asarray(decoded), values >> 8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    upright = Image.new("RGB", (40, 20), "black")
    upright.paste("white", (0, 0, 10, 10))
    # The stored pixels are the upright ones taken back, so that turning by the tag gives the upright image.
    undo = {
        1: (),
        2: (Image.Transpose.FLIP_LEFT_RIGHT,),
        3: (Image.Transpose.ROTATE_180,),
        4: (Image.Transpose.FLIP_TOP_BOTTOM,),
        5: (Image.Transpose.TRANSPOSE,),
        6: (Image.Transpose.ROTATE_90,),
        7: (Image.Transpose.TRANSVERSE,),
        8: (Image.Transpose.ROTATE_270,),
    }
    stored = upright
    for step in undo[orientation]:
        stored = stored.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode_image(ImageExample(encode(stored, exif=exif), 0, "x"), 3)
    assert np.array_equal(np.asarray(decoded), np.asarray(upright))


# What is refused


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that says it has this many black pixels; a few kB whatever the size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 0, 0, 0, 0])
    body = zlib.compress(bytes(width + 1) * 4)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [8200, 10_000, 60_000])
def test_decompression_bombs_are_refused_before_they_unfold(side: int) -> None:
    data = png_of_size(side, side)
    tracemalloc.start()
    with pytest.raises(DataError, match=rf"images/0\.png: .*at most {MAX_PIXELS} pixels"):
        dataset([data]).read(0)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


@pytest.mark.parametrize("size", [(1, 20_000), (60_000, 1)])
@pytest.mark.parametrize("transform", [PLAIN, AUGMENTED])
def test_narrow_images_are_refused_before_they_are_resized(size: tuple[int, int], transform: ImageTransform) -> None:
    """A file of 163 bytes took 4 GB: its shorter edge becomes that of the model, the other one as many times more."""
    transform = replace(transform, size=(224, 224))
    data = encode(Image.new("RGB", size))
    with pytest.raises(DataError, match=rf"images/0\.png: {size[0]} x {size[1]} pixels, too narrow: .*; crop it"):
        dataset([data], transform, train=True).read(0)
    assert dataset([encode(Image.new("RGB", (2, 1000)))], transform).read(0)["pixel_values"].shape == (3, 224, 224)


JPEG, PNG = encode(noise(32, 32), "JPEG"), encode(noise(32, 32))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not a JPEG, PNG, WEBP, BMP file"),
        (b"GIF89a" + bytes(40), "not a JPEG, PNG, WEBP, BMP file"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a JPEG, PNG, WEBP, BMP file"),
        (encode(noise(4, 4), "GIF"), "not a JPEG, PNG, WEBP, BMP file"),
        (JPEG[: len(JPEG) // 2], "truncated"),
        (PNG[: len(PNG) // 2], "truncated"),
    ],
    ids=["empty", "gif-like", "postscript", "gif", "half-jpeg", "half-png"],
)
def test_damaged_images_are_named(data: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=rf"images/0\.png: the image cannot be decoded: .*{reason}.*repair or delete"):
        dataset([data]).read(0)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_damage_gives_another_error(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["JPEG", "PNG", "WEBP", "BMP"]))
    exif = Image.Exif()
    exif[0x0112] = 6
    content = bytearray(encode(noise(9, 9), kind, **({} if kind == "BMP" else {"exif": exif})))
    for _ in range(data.draw(st.integers(1, 8))):
        place = data.draw(st.integers(0, min(len(content), 120) - 1))
        content[place] = data.draw(st.integers(0, 255))
    try:
        sample = dataset([bytes(content)]).read(0)
    except DataError as error:
        assert str(error).startswith("images/0.png: ")
    else:
        assert sample["pixel_values"].shape == (3, 8, 12)


@pytest.mark.parametrize("label", [-1, 2])
def test_a_label_that_is_no_class(label: int) -> None:
    source = MemoryImages([PNG], label=label)
    with pytest.raises(DataError, match=rf"images/0\.png: class {label} is none of the 2 classes"):
        ImageDataset(source, np.arange(1), PLAIN, 0, False, "f").read(0)


def test_without_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ConfigError, match=r"needs the package pillow.*pip install 'truthgpt\[vision\]'"):
        dataset([PNG])


# Augmentation


def test_augmentation_depends_on_seed_epoch_and_index_only() -> None:
    images = [PNG] * 4
    first, again = dataset(images, AUGMENTED, train=True), dataset(images, AUGMENTED, train=True)
    forward = {(epoch, index): first.read(index, epoch)["pixel_values"] for epoch in (0, 1) for index in range(4)}
    for (epoch, index), pixels in reversed(forward.items()):
        assert np.array_equal(again.read(index, epoch)["pixel_values"], pixels)
    distinct = {pixels.tobytes() for pixels in forward.values()}
    assert len(distinct) == 8, "the same image looks another way at every index and epoch"
    other = dataset(images, AUGMENTED, seed=1, train=True)
    assert not np.array_equal(other.read(0)["pixel_values"], forward[0, 0])


def test_validation_is_not_augmented() -> None:
    plain = dataset([PNG], PLAIN).read(0)["pixel_values"]
    held_out = dataset([PNG], AUGMENTED)
    for epoch in range(3):
        assert np.array_equal(held_out.read(0, epoch)["pixel_values"], plain)


def test_every_other_image_is_mirrored() -> None:
    image = encode(noise(12, 8))
    plain = dataset([image]).read(0)["pixel_values"]
    flipped = dataset([image] * 400, replace(PLAIN, horizontal_flip=True), train=True)
    mirrored = 0
    for index in range(400):
        pixels = flipped.read(index)["pixel_values"]
        same, other = np.array_equal(pixels, plain), np.array_equal(pixels, plain[:, :, ::-1])
        assert same != other
        mirrored += other
    assert 160 < mirrored < 240  # 4 standard deviations


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300))
def test_random_parts_lie_inside_the_image(width: int, height: int) -> None:
    """A part that left the image would raise, or show black."""
    white = encode(Image.new("RGB", (width, height), "white"))
    crops = dataset([white], replace(PLAIN, random_resized_crop=True), train=True)
    for epoch in range(4):
        assert np.allclose(denormalised(crops.read(0, epoch)), 255, atol=1e-3)


def test_random_parts_have_the_stated_area() -> None:
    """In a ramp along x, the slope is the width of the part and the mean its place."""
    ramp = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (256, 1))).convert("RGB")
    transform = replace(PLAIN, size=(32, 32), random_resized_crop=True)
    crops = dataset([encode(ramp)], transform, train=True)
    widths, places = [], []
    for epoch in range(300):
        rows = denormalised(crops.read(0, epoch), transform)[..., 0].mean(axis=0)
        widths.append((rows[-2] - rows[1]) / 29 * 32 / 256)
        places.append(rows.mean() / 255)
    # Relative width = sqrt(area * aspect): from sqrt(0.08 * 3/4) = 0.245 to 1, on average about 0.71.
    assert 0.23 < min(widths) < 0.45 and 0.9 < max(widths) <= 1.02
    assert 0.66 < np.mean(widths) < 0.77
    assert 0.45 < np.mean(places) < 0.55


class Reads(Dataset[ImageSample]):
    """Epoch 3 of a data set, as a torch loader reads it."""

    def __init__(self, images: ImageDataset) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> ImageSample:
        return self.images.read(index, 3)


def test_workers_change_nothing(tmp_path: Path) -> None:
    for index in range(12):
        folder = tmp_path / ("a" if index % 2 else "b")
        folder.mkdir(exist_ok=True)
        noise(20 + index, 30, seed=index).save(folder / f"{index}.png")
    source = ImageFolder([str(tmp_path)])
    train, _ = split_images(source, 0.2)
    reads = Reads(ImageDataset(source, train, AUGMENTED, 5, True, source.fingerprint()))
    batches = [list(DataLoader(reads, batch_size=4, collate_fn=ImageCollator(), num_workers=n)) for n in (0, 2)]
    assert len(batches[0]) == len(batches[1]) == 3
    for alone, worked in zip(*batches, strict=True):
        for key in ("pixel_values", "labels"):
            assert torch.equal(alone[key], worked[key])


def test_fingerprint_changes_with_everything_that_changes_a_sample() -> None:
    source = MemoryImages([PNG] * 3)

    def fingerprint(
        indices: Sequence[int] = (0, 1),
        transform: ImageTransform = AUGMENTED,
        seed: int = 0,
        train: bool = True,
        files: str = "x",
    ) -> str:
        return ImageDataset(source, np.array(indices), transform, seed, train, files).fingerprint

    prints = [
        fingerprint(),
        fingerprint(indices=(0, 2)),
        fingerprint(files="y"),
        fingerprint(seed=1),
        fingerprint(train=False),
        fingerprint(transform=replace(AUGMENTED, horizontal_flip=False)),
        fingerprint(transform=replace(AUGMENTED, random_resized_crop=False)),
        fingerprint(transform=replace(AUGMENTED, size=(8, 8))),
        fingerprint(transform=replace(AUGMENTED, std=(0.2, 0.2, 0.2))),
        fingerprint(transform=replace(AUGMENTED, mean=(0.2, 0.2, 0.2))),
    ]
    assert len(set(prints)) == len(prints)
    assert fingerprint() == prints[0]
    assert fingerprint(seed=1, train=False) == fingerprint(train=False), "nothing is drawn: the seed does not matter"
    assert fingerprint(seed=1, transform=PLAIN) == fingerprint(transform=PLAIN)
