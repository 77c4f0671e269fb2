"""The OPTIMIZERS registry; AdamW and Adafactor against float64 transcriptions of their papers."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from pydantic import ValidationError

from truthgpt.errors import ConfigError
from truthgpt.factories.optimizer import OPTIMIZERS
from truthgpt.factories.registry import Availability
from truthgpt.optim.lion import Lion

torch.set_num_threads(1)

Array = npt.NDArray[np.float64]
SHAPES = [(6, 4), (5,), (3, 4, 2), (1, 7), (1,)]


def reference_adamw(
    start: Array, gradients: list[Array], lr: float, weight_decay: float, betas: list[float], eps: float
) -> Array:
    """Loshchilov and Hutter 2019, algorithm 2, with the decay scaled by the learning rate as torch does."""
    theta, m, v = start.copy(), np.zeros_like(start), np.zeros_like(start)
    for t, g in enumerate(gradients, start=1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
        theta = theta - lr * weight_decay * theta - lr * m_hat / (np.sqrt(v_hat) + eps)
    return theta


def reference_adafactor(
    start: Array,
    gradients: list[Array],
    lr: float,
    weight_decay: float,
    eps: list[float | None],
    d: float,
    beta2_decay: float,
) -> Array:
    """Shazeer and Stern 2018, algorithms 4 and 5, with torch's choices: lr caps the relative step, row and column
    statistics are means, eps1 is a floor instead of a summand, decay is by the learning rate."""
    floor = float(np.finfo(np.float64).eps) if eps[0] is None else eps[0]
    scale = eps[1]
    assert scale is not None
    theta = start.copy()
    row = col = v = np.zeros(())
    for t, g in enumerate(gradients, start=1):
        beta2 = 1 - t**beta2_decay
        rho = min(lr, 1 / np.sqrt(t))
        alpha = max(scale, np.sqrt(np.mean(theta**2))) * rho
        theta = theta * (1 - lr * weight_decay)
        if g.ndim > 1:
            row = beta2 * row + (1 - beta2) * np.mean(g**2, axis=-1, keepdims=True)
            col = beta2 * col + (1 - beta2) * np.mean(g**2, axis=-2, keepdims=True)
            v = row * col / np.maximum(np.mean(row, axis=-2, keepdims=True), floor)
        else:
            v = beta2 * v + (1 - beta2) * g**2
        update = g / np.sqrt(np.maximum(v, floor**2))
        update = update / max(1.0, np.sqrt(np.mean(update**2)) / d)
        theta = theta - alpha * update
    return theta


def problem(seed: int, steps: int) -> tuple[list[Array], list[list[Array]]]:
    rng = np.random.default_rng(seed)
    starts = [rng.normal(size=shape) for shape in SHAPES]
    return starts, [[rng.normal(size=shape) * 10 ** rng.uniform(-3, 1) for shape in SHAPES] for _ in range(steps)]


def train(optimizer: torch.optim.Optimizer, parameters: list[torch.Tensor], gradients: list[list[Array]]) -> None:
    for step_gradients in gradients:
        for parameter, gradient in zip(parameters, step_gradients, strict=True):
            parameter.grad = torch.tensor(gradient, dtype=parameter.dtype)
        optimizer.step()


def build(
    name: str, options: dict[str, Any], parameters: list[torch.Tensor], lr: float, decay: float, fused: bool = True
) -> torch.optim.Optimizer:
    groups = [{"params": parameters[:2], "weight_decay": decay}, {"params": parameters[2:], "weight_decay": decay}]
    optimizer = OPTIMIZERS.build(name, options, params=groups, lr=lr, weight_decay=0.9, fused=fused)
    assert isinstance(optimizer, torch.optim.Optimizer)
    return optimizer


def check(
    name: str,
    options: dict[str, Any],
    decay: float,
    lr: float,
    reference: Callable[[Array, list[Array]], Array],
    fused: bool,
) -> None:
    starts, gradients = problem(seed=7, steps=60)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-4)):
        parameters = [torch.tensor(start, dtype=dtype, requires_grad=True) for start in starts]
        train(build(name, options, parameters, lr, decay, fused), parameters, gradients)
        for index, parameter in enumerate(parameters):
            expected = reference(starts[index], [g[index] for g in gradients])
            np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("options", [{}, {"betas": [0.9, 0.95], "eps": 1e-6}])
def test_adamw_matches_the_paper(options: dict[str, Any], decay: float, fused: bool) -> None:
    values: dict[str, Any] = {"betas": [0.9, 0.999], "eps": 1e-8} | options

    def reference(start: Array, gradients: list[Array]) -> Array:
        return reference_adamw(start, gradients, lr=0.01, weight_decay=decay, **values)

    check("adamw", options, decay, 0.01, reference, fused)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("options", [{}, {"d": 2.0, "beta2_decay": -0.5, "eps": [1e-3, 1e-2]}])
def test_adafactor_matches_the_paper(options: dict[str, Any], decay: float) -> None:
    values: dict[str, Any] = {"eps": [None, 1e-3], "d": 1.0, "beta2_decay": -0.8} | options

    def reference(start: Array, gradients: list[Array]) -> Array:
        return reference_adafactor(start, gradients, lr=0.02, weight_decay=decay, **values)

    check("adafactor", options, decay, 0.02, reference, fused=True)


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor"])
def test_state_round_trip_continues_bit_for_bit(name: str) -> None:
    starts, gradients = problem(seed=3, steps=12)

    def fresh() -> tuple[list[torch.Tensor], torch.optim.Optimizer]:
        parameters = [torch.tensor(start, dtype=torch.float32, requires_grad=True) for start in starts]
        return parameters, build(name, {}, parameters, lr=0.01, decay=0.1)

    straight, optimizer = fresh()
    train(optimizer, straight, gradients)
    first, optimizer = fresh()
    train(optimizer, first, gradients[:5])
    second, resumed = fresh()
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with torch.no_grad():
        for old, new in zip(first, second, strict=True):
            new.copy_(old)
    train(resumed, second, gradients[5:])
    assert all(torch.equal(a, b) for a, b in zip(straight, second, strict=True))


@pytest.mark.parametrize("saved_fused", [True, False])
def test_resume_keeps_the_kernel_of_its_own_configuration(saved_fused: bool) -> None:
    starts, gradients = problem(seed=3, steps=3)
    parameters = [torch.tensor(start, dtype=torch.float32, requires_grad=True) for start in starts]
    saved = build("adamw", {}, parameters, lr=0.01, decay=0.1, fused=saved_fused)
    train(saved, parameters, gradients)
    resumed = build("adamw", {}, parameters, lr=0.01, decay=0.1, fused=not saved_fused)
    before = saved.state_dict()
    resumed.load_state_dict(before)
    assert {group["fused"] for group in resumed.param_groups} == {None if saved_fused else True}
    assert {group["fused"] for group in before["param_groups"]} == {True if saved_fused else None}
    train(resumed, parameters, gradients)


def test_lion_is_ours_with_its_options() -> None:
    optimizer = build("lion", {"betas": [0.95, 0.98]}, [torch.ones(2, requires_grad=True) for _ in range(3)], 1e-4, 1.0)
    assert isinstance(optimizer, Lion)
    assert [group["betas"] for group in optimizer.param_groups] == [(0.95, 0.98)] * 2
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1.0] * 2


@pytest.mark.parametrize("fused", [True, False])
def test_muon_takes_the_hidden_matrices_and_adamw_the_rest(fused: bool) -> None:
    matrix, head, bias = (torch.ones(shape, requires_grad=True) for shape in [(4, 6), (5, 4), (3,)])
    groups = [
        {"params": [matrix], "weight_decay": 0.1, "kind": "hidden"},
        {"params": [head], "weight_decay": 0.1, "kind": "matrix"},
        {"params": [bias], "weight_decay": 0.0, "kind": "other"},
    ]
    options = {"betas": [0.8, 0.9], "eps": 1e-6, "momentum": 0.7, "nesterov": False, "ns_steps": 3}
    optimizer = OPTIMIZERS.build("muon", options, params=groups, lr=0.5, weight_decay=0.9, fused=fused)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [
        (0.5, 0.1),
        (0.5, 0.1),
        (0.5, 0.0),
    ]
    muon, adamw, _ = optimizer.param_groups
    assert (muon["momentum"], muon["nesterov"], muon["ns_steps"]) == (0.7, False, 3)
    assert muon["adjust_lr_fn"] == "match_rms_adamw", "one learning rate for both"
    assert (adamw["betas"], adamw["eps"], adamw["fused"]) == ((0.8, 0.9), 1e-6, fused or None)
    for parameter in (matrix, head, bias):
        parameter.grad = torch.randn(parameter.shape)
    optimizer.step()
    assert [sorted(optimizer.state[p]) for p in (matrix, bias)] == [
        ["momentum_buffer"],
        ["exp_avg", "exp_avg_sq", "step"],
    ]


@pytest.mark.parametrize("group", [{}, {"kind": "other"}])
def test_muon_without_a_matrix_to_train_is_refused(group: dict[str, Any]) -> None:
    groups = [{"params": [torch.ones(2, 2, requires_grad=True)], "weight_decay": 0.1, **group}]
    with pytest.raises(ConfigError, match=r"optimizer.type: muon is for the matrices .*use adamw"):
        OPTIMIZERS.build("muon", {}, params=groups, lr=0.5, weight_decay=0.1)


def test_adamw8bit_needs_torchao_and_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = OPTIMIZERS.entry("adamw8bit").probe
    monkeypatch.setitem(sys.modules, "torchao", None)
    assert probe() == Availability(False, "torchao is not installed: pip install 'truthgpt[torchao]'", "adamw")
    there = ModuleType("torchao")
    there.__spec__ = ModuleSpec("torchao", None)
    monkeypatch.setitem(sys.modules, "torchao", there)
    monkeypatch.setenv("CXX", "nowhere++")
    absent = probe()
    assert absent.fallback == "adamw" and "no C++ compiler (nowhere++)" in str(absent.reason)
    monkeypatch.setenv("CXX", sys.executable)
    assert probe().available


def test_schedule_free_needs_its_package_and_nothing_stands_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "schedulefree", None)
    absent = OPTIMIZERS.entry("schedule_free").probe()
    assert not absent.available and absent.fallback is None
    assert "pip install 'truthgpt[schedule_free]'" in str(absent.reason)
    there = ModuleType("schedulefree")
    there.__spec__ = ModuleSpec("schedulefree", None)
    monkeypatch.setitem(sys.modules, "schedulefree", there)
    assert OPTIMIZERS.entry("schedule_free").probe().available


def test_schedule_free_passes_its_options() -> None:
    pytest.importorskip("schedulefree")
    weights = [torch.ones(2, requires_grad=True) for _ in range(3)]
    optimizer = build("schedule_free", {"betas": [0.5, 0.75], "eps": 1e-3}, weights, lr=0.1, decay=0.2)
    group = optimizer.param_groups[0]
    assert (group["betas"], group["eps"], group["lr"], group["weight_decay"]) == ((0.5, 0.75), 1e-3, 0.1, 0.2)


def test_a_group_without_decay_takes_the_run_time_one() -> None:
    for name in ("adamw", "lion", "adafactor"):
        groups = [{"params": [torch.ones(2, requires_grad=True)]}]
        optimizer = OPTIMIZERS.build(name, {}, params=groups, lr=0.5, weight_decay=0.3, fused=True)
        assert optimizer.param_groups[0]["weight_decay"] == 0.3
        assert optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("adamw", {"betas": [0.9]}),
        ("adamw", {"betas": [0.9, 0.95, 0.99]}),
        ("adamw", {"betas": [0.9, 1.0]}),
        ("adamw", {"betas": [-0.1, 0.9]}),
        ("adamw", {"betas": "0.9"}),
        ("adamw", {"eps": -1e-8}),
        ("adamw", {"beta": [0.9, 0.95]}),
        ("muon", {"momentum": 1.0}),
        ("muon", {"ns_steps": 0}),
        ("muon", {"nesterov": 1}),
        ("schedule_free", {"betas": [0.0, 0.9]}),
        ("schedule_free", {"betas": [0.9, 1.0]}),
        ("schedule_free", {"warmup_steps": 10}),
        ("lion", {"eps": 1e-8}),
        ("lion", {"betas": [0.9, None]}),
        ("adafactor", {"eps": [1e-30, None]}),
        ("adafactor", {"d": 0.5}),
        ("adafactor", {"beta2_decay": 0.8}),
    ],
)
def test_refuses_wrong_options(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        build(name, options, [torch.ones(2, requires_grad=True)], lr=0.1, decay=0.0)


def test_importing_the_factories_imports_no_torch() -> None:
    code = "import sys, truthgpt.factories.optimizer, truthgpt.factories.scheduler; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
