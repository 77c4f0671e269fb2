"""What a forward pass keeps for the backward pass, counted on a model without storage: no weight is made, nothing is
computed, and no GPU is needed.

The model runs on fake tensors, which have shapes and types only, and every tensor that autograd saves is counted once.
Compiled layers are cut into forward and backward by the same partitioner as in training, so what it chooses to compute
again is not counted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, library, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from truthgpt.attention.install import install_attention
from truthgpt.models.output_head import last_hidden_states
from truthgpt.runtime.compile import decoder_layers

ROWS = 1009
"""Rows of the micro-batch that is counted. It costs nothing to have many, and of this prime number no weight's size is
a multiple: what is, has all the rows."""


@dataclass(frozen=True)
class Activations:
    """Bytes kept for the backward pass. `..._row` are for every row of a micro-batch, the others for a micro-batch."""

    outside_row: float
    """Outside the decoder layers: embeddings, the last norm."""
    outside: float
    layer_row: float
    """In one decoder layer, the mean of all."""
    layer: float
    """The same: casts of its weights."""
    layer_input_row: float
    """What a layer keeps that is computed again in the backward pass: its input."""
    widest_row: float
    """The largest tensor that a layer keeps."""


def fake_model(build: Callable[[], PreTrainedModel]) -> tuple[FakeTensorMode, PreTrainedModel]:
    """What `build` makes, without storage, and the mode in which it can be run."""
    with torch.device("meta"):
        model = build()
    # Tensors on "meta" have no device to compute for, which autocast and others ask about.
    mode = FakeTensorMode()
    made: dict[Tensor, Tensor] = {}  # a tied weight stays one
    with mode:
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        made[tensor] = made[tensor] if tensor in made else _without_storage(tensor)
                        tensors[name] = made[tensor]
    return mode, model


def _without_storage(tensor: Tensor) -> Tensor:
    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
    return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


def measure_activations(
    mode: FakeTensorMode, model: PreTrainedModel, length: int, half_precision: bool, compiled: bool
) -> Activations:
    """Count what one training forward pass of `model` keeps.

    Args:
        mode, model: from `fake_model`; the parameters in the types they are trained in.
        length: tokens a row.
        half_precision: products are computed in bf16 or fp16, by autocast or since the weights are in it.
        compiled: the decoder layers are compiled.

    Raises:
        RuntimeError, NotImplementedError: an operation of the model depends on values, which fake tensors do not have.
    """
    layers = _layer_list(model)
    count = len(layers)
    autocast = half_precision and any(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    with ExitStack() as stack:
        stack.enter_context(mode)
        stack.enter_context(one_line_an_error())
        stack.enter_context(_counted_attention(model))
        if autocast:
            stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
        if compiled:
            stack.enter_context(_compiled(list(layers)))
        elif autocast:
            stack.enter_context(_CudaAutocast())
        whole = _saved(model, length)
        with _without(layers):
            outside = _saved(model, length)
    return Activations(
        outside_row=outside.row,
        outside=outside.constant,
        layer_row=(whole.row - outside.row) / count,
        layer=(whole.constant - outside.constant) / count,
        layer_input_row=whole.hidden_row,
        widest_row=whole.widest_row,
    )


@dataclass(frozen=True)
class _Saved:
    """Bytes of a forward pass for every row, whatever the rows, of the largest tensor and of the hidden states."""

    row: float
    constant: int
    widest_row: float
    hidden_row: float


def _saved(model: PreTrainedModel, length: int) -> _Saved:
    own = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in own:
            saved.setdefault(_storage(tensor), tensor)  # kept, so that no storage takes another's place
        return tensor

    ids = torch.zeros((ROWS, length), dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = last_hidden_states(model.train(), input_ids=ids)
    sizes = [tensor.untyped_storage().nbytes() for tensor in saved.values()]
    rows = [size / ROWS for size in sizes if size % ROWS == 0]
    constant = sum(size for size in sizes if size % ROWS)
    return _Saved(sum(rows), constant, max(rows, default=0.0), hidden.untyped_storage().nbytes() / ROWS)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _layer_list(model: nn.Module) -> nn.ModuleList:
    layers = decoder_layers(model)
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and list(m) == layers)


@contextmanager
def _without(layers: nn.ModuleList) -> Iterator[None]:
    kept = list(layers)
    del layers[:]
    try:
        yield
    finally:
        layers.extend(kept)


@contextmanager
def one_line_an_error() -> Iterator[None]:
    """torch logs the frames of an operation that fake tensors cannot do, which whoever counts says in one line."""
    torchs_own = logging.getLogger("torch._subclasses.fake_tensor")
    level = torchs_own.level
    torchs_own.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        torchs_own.setLevel(level)


@contextmanager
def _compiled(layers: list[nn.Module]) -> Iterator[None]:
    """Layers cut and decomposed as for Inductor, and run operation by operation."""
    for layer in layers:
        layer.compile(backend="aot_eager_decomp_partition", dynamic=False)
    try:
        yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None
        torch._dynamo.reset()  # what was compiled for fake tensors is of no use to the run


@contextmanager
def _counted_attention(model: PreTrainedModel) -> Iterator[None]:
    """The model attends through a stand-in that saves what our GPU kernels do: no mask, no scores."""
    own = str(model.config._attn_implementation)
    if not model._supports_attention_backend or own == "eager":
        yield
        return
    model.set_attn_implementation(install_attention("counted", _attend))
    try:
        yield
    finally:
        model.set_attn_implementation(own)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **more: Any,
) -> tuple[Tensor, None]:
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    output, _ = _counted(query.to(dtype), key.to(dtype), value.to(dtype))
    return output.transpose(1, 2), None


@library.custom_op("truthgpt::counted_attention", mutates_args=())
def _counted(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of an attention that is never computed."""
    raise NotImplementedError("it stands for attention where tensors have no values")


@_counted.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    rows, heads, length, _ = query.shape
    # As the kernels lay it out: for the output projection it is no copy.
    output = query.new_empty(rows, length, heads, value.shape[-1]).transpose(1, 2)
    return output, query.new_empty(rows, heads, length, dtype=torch.float32)


@library.custom_op("truthgpt::counted_attention_backward", mutates_args=())
def _counted_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, log_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    raise NotImplementedError("it stands for attention where tensors have no values")


@_counted_backward.register_fake
def _(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, log_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, ...]:
    gradients: tuple[Tensor, ...] = _counted_backward(gradient, *ctx.saved_tensors)
    return gradients


_counted.register_autograd(_backward, setup_context=_keep)


class _CudaAutocast(TorchFunctionMode):
    """What autocast does on a GPU and not on a CPU, where fake tensors are: powers are computed in float32."""

    _POWERS = (torch.pow, Tensor.pow, Tensor.__pow__)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See `TorchFunctionMode`."""
        if func in self._POWERS and isinstance(args[0], Tensor):
            args = (args[0].float(), *args[1:])
        return func(*args, **(kwargs or {}))
