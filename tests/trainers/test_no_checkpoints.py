"""The store that keeps nothing."""

from __future__ import annotations

from pathlib import Path

from truthgpt.trainers.no_checkpoints import NoCheckpoints


def test_nothing_is_written(tmp_path: Path) -> None:
    store = NoCheckpoints(tmp_path / "checkpoints", run_id="a", keep_last=1)
    path = store.save(7, {}, best=True)
    assert path == tmp_path / "checkpoints/step_00000007.pt"
    assert store.best_or_last().parent == path.parent
    assert store.latest() is None
    assert list(tmp_path.iterdir()) == []
