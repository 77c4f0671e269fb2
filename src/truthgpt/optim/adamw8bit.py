"""AdamW whose averages are kept in 8 bits (Dettmers et al. 2022, arXiv 2110.02861), by torchao.

It is an extra: this module is imported where it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torchao.optim
from torch import Tensor
from torchao.optim.subclass_8bit import OptimState8bit


class AdamW8bit(torchao.optim.AdamW8bit):  # type: ignore[misc]
    """torchao's AdamW8bit with learning rates that are numbers, and a `state_dict` of plain tensors.

    An average of 4,096 values or more is kept as codes into a table of 256 values (`qmap`), with a scale for every 256
    of them; smaller ones, and those that do not divide into such blocks, stay float32. The step is compiled, once for
    every shape.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's: the learning rate stays the number that it is."""
        rate = param_group.get("lr", self.defaults["lr"])
        super().add_param_group(param_group)
        self.param_groups[-1]["lr"] = rate

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        Args:
            closure: computes the loss again and returns it.

        Returns:
            What `closure` returned.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        rates = [group["lr"] for group in self.param_groups]
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = torch.tensor(rate)  # a number would be compiled in, and again at every change
        try:
            loss: float | None = super().step(closure)
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate
        return loss

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with the parts of a quantised average in its place, by name."""
        whole: dict[str, Any] = super().state_dict()
        state = {index: {name: _plain(value) for name, value in of.items()} for index, of in whole["state"].items()}
        return {**whole, "state": state}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave, in the types it gave: torch would make them those of the weights.

        Raises:
            ValueError: the state is of other parameter groups.
        """
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        for parameter, index in zip(parameters, saved, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                self.state[parameter][name] = _restored(value, parameter, "cpu" if name == "step" else parameter.device)


def _plain(value: Any) -> Any:
    if not isinstance(value, OptimState8bit):
        return value
    return {**{name: getattr(value, name) for name in value.tensor_attrs}, "signed": value.signed}


def _restored(value: Any, parameter: Tensor, device: torch.device | str) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().clone().to(device)
    parts = [value[name].detach().clone().to(device) for name in OptimState8bit.tensor_attrs]
    restored: Tensor = OptimState8bit(*parts, value["signed"], parameter.dtype)
    return restored
