"""AdamW's update of all parameters as one Triton kernel. Imported on a GPU only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl

from truthgpt.optim.adamw_step import Slot, Step

BLOCK = 1024
WARPS = 4
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}


Kind = tuple[torch.dtype, torch.dtype, bool]
"""Types of weight and gradient, and whether there is a float32 copy."""


class Tables:
    """The addresses of a group's tensors on the device, which mostly are those of the step before."""

    def __init__(self) -> None:
        self._last: dict[Kind, tuple[list[list[int]], torch.Tensor]] = {}

    def on_device(self, kind: Kind, rows: list[list[int]], device: torch.device) -> torch.Tensor:
        """`rows` as int64 `(9, tensors)`, sent only when they changed."""
        if kind not in self._last or self._last[kind][0] != rows:
            table = torch.tensor(rows, dtype=torch.int64).T.contiguous().pin_memory()
            self._last[kind] = rows, table.to(device, non_blocking=True)
        return self._last[kind][1]


def update(slots: Sequence[Slot], step: Step, tables: Tables) -> None:
    """Update the parameters of `slots`, which lie on one device.

    One launch for each kind: the kernel finds its tensors by their addresses, so that the hundreds of small ones of a
    model cost no launch each.
    """
    kinds: dict[Kind, dict[int, Slot]] = {}
    for number, slot in enumerate(slots):
        kind = slot.parameter.dtype, slot.gradient.dtype, slot.master is not None
        kinds.setdefault(kind, {})[number] = slot
    for kind, members in kinds.items():
        dtype, gradient_dtype, has_master = kind
        first = next(iter(members.values()))
        device = first.parameter.device
        rows, blocks = _rows(members)
        table = tables.on_device(kind, rows, device)
        with torch.cuda.device(device):
            _adamw[(blocks,)](
                table, len(members), step.corrections, len(slots), step.skip, step.scale,
                step.lr, step.beta1, step.beta2, step.eps, step.weight_decay, step.noise_seed, first.step,
                DTYPE=_TYPES[dtype], GRADIENT_DTYPE=_TYPES[gradient_dtype], HAS_MASTER=has_master,
                STOCHASTIC=step.stochastic and dtype == torch.bfloat16,
                TENSORS=triton.next_power_of_2(len(members)), BLOCK=BLOCK, num_warps=WARPS,
            )  # fmt: skip


def _rows(slots: Mapping[int, Slot]) -> tuple[list[list[int]], int]:
    """What the kernel knows of each tensor, and the number of blocks.

    Addresses of weight, gradient, the two averages and the float32 copy (0: none), number of weights, first
    block, weights of the optimizer before this parameter, and its number among the group's.
    """
    rows: list[list[int]] = []
    blocks = 0
    for number, slot in slots.items():
        master = 0 if slot.master is None else slot.master.data_ptr()
        tensors = (slot.parameter, slot.gradient, slot.exp_avg, slot.exp_avg_sq)
        addresses = (tensor.data_ptr() for tensor in tensors)
        rows.append([*addresses, master, slot.parameter.numel(), blocks, slot.place, number])
        blocks += -(-slot.parameter.numel() // BLOCK)
    return rows, blocks


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _adamw(  # type: ignore[no-untyped-def]
    table, tensors, corrections, slots, skip, scale, lr, beta1, beta2, eps, weight_decay, noise_seed, steps,
    DTYPE: tl.constexpr, GRADIENT_DTYPE: tl.constexpr, HAS_MASTER: tl.constexpr, STOCHASTIC: tl.constexpr,
    TENSORS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if tl.load(skip) != 0:
        return
    block = tl.program_id(0)
    numbers = tl.arange(0, TENSORS)
    firsts = tl.load(table + 6 * tensors + numbers, mask=numbers < tensors, other=2147483647)
    tensor = tl.sum((firsts <= block).to(tl.int32)) - 1
    row = table + tensor
    weight = tl.load(row).to(tl.pointer_type(DTYPE))
    gradient = tl.load(row + tensors).to(tl.pointer_type(GRADIENT_DTYPE))
    exp_avg = tl.load(row + 2 * tensors).to(tl.pointer_type(tl.float32))
    exp_avg_sq = tl.load(row + 3 * tensors).to(tl.pointer_type(tl.float32))
    master = tl.load(row + 4 * tensors).to(tl.pointer_type(tl.float32))
    size = tl.load(row + 5 * tensors)
    places = (block - tl.load(row + 6 * tensors)) * BLOCK + tl.arange(0, BLOCK)
    inside = places < size

    source = master if HAS_MASTER else weight
    values = tl.load(source + places, mask=inside).to(tl.float32)
    g = tl.load(gradient + places, mask=inside).to(tl.float32) / tl.load(scale)
    m = tl.load(exp_avg + places, mask=inside)
    v = tl.load(exp_avg_sq + places, mask=inside)
    m += (g - m) * (1 - beta1)
    v = v * beta2 + g * g * (1 - beta2)
    corrections += tl.load(row + 8 * tensors)
    denominator = tl.sqrt(v) / tl.load(corrections + slots) + eps
    values = values * (1 - lr * weight_decay) - lr / tl.load(corrections) * m / denominator
    tl.store(exp_avg + places, m, mask=inside)
    tl.store(exp_avg_sq + places, v, mask=inside)
    if HAS_MASTER:
        tl.store(master + places, values, mask=inside)
    if STOCHASTIC:
        # As in `adamw.round_stochastically`: noise below the last bit that bf16 keeps carries over into it.
        seed = noise_seed + tl.load(steps).to(tl.int64) * 1000003
        noise = tl.randint(seed, (tl.load(row + 7 * tensors) + places).to(tl.int32)) & 0xFFFF
        bits = (values.to(tl.int32, bitcast=True) + noise) & 0xFFFF0000
        values = bits.to(tl.float32, bitcast=True)
    tl.store(weight + places, values.to(DTYPE), mask=inside)
