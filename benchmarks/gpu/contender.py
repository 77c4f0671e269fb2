"""What every contender has in common: when it started, its arguments, and the one JSON line it prints."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

from workloads import WORKLOADS, Workload

if TYPE_CHECKING:
    from truthgpt.benchmark_train import TrainBenchmark
    from truthgpt.config.schema import Config

# Every contender imports this module before anything heavy.
STARTED_S, STARTED_UNIX_S = time.perf_counter(), time.time()
_PEERS = ("accelerate", "peft", "trl", "liger_kernel", "torchao", "triton")


@dataclass(frozen=True)
class Arguments:
    """What to run. `steps` None: one epoch. `overrides` are `key=value` for the workload's YAML."""

    workload: Workload
    variant: str
    steps: int | None
    overrides: tuple[str, ...]


def parse_arguments(argv: Sequence[str] | None, description: str | None) -> Arguments:
    """The arguments of a contender; exits with code 2 when they are wrong."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=sorted(WORKLOADS), required=True)
    parser.add_argument("--variant", default="default")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: the workload's)")
    parser.add_argument("--epoch", action="store_true", help="one pass over the documents, whatever --steps says")
    parser.add_argument("--data", help="the documents, for a workload that reads a file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="what to change in the workload's YAML")
    given = parser.parse_intermixed_args(argv)
    workload = WORKLOADS[given.workload]
    if workload.needs_data and given.data is None:
        parser.error(f"{workload.name} reads a file: give it with --data")
    data = (f"data.path={given.data}",) if workload.needs_data else ()
    steps = None if given.epoch else given.steps or workload.steps
    return Arguments(workload, given.variant, steps, (*data, *given.overrides))


def load(arguments: Arguments, overrides: Sequence[str]) -> Config:
    """The workload's configuration with `overrides`; a later one wins."""
    from truthgpt.validate_config import load_config

    return load_config(str(arguments.workload.yaml), overrides)


def print_record(contender: str, arguments: Arguments, result: TrainBenchmark, **more: Any) -> None:
    """The one line on stdout: what was run, and what was measured."""
    import torch

    record: dict[str, Any] = {"contender": contender, "workload": arguments.workload.name}
    # Not where the documents lie on this machine.
    overrides = [each for each in arguments.overrides if not each.startswith("data.path=")]
    record |= {"variant": arguments.variant, "overrides": overrides, "started_unix_s": STARTED_UNIX_S}
    record |= {**more, **result.to_json()}
    record["versions"] |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    for name in _PEERS:
        try:
            record["versions"][name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    print(json.dumps(record), flush=True)


def print_skipped(contender: str, arguments: Arguments, reason: str) -> None:
    """The one line on stdout of a contender that cannot run here."""
    record = {"contender": contender, "workload": arguments.workload.name, "variant": arguments.variant}
    print(json.dumps({**record, "skipped": reason}), flush=True)


def say(text: str) -> None:
    """A line for people, on stderr."""
    print(text, file=sys.stderr, flush=True)
