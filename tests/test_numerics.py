"""What a run computes, against plain PyTorch written here: losses, gradients, updates, averages, skipped steps."""

from __future__ import annotations

import copy
import itertools
import logging
import math
import shutil
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.test_build import COMPLETIONS, NO_DROPOUT, build, build_small_trainer, registered
from truthgpt.build import Components
from truthgpt.data.base import Batch, GlobalBatch, LossAndLogits
from truthgpt.errors import NonFiniteError
from truthgpt.factories.optimizer import OPTIMIZERS
from truthgpt.models.causal_lm import causal_lm_loss
from truthgpt.optim.groups import parameter_groups
from truthgpt.runtime.precision import UnscaledPrecision, has_native_bf16
from truthgpt.trainers.ema import EMA, NoEMA, WeightAverage
from truthgpt.trainers.engine import EngineSettings, Objective, TrainEngine
from truthgpt.trainers.guards import NonFiniteGuard

CPU = torch.device("cpu")
NO_CLIPPING = EngineSettings(seed=7, max_grad_norm=None)
PLAIN = (f"model.config={NO_DROPOUT}", "ema.enabled=false")


def engine_for(
    components: Components,
    objective: Objective = causal_lm_loss,
    ema: WeightAverage | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    settings: EngineSettings = NO_CLIPPING,
) -> TrainEngine:
    """An engine around the components; without an optimizer, SGD at rate 1: a step is the gradient."""
    return TrainEngine(
        components.model,
        objective,
        optimizer or torch.optim.SGD(components.model.parameters(), lr=1.0),
        lambda step: 1.0,
        UnscaledPrecision("none", CPU, None),
        ema or NoEMA(),
        NonFiniteGuard(10, CPU),
        settings,
    )


def one_step_gradient(components: Components, step: int) -> tuple[dict[str, torch.Tensor], float]:
    """Gradient of every parameter and the mean loss of global batch `step`, as the engine computes them."""
    engine = engine_for(components)
    batch = next(components.train_loader.batches(step))
    before = {name: p.detach().clone() for name, p in components.model.named_parameters()}
    scalars = engine.train_step(batch, 0)
    gradient = {name: before[name] - p.detach() for name, p in components.model.named_parameters()}
    return gradient, float(scalars.loss_sum) / batch.tokens


def assert_close(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], tolerance: float) -> None:
    """Within `tolerance` of the largest entry of the tensor."""
    assert first.keys() == second.keys()
    for name in first:
        scale = max(float(second[name].abs().max()), 1e-12)
        difference = float((first[name] - second[name]).abs().max())
        assert difference <= tolerance * scale, f"{name}: {difference / scale:.2e}"


PADDED = (*COMPLETIONS, "data.packing=false")


@pytest.mark.parametrize("data", [(), PADDED, COMPLETIONS], ids=["text", "padded", "packed"])
@pytest.mark.parametrize("step", [0, -1], ids=["full batch", "last partial batch"])
def test_splitting_a_batch_changes_nothing(tmp_path: Path, data: tuple[str, ...], step: int) -> None:
    """8x1, 4x2, 2x4 and 1x8 give one gradient, also with unequal label counts, and so does plain PyTorch."""
    reference: dict[str, torch.Tensor] = {}
    loss = math.nan
    for size, steps in ((8, 1), (4, 2), (2, 4), (1, 8)):
        shape = (f"training.train_batch_size={size}", f"training.grad_accum_steps={steps}")
        components = build(tmp_path, *PLAIN, *data, *shape)
        components.model.double()
        at = step % components.train_loader.steps_per_epoch
        batch = next(components.train_loader.batches(at))
        counts = [int((b["labels"] != -100).sum()) for b in batch.micro_batches]
        assert sum(counts) == batch.tokens
        if not reference:
            reference, loss = plain_gradient(components.model, batch.micro_batches)
            assert (batch.samples < 8) == (step == -1), "the last batch of the epoch must be a partial one"
        elif data and step == 0:
            assert len(set(counts)) > 1, "equal label counts would hide a mean of means"
        gradient, own_loss = one_step_gradient(components, at)
        assert_close(gradient, reference, 1e-6)
        assert own_loss == pytest.approx(loss, rel=1e-6)


def documents_alone(batch: Batch) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and labels of every packed document as a row of its own; a batch that is not packed as it is."""
    ids, labels = batch["input_ids"], batch["labels"]
    if "cu_seq_lens" not in batch:
        yield ids, labels
        return
    borders = batch["cu_seq_lens"].tolist()
    for start, end in itertools.pairwise(borders):
        if end > start:
            yield ids.flatten()[None, start:end], labels.flatten()[None, start:end]


def plain_gradient(model: nn.Module, batches: list[Batch]) -> tuple[dict[str, torch.Tensor], float]:
    """Mean cross-entropy over all labels of all batches, one after the other, and its gradient."""
    copied = copy.deepcopy(model).train()
    losses = []
    for ids, labels in (pair for batch in batches for pair in documents_alone(batch)):
        logits = copied(input_ids=ids).logits
        picked = labels != -100
        log_probabilities = torch.log_softmax(logits[picked], dim=-1)
        losses.append(-log_probabilities.gather(1, labels[picked].unsqueeze(1)).flatten())
    mean = torch.cat(losses).mean()
    mean.backward()
    return {name: p.grad for name, p in copied.named_parameters() if p.grad is not None}, float(mean.detach())


@pytest.mark.parametrize("data", [PADDED, COMPLETIONS], ids=["padded", "packed"])
def test_ten_steps_equal_a_plain_loop(tmp_path: Path, data: tuple[str, ...]) -> None:
    """AdamW with cosine, warm-up, clipping and weight decay on matrices; EMA in float64; across an epoch's end."""
    overrides = (
        *(f"model.config={NO_DROPOUT}", *data, "training.max_steps=18", "training.warmup_ratio=0.2"),
        *("training.max_grad_norm=0.5", "training.weight_decay=0.1", "ema.decay=0.5", "checkpoint.interval_steps=100"),
    )
    trainer = build_small_trainer(tmp_path, *overrides)
    loader, model = trainer.parts.loader, copy.deepcopy(trainer.parts.engine.model)
    assert loader.steps_per_epoch < 18
    decayed = [p for n, p in model.named_parameters() if p.ndim >= 2 and not n.startswith(("transformer.w", "lm_head"))]
    others = [p for p in model.parameters() if all(p is not d for d in decayed)]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.999), eps=1e-8)
    average = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    norms, losses = [], []
    for step, batch in enumerate(islice(loader.batches(), 18)):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * cosine_factor(step, total=18, warmup=4)
        pairs = [pair for micro_batch in batch.micro_batches for pair in documents_alone(micro_batch)]
        labels = [labels.flatten() for _, labels in pairs]
        logits = [model(input_ids=ids).logits.flatten(0, 1) for ids, _ in pairs]
        loss = F.cross_entropy(torch.cat(logits), torch.cat(labels), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        losses.append(float(loss.detach()))
        decay = min(0.5, (2 + step) / (11 + step))
        for name, p in model.named_parameters():
            average[name] = decay * average[name] + (1 - decay) * p.detach().double()
    trainer.train()
    engine = trainer.parts.engine
    rows = [row for row in read_log(tmp_path) if "loss" in row]
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-5)
    assert [row["grad_norm"] for row in rows] == pytest.approx(norms, rel=1e-4)
    assert max(norms) > 0.5, "nothing was clipped"
    # After train() the model holds what was exported, the averaged weights: the raw ones are in the last checkpoint.
    payload = torch.load(tmp_path / "runs/t/checkpoints/last.pt", weights_only=True)
    raw = {name: payload["model"][name] for name, _ in engine.model.named_parameters()}
    assert_close(raw, {name: p.detach() for name, p in model.named_parameters()}, 1e-4)
    assert_close({name: v.double() for name, v in payload["ema"].items()}, average, 1e-4)


def cosine_factor(step: int, total: int, warmup: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def read_log(folder: Path) -> list[dict[str, float]]:
    from truthgpt.runtime.metrics_log import read_rows

    return read_rows(folder / "runs/t/metrics.jsonl")


def test_average_equals_a_float64_loop() -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    ema = EMA(model, decay=0.9)
    expected = model.weight.detach().double().clone()
    for step in range(1, 200):
        with torch.no_grad():
            model.weight.add_(torch.randn(3, 5) * 0.1)
        ema.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach().double()
    average = ema.state_dict()["weight"]
    assert average.dtype == torch.float32
    assert torch.allclose(average.double(), expected, rtol=0, atol=1e-6)


def test_evaluation_does_not_depend_on_the_batch_size(tmp_path: Path) -> None:
    values = []
    for size in (1, 3, 16):
        trainer = build_small_trainer(
            tmp_path, *PLAIN, *COMPLETIONS, f"training.eval_batch_size={size}", f"output_dir={tmp_path / str(size)}",
            "eval.metrics=[ppl, bits_per_byte]",
        )  # fmt: skip
        evaluator = trainer.parts.evaluator
        assert evaluator is not None
        evaluation = evaluator.run(trainer.parts.engine.model)
        assert evaluation is not None
        values.append(evaluation)
    assert values[0].tokens == values[1].tokens == values[2].tokens > 0
    for name, value in values[0].values.items():
        assert [v.values[name] for v in values] == pytest.approx([value] * 3, rel=1e-6), name


def poison(call: int) -> Objective:
    """The real objective, save that call number `call` (from 0) gives NaN."""
    calls = iter(range(10**6))

    def objective(model: nn.Module, batch: Batch) -> LossAndLogits:
        loss, logits = causal_lm_loss(model, batch)
        return (loss * math.nan if next(calls) == call else loss), logits

    return objective


OPTIMIZER_MAKERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    name: lambda model, name=name: OPTIMIZERS.build(  # type: ignore[misc]
        name, {}, params=parameter_groups(model, 0.1), lr=1e-3, weight_decay=0.1, fused=True
    )
    for name in ("adamw", "lion", "adafactor", "muon")
} | {"adamw not fused": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3, fused=False)}


@pytest.mark.parametrize("name", OPTIMIZER_MAKERS)
def test_non_finite_micro_batch_touches_nothing(tmp_path: Path, name: str) -> None:
    components = build(tmp_path, *PLAIN)
    model, ema = components.model, EMA(components.model, 0.9)
    optimizer = OPTIMIZER_MAKERS[name](model)
    settings = EngineSettings(seed=7, max_grad_norm=1.0)
    engine = engine_for(components, poison(3), ema, optimizer, settings)  # second micro-batch of the second step
    batches = list(islice(components.train_loader.batches(), 3))
    engine.train_step(batches[0], 0)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])
    average = copy.deepcopy(ema.state_dict())
    scalars = engine.train_step(batches[1], 1)
    assert not torch.isfinite(scalars.loss_sum) and engine.guard.skipped() == 1
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    for index, values in optimizer.state_dict()["state"].items():
        for key, value in values.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(state[index][key])), (index, key)
    for key, value in ema.state_dict().items():  # it takes in the unchanged weights once more
        assert torch.allclose(value, torch.lerp(average[key], weights[key], 1 - 3 / 12), atol=1e-7)
    engine.train_step(batches[2], 2)
    assert engine.guard.skipped() == 1
    assert any(not torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_infinite_gradient_of_a_finite_loss_is_skipped_too(tmp_path: Path) -> None:
    components = build(tmp_path, *PLAIN)

    def objective(model: nn.Module, batch: Batch) -> LossAndLogits:
        loss, logits = causal_lm_loss(model, batch)
        zero = next(model.parameters()).sum() * 0
        return loss + zero.sqrt(), logits  # d sqrt(x) / dx is infinite at 0, times 0 is NaN

    engine = engine_for(components, objective)
    before = copy.deepcopy(components.model.state_dict())
    scalars = engine.train_step(next(components.train_loader.batches()), 0)
    assert torch.isfinite(scalars.loss_sum) and not torch.isfinite(scalars.grad_norm)
    assert all(torch.equal(value, before[key]) for key, value in components.model.state_dict().items())


def test_anomaly_detection_names_the_operation(tmp_path: Path) -> None:
    components = build(tmp_path, *PLAIN)

    def objective(model: nn.Module, batch: Batch) -> LossAndLogits:
        loss, logits = causal_lm_loss(model, batch)
        return loss + (next(model.parameters()).sum() * 0).sqrt(), logits

    engine = engine_for(components, objective, settings=EngineSettings(7, None, detect_anomaly=True))
    with (
        pytest.warns(UserWarning, match="Error detected in"),
        pytest.raises(NonFiniteError, match=r"SqrtBackward0|MulBackward0"),
    ):
        engine.train_step(next(components.train_loader.batches()), 0)
    assert not torch.is_anomaly_enabled()


def losses_of(trainer_folder: Path, *overrides: str) -> list[float]:
    build_small_trainer(trainer_folder, *overrides, f"output_dir={trainer_folder / 'runs/t'}").train()
    found = [float(row["loss"]) for row in read_log(trainer_folder) if "loss" in row]
    shutil.rmtree(trainer_folder / "runs/t")
    return found


@pytest.mark.skipif(not has_native_bf16(CPU), reason="this CPU multiplies no bf16")
def test_bf16_on_a_cpu_that_has_it(tmp_path: Path) -> None:
    components = build(tmp_path, "training.mixed_precision=bf16")
    assert components.precision.name == "bf16"
    assert {p.dtype for p in components.model.parameters()} == {torch.float32}
    exact = losses_of(tmp_path, "training.max_steps=6", "training.mixed_precision=none")
    rough = losses_of(tmp_path, "training.max_steps=6", "training.mixed_precision=bf16")
    assert rough == pytest.approx(exact, rel=0.02) and rough != exact


def test_fp16_on_a_cpu_falls_back_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "truthgpt"):
        components = build(tmp_path, "training.mixed_precision=fp16")
    assert components.precision.name == "none"
    assert len(caplog.records) == 1 and "fp16" in caplog.text
    assert [f["used"] for f in components.fallbacks.to_json()] == ["none"]


def test_gradient_checkpointing_gives_the_same_gradients(tmp_path: Path) -> None:
    """With dropout on: what is recomputed must drop the same units."""
    plain, recomputed = (
        one_step_gradient(build(tmp_path, f"model.gradient_checkpointing={on}"), 0)[0] for on in ("false", "true")
    )
    assert_close(recomputed, plain, 1e-6)
    assert build(tmp_path, "model.gradient_checkpointing=true").model.is_gradient_checkpointing


@pytest.mark.soak  # Two minutes of compilation on two cores; tests/runtime/test_compile.py has the quick half.
@pytest.mark.skipif(
    shutil.which("c++") is None and shutil.which("g++") is None, reason="torch.compile needs a compiler"
)
def test_compiled_layers_give_the_same_loss(tmp_path: Path) -> None:
    config = "{model_type: gpt2, n_layer: 1, n_head: 2, n_embd: 16, n_positions: 64}"
    base = (f"model.config={config}", "training.max_steps=3", "training.eval_interval=100", "ema.enabled=false")
    eager = build(tmp_path, *base)
    compiled = build(tmp_path, *base, "training.torch_compile=true")
    assert compiled.fallbacks.to_json() == []
    assert list(compiled.model.state_dict()) == list(eager.model.state_dict())
    assert any(module._compiled_call_impl is not None for module in compiled.model.modules())
    batch: GlobalBatch = next(eager.train_loader.batches())
    losses = []
    for components in (eager, compiled):
        components.model.eval()  # dropout draws other numbers when compiled
        with torch.no_grad():
            losses.append(
                sum(float(causal_lm_loss(components.model, b)[0]) for b in batch.micro_batches) / batch.tokens
            )
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_learning_rate_follows_the_schedule(tmp_path: Path) -> None:
    """Also where an optimizer is a user's own."""
    seen: list[float] = []

    class Recorder(torch.optim.SGD):
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            seen.append(self.param_groups[0]["lr"])

    def build_recorder(params: object, lr: float) -> torch.optim.Optimizer:
        return Recorder(params, lr=lr)  # type: ignore[arg-type]

    with registered(OPTIMIZERS, "recorder", build_recorder):
        shape = ("training.max_steps=10", "training.warmup_ratio=0.2", "training.eval_interval=100")
        build_small_trainer(tmp_path, *PLAIN, *shape, "optimizer.type=recorder").train()
    assert seen == pytest.approx([1e-3 * cosine_factor(step, 10, 2) for step in range(10)])
