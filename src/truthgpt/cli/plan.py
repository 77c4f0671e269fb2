"""`truthgpt plan`: what a run will take, before it is started and without the GPU it is for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from truthgpt.cli.configuration import AllowPlugins, ConfigArguments, read_config
from truthgpt.cli.output import emit_json, precision_label, print_table, say
from truthgpt.cli.sizes import parse_size
from truthgpt.errors import ConfigError, OutOfMemoryError

if TYPE_CHECKING:
    from truthgpt.plan_run import RunPlan

_UNITS = {"GiB": 2**30, "MiB": 2**20}
_GPU = "H100"


def plan(
    arguments: ConfigArguments = None,
    gpu_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Plan for a GPU of this memory, such as 80GiB, not this machine.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(metavar="NAME", help="The GPU whose speed --gpu-memory plans with; default: H100.")
    ] = None,
    allow_plugins: AllowPlugins = False,
    json_output: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Say what a run takes: memory by part, the way its steps are cut up, and time. Nothing is trained or read."""
    if gpu is not None and gpu_memory is None:
        raise ConfigError(f"--gpu is read with --gpu-memory only; give both, such as --gpu {gpu} --gpu-memory 80GiB")
    size = None if gpu_memory is None else parse_size(gpu_memory, "--gpu-memory")
    config = read_config(arguments or [], allow_plugins)

    from truthgpt.plan_run import plan_run

    found = plan_run(config, size, gpu or _GPU)
    if json_output:
        emit_json(found.to_json())
    else:
        _print(found)
    if not found.fits:
        if json_output:
            raise typer.Exit(OutOfMemoryError.exit_code)
        raise OutOfMemoryError(found.problem or "the run as configured does not fit")


def _print(found: RunPlan) -> None:
    trained = f", {found.trainable_parameters:,} trained" if found.trainable_parameters < found.parameters else ""
    again = f", {found.checkpointed_layers} of {found.layers} layers computed again"
    cut = f"{found.grad_accum_steps} x {found.micro_batch_size} samples, {found.tokens_per_step:,} tokens"
    layers = "compiled layers" if found.compiled else "eager"
    unit = "GiB" if found.peak_bytes >= _UNITS["GiB"] else "MiB"
    limit = "" if found.limit_bytes is None else f" of {_amount(found.limit_bytes, 'GiB')} that may be taken"
    lines = [
        ("device", f"{found.device}; {precision_label(found.precision)}, {layers}"),
        ("parameters", f"{found.parameters:,}{trained}"),
        ("a step", f"{cut}{again if found.checkpointed_layers else ''}"),
        ("peak", f"{_amount(found.peak_bytes, unit)}{limit}, at {found.peak_moment}"),
        *([] if found.step_time_s is None else [("time a step", f"{found.step_time_s:.3g} s, about")]),
        *([] if found.run_time_s is None else [("time of the run", f"{_duration(found.run_time_s)}, about")]),
    ]
    width = max(len(name) for name, _ in lines)
    for name, text in lines:
        typer.echo(f"{name:{width}}  {text}")
    typer.echo()
    print_table(
        ("memory", unit, ""),
        [
            (name, f"{size / _UNITS[unit]:7.2f}", "#" * round(40 * size / found.peak_bytes))
            for name, size in found.memory_bytes.items()
            if size
        ],
    )
    typer.echo()
    print_table(
        ("layers computed again", "activations", "peak", "a step", ""),
        [
            (
                str(each.checkpointed_layers),
                _amount(each.activation_bytes, unit),
                _amount(each.peak_bytes, unit),
                "-" if each.step_time_s is None else f"{each.step_time_s:.3g} s",
                "" if each.fits else "does not fit",
            )
            for each in found.checkpointing
        ],
    )
    if found.step_time_s is None:
        from truthgpt.runtime.flops import gpu_names

        say(
            f"time: the speed of {found.device} in {precision_label(found.precision)} is not known; --gpu-memory 80GiB "
            f"--gpu NAME plans for one of these GPUs: {', '.join(gpu_names())}"
        )


def _amount(size_bytes: int, unit: str) -> str:
    return f"{size_bytes / _UNITS[unit]:.2f} {unit}"


def _duration(seconds: float) -> str:
    hours, minutes = seconds / 3600, seconds / 60
    return f"{hours:.1f} h" if hours >= 1 else f"{minutes:.1f} min" if minutes >= 1 else f"{seconds:.0f} s"
