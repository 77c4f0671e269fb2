"""Loading a model back: a run, a checkpoint, a folder, and what is said when there is nothing to load."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import truthgpt.build
from tests.attention.packed_models import model_of
from tests.models.adapted_models import SHAPES, adapted, settings
from tests.models.test_lora import saved
from tests.test_build import build_small_trainer, registered, small_config
from truthgpt.build import frozen_cast
from truthgpt.errors import CheckpointError, ConfigError
from truthgpt.factories.metrics import METRICS
from truthgpt.load_model import LoadedModel, load_model
from truthgpt.metrics.base import EvalBatch
from truthgpt.models.tokenizer import byte_tokenizer
from truthgpt.models.trained_weights import adapter_weights
from truthgpt.serve_model import ServingOptions, open_text_model

CPU = torch.device("cpu")


class Growing:
    """A metric that only gets worse, so that the first evaluation is the best."""

    name = "growing"
    direction = "min"

    def __init__(self) -> None:
        self._value = 0.0

    def reset(self) -> None:
        """Nothing is summed."""

    def update(self, batch: EvalBatch) -> None:
        """Nothing is looked at."""

    def compute(self) -> float:
        """One more each time."""
        self._value += 1
        return self._value


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its best checkpoint at step 2 and its last at step 4."""
    folder = tmp_path_factory.mktemp("loaded")
    judged = ("eval.metrics=[growing]", "eval.select_best_by=growing")
    with registered(METRICS, "growing", Growing):
        build_small_trainer(folder, "training.max_steps=4", "training.eval_interval=2", *judged).train()
    return folder / "runs/t"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def averaged(path: Path) -> dict[str, torch.Tensor]:
    payload = torch.load(path, weights_only=True)
    return {**payload["model"], **payload["ema"]}


def assert_weights(loaded: LoadedModel, expected: dict[str, torch.Tensor]) -> None:
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    assert not loaded.model.training


@pytest.mark.parametrize(
    ("target", "in_run"),
    [("", True), ("model", False), ("checkpoints/best.pt", True), ("checkpoints/last.pt", True)],
)
def test_every_form_is_the_averaged_weights(run: Path, target: str, in_run: bool) -> None:
    loaded = load_model(run / target, CPU)
    last = "last" in target
    assert_weights(loaded, averaged(run / f"checkpoints/{'last' if last else 'best'}.pt"))
    assert loaded.run_directory == (run if in_run else None)
    assert loaded.tokenizer("hi").input_ids == [104, 105]


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[set[torch.dtype]]:
    """The types of the weights whenever a model is moved to its device."""
    types: list[set[torch.dtype]] = []
    move = PreTrainedModel.to

    def noted(model: PreTrainedModel, *arguments: Any, **keywords: Any) -> Any:
        types.append({parameter.dtype for parameter in model.parameters()})
        return move(model, *arguments, **keywords)

    monkeypatch.setattr(PreTrainedModel, "to", noted)
    return types


@pytest.mark.parametrize(("dtype", "expected"), [("bf16", torch.bfloat16), ("float32", torch.float32)])
def test_a_model_that_writes_is_moved_in_its_own_type(
    run: Path, moved: list[set[torch.dtype]], dtype: str, expected: torch.dtype
) -> None:
    with open_text_model(run, ServingOptions(device="cpu", dtype=dtype)):
        assert moved[-1] == {expected}


@pytest.mark.parametrize("half", [True, False])
def test_a_frozen_base_is_moved_as_it_is_evaluated(
    tmp_path: Path, moved: list[set[torch.dtype]], monkeypatch: pytest.MonkeyPatch, half: bool
) -> None:
    base = model_of(SHAPES["llama"], "sdpa")
    folder = saved(adapted(base, settings(), share=False), base, tmp_path / "adapters")
    for place in (folder, folder / "base"):
        byte_tokenizer().save_pretrained(place)
    monkeypatch.setattr(truthgpt.build, "has_native_bf16", lambda device: True)
    config = small_config(tmp_path, f"training.mixed_precision={'bf16' if half else 'none'}")
    loaded = load_model(folder, CPU, cast=frozen_cast(config, CPU))
    assert moved[-1] == ({torch.bfloat16, torch.float32} if half else {torch.float32})
    assert {weight.dtype for weight in adapter_weights(loaded.model).values()} == {torch.float32}
    loaded = load_model(tmp_path / "adapters/base", CPU, cast=frozen_cast(config, CPU))
    assert moved[-1] == {torch.float32}, "autocast needs all weights in float32"


def test_relative_paths(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run / "checkpoints")
    assert_weights(load_model(Path("best.pt"), CPU), averaged(run / "checkpoints/best.pt"))
    monkeypatch.chdir(run)
    assert_weights(load_model(Path(), CPU), averaged(run / "checkpoints/best.pt"))


def test_unfinished_run_uses_its_best_and_says_so(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    (run / "model/model.safetensors").unlink()
    with caplog.at_level(logging.WARNING, "truthgpt"):
        assert_weights(load_model(run, CPU), averaged(run / "checkpoints/best.pt"))
    assert "has no final weights yet" in caplog.text
    for name in ("best.pt", "best.json"):
        (run / "checkpoints" / name).unlink()
    assert_weights(load_model(run, CPU), averaged(run / "checkpoints/last.pt"))


def damage(run: Path) -> Path:
    path = run / "checkpoints/best.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    path.write_bytes(content)
    return path


def move_away(run: Path) -> Path:
    shutil.copy(run / "checkpoints/best.pt", run.parent / "alone.pt")
    return run.parent / "alone.pt"


@pytest.mark.parametrize(
    ("target", "phrase"),
    [
        (lambda run: run / "nothing", "nothing to load at"),
        (lambda run: run.parent, "give a run directory"),
        (damage, "SHA-256"),
        (move_away, "lies in no run directory"),
    ],
)
def test_what_cannot_be_loaded(run: Path, target: Callable[[Path], Path], phrase: str) -> None:
    with pytest.raises(CheckpointError, match=phrase):
        load_model(target(run), CPU)


def test_folder_without_a_tokenizer(run: Path) -> None:
    for path in (run / "model").glob("*token*"):
        path.unlink()
    with pytest.raises(ConfigError, match="vocabulary is empty"):
        load_model(run / "model", CPU)
