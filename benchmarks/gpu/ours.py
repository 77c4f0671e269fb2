"""Contender: what `truthgpt benchmark train` measures, for the variant `default` or `tuned` of a workload.

python benchmarks/gpu/ours.py --workload w1 --variant default
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from contender import STARTED_S, load, parse_arguments, print_record, print_skipped
from documents import loader_epoch_tokens


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print the record."""
    arguments = parse_arguments(argv, __doc__)

    from truthgpt.errors import ConfigError
    from truthgpt.runtime.run_log import attach_console, detach

    console = attach_console(logging.INFO)
    try:
        config = load(arguments, [*arguments.workload.ours(arguments.variant), *arguments.overrides])

        from truthgpt.benchmark_train import benchmark_training

        result = benchmark_training(config, arguments.steps, STARTED_S)
    except ConfigError as error:
        reasons = "; ".join(f"{problem.key}: {problem.message}" for problem in error.problems)
        print_skipped("ours", arguments, f"not supported: {reasons}")
        return
    finally:
        detach(console)
    print_record("ours", arguments, result, epoch_tokens=loader_epoch_tokens(config, result.batches.packed))


if __name__ == "__main__":
    main()
