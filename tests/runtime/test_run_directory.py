"""The run directory: who may have it, what it refuses, and documents that are always whole."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from truthgpt.errors import RunDirectoryError
from truthgpt.runtime.run_directory import RunDirectory, RunStatus, is_in_use, is_run_directory, read_status

HOLDER = """
import os, sys, time
from pathlib import Path
from truthgpt.runtime.run_directory import RunDirectory
run = RunDirectory.claim(Path(sys.argv[1]), resume=True, overwrite=False)
{body}
print("ready", os.getpid(), flush=True)
time.sleep(60)
"""


def hold(path: Path, body: str = "") -> subprocess.Popen[str]:
    """Another process that holds `path` until it is killed."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER.format(body=body), str(path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline().startswith("ready")
    return holder


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def claim(path: Path, resume: bool = False, overwrite: bool = False) -> RunDirectory:
    return RunDirectory.claim(path, resume=resume, overwrite=overwrite)


def used(path: Path) -> str:
    """A directory that a run has used and left; its run id."""
    with claim(path) as run:
        run.write_config("seed: 1\n")
        run.write_status(RunStatus("complete", step=4, max_steps=4))
        return run.run_id


def test_a_fresh_directory_is_made_with_its_parents_and_holds_only_the_lock(tmp_path: Path) -> None:
    with claim(tmp_path / "a" / "b") as run:
        assert names(run.path) == [".lock"]
        assert (run.checkpoints, run.model) == (run.path / "checkpoints", run.path / "model")
        assert (run.metrics, run.log) == (run.path / "metrics.jsonl", run.path / "run.log")
        assert is_in_use(run.path)
    assert not is_in_use(tmp_path / "a" / "b")
    assert not is_run_directory(tmp_path / "a" / "b")


def test_a_claim_that_led_to_nothing_may_be_repeated(tmp_path: Path) -> None:
    ids = []
    for _ in range(2):
        with claim(tmp_path / "run") as run:
            ids.append(run.run_id)
    assert ids[0] != ids[1]


@pytest.mark.parametrize("mark", ["config.yaml", "status.json", "metrics.jsonl", "checkpoints"])
def test_a_used_directory_is_refused_with_the_ways_on(tmp_path: Path, mark: str) -> None:
    (tmp_path / mark).mkdir() if mark == "checkpoints" else (tmp_path / mark).write_text("{}")
    with pytest.raises(RunDirectoryError, match=r"--resume auto.*--overwrite") as error:
        claim(tmp_path)
    assert error.value.exit_code == 6
    assert not is_in_use(tmp_path), "a refused claim holds nothing"
    claim(tmp_path, resume=True).release()


def test_resume_keeps_files_and_run_id(tmp_path: Path) -> None:
    run_id = used(tmp_path)
    with claim(tmp_path, resume=True) as run:
        assert run.run_id == run_id
        assert (tmp_path / "config.yaml").read_text() == "seed: 1\n"


@pytest.mark.parametrize("status", [None, "", '{"run', "[1]", '{"run_id": 3}'])
def test_a_lost_status_leaves_the_run_id_to_the_newest_manifest(tmp_path: Path, status: str | None) -> None:
    used(tmp_path)
    (tmp_path / "status.json").unlink()
    if status is not None:
        (tmp_path / "status.json").write_text(status)
    (tmp_path / "checkpoints").mkdir()
    for step, run_id in ((9, "old"), (10, "new")):
        (tmp_path / "checkpoints" / f"step_{step:08d}.json").write_text(json.dumps({"run_id": run_id}))
    with claim(tmp_path, resume=True) as run:
        assert run.run_id == "new"


def test_overwrite_moves_the_old_run_aside_and_never_deletes(tmp_path: Path) -> None:
    run_id = used(tmp_path / "run")
    for count in (1, 2):
        with claim(tmp_path / "run", overwrite=True) as run:
            assert run.run_id != run_id
            assert names(run.path) == [".lock"]
            run.write_config("new")
        moved = list(tmp_path.glob("run.old-*Z"))
        assert len(moved) == count
    assert sorted((path / "config.yaml").read_text() for path in moved) == ["new", "seed: 1\n"]


def test_overwrite_behind_a_symbolic_link_stays_on_its_disk(tmp_path: Path) -> None:
    used(tmp_path / "disk" / "run")
    (tmp_path / "run").symlink_to(tmp_path / "disk" / "run")
    claim(tmp_path / "run", overwrite=True).release()
    assert (tmp_path / "run").is_symlink()
    assert len(list((tmp_path / "disk").glob("run.old-*"))) == 1


def test_overwrite_leaves_a_directory_that_is_no_run_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    claim(tmp_path, overwrite=True).release()
    assert (tmp_path / "thesis.tex").read_text() == "precious"


@pytest.mark.parametrize("option", [{}, {"resume": True}, {"overwrite": True}])
def test_a_model_that_no_run_wrote_is_not_replaced(tmp_path: Path, option: dict[str, bool]) -> None:
    (tmp_path / "model").mkdir()
    claim(tmp_path, **option).release()
    (tmp_path / "model/model.safetensors").write_text("mine")
    with pytest.raises(RunDirectoryError, match="choose another output_dir, or move that folder away"):
        claim(tmp_path, **option)
    assert (tmp_path / "model/model.safetensors").read_text() == "mine"


def test_resume_and_overwrite_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="exclude"):
        claim(tmp_path / "run", resume=True, overwrite=True)
    assert not (tmp_path / "run").exists()


def test_a_file_or_a_broken_link_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for path in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "link"):
        with pytest.raises(RunDirectoryError, match="choose another output_dir"):
            claim(path)
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_directory_that_cannot_be_written_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(RunDirectoryError, match=os.strerror(code)):
        claim(tmp_path)
    assert names(tmp_path) == []


def test_temporaries_of_killed_processes_are_removed(tmp_path: Path) -> None:
    used(tmp_path)
    leftovers = [tmp_path / folder / ".x.pt.tmp-host-1" for folder in (".", "checkpoints", "model")]
    for path in leftovers:
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
    claim(tmp_path, resume=True).release()
    assert not any(path.exists() for path in leftovers)


# Two processes


def test_a_second_process_is_told_who_holds_the_directory(tmp_path: Path) -> None:
    holder = hold(tmp_path)
    try:
        for resume, overwrite in ((False, False), (True, False), (False, True)):
            with pytest.raises(RunDirectoryError) as error:
                claim(tmp_path, resume, overwrite)
            assert f"in use by process {holder.pid} on host {socket.gethostname()} since 2" in str(error.value)
        assert is_in_use(tmp_path)
    finally:
        holder.kill()
        holder.wait()
    assert not is_in_use(tmp_path)
    claim(tmp_path, resume=True).release()


def test_the_same_process_cannot_claim_twice(tmp_path: Path) -> None:
    with claim(tmp_path), pytest.raises(RunDirectoryError, match=f"process {os.getpid()}"):
        claim(tmp_path, resume=True)


def test_a_worker_that_outlives_its_killed_parent_holds_nothing(tmp_path: Path) -> None:
    body = "worker = os.fork()\nif worker == 0: time.sleep(60)\nopen(sys.argv[1] + '/worker', 'w').write(str(worker))"
    holder = hold(tmp_path, body)
    worker = int((tmp_path / "worker").read_text())
    try:
        holder.kill()
        holder.wait()
        os.kill(worker, 0)  # it lives on
        claim(tmp_path, resume=True).release()
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_directory_moved_aside_while_it_is_claimed_is_claimed_in_its_new_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, aside, real = tmp_path / "run", tmp_path / "run.old", fcntl.flock

    def move_then_lock(descriptor: int, operation: int) -> None:
        if not aside.exists():
            path.rename(aside)
            path.mkdir()
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", move_then_lock)
    with claim(path):
        assert is_in_use(path) and not is_in_use(aside)


def test_a_file_system_without_locks_is_used_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with claim(tmp_path), caplog.at_level(logging.WARNING):
        assert not is_in_use(tmp_path)
    assert "cannot be locked" in caplog.text


def test_a_listing_does_not_stop_a_run_from_starting(tmp_path: Path) -> None:
    claim(tmp_path).release()
    for _ in range(20):
        assert not is_in_use(tmp_path)
        with claim(tmp_path):
            assert is_in_use(tmp_path)


# Documents


def test_the_status_says_all_there_is_to_know(tmp_path: Path) -> None:
    with claim(tmp_path) as run:
        assert run.read_status() is None
        run.write_status(RunStatus("running", 3, 9, best_metric=float("inf"), best_step=2))
        status = run.read_status()
    assert status is not None
    assert {key: status[key] for key in status if not key.endswith("_at")} == {
        "run_id": run.run_id,
        "state": "running",
        "step": 3,
        "max_steps": 9,
        "best_metric": None,
        "best_step": 2,
        "exit_code": None,
        "message": None,
    }
    assert status["started_at"] <= status["updated_at"]
    assert read_status(tmp_path / "nowhere") is None


def test_the_status_of_an_earlier_process_is_not_this_one_s(tmp_path: Path) -> None:
    with claim(tmp_path) as run:
        assert run.written_status() is None
        run.write_status(RunStatus("running", 3, 9, 1.5, 2))
        assert run.written_status() == run.read_status() is not None
    with RunDirectory.claim(tmp_path, resume=True, overwrite=False) as run:
        assert run.written_status() is None


def test_environment_is_json(tmp_path: Path) -> None:
    with claim(tmp_path) as run:
        run.write_environment({"versions": {"python": "3"}})
    assert json.loads((tmp_path / "environment.json").read_text()) == {"versions": {"python": "3"}}


def test_a_directory_deleted_under_the_run_comes_back_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with claim(tmp_path / "run") as run:
        run.write_config("seed: 1\n")
        (tmp_path / "run").rename(tmp_path / "gone")
        with caplog.at_level(logging.WARNING):
            run.write_status(RunStatus("running", 1, 2))
            run.write_status(RunStatus("running", 2, 2))
        assert len(caplog.records) == 1 and "was deleted" in caplog.text
        assert (tmp_path / "run" / "config.yaml").read_text() == "seed: 1\n"
        assert is_in_use(tmp_path / "run")


def test_a_place_that_another_run_took_meanwhile_is_left_to_it(tmp_path: Path) -> None:
    with claim(tmp_path / "run") as run:
        (tmp_path / "run").rename(tmp_path / "gone")
        with claim(tmp_path / "run"), pytest.raises(RunDirectoryError, match="in use"):
            run.write_config("seed: 1\n")
        assert not (tmp_path / "run" / "config.yaml").exists()


def test_none_of_this_needs_torch() -> None:
    modules = ("atomic_file", "run_directory", "metrics_log", "stop_signal", "run_log", "environment")
    imports = ", ".join(f"truthgpt.runtime.{name}" for name in modules)
    subprocess.run([sys.executable, "-c", f"import sys, {imports}; assert 'torch' not in sys.modules"], check=True)
