"""Ours against one peer on one workload: interleaved, repeated, one record of raw figures.

    python benchmarks/gpu/compare.py w1 --ours tuned --peer hf_trainer:best --out benchmarks/results/w1.jsonl
    python benchmarks/gpu/compare.py w4 --epoch --ours tuned --peer hf_trainer:best --data gsm8k_train.jsonl --out ...

Every run is a process of its own, in the order ours, peer, peer, ours, ours, peer. The ratio is that of the medians
within this one call; never compare figures of two calls. The call ends within `--minutes`: when the next run would not
fit, repeats are left out, and the record says so. The first run of each side finds an empty cache of compiled kernels.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from contender import say
from processes import append_record, compile_cache, gpu_state, run_contender
from workloads import WORKLOADS

SIDES = ("ours", "peer")
SAME_LOSS = 0.005
"""Relative difference of the last losses up to which two runs have learnt the same."""

Record = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the summary, append the record."""
    options = _parse(argv)
    workload = WORKLOADS[options.workload]
    contender, _, peer_variant = options.peer.partition(":")
    if peer_variant == "best":
        peer_variant = workload.hf_best
    forwarded = [*(["--epoch"] if options.epoch else []), *options.overrides]
    for name in ("steps", "data"):
        if getattr(options, name) is not None:
            forwarded = [f"--{name}", str(getattr(options, name)), *forwarded]
    commands = {
        "ours": ("ours", ["--workload", options.workload, "--variant", options.ours, *forwarded]),
        "peer": (contender, ["--workload", options.workload, "--variant", peer_variant, *forwarded]),
    }
    before = gpu_state()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:

        def run(side: str, timeout_s: float) -> Record:
            return run_contender(*commands[side], compile_cache(Path(folder) / side), timeout_s)

        runs, stopped = interleave(run, options.repeats, 60 * options.minutes)
    record = {
        "kind": "epoch" if options.epoch else "compare",
        "workload": options.workload,
        "title": workload.title,
        "ours": options.ours,
        "peer": f"{contender}:{peer_variant}",
        "overrides": options.overrides,
        "repeats": options.repeats,
        "stopped": stopped,
        "gpu": {"before": before, "after": gpu_state()},
        "summary": summarize(runs),
        "runs": runs,
    }
    append_record(options.out, record)
    _say_summary(record)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=sorted(WORKLOADS))
    parser.add_argument("--ours", choices=("default", "tuned"), default="default")
    parser.add_argument(
        "--peer", default="hf_trainer:default", metavar="CONTENDER:VARIANT", help="variant `best`: the sweep's"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=9.0, help="the call ends within this time")
    parser.add_argument("--steps", type=int, help="optimizer steps of a run (default: the workload's)")
    parser.add_argument("--epoch", action="store_true", help="one pass over the documents, timed as a whole")
    parser.add_argument("--data", help="the documents, for a workload that reads a file")
    parser.add_argument("--out", type=Path, required=True, help="file to append the record to")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="what to change in the workload's YAML")
    return parser.parse_intermixed_args(argv)


def interleave(
    run: Callable[[str, float], Record], repeats: int, limit_s: float
) -> tuple[dict[str, list[Record]], str | None]:
    """Run both sides in turn, `repeats` times each, within `limit_s`. When one cannot run, both are tried once.

    Args:
        run: measures a side within a number of seconds.

    Returns:
        The records of each side, and why there are fewer than asked for (None: there are not).
    """
    ends_s = time.perf_counter() + limit_s
    runs: dict[str, list[Record]] = {side: [] for side in SIDES}
    problems: list[str] = []
    for repeat in range(repeats):
        for side in SIDES if repeat % 2 == 0 else reversed(SIDES):
            left_s = ends_s - time.perf_counter()
            needed_s = max((each["wall_s"] for each in runs[side]), default=0.0)
            if needed_s >= left_s:
                return runs, f"{left_s:.0f} s were left, and {side} takes {needed_s:.0f} s"
            say(f"-- {side}, run {repeat + 1} of {repeats}")
            record = run(side, left_s)
            runs[side].append(record)
            if "tokens_per_s" not in record:
                problems.append(f"{side}: {record.get('skipped') or record['failed'] + ': ' + record['said']}")
        if problems:
            break
    return runs, "; ".join(problems) or None


def summarize(runs: dict[str, list[Record]]) -> Record:
    """The figures of both sides beside each other; of runs that failed or were skipped there are none."""
    done = {side: [each for each in runs[side] if "tokens_per_s" in each] for side in SIDES}
    summary: Record = {side: _summarize_side(done[side]) for side in SIDES if done[side]}
    if len(summary) < len(SIDES):
        return summary
    medians = {side: summary[side]["tokens_per_s"]["median"] for side in SIDES}
    pairs = zip(done["ours"], done["peer"], strict=False)
    summary["ratio"] = medians["ours"] / medians["peer"]
    summary["ratios_of_pairs"] = [
        ours["tokens_per_s"]["median"] / peer["tokens_per_s"]["median"] for ours, peer in pairs
    ]
    last = {side: summary[side]["to_last_step_s"]["warm"] or summary[side]["to_last_step_s"]["cold"] for side in SIDES}
    summary["ratio_to_last_step"] = last["peer"] / last["ours"]
    summary["same"] = _compare_work(done["ours"][0], done["peer"][0])
    return summary


def _summarize_side(runs: Sequence[Record]) -> Record:
    speeds = [run["tokens_per_s"]["median"] for run in runs]
    to_first = [run["started_unix_s"] - run["spawned_unix_s"] + run["start"]["to_first_step_s"] for run in runs]
    to_last = [
        first + sum(window["seconds"] for window in run["windows"][1:])
        for first, run in zip(to_first, runs, strict=True)
    ]
    memory = [run["memory"] for run in runs if run["memory"] is not None]
    arithmetic = [run["arithmetic"] for run in runs]
    return {
        "runs": len(runs),
        "tokens_per_s": {"median": statistics.median(speeds), "lowest": min(speeds), "highest": max(speeds)},
        "step_ms": statistics.median(run["step_ms"]["median"] for run in runs),
        "share_of_matmul": statistics.median(each["share_of_matmul"] for each in arithmetic),
        "matmul_flops_per_s": statistics.median(each["matmul"]["flops_per_s"] for each in arithmetic),
        "peak_allocated_bytes": max((each["peak_allocated_bytes"] for each in memory), default=None),
        "peak_reserved_bytes": max((each["peak_reserved_bytes"] for each in memory), default=None),
        "to_first_step_s": _cold_and_warm(to_first),
        "to_last_step_s": _cold_and_warm(to_last),
    }


def _cold_and_warm(seconds: Sequence[float]) -> Record:
    """The first run compiles everything, the later ones find it compiled."""
    return {"cold": seconds[0], "warm": statistics.median(seconds[1:]) if len(seconds) > 1 else None}


def _compare_work(ours: Record, peer: Record) -> Record:
    """Whether both did the same work: supervised tokens of the same samples, and the losses on the way.

    Where samples differ (packed rows, other batches), the tokens of a whole epoch are compared instead, and losses,
    which are then of other batches, are only told.
    """
    counts = {side: run["batches"] for side, run in zip(SIDES, (ours, peer), strict=True)}
    batches = counts["ours"]["samples"] == counts["peer"]["samples"] and peer["same_order"]
    batches = batches and not counts["ours"]["packed"]
    if batches:
        tokens = {side: counts[side]["tokens"] for side in SIDES}
    else:
        tokens = {"ours": ours["epoch_tokens"], "peer": peer["epoch_tokens"]}
    windows = list(zip(ours["windows"], peer["windows"], strict=False))
    differences = [abs(mine["loss"] - theirs["loss"]) / theirs["loss"] for mine, theirs in windows]
    return {
        "batches": batches,
        "tokens_compared": "trained" if batches else "epoch",
        "tokens": tokens,
        "tokens_equal": None if None in tokens.values() else tokens["ours"] == tokens["peer"],
        "largest_loss_difference": max(differences),
        "last_loss_difference": differences[-1],
        "losses_equal": differences[-1] <= SAME_LOSS if batches else None,
    }


def _say_summary(record: Record) -> None:
    """On stdout: the figures that a person looks for."""
    summary = record["summary"]
    for side in SIDES:
        if side in summary:
            speed, start = summary[side]["tokens_per_s"], summary[side]["to_first_step_s"]
            print(
                f"{side} {record[side]}: {speed['median']:,.0f} tokens/s ({speed['lowest']:,.0f} to "
                f"{speed['highest']:,.0f}, {summary[side]['runs']} runs), {summary[side]['share_of_matmul']:.1%} of "
                f"the ceiling, first step after {start['cold']:.1f} s"
            )
    if record["stopped"]:
        print(f"stopped: {record['stopped']}")
    if "ratio" not in summary:
        sys.exit(1)
    same = summary["same"]
    pairs = ", ".join(f"{ratio:.3f}" for ratio in summary["ratios_of_pairs"])
    print(f"ratio {summary['ratio']:.3f} (pairs {pairs})")
    if record["kind"] == "epoch":
        print(f"ratio of the whole epoch, from the start of the process: {summary['ratio_to_last_step']:.3f}")
    equal = {True: "equal", False: "NOT equal", None: "not known"}[same["tokens_equal"]]
    print(f"tokens, {same['tokens_compared']}: {equal} {same['tokens']}")
    losses = f"{same['largest_loss_difference']:.2e} at most, {same['last_loss_difference']:.2e} at the end"
    print(f"losses differ by {losses}{'' if same['batches'] else ' (other batches)'}")


if __name__ == "__main__":
    main()
