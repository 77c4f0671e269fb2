"""Adapters on a GPU: no float32 copy of the base, whole compiled layers, no waiting in a step, exact resume."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from tests.attention.packed_models import model_of
from tests.compiled_graphs import count_graphs_after_the_plan
from tests.gpu.gpu_runs import (
    LLAMA,
    LOSS_NOISE,
    PACKED,
    PACKED_ROWS,
    gpu_trainer,
    losses,
    needs_compiler,
    pretrained_llama,
    train_straight_and_resumed,
)
from tests.models.adapted_models import SHAPES, adapted, by_peft, error_of_all, loss_and_gradients, settings
from tests.test_resume import equal, final_checkpoint
from torch._dynamo.utils import counters

from truthgpt.load_model import load_model
from truthgpt.models.causal_lm import build_causal_lm
from truthgpt.models.lora import Method
from truthgpt.models.quantized_base import is_quantized
from truthgpt.models.tokenizer import byte_tokenizer
from truthgpt.models.trained_weights import adapter_weights
from truthgpt.runtime.compile import decoder_layers
from truthgpt.runtime.precision import hold_frozen_in_bf16

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
LORA = ("model.lora.enabled=true", "model.lora.dropout=0.0", "training.mixed_precision=bf16")
NF4 = "model.lora.quantization=nf4"
DORA = "model.lora.method=dora"
COMPILED = "training.torch_compile=true"
BIG = (
    "{model_type: llama, hidden_size: 1024, intermediate_size: 4096, num_hidden_layers: 12, num_attention_heads: 16, "
    "num_key_value_heads: 16, max_position_embeddings: 64}"
)
"""202 million weights: 0.4 GB in bf16, 0.8 GB in float32; a layer has 17 million."""


@pytest.mark.parametrize("data", [(), PACKED_ROWS], ids=["joined", "packed"])
def test_learns_as_on_a_cpu(tmp_path: Path, data: tuple[str, ...]) -> None:
    chosen = ("model.lora.enabled=true", "model.lora.dropout=0.0", "training.learning_rate=3e-3")
    base = pretrained_llama(tmp_path)
    exact = losses(tmp_path, "cpu", *chosen, *base, *data, "training.mixed_precision=none", "hardware.device=cpu")
    rough = losses(tmp_path, "gpu", *chosen, *base, *data, "training.mixed_precision=bf16")
    assert exact[-1] < exact[0] - 0.1
    assert rough == pytest.approx(exact, rel=LOSS_NOISE)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)])
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("family", SHAPES)
def test_gradients_are_pefts(family: str, method: Method, compiled: bool) -> None:
    base, wanted = model_of(SHAPES[family], "sdpa").to(DEVICE), settings(method=method)
    hold_frozen_in_bf16(base.requires_grad_(False))
    ours = adapted(base, wanted)
    for name, weight in adapter_weights(ours).items():
        weight.mul_(1.0 if name.endswith("magnitude_vector") else 0.25)
    theirs, exact = by_peft(base, ours, wanted), by_peft(base.float(), ours, wanted)
    if compiled:
        for layer in decoder_layers(ours):
            layer.compile(fullgraph=True, dynamic=False)
    truth = loss_and_gradients(exact)
    own, peft = (error_of_all(loss_and_gradients(model), truth) for model in (ours, theirs))
    assert own < 1.5 * peft and own < 0.03


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)])
def test_base_is_never_in_float32(tmp_path: Path, compiled: bool) -> None:
    """Made, probed, compiled and trained on in about two bytes a weight and what a layer takes."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    trainer = gpu_trainer(
        tmp_path, "run", *LORA, f"model.config={BIG}", f"training.torch_compile={str(compiled).lower()}"
    )
    model = trainer.parts.engine.model
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert frozen > 200e6 and {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    built = torch.cuda.max_memory_allocated() - before
    layer = 17e6 * 4  # and the workspaces of the products, which an earlier test may have left there or not
    assert built < 2 * frozen + 8 * trained + layer + 150e6, f"{built / frozen:.2f} bytes a weight"
    for step, batch in enumerate(islice(trainer.parts.loader.batches(), 3)):
        trainer.parts.engine.train_step(batch, step)
    held = torch.cuda.memory_allocated() - before
    assert held < 2 * frozen + 20 * trained + 80e6, f"{held / frozen:.2f} bytes a weight after a step"


@needs_compiler
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    "data",
    [(f"model.config={LLAMA}",), PACKED, (*PACKED, DORA), (), (DORA,)],
    ids=["joined", "packed", "packed dora", "gpt2", "gpt2 dora"],
)
def test_whole_layers_are_compiled_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: tuple[str, ...], accumulation: int
) -> None:
    count_graphs_after_the_plan(monkeypatch)
    chosen = (*LORA, COMPILED, *data, f"training.grad_accum_steps={accumulation}")
    trainer = gpu_trainer(tmp_path, "run", *chosen)
    assert json.loads((tmp_path / "run/environment.json").read_text())["fallbacks"] == []
    assert not counters["graph_break"], counters["graph_break"]
    batches = list(islice(trainer.parts.loader.batches(), 6))
    trainer.parts.engine.train_step(batches[0], 0)
    graphs = counters["stats"]["unique_graphs"]
    assert 1 <= graphs <= 2, "one for the first layer, whose input needs no gradient, one for the others"
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step, batch in enumerate(batches[1:], 1):
            trainer.parts.engine.train_step(batch, step)
    assert counters["stats"]["unique_graphs"] == graphs


@needs_compiler
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_losses_are_those_of_operations(tmp_path: Path, mode: str) -> None:
    chosen = (*LORA, f"model.config={LLAMA}", "training.learning_rate=3e-3")
    eager = losses(tmp_path, "eager", *chosen, "training.torch_compile=false")
    compiled = losses(tmp_path, "compiled", *chosen, COMPILED, f"training.compile_mode={mode}")
    assert eager[-1] < eager[0] - 0.1 and compiled == pytest.approx(eager, rel=LOSS_NOISE)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_step_never_waits_for_the_device(tmp_path: Path, dropout: float, method: str) -> None:
    chosen = (f"model.lora.dropout={dropout}", f"model.lora.method={method}")
    trainer = gpu_trainer(tmp_path, "run", *LORA, *chosen, *PACKED)
    engine = trainer.parts.engine
    batches = list(islice(trainer.parts.loader.batches(), 6))
    for step, batch in enumerate(batches[:3]):
        engine.train_step(batch, step)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step, batch in enumerate(batches[3:], 3):
            engine.train_step(batch, step)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_resume_is_exact_in_deterministic_mode(tmp_path: Path, method: str) -> None:
    shape = (
        *LORA,
        "model.lora.dropout=0.1",
        f"model.lora.method={method}",
        "hardware.deterministic=true",
        "training.eval_interval=20",
    )
    train_straight_and_resumed(tmp_path, *shape)
    equal(*(final_checkpoint(tmp_path / name, 40) for name in ("straight", "resumed")))


def test_model_of_a_gpu_is_used_on_a_cpu(tmp_path: Path) -> None:
    """The base that the run made on the GPU is saved, and is the one its checkpoints are of."""
    gpu_trainer(tmp_path, "run", *LORA, f"model.config={LLAMA}", "training.max_steps=3").train()
    ids = torch.tensor([list(b"the cat")])
    logits = [
        load_model(tmp_path / name, torch.device("cpu")).model(input_ids=ids).logits
        for name in ("run", "run/checkpoints/last.pt")
    ]
    assert torch.equal(*logits)


def test_random_base_depends_on_the_seed_only() -> None:
    architecture = model_of(SHAPES["llama"]).config
    made = []
    for seed in (1, 1, 2):
        before = torch.cuda.get_rng_state()
        with DEVICE:
            made.append(build_causal_lm(architecture, "sdpa", seed, torch.bfloat16))
        assert torch.equal(torch.cuda.get_rng_state(), before)
    weights = [next(model.parameters()) for model in made]
    assert weights[0].is_cuda and weights[0].dtype == torch.bfloat16
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def tokens_added(folder: Path) -> tuple[str, ...]:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(folder / "chat_tokenizer")
    return (f"model.tokenizer={{type: path, path: {folder / 'chat_tokenizer'}}}",)


@pytest.mark.parametrize("graph", ["default", pytest.param("reduce-overhead", marks=needs_compiler)])
def test_new_tokens_learn_as_on_a_cpu(tmp_path: Path, graph: str) -> None:
    chosen = (*LORA, *pretrained_llama(tmp_path), *tokens_added(tmp_path), "training.learning_rate=3e-3")
    on_cpu = ("training.mixed_precision=none", "hardware.device=cpu")
    compiled = (COMPILED, f"training.compile_mode={graph}") if graph != "default" else ()
    exact = losses(tmp_path, "cpu", *chosen, *on_cpu)
    assert losses(tmp_path, "gpu", *chosen, *compiled) == pytest.approx(exact, rel=LOSS_NOISE)


class TestFourBits:
    """A base in NF4; needs bitsandbytes."""

    @pytest.fixture(autouse=True)
    def _package(self) -> None:
        pytest.importorskip("bitsandbytes")

    @pytest.mark.parametrize("compiled", ["false", pytest.param("true", marks=needs_compiler)])
    def test_learns_as_on_a_cpu(self, tmp_path: Path, compiled: str) -> None:
        chosen = (*LORA, *pretrained_llama(tmp_path), NF4, "training.learning_rate=3e-3")
        exact = losses(tmp_path, "cpu", *chosen, "training.mixed_precision=none", "hardware.device=cpu")
        rough = losses(tmp_path, "gpu", *chosen, f"training.torch_compile={compiled}")
        assert exact[-1] < exact[0] - 0.1 and rough == pytest.approx(exact, rel=LOSS_NOISE)

    def test_base_takes_half_a_byte_a_weight(self, tmp_path: Path) -> None:
        trainer = gpu_trainer(tmp_path, "run", *LORA, *pretrained_llama(tmp_path), NF4)
        layers = [m for m in trainer.parts.engine.model.modules() if is_quantized(m)]
        held = sum(m.weight.nbytes for m in layers)
        assert layers and held * 2 == sum(m.in_features * m.out_features for m in layers)
        assert all(m.weight.is_cuda for m in layers)

    def test_resume_is_exact_in_deterministic_mode(self, tmp_path: Path) -> None:
        shape = (*LORA, *pretrained_llama(tmp_path), NF4, "hardware.deterministic=true", "training.eval_interval=20")
        train_straight_and_resumed(tmp_path, *shape)
        equal(*(final_checkpoint(tmp_path / name, 40) for name in ("straight", "resumed")))
