"""The tables of the results: Markdown from the raw records.

    python benchmarks/gpu/table.py [FOLDER]     # default: benchmarks/results

Of several records of the same comparison the newest counts. Ratios are those that each call formed within itself.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from processes import read_records

RESULTS = Path(__file__).parents[1] / "results"
GIB = 2**30

Record = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables."""
    arguments = sys.argv[1:] if argv is None else argv
    records = read_records(Path(arguments[0]) if arguments else RESULTS)
    tables: list[tuple[str, str, Callable[[list[Record]], list[str]]]] = [
        ("compare", "Training speed", comparisons),
        ("epoch", "One epoch, from the start of the process to the last step", epochs),
        ("sweep", "Sweep of HF Trainer's variants", sweeps),
        ("level", "What each level of ours gains", levels),
        ("memory", "Predicted and measured peak of a step", memory),
    ]
    for kind, title, rows in tables:
        found = [record for record in records if record["kind"] == kind]
        if found:
            print(f"## {title}\n\n{_devices(found)}\n")
            print("\n".join([*rows(found), ""]))


def comparisons(records: Iterable[Record]) -> list[str]:
    """Rows of the main table."""
    header = ("workload", "ours", "peer", "ours, tokens/s", "peer, tokens/s", "ratio", "share of the ceiling")
    lines = _head(*header, "peak GiB", "first step, s (warm)", "tokens", "loss differs by")
    for record in _newest(records, "workload", "ours", "peer"):
        ours, peer = (record["summary"].get(side) for side in ("ours", "peer"))
        cells = [_title(record), record["ours"], record["peer"], _speed(ours), _speed(peer)]
        if ours is None or peer is None:
            lines.append(_row(*cells, "-", "-", "-", "-", "-", str(record["stopped"])))
            continue
        summary, same = record["summary"], record["summary"]["same"]
        difference = f"{same['last_loss_difference']:.1e}{'' if same['batches'] else ' (other batches)'}"
        lines.append(
            _row(
                *cells,
                f"**{summary['ratio']:.2f}** ({_range(summary['ratios_of_pairs'])})",
                f"{ours['share_of_matmul']:.2f} / {peer['share_of_matmul']:.2f}",
                f"{_gib(ours)} / {_gib(peer)}",
                f"{_seconds(ours['to_first_step_s'])} / {_seconds(peer['to_first_step_s'])}",
                {True: "equal", False: "NOT equal", None: "-"}[same["tokens_equal"]],
                difference,
            )
        )
    return lines


def epochs(records: Iterable[Record]) -> list[str]:
    """Rows of the table of whole epochs."""
    lines = _head("workload", "ours", "peer", "ours, s (warm)", "peer, s (warm)", "ratio", "tokens")
    for record in _newest(records, "workload", "ours", "peer"):
        summary = record["summary"]
        if "ratio_to_last_step" not in summary:
            lines.append(_row(_title(record), record["ours"], record["peer"], "-", "-", "-", str(record["stopped"])))
            continue
        seconds = (_seconds(summary[side]["to_last_step_s"]) for side in ("ours", "peer"))
        equal = {True: "equal", False: "NOT equal", None: "-"}[summary["same"]["tokens_equal"]]
        ratio = f"**{summary['ratio_to_last_step']:.2f}**"
        lines.append(_row(_title(record), record["ours"], record["peer"], *seconds, ratio, equal))
    return lines


def sweeps(records: Iterable[Record]) -> list[str]:
    """Rows of the sweep, each workload's fastest first."""
    lines = _head("workload", "variant", "tokens/s", "share of the ceiling", "peak GiB", "first step, s")
    newest = _newest(records, "workload", "variant")
    for record in sorted(newest, key=lambda each: (each["workload"], -_median_speed(each["run"]))):
        run = record["run"]
        if "tokens_per_s" not in run:
            outcome = run.get("failed") or run["skipped"]
            lines.append(_row(_title(record), record["variant"], outcome, "-", "-", "-"))
            continue
        peak = "-" if run["memory"] is None else f"{run['memory']['peak_allocated_bytes'] / GIB:.1f}"
        speed, share = f"{_median_speed(run):,.0f}", f"{run['arithmetic']['share_of_matmul']:.2f}"
        lines.append(
            _row(_title(record), record["variant"], speed, share, peak, f"{run['start']['to_first_step_s']:.0f}")
        )
    return lines


def levels(records: Iterable[Record]) -> list[str]:
    """Rows of the levels, each workload's in the order they were measured; a gain is over the level before."""
    lines = _head("workload", "level", "tokens/s", "gain", "share of the ceiling", "peak GiB")
    before: dict[str, float] = {}
    newest = {(each["workload"], each["level"]): each for each in records}.values()
    for record in sorted(newest, key=lambda each: str(each["workload"])):
        run, workload = record["run"], str(record["workload"])
        if "tokens_per_s" not in run:
            lines.append(_row(workload, record["level"], run.get("failed") or run["skipped"], "-", "-", "-"))
            continue
        speed, share = _median_speed(run), f"{run['arithmetic']['share_of_matmul']:.2f}"
        gain = f"{speed / before[workload]:.2f}" if workload in before else ""
        peak = "-" if run["memory"] is None else f"{run['memory']['peak_allocated_bytes'] / GIB:.1f}"
        lines.append(_row(workload, record["level"], f"{speed:,.0f}", gain, share, peak))
        before[workload] = speed
    return lines


def memory(records: Iterable[Record]) -> list[str]:
    """Rows of the grid of predicted and measured peaks, and the errors in the middle and at worst."""
    header = ("workload", "tokens a row", "layers computed again", "layers")
    lines = _head(*header, "predicted GiB", "measured GiB", "error")
    errors = []
    for record in _newest(records, "workload", "length", "checkpointed", "compiled"):
        run, predicted = record["run"], record["predicted_bytes"]
        cells = [record["workload"], f"{record['length']:,}", str(record["checkpointed"])]
        cells += ["compiled" if record["compiled"] else "eager", f"{predicted / GIB:.2f}"]
        if run.get("memory") is None:
            lines.append(_row(*cells, str(run.get("failed") or run.get("skipped") or "not measured"), "-"))
            continue
        measured = run["memory"]["peak_allocated_bytes"]
        errors.append(predicted / measured - 1)
        lines.append(_row(*cells, f"{measured / GIB:.2f}", f"{errors[-1]:+.1%}"))
    if errors:
        sizes = sorted(map(abs, errors))
        lines += ["", f"Errors: {statistics.median(sizes):.1%} in the middle, {sizes[-1]:.1%} at worst."]
    return lines


def _newest(records: Iterable[Record], *keys: str) -> list[Record]:
    """The last record of each combination of `keys`, in the order of the keys."""
    found = {tuple(record[key] for key in keys): record for record in records}
    return [found[key] for key in sorted(found)]


def _devices(records: Iterable[Record]) -> str:
    """The devices and versions that the records were made with."""
    runs = [run for record in records for run in _runs(record) if "hardware" in run]
    named = {
        f"{run['hardware']['name']}, torch {run['versions']['torch']}, transformers {run['versions']['transformers']}"
        for run in runs
    }
    return "; ".join(sorted(named)) or "no run ended"


def _runs(record: Record) -> list[Record]:
    return [record["run"]] if "run" in record else [*record["runs"]["ours"], *record["runs"]["peer"]]


def _title(record: Record) -> str:
    """The workload, and whether it was changed for this record."""
    return f"{record['title']}{' (changed)' if record['overrides'] else ''}"


def _median_speed(run: Record) -> float:
    return float(run["tokens_per_s"]["median"]) if "tokens_per_s" in run else 0.0


def _speed(side: Record | None) -> str:
    if side is None:
        return "-"
    speed = side["tokens_per_s"]
    return f"{speed['median']:,.0f} ({speed['lowest']:,.0f} to {speed['highest']:,.0f})"


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


def _gib(side: Record) -> str:
    return "-" if side["peak_allocated_bytes"] is None else f"{side['peak_allocated_bytes'] / GIB:.1f}"


def _seconds(times: Record) -> str:
    return f"{times['cold']:.0f}" if times["warm"] is None else f"{times['cold']:.0f} ({times['warm']:.0f})"


def _head(*names: str) -> list[str]:
    return [_row(*names), _row(*["---"] * len(names))]


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    main()
