"""The engine beside its numbers (tests/test_numerics.py): state, restore, refusals, and what it leaves alone."""

from __future__ import annotations

import copy
from itertools import islice
from pathlib import Path

import pytest
import torch
from tests.test_build import build_small_trainer
from tests.test_resume import equal

from truthgpt.errors import CheckpointError, OutOfMemoryError
from truthgpt.trainers.engine import TrainEngine


def trained_engine(folder: Path, name: str, *overrides: str, steps: int = 3) -> TrainEngine:
    trainer = build_small_trainer(folder, f"output_dir={folder / name}", *overrides)
    for step, batch in enumerate(islice(trainer.parts.loader.batches(), steps)):
        trainer.parts.engine.train_step(batch, step)
    return trainer.parts.engine


def test_restored_engine_goes_on_bit_for_bit(tmp_path: Path) -> None:
    trainer = build_small_trainer(tmp_path)
    batches = list(islice(trainer.parts.loader.batches(), 5))
    first = trainer.parts.engine
    for step in range(3):
        first.train_step(batches[step], step)
    saved = copy.deepcopy(first.state_dict())
    second = trained_engine(tmp_path, "other", steps=1)
    second.load_state_dict(copy.deepcopy(saved))
    for step in (3, 4):
        first.train_step(batches[step], step)
        second.train_step(batches[step], step)
    equal(second.state_dict(), first.state_dict())


def test_hyperparameters_stay_as_configured(tmp_path: Path) -> None:
    """A learning rate changed on resume is the new one, not the checkpoint's."""
    saved = trained_engine(tmp_path, "a").state_dict()
    changed = trained_engine(tmp_path, "b", "training.learning_rate=5e-4", "training.weight_decay=0.3", steps=0)
    changed.load_state_dict(copy.deepcopy(saved))
    assert changed.optimizer.param_groups[0]["weight_decay"] == 0.3
    trainer = build_small_trainer(tmp_path, f"output_dir={tmp_path / 'c'}")
    changed.train_step(next(trainer.parts.loader.batches()), 39)
    assert changed.learning_rate == pytest.approx(5e-4 * changed.schedule(39))


@pytest.mark.parametrize(
    ("model", "phrase"),
    [
        ("{model_type: gpt2, n_layer: 2, n_head: 2, n_embd: 16, n_positions: 64}", r"is \(257, 32\), this model's is"),
        ("{model_type: gpt2, n_layer: 1, n_head: 2, n_embd: 32, n_positions: 64}", "is not part of this model"),
        ("{model_type: gpt2, n_layer: 3, n_head: 2, n_embd: 32, n_positions: 64}", "is missing .and 11 more"),
    ],
)
def test_other_model_is_refused_before_anything_changes(tmp_path: Path, model: str, phrase: str) -> None:
    saved = trained_engine(tmp_path, "a", steps=1).state_dict()
    other = trained_engine(tmp_path, "b", f"model.config={model}", steps=0)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(CheckpointError, match=phrase):
        other.load_state_dict(saved)
    equal(other.state_dict(), before)


def test_another_seed_is_refused(tmp_path: Path) -> None:
    """The order of the data is made of it, and no checkpoint holds that."""
    saved = trained_engine(tmp_path, "a", steps=1).state_dict()
    other = trained_engine(tmp_path, "b", "seed=8", steps=0)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(CheckpointError, match="a run with seed 7, this one has 8"):
        other.load_state_dict(saved)
    equal(other.state_dict(), before)


@pytest.mark.parametrize("where", ["optimizer", "average"])
def test_an_update_that_is_out_of_memory_is_not_taken_again(tmp_path: Path, where: str) -> None:
    """Half of the weights may have taken it: the trainer, which takes a step again, must not be told that it can."""
    trainer = build_small_trainer(tmp_path)
    engine = trainer.parts.engine

    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    setattr(
        engine.optimizer if where == "optimizer" else engine.ema, "step" if where == "optimizer" else "update", fail
    )
    with pytest.raises(OutOfMemoryError, match="in the update of step 1: CUDA out of memory"):
        trainer.train()


def test_optimizer_of_another_kind_is_refused(tmp_path: Path) -> None:
    saved = copy.deepcopy(trained_engine(tmp_path, "a", steps=1).state_dict())
    saved["optimizer"]["param_groups"] = saved["optimizer"]["param_groups"][:1]
    with pytest.raises(CheckpointError, match="optimizer state does not fit"):
        trained_engine(tmp_path, "b", steps=0).load_state_dict(saved)


def test_optimizer_that_stood_in_for_another_is_refused(tmp_path: Path) -> None:
    """Parameter groups of equal sizes, and yet another state: torchao's where it is installed, AdamW's where not."""
    engine = trained_engine(tmp_path, "a", steps=1)
    saved = copy.deepcopy(engine.state_dict())
    assert saved["optimizer"]["kind"] == "AdamW"
    saved["optimizer"]["kind"] = "AdamW8bit"
    with pytest.raises(CheckpointError, match="optimizer state is of AdamW8bit, this run's optimizer is AdamW"):
        engine.load_state_dict(saved)
    del saved["optimizer"]["kind"]  # of before checkpoints said it
    engine.load_state_dict(saved)


def test_average_switched_on_or_off_between_runs(tmp_path: Path) -> None:
    without = copy.deepcopy(trained_engine(tmp_path, "a", "ema.enabled=false").state_dict())
    assert without["ema"] == {}
    switched_on = trained_engine(tmp_path, "b", steps=0)
    switched_on.load_state_dict(without)
    average = switched_on.state_dict()["ema"]
    assert all(torch.equal(value, without["model"][name]) for name, value in average.items())
    kept = copy.deepcopy(trained_engine(tmp_path, "c").state_dict())
    switched_off = trained_engine(tmp_path, "d", "ema.enabled=false", steps=0)
    switched_off.load_state_dict(kept)
    assert switched_off.state_dict()["ema"] == {}


def test_saving_does_not_change_what_is_trained(tmp_path: Path) -> None:
    trainer = build_small_trainer(tmp_path)
    batches = list(islice(trainer.parts.loader.batches(), 2))
    plain = trained_engine(tmp_path, "plain", steps=2)
    trainer.parts.engine.train_step(batches[0], 0)
    trainer.parts.engine.state_dict()
    trainer.parts.engine.train_step(batches[1], 1)
    equal(trainer.parts.engine.state_dict(), plain.state_dict())


def test_dropout_depends_on_seed_step_and_micro_batch_only(tmp_path: Path) -> None:
    first = trained_engine(tmp_path, "a")
    torch.manual_seed(999)
    torch.rand(17)
    second = trained_engine(tmp_path, "b")
    equal(first.state_dict(), second.state_dict())
    other = trained_engine(tmp_path, "c", "seed=8")
    assert not torch.equal(
        next(iter(other.state_dict()["model"].values())), next(iter(first.state_dict()["model"].values()))
    )
