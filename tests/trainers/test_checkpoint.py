"""Checkpoints: whole or not there at every point of a save, damage found, nothing but plain values loaded."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import random
import resource
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from truthgpt.errors import CheckpointError, RunDirectoryError
from truthgpt.runtime import atomic_file
from truthgpt.trainers.checkpoint import (
    CHECKPOINT_VERSION,
    CheckpointStore,
    find_checkpoint,
    glance_at_state,
    load_checkpoint,
)
from truthgpt.trainers.checkpoint_payload import PARTS

RUN = "a" * 32
KILLED, FINISHED = 9, 0
FAULT_POINTS = ("open", "fsync", "replace", "rename", "link", "symlink", "unlink")
"""Every call of a save that changes the folder; `Path` goes through `os`. Writes are counted apart."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["hard links", "symbolic links", "copies"])
def links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The three kinds of file system a save meets."""

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if request.param != "hard links":
        monkeypatch.setattr(os, "link", refuse)
    if request.param == "copies":
        monkeypatch.setattr(os, "symlink", refuse)
    return str(request.param)


def payload(step: int, content: int | None = None) -> dict[str, Any]:
    weights = torch.full((300,), float(step if content is None else content))
    parts: dict[str, Any] = dict.fromkeys(PARTS, None)
    return {**parts, "state": {"step": step}, "model": {"w": weights}, "optimizer": {"state": {0: {"m": weights}}}}


def store(folder: Path, keep_last: int = 3, run_id: str = RUN) -> CheckpointStore:
    return CheckpointStore(folder, run_id=run_id, keep_last=keep_last)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix == ".pt"}


def weight(path: Path) -> int:
    """The one number all weights of a checkpoint have; a mix of two saves would have two."""
    loaded = load_checkpoint(path)
    values = torch.cat([loaded["model"]["w"], loaded["optimizer"]["state"][0]["m"]]).unique()
    assert len(values) == 1
    return int(values.item())


# The ordinary way


def test_a_saved_payload_comes_back_equal(tmp_path: Path) -> None:
    path = store(tmp_path).save(7, payload(7), best=True)
    loaded = load_checkpoint(path)
    assert path == tmp_path / "step_00000007.pt"
    assert loaded["version"] == CHECKPOINT_VERSION
    assert torch.equal(loaded["model"]["w"], torch.full((300,), 7.0))
    assert {name: loaded[name] for name in PARTS if name not in ("model", "optimizer")} == {
        name: value for name, value in payload(7).items() if name not in ("model", "optimizer")
    }


def test_the_manifest_says_what_the_checkpoint_is(tmp_path: Path) -> None:
    path = store(tmp_path).save(7, payload(7), best=False)
    manifest = json.loads(path.with_suffix(".json").read_text())
    assert manifest["step"] == 7
    assert manifest["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert manifest["size_bytes"] == path.stat().st_size
    assert manifest["run_id"] == RUN
    assert manifest["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert json.loads((tmp_path / "last.json").read_text()) == {"step": 7, "sha256": manifest["sha256"]}


def test_a_checkpoint_holds_no_trace_of_where_it_was_written(tmp_path: Path) -> None:
    paths = [store(tmp_path / name).save(7, payload(7), best=False) for name in ("here", "there")]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert b"here" not in paths[0].read_bytes()


def test_last_and_best_follow_their_checkpoints(tmp_path: Path, links: str) -> None:
    checkpoints = store(tmp_path)
    for step in (10, 20, 30):
        checkpoints.save(step, payload(step), best=step == 20)
    assert weight(tmp_path / "last.pt") == 30
    assert weight(tmp_path / "best.pt") == 20
    assert (tmp_path / "last.pt").is_symlink() == (links == "symbolic links")
    assert checkpoints.best_or_last().name == "best.pt"
    if links == "hard links":
        assert (tmp_path / "last.pt").samefile(tmp_path / "step_00000030.pt")


def test_prune_keeps_the_newest_by_step_and_what_the_links_stand_for(tmp_path: Path, links: str) -> None:
    checkpoints = store(tmp_path, keep_last=2)
    for step in range(10, 70, 10):
        checkpoints.save(step, payload(step), best=step == 20)
    kept = {"step_00000050.pt", "step_00000060.pt", "last.pt", "best.pt"}
    assert names(tmp_path) == kept | ({"step_00000020.pt"} if links == "symbolic links" else set())
    assert weight(tmp_path / "best.pt") == 20
    assert not [path for path in tmp_path.iterdir() if ".tmp-" in path.name]


def test_clocks_decide_nothing(tmp_path: Path) -> None:
    checkpoints = store(tmp_path, keep_last=1)
    future_s = 4102444800
    for step in (10, 20, 30):
        path = checkpoints.save(step, payload(step), best=False)
        for file in (path, path.with_suffix(".json")):
            os.utime(file, (future_s - step * 1e6, future_s - step * 1e6))
    assert names(tmp_path) == {"step_00000030.pt", "last.pt"}
    found = checkpoints.latest()
    assert found is not None and found.step == 30


def test_steps_above_the_saved_one_are_of_a_branch_that_was_left(tmp_path: Path) -> None:
    checkpoints = store(tmp_path, keep_last=1)
    for step in (10, 20, 30):
        store(tmp_path, keep_last=9).save(step, payload(step), best=step == 30)
    checkpoints.save(15, payload(15), best=False)
    assert names(tmp_path) == {"step_00000015.pt", "last.pt", "best.pt"}
    found = checkpoints.latest()
    assert found is not None and found.step == 15, "best.pt of step 30 is of the branch that was left"


def going_back(step: int, best_step: int | None) -> dict[str, Any]:
    values = payload(step)
    return {**values, "state": {**values["state"], "best_step": best_step}}


@pytest.mark.parametrize("saved", [25, 40])
def test_the_best_is_never_of_a_branch_that_was_left(tmp_path: Path, links: str, saved: int) -> None:
    """From step 20 the run goes another way, and finds nothing better, whether its steps reach those it left or not."""
    checkpoints = store(tmp_path, keep_last=9)
    for step in (10, 20, 30):
        checkpoints.save(step, going_back(step, best_step=step), best=True)
    checkpoints.save(saved, going_back(saved, best_step=20), best=False)
    assert weight(checkpoints.best_or_last()) == 20
    assert json.loads((tmp_path / "best.json").read_text())["step"] == 20


@pytest.mark.parametrize("best_step", [None, 10])
def test_a_best_that_is_gone_gives_way_to_last(tmp_path: Path, links: str, best_step: int | None) -> None:
    for step in (10, 20, 30):
        store(tmp_path, keep_last=1).save(step, going_back(step, best_step=step), best=True)
    checkpoints = store(tmp_path, keep_last=1)
    checkpoints.save(40, going_back(40, best_step), best=False)
    assert checkpoints.best_or_last().name == "last.pt"
    assert weight(tmp_path / "last.pt") == 40 and not (tmp_path / "best.json").exists()


@pytest.mark.parametrize("there_before", [False, True])
@pytest.mark.parametrize("where", ["best.pt", "step_00000010.pt", None])
def test_a_run_that_goes_on_elsewhere_takes_its_best_along(
    tmp_path: Path, links: str, where: str | None, there_before: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever lies there, of the same step too, is of another run."""
    old, new = tmp_path / "old", tmp_path / "new"
    for step in (10, 20):
        store(old).save(step, going_back(step, best_step=10), best=step == 10)
    if where != "best.pt":
        (old / "best.pt").unlink()
    if where is None:
        (old / "step_00000010.pt").unlink()
    if there_before:
        store(new).save(10, {**going_back(10, best_step=10), **{"model": {"w": torch.full((300,), 7.0)}}}, best=True)
    checkpoints = store(new)
    state = checkpoints.load(old / "last.pt")["state"]
    checkpoints.save(25, going_back(25, state["best_step"]), best=False)
    assert weight(checkpoints.best_or_last()) == (25 if where is None else 10)
    assert ("is not in" in caplog.text) is (where is None)
    assert (new / "best.pt").exists() is (new / "best.json").exists() is (where is not None)
    assert not (new / "best.pt").is_symlink()
    checkpoints.save(30, going_back(30, best_step=30), best=True)
    assert weight(new / "best.pt") == 30
    if where is not None:
        assert weight(old / where) == 10


def test_going_on_in_the_same_folder_takes_nothing(tmp_path: Path, links: str) -> None:
    checkpoints = store(tmp_path)
    for step in (10, 20):
        checkpoints.save(step, going_back(step, best_step=10), best=step == 10)
    checkpoints.load(tmp_path / "last.pt")
    kept = (tmp_path / "best.pt").stat().st_ino
    checkpoints.save(25, going_back(25, best_step=10), best=False)
    assert (tmp_path / "best.pt").stat().st_ino == kept and weight(tmp_path / "best.pt") == 10


def test_saving_a_step_again_replaces_it(tmp_path: Path, links: str) -> None:
    checkpoints = store(tmp_path)
    checkpoints.save(10, payload(10, content=1), best=True)
    checkpoints.save(10, payload(10, content=2), best=False)
    assert [weight(tmp_path / name) for name in ("step_00000010.pt", "last.pt", "best.pt")] == [2, 2, 1]
    assert not [path for path in tmp_path.iterdir() if ".tmp-" in path.name]


def test_an_empty_or_missing_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert store(tmp_path).latest() is None
    assert store(tmp_path / "missing").latest() is None


def test_find_checkpoint_takes_a_file_a_folder_or_a_run(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    path = store(folder).save(10, payload(10), best=False)
    assert find_checkpoint(path) == find_checkpoint(folder) == find_checkpoint(tmp_path / "run") == path
    with pytest.raises(CheckpointError, match="does not exist"):
        find_checkpoint(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        find_checkpoint(tmp_path / "empty")


# Killed in a save


def killed_at(point: int, action: Callable[[], object]) -> int:
    """Run `action` in a child that dies before its `point`-th change of the disk; its exit status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    calls = 0

    def faulty(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == point:
                os._exit(KILLED)
            return real(*args, **kwargs)

        return call

    for name in FAULT_POINTS:
        setattr(os, name, faulty(getattr(os, name)))
    write = atomic_file.HashingWriter.write
    torn = faulty(lambda self, data: (write(self, data), self._file.flush())[0])
    # Of the forty writes of a small archive, the first and the tensors are enough.
    atomic_file.HashingWriter.write = lambda self, data: (torn if self.size_bytes == 0 or len(data) > 1000 else write)(
        self, data
    )
    try:
        action()
    except BaseException:  # noqa: BLE001 - a forked test process must not come back into pytest
        os._exit(1)
    os._exit(FINISHED)


SAVES = {"first": ((), 10, 10), "next": ((10, 20), 30, 30), "again": ((10, 20), 20, 99), "alone": ((20,), 20, 99)}
"""Steps saved before, the step whose save is killed, and its content."""


@pytest.mark.parametrize(
    ("links", "name"),
    [
        *(("hard links", name) for name in SAVES),
        *(("symbolic links", name) for name in ("next", "alone")),
        ("copies", "alone"),
    ],
    indirect=["links"],
)
def test_a_kill_anywhere_leaves_the_old_or_the_new_checkpoint_whole(
    tmp_path: Path, links: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # a kill does not empty the page cache
    earlier, step, content = SAVES[name]
    status, points = KILLED, 0
    while status == KILLED:
        points += 1
        folder = tmp_path / str(points)
        checkpoints = store(folder, keep_last=1)
        for old in earlier:
            checkpoints.save(old, payload(old), best=True)
        status = killed_at(points, partial(checkpoints.save, step, payload(step, content), best=True))
        assert status in (KILLED, FINISHED)
        atomic_file.remove_temporaries(folder)
        found = checkpoints.latest()
        if found is None:
            assert not earlier, f"killed at {points}: everything is lost"
            assert not folder.exists() or not names(folder)
            continue
        # Every save here is the best one. Of a new step, the links are what was found; of one saved again, old or new.
        possible = {content, earlier[-1]} if step in earlier else {weight(found.path)}
        assert {weight(path) for path in (found.path, folder / "last.pt", folder / "best.pt")} <= possible
        checkpoints.save(step + 10, payload(step + 10), best=False)
        again = checkpoints.latest()
        assert again is not None and again.step == step + 10
        assert not [path for path in folder.iterdir() if ".tmp-" in path.name]
    assert points > 15, "the fault hooks saw too few calls"


# Damage


def damages() -> list[tuple[str, Callable[[Path], object], str]]:
    def truncate(path: Path) -> None:
        os.truncate(path, path.stat().st_size // 2)

    def zero_fill(path: Path) -> None:
        path.write_bytes(bytes(path.stat().st_size))

    def other_step(path: Path) -> None:
        manifest = json.loads(path.with_suffix(".json").read_text())
        path.with_suffix(".json").write_text(json.dumps({**manifest, "step": 999}))

    return [
        ("truncated", truncate, "bytes long"),
        ("one byte short", lambda path: os.truncate(path, path.stat().st_size - 1), "bytes long"),
        ("empty", lambda path: os.truncate(path, 0), "is 0 bytes long"),
        ("zero-filled", zero_fill, "SHA-256"),
        ("no manifest", lambda path: path.with_suffix(".json").unlink(), "has no manifest"),
        ("torn manifest", lambda path: path.with_suffix(".json").write_text('{"step": 20, "sha'), "damaged"),
        ("zeroed manifest", lambda path: path.with_suffix(".json").write_bytes(bytes(200)), "damaged"),
        ("list manifest", lambda path: path.with_suffix(".json").write_text("[1]"), "damaged"),
        ("poor manifest", lambda path: path.with_suffix(".json").write_text('{"step": 20}'), "damaged"),
        ("manifest of another step", other_step, "of step 999"),
    ]


@pytest.mark.parametrize(("damage", "reason"), [d[1:] for d in damages()], ids=[d[0] for d in damages()])
def test_damage_is_found_said_and_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], object], reason: str
) -> None:
    checkpoints = store(tmp_path)
    checkpoints.save(10, payload(10), best=True)
    newest = checkpoints.save(20, payload(20), best=False)
    for name in ("last.pt", "last.json"):
        (tmp_path / name).unlink()
    damage(newest)
    with pytest.raises(CheckpointError, match=reason):
        load_checkpoint(newest)
    with caplog.at_level(logging.WARNING):
        found = checkpoints.latest()
    assert found is not None and weight(found.path) == 10
    assert len(caplog.records) == 1 and newest.name in caplog.text and reason in caplog.text


def test_damage_to_one_inode_reaches_its_links_and_no_further(tmp_path: Path) -> None:
    checkpoints = store(tmp_path)
    checkpoints.save(10, payload(10), best=True)
    newest = checkpoints.save(20, payload(20), best=True)
    with newest.open("r+b") as file:
        file.seek(1000)
        file.write(b"\xff\xff\xff\xff")
    found = checkpoints.latest()
    assert found is not None and found.step == 10
    assert [weight(tmp_path / name) for name in ("last.pt", "best.pt")] == [10, 10], "the links are put right"


def test_a_healthy_folder_is_read_without_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = store(tmp_path)
    for step in (10, 20):
        checkpoints.save(step, payload(step), best=step == 10)
    checkpoints.latest()
    assert not caplog.records


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    checkpoints = store(tmp_path)
    checkpoints.save(10, payload(10), best=False)
    newest = checkpoints.save(20, payload(20), best=False)
    content = newest.read_bytes()
    places = random.Random(0)
    for _ in range(100):
        bit = places.randrange(len(content) * 8)
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        newest.write_bytes(flipped)
        with pytest.raises(CheckpointError, match="SHA-256"):
            load_checkpoint(newest)
    found = checkpoints.latest()
    assert found is not None and found.step == 10


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_glance_at_a_damaged_checkpoint_ends_nothing(tmp_path: Path) -> None:
    """It is taken before any digest is verified, and torch raises whatever comes of what it reads."""
    path = store(tmp_path).save(1, payload(1), best=False)
    state = glance_at_state(path)
    assert state == {"step": 1}
    whole, rng = path.read_bytes(), random.Random(0)
    pickled = whole.index(b"data.pkl"), whole.index(b"byteorder")  # the archive's first record
    damaged = tmp_path / "damaged.pt"
    for _ in range(300):
        content = bytearray(whole)
        content[rng.randrange(*pickled)] = rng.randrange(256)
        damaged.write_bytes(content)
        glance_at_state(damaged)


def test_checkpoints_none_of_which_is_valid_are_an_error_with_every_reason(tmp_path: Path) -> None:
    checkpoints = store(tmp_path)
    for step in (10, 20):
        path = checkpoints.save(step, payload(step), best=False)
        os.truncate(path, 5)
    with pytest.raises(CheckpointError) as error:
        checkpoints.latest()
    assert error.value.exit_code == 4
    assert all(name in str(error.value) for name in ("step_00000010.pt is 5 bytes", "step_00000020.pt", "last.pt"))


def test_files_without_any_manifest_are_never_a_silent_fresh_start(tmp_path: Path) -> None:
    path = store(tmp_path / "a").save(10, payload(10), best=False)
    (tmp_path / "b").mkdir()
    path.rename(tmp_path / "b" / path.name)
    with pytest.raises(CheckpointError, match="no manifest"):
        store(tmp_path / "b").latest()


def test_a_damaged_best_gives_way_to_last_for_the_final_model(tmp_path: Path) -> None:
    checkpoints = store(tmp_path)
    with pytest.raises(CheckpointError, match="neither"):
        checkpoints.best_or_last()
    best = checkpoints.save(10, payload(10), best=True)
    checkpoints.save(20, payload(20), best=False)
    os.truncate(best, 5)
    assert checkpoints.best_or_last().name == "last.pt"


def test_a_checkpoint_of_another_run_is_an_error(tmp_path: Path) -> None:
    store(tmp_path, run_id="b" * 32).save(900, payload(900), best=False)
    with pytest.raises(CheckpointError, match=f"is of run {'b' * 32}, not of run {RUN}"):
        store(tmp_path).latest()
    other = tmp_path / "own"
    store(other).save(10, payload(10), best=False)
    for path in tmp_path.glob("step_*"):
        path.rename(other / path.name)
    with pytest.raises(CheckpointError, match="is of run"):
        find_checkpoint(other)


# What may be in a checkpoint


class Payload:
    """Pickled, it runs code where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.mark),))


def sign(path: Path, step: int) -> None:
    content = path.read_bytes()
    manifest = {"step": step, "sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content), "run_id": RUN}
    path.with_suffix(".json").write_text(json.dumps(manifest))


def test_a_crafted_checkpoint_runs_nothing(tmp_path: Path) -> None:
    path, mark = tmp_path / "step_00000010.pt", tmp_path / "mark"
    torch.save({"version": CHECKPOINT_VERSION, **payload(10), "rng": Payload(mark)}, path)
    with pytest.raises(CheckpointError, match="no manifest"):
        load_checkpoint(path)
    sign(path, 10)
    with pytest.raises(CheckpointError, match="could run code"):
        load_checkpoint(path)
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists(), "the payload of this test is harmless"


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_part_is_named(tmp_path: Path, part: str) -> None:
    content = payload(10)
    del content[part]
    with pytest.raises(CheckpointError, match=f"lacks {part}"):
        store(tmp_path).save(10, content, best=False)
    path = tmp_path / "step_00000010.pt"
    torch.save({"version": CHECKPOINT_VERSION, **content}, path)
    sign(path, 10)
    with pytest.raises(CheckpointError, match=f"lacks {part}"):
        load_checkpoint(path)


def test_another_version_and_no_checkpoint_at_all_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "step_00000010.pt"
    for content, reason in (({"version": 2, **payload(10)}, "format 2"), ([1], "format None")):
        torch.save(content, path)
        sign(path, 10)
        with pytest.raises(CheckpointError, match=reason):
            load_checkpoint(path)
    path.write_bytes(b"PK no archive")
    sign(path, 10)
    with pytest.raises(CheckpointError):
        load_checkpoint(path)


@pytest.mark.parametrize("value", [np.float64(1.0), np.zeros(2), Path("x"), {1}, object()])
def test_what_could_not_be_loaded_again_is_not_saved(tmp_path: Path, value: object) -> None:
    content = {**payload(10), "callbacks": {"mine": {"history": [1, value]}}}
    with pytest.raises(CheckpointError, match=r"callbacks\.mine\.history\[1\] is a "):
        store(tmp_path).save(10, content, best=False)
    assert not list(tmp_path.iterdir())


# The disk


def test_a_full_disk_is_named_and_costs_no_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: str
) -> None:
    checkpoints = store(tmp_path)
    checkpoints.save(10, payload(10), best=True)
    before = sorted(path.name for path in tmp_path.iterdir())
    create = atomic_file.create_exclusive

    for capacity in (0, 100, 2500):

        class Full:
            def __init__(self, file: Any, capacity: int = capacity) -> None:
                self.file, self.left = file, capacity

            def __enter__(self) -> Full:
                return self

            def __exit__(self, *_: object) -> None:
                self.file.close()

            def flush(self) -> None:
                self.file.flush()

            def write(self, data: bytes) -> int:
                if len(data) > self.left:
                    raise OSError(errno.ENOSPC, "No space left on device")
                self.left -= len(data)
                return int(self.file.write(data))

        monkeypatch.setattr(
            "truthgpt.trainers.checkpoint_payload.create_exclusive", lambda path, full=Full: full(create(path))
        )
        with pytest.raises(
            RunDirectoryError, match=r"No space left on device \(.* free, about .*\(2400 bytes\) needed"
        ):
            checkpoints.save(20, payload(20), best=True)
        assert sorted(path.name for path in tmp_path.iterdir()) == before
        found = checkpoints.latest()
        assert found is not None and weight(found.path) == 10


def test_a_real_limit_on_file_size_is_a_run_directory_error(tmp_path: Path) -> None:
    checkpoints = store(tmp_path)
    checkpoints.save(10, payload(10), best=False)
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
        try:
            checkpoints.save(20, payload(20), best=False)
        except RunDirectoryError as error:
            os._exit(error.exit_code)
        except BaseException:  # noqa: BLE001 - a forked test process must not come back into pytest
            os._exit(1)
        os._exit(FINISHED)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 6
    assert names(tmp_path) == {"step_00000010.pt", "last.pt"}
    assert not [path for path in tmp_path.iterdir() if ".tmp-" in path.name]


def test_a_file_in_the_place_of_the_folder_is_a_run_directory_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(RunDirectoryError, match="cannot write"):
        store(tmp_path / "checkpoints").save(10, payload(10), best=False)


def test_a_deleted_folder_comes_back(tmp_path: Path) -> None:
    path = store(tmp_path / "run" / "checkpoints").save(10, payload(10), best=False)
    assert weight(path) == 10
