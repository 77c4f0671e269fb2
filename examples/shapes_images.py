"""A data set of drawn shapes, one folder a class, for `model.task: image_classification`.

python examples/shapes_images.py shapes --images 2000 --size 32 --seed 0
"""

from __future__ import annotations

import argparse
import math
import random
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw

DRAWN_LARGER = 4
"""Shapes are drawn this many times larger and scaled down, for smooth edges."""
NOISE_LEVELS = 24
"""Spread of the noise on each channel, of 255."""
DARKEST_SHAPE = 128
"""Channels of a shape's colour are at least this bright, the background's at most half as much."""

Point = tuple[float, float]


def circle() -> list[Point]:
    """Corners of a 48-gon on the unit circle."""
    return regular_polygon(48)


def square() -> list[Point]:
    """Corners of a square on the unit circle."""
    return regular_polygon(4)


def triangle() -> list[Point]:
    """Corners of an equilateral triangle on the unit circle."""
    return regular_polygon(3)


def star() -> list[Point]:
    """Corners of a five-pointed star; every other one lies on the unit circle."""
    return [(x * (0.4 if i % 2 else 1.0), y * (0.4 if i % 2 else 1.0)) for i, (x, y) in enumerate(regular_polygon(10))]


def cross() -> list[Point]:
    """Corners of a plus sign."""
    near, far = 0.28, 0.95
    quarter = [(near, near), (near, far), (-near, far)]
    turned = [quarter]
    for _ in range(3):
        turned.append([(-y, x) for x, y in turned[-1]])
    return [corner for corners in turned for corner in corners]


def regular_polygon(corners: int) -> list[Point]:
    """Corners, evenly spread over the unit circle."""
    angles = [2 * math.pi * i / corners for i in range(corners)]
    return [(math.cos(angle), math.sin(angle)) for angle in angles]


SHAPES = {"circle": circle, "cross": cross, "square": square, "star": star, "triangle": triangle}


def draw_shape(name: str, size: int, generator: random.Random) -> Image.Image:
    """One `size` x `size` RGB image: a bright shape of random colour, place, size and rotation on a dark background."""
    large = size * DRAWN_LARGER
    background = tuple(generator.randrange(DARKEST_SHAPE // 2) for _ in range(3))
    colour = tuple(generator.randrange(DARKEST_SHAPE, 256) for _ in range(3))
    radius = generator.uniform(0.25, 0.42) * large
    centre = [generator.uniform(radius, large - radius) for _ in range(2)]
    angle = generator.uniform(0, 2 * math.pi)
    cos, sin = math.cos(angle) * radius, math.sin(angle) * radius
    corners = [(centre[0] + x * cos - y * sin, centre[1] + x * sin + y * cos) for x, y in SHAPES[name]()]
    image = Image.new("RGB", (large, large), background)
    ImageDraw.Draw(image).polygon(corners, fill=colour)
    noise = Image.frombytes("RGB", (size, size), generator.randbytes(3 * size * size))
    noise = noise.point([value * NOISE_LEVELS // 255 for value in range(256)] * 3)
    return ImageChops.add(image.resize((size, size), Image.Resampling.BOX), noise, offset=-NOISE_LEVELS // 2)


def write_shapes(folder: Path, images: int, size: int, seed: int) -> None:
    """Write `images` PNG files to `folder/<shape>/`, as many of each shape; the same arguments give the same files."""
    names = sorted(SHAPES)
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index in range(images):
        name = names[index % len(names)]
        image = draw_shape(name, size, random.Random(f"{seed} {index}"))
        image.save(folder / name / f"{index:06d}.png")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Draw a data set of shapes, one folder a class.")
    parser.add_argument("folder", type=Path, help="where to write; made when it is not there")
    parser.add_argument("--images", type=int, default=4000, help="images in all")
    parser.add_argument("--size", type=int, default=32, help="height and width of an image in pixels")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other images")
    arguments = parser.parse_args()
    write_shapes(arguments.folder, arguments.images, arguments.size, arguments.seed)
    print(f"{arguments.images} images of {len(SHAPES)} shapes in {arguments.folder}")


if __name__ == "__main__":
    main()
