"""Small models with our adapters and with peft's, their losses and gradients, and how far those are apart."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from tests.attention.packed_models import FAMILIES
from transformers import PreTrainedModel

from truthgpt.models.adapted_linear import share_inputs
from truthgpt.models.causal_lm import causal_lm_loss
from truthgpt.models.lora import LoraSettings, Method, add_adapters
from truthgpt.models.trained_weights import adapter_weights

NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
SHAPES = {name: FAMILIES[name] for name in ("llama", "qwen3")} | {"gpt2": {**FAMILIES["gpt2"], **NO_DROPOUT}}
IDS = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(1))


METHODS: tuple[Method, ...] = ("lora", "rslora", "dora")


def settings(
    dropout: float = 0.0, targets: tuple[str, ...] = ("all-linear",), r: int = 4, method: Method = "lora"
) -> LoraSettings:
    return LoraSettings(r=r, alpha=12, dropout=dropout, target_modules=targets, method=method)


def peft_config(wanted: LoraSettings, targets: Any = "all-linear") -> LoraConfig:
    return LoraConfig(
        r=wanted.r,
        lora_alpha=wanted.alpha,
        lora_dropout=wanted.dropout,
        target_modules=targets,
        use_rslora=wanted.method == "rslora",
        use_dora=wanted.method == "dora",
    )


def adapted(model: PreTrainedModel, wanted: LoraSettings, *, trained: bool = True, share: bool = True) -> Any:
    """A copy of `model` with our adapters; `trained` ones change what it computes."""
    model = copy.deepcopy(model)
    add_adapters(model, wanted, None, seed=3)
    generator = torch.Generator().manual_seed(5)
    if trained:
        for name, weight in adapter_weights(model).items():
            noise = torch.randn(weight.shape, generator=generator).to(weight.device) * 0.2
            # Magnitudes are lengths: they stay near those of the base's rows.
            weight.copy_(weight * (1 + noise) if name.endswith("magnitude_vector") else noise)
    if share:
        share_inputs(model, IDS[:1, :8].to(model.device))
    return model


def by_peft(model: PreTrainedModel, ours: Any, wanted: LoraSettings) -> Any:
    """A copy of `model` with peft's own layers, whose adapters have the weights of `ours`."""
    model = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inject_adapter_in_model(peft_config(wanted), model)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.lora_A.float(), module.lora_B.float()
    weights = adapter_weights(ours)
    own = {peft_name(name): value for name, value in model.named_parameters() if "lora_" in name}
    assert own.keys() == weights.keys()
    for name, weight in own.items():
        weight.data.copy_(weights[name])
    return model


def peft_name(name: str) -> str:
    return name.replace(".default.", ".").replace("magnitude_vector.weight", "magnitude_vector")


def loss_and_gradients(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    ids = IDS.to(model.device)
    loss, _ = causal_lm_loss(model.train(), {"input_ids": ids, "labels": ids.roll(-1, dims=1)})
    loss.backward()
    found = {peft_name(name): p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in found) and found
    return loss.detach(), found


def differences(first: Any, second: Any) -> list[float]:
    """Relative, of the loss and of every gradient."""
    (loss, gradients), (other_loss, others) = first, second
    assert gradients.keys() == others.keys()
    pairs = [(loss, other_loss), *((gradients[name], others[name]) for name in gradients)]
    return [float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs]


def error_of_all(found: Any, truth: Any) -> float:
    """Of all gradients as one vector: small ones are differences of large numbers, and mostly noise in bf16."""
    first, second = (torch.cat([g.double().flatten() for _, g in sorted(each[1].items())]) for each in (found, truth))
    return float((first - second).norm() / second.norm())
