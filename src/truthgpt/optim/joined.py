"""Several optimizers, each for its own parameters, as one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from truthgpt.runtime.precision import OptimizerStep


class Joined(torch.optim.Optimizer):
    """Optimizers that step together: their parameter groups in a row, one state, one `state_dict`.

    The groups are those of the parts, so that a learning rate set here is the part's. A step that `found_inf` forbids
    is skipped by each part as it can, see `OptimizerStep`.

    Args:
        parts: no parameter is in two of them. From now on they are stepped and loaded here only.
    """

    # torch's name for an optimizer that honours `found_inf` and `grad_scale` by itself.
    _step_supports_amp_scaling = True

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._parts = parts
        self._guarded_step = OptimizerStep()
        self._share()

    def _share(self) -> None:
        self.param_groups = [group for part in self._parts for group in part.param_groups]
        self.state = defaultdict(dict, chain.from_iterable(part.state.items() for part in self._parts))
        for part in self._parts:
            part.state = self.state

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step every part.

        Args:
            closure: computes the loss again and returns it.

        Returns:
            What `closure` returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        skip: Tensor | None = getattr(self, "found_inf", None)
        for part in self._parts:
            if skip is None:
                part.step()
            else:
                self._guarded_step(part, skip, getattr(self, "grad_scale", None))
        return loss

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave; every part loads its own share, in its own way.

        Raises:
            ValueError: the state is of other parameter groups.
        """
        groups = list(state_dict["param_groups"])
        if len(groups) != len(self.param_groups):
            raise ValueError(f"it has {len(groups)} parameter groups, this optimizer {len(self.param_groups)}")
        for part in self._parts:
            own, groups = groups[: len(part.param_groups)], groups[len(part.param_groups) :]
            members = {index for group in own for index in group["params"]}
            state = {index: values for index, values in state_dict["state"].items() if index in members}
            part.load_state_dict({"state": state, "param_groups": own})
        self._share()
