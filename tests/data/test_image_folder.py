"""A folder of images: classes, keys, what is left out, what is refused, and when the fingerprint changes."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import pytest
from examples.shapes_images import SHAPES, write_shapes

from truthgpt.data import image_folder
from truthgpt.data.image_folder import ImageFolder
from truthgpt.errors import DataError


def write(root: Path, *names: str) -> Path:
    """Files that hold their own name; nothing is decoded here."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def test_classes_and_keys_are_sorted_at_any_depth(tmp_path: Path) -> None:
    root = write(tmp_path, "dog/2.png", "cat/b/1.JPG", "cat/a.jpeg", "ant/x.webp", "ant/y.bmp")
    source = ImageFolder([str(root)])
    assert source.classes == ["ant", "cat", "dog"]
    assert source.keys() == ["ant/x.webp", "ant/y.bmp", "cat/a.jpeg", "cat/b/1.JPG", "dog/2.png"]
    example = source.read(3)
    assert (example.data, example.label, example.where) == (b"cat/b/1.JPG", 1, str(root / "cat/b/1.JPG"))


def test_several_roots_are_one_data_set(tmp_path: Path) -> None:
    write(tmp_path, "part1/cat/1.png", "part1/dog/1.png", "part2/cat/1.png", "part2/emu/3.png")
    source = ImageFolder([str(tmp_path / "part1"), str(tmp_path / "part2"), str(tmp_path / "part1")])
    assert source.classes == ["cat", "dog", "emu"]
    assert source.keys() == ["cat/1.png", "cat/1.png", "dog/1.png", "emu/3.png"]
    assert [source.read(index).label for index in range(4)] == [0, 0, 1, 2]
    assert ImageFolder([str(tmp_path / "part*")]).keys() == source.keys()


def test_classes_that_the_training_images_have_set(tmp_path: Path) -> None:
    root = str(write(tmp_path, "dog/2.png"))
    source = ImageFolder([root], classes=["cat", "dog", "emu"])
    assert source.classes == ["cat", "dog", "emu"] and source.read(0).label == 1
    with pytest.raises(DataError, match=r"dog: no class of the training images, which have ant, cat; give the folders"):
        ImageFolder([root], classes=["ant", "cat"])


def test_other_files_are_counted_once_and_hidden_ones_are_not_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, "a/1.png", "b/1.png", "b/notes.txt", "labels.csv", "a/.DS_Store", "a/._1.png", ".cache/1.png")
    write(tmp_path, "b/.thumbs/1.png", "a/README")
    with caplog.at_level(logging.INFO, "truthgpt"):
        source = ImageFolder([str(tmp_path)])
    assert source.keys() == ["a/1.png", "b/1.png"]
    (record,) = caplog.records
    said = record.getMessage()
    assert "3 files are not images" in said and "1 .txt" in said and "1 .csv" in said and "without a suffix" in said


@pytest.mark.parametrize(
    ("names", "phrases"),
    [
        (["a/1.png", "b/.hidden.png"], ["{root}/b: no image in this class folder", "delete the folder"]),
        (["a/1.png", "b/1.txt"], ["{root}/b: no image in this class folder"]),
        (["1.png", "2.png"], ["{root}: no class folders", "images lie in it directly", "named after it"]),
        (["notes.txt"], ["{root}: no class folders; put the images"]),
        (["a/1.png"], ["{root}: a single class, 'a'", "two class folders"]),
        (["train/a/1.png", "val/a/1.png"], ["train, val look like splits", "data.validation_path"]),
    ],
)
def test_folders_that_are_no_data_set(tmp_path: Path, names: list[str], phrases: list[str]) -> None:
    write(tmp_path, *names)
    with pytest.raises(DataError) as caught:
        ImageFolder([str(tmp_path)])
    for phrase in phrases:
        assert phrase.format(root=tmp_path) in str(caught.value)


def test_paths_that_are_no_folder(tmp_path: Path) -> None:
    write(tmp_path, "a/1.png")
    with pytest.raises(DataError, match=r"missing'.*nothing there.*one folder of images for each class"):
        ImageFolder([str(tmp_path / "missing")])
    with pytest.raises(DataError, match=r"1\.png'.*a file"):
        ImageFolder([str(tmp_path / "a/1.png")])
    with pytest.raises(DataError, match="the list is empty"):
        ImageFolder([])


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    source = ImageFolder([str(write(tmp_path, "a/1.png", "b/1.png"))])
    (tmp_path / "a/1.png").unlink()
    (tmp_path / "b/1.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"a/1\.png: cannot be read: No such file.*check the file"):
        source.read(0)
    with pytest.raises(DataError, match=r"b/1\.png: the file is empty; delete it"):
        source.read(1)
    with pytest.raises(DataError, match=r"a/1\.png: cannot be read"):
        source.fingerprint()


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    write(tmp_path, "a/1.png", "b/1.png")
    try:
        (tmp_path / "b/1.png").rename(tmp_path / "b" / os.fsdecode(b"\xff.png"))
    except OSError:
        pytest.skip("the file system takes UTF-8 names only")
    source = ImageFolder([str(tmp_path)])
    assert source.read(1).data == b"b/1.png" and source.fingerprint()


@pytest.mark.parametrize("whole", [True, False])
def test_fingerprint(tmp_path: Path, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not whole:
        monkeypatch.setattr(image_folder, "WHOLE_FILES", 2)
    root = write(tmp_path / "one", "a/1.png", "a/2.png", "b/1.png")
    first = ImageFolder([str(root)]).fingerprint()
    assert ImageFolder([str(root)]).fingerprint() == first
    shutil.copytree(root, tmp_path / "two", copy_function=shutil.copy2)
    assert ImageFolder([str(tmp_path / "two")]).fingerprint() == first, "moving the folder changes nothing"
    os.utime(root / "a/1.png", ns=(1, 1))
    assert (ImageFolder([str(root)]).fingerprint() == first) == whole, "times count only where contents do not"

    changed = {first}
    (root / "a/1.png").write_bytes(b"a/9.png")  # as long as before
    changed.add(ImageFolder([str(root)]).fingerprint())
    (root / "a/2.png").rename(root / "b/2.png")
    changed.add(ImageFolder([str(root)]).fingerprint())
    (root / "b").rename(root / "c")
    changed.add(ImageFolder([str(root)]).fingerprint())
    write(root, "c/3.png")
    changed.add(ImageFolder([str(root)]).fingerprint())
    assert len(changed) == 5


def test_the_example_draws_as_many_of_each_shape_and_the_same_every_time(tmp_path: Path) -> None:
    prints = []
    for name, seed in (("one", 3), ("two", 3), ("three", 4)):
        write_shapes(tmp_path / name, images=15, size=32, seed=seed)
        source = ImageFolder([str(tmp_path / name)])
        assert source.classes == sorted(SHAPES) and len(source.keys()) == 15
        assert [source.read(index).label for index in range(15)] == [label for label in range(5) for _ in range(3)]
        prints.append(source.fingerprint())
    assert prints[0] == prints[1] != prints[2]
