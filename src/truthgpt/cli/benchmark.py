"""`truthgpt benchmark`: how fast this machine trains what a configuration describes."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Annotated

import typer

from truthgpt.cli.configuration import AllowPlugins, ConfigArguments, read_config
from truthgpt.cli.output import emit_json, precision_label

if TYPE_CHECKING:
    from truthgpt.benchmark_train import TrainBenchmark

_IMPORTED_S = time.perf_counter()
"""The commands are imported right after Python has started."""
_GIB = 2**30

benchmark_app = typer.Typer(help="Measure speed.", no_args_is_help=True)


@benchmark_app.callback()
def benchmark() -> None:
    """Measure speed."""


@benchmark_app.command("train")
def benchmark_train(
    arguments: ConfigArguments = None,
    steps: Annotated[int, typer.Option(min=8, metavar="N", help="Optimizer steps to take.")] = 40,
    allow_plugins: AllowPlugins = False,
    json_output: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Train the first N steps of a configuration, say how fast they were, and keep nothing."""
    from truthgpt.runtime.run_log import attach_console, detach

    console = attach_console(logging.INFO)
    try:
        config = read_config(arguments or [], allow_plugins)

        from truthgpt.benchmark_train import benchmark_training

        result = benchmark_training(config, steps, _IMPORTED_S)
    finally:
        detach(console)
    if json_output:
        emit_json(result.to_json())
    else:
        _print(result)


def _print(result: TrainBenchmark) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "median", "lowest", "highest", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, spread, pattern in (
        (f"{result.unit}/s", result.tokens_per_s, ",.0f"),
        ("ms a step", result.step_ms, ",.1f"),
    ):
        table.add_row(name, *(format(value, pattern) for value in (spread.median, spread.lowest, spread.highest)))
    console = Console(highlight=False, markup=False)
    console.print(table)
    facts = Table(box=None, pad_edge=False, show_header=False)
    for name, text in _facts(result):
        facts.add_row(name, text)
    console.print("", facts)


def _facts(result: TrainBenchmark) -> list[tuple[str, str]]:
    """What the speed was measured on and with, and what it means: name and text."""
    batches, start, memory = result.batches, result.start, result.memory
    layers, rows = "compiled layers" if result.compiled else "eager", "packed rows" if batches.packed else "rows"
    useful = f" ({batches.tokens / batches.positions:.1%} of the positions)" if result.unit == "tokens" else ""
    parts = f"build {start.build_s:.1f} s, the step itself {start.first_step_s:.1f} s"
    first, last = result.windows[0], result.windows[-1]
    window_steps = max(window.steps for window in result.windows)
    facts = [
        ("device", f"{result.hardware['name']}; {precision_label(result.precision)}, {layers}, {rows}"),
        ("measured", f"{result.steps} steps in windows of {window_steps}, {batches.tokens:,} {result.unit}{useful}"),
        ("start", f"{start.to_first_step_s:.1f} s to the end of step 1: {parts}"),
    ]
    if memory is not None:
        peak, reserved = memory.peak_allocated_bytes / _GIB, memory.peak_reserved_bytes / _GIB
        facts.append(("peak memory", f"{peak:.1f} GiB allocated, {reserved:.1f} GiB reserved"))
    facts += [*_arithmetic_facts(result), ("loss", f"{first.loss:.4f} at first, {last.loss:.4f} in the last window")]
    return [*facts, *(("fallback", f"{f['part']}: {f['used']}, {f['reason']}") for f in result.fallbacks)]


def _arithmetic_facts(result: TrainBenchmark) -> list[tuple[str, str]]:
    """Model FLOPs, and what share they are of what the machine can do."""
    arithmetic, matmul, length = result.arithmetic, result.arithmetic.matmul, result.batches.attention_length
    product = f"{matmul.dtype} matrix product of size {matmul.size:,}, measured after training"
    facts = [("ceiling", f"{_flops(matmul.flops_per_s)}/s: {product}")]
    if arithmetic.flops_per_token is None or arithmetic.flops_per_s is None or arithmetic.share_of_matmul is None:
        return facts
    attention = "" if length is None else f", attention within {length:,.0f} positions"
    each = f"{_flops(arithmetic.flops_per_token)} each{attention}"
    facts.append(("model FLOPs", f"{_flops(arithmetic.flops_per_s)}/s ({each})"))
    shares = f"{arithmetic.share_of_matmul:.1%} of the ceiling"
    if arithmetic.share_of_peak is not None and arithmetic.peak_flops_per_s is not None:
        shares += f", {arithmetic.share_of_peak:.1%} of the data sheet's {_flops(arithmetic.peak_flops_per_s)}/s"
    return [*facts, ("share", shares)]


def _flops(value: float) -> str:
    """With the unit that suits its size."""
    unit, size = ("TFLOP", 1e12) if value >= 1e12 else ("GFLOP", 1e9) if value >= 1e9 else ("MFLOP", 1e6)
    return f"{value / size:,.1f} {unit}"
