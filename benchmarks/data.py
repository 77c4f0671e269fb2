"""What the data path costs: tokenising, loading, packing, start-up and going on with a stream, each against its goal.

    python benchmarks/data.py [--only SECTION] [--pairs 3] [--json]
    python benchmarks/data.py --only packing --rows gsm8k_train.jsonl --prompt-field question --completion-field answer
    python benchmarks/data.py --mb 2 --batches 100 --text-mb 2 --stream-steps 2000 --pairs 1    # a quick look

Needs Linux (it reads /proc) and `pip install 'truthgpt[hf]'`. Every measurement is a process of its own (the two
loaders take turns in one), timed behind its imports. What is compared alternates (ours first in even pairs, second in
odd ones), and each pair gives one ratio, so a machine that slows down slows both; shown are medians. The corpus is the
source of Python's standard library, cut at other places whenever it is repeated. Sections:

tokenise: JSON Lines to tokens on disk in two processes, against `datasets.map(batched=True, num_proc=2)` with the same
    tokenizer. `from rows` is tokenising alone; `from the file` has what comes before too: the index of the documents
    here, the Arrow table there. Both must find the same number of tokens.
loader: blocks of 512 tokens in batches of 8, shuffled, against a torch DataLoader over the same memory-mapped file.
packing: share of the positions that hold a token, as `truthgpt inspect` tells it, and the shapes a pass really has.
startup: from the imports to the first batch of a large text, tokens in the cache (cold: the very first start).
stream: the first batch of a new run against one that goes on late in the stream.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import data_measurements
from data_measurements import Work, corpus, write_corpus, write_lines


@dataclass(frozen=True)
class Figure:
    """One line of the table; `met` is None where there is no goal."""

    section: str
    name: str
    value: float
    goal: str = ""
    met: bool | None = None
    detail: str = ""


def alternate(work: Work, ours: str, other: str, caches: Sequence[str]) -> list[dict[str, Any]]:
    """Both measurements, pair by pair; `caches` are those of the two, "" for one of its own each time."""
    pairs = []
    for pair in range(work.pairs):
        sides = {"ours": (ours, caches[0]), "other": (other, caches[1])}
        found = {}
        for side in ("ours", "other") if pair % 2 == 0 else ("other", "ours"):
            name, cache = sides[side]
            found[side] = data_measurements.measure(name, work, cache or f"cache-{name}-{pair}")
        print(f"pair {pair + 1}: {json.dumps(found)}", file=sys.stderr)
        pairs.append(found)
    return pairs


def _ratio(section: str, name: str, pairs: Sequence[dict[str, float]], goal: float | None, unit: str) -> Figure:
    """Median of the ratios of the pairs, and of each side."""
    ratio = statistics.median(pair["ours"] / pair["other"] for pair in pairs)
    ours, other = (statistics.median(pair[side] for pair in pairs) for side in ("ours", "other"))
    detail = f"{ours:,.1f} against {other:,.1f} {unit}"
    if goal is None:
        return Figure(section, f"{name}, ratio", ratio, detail=detail)
    return Figure(section, f"{name}, ratio", ratio, f">= {goal}", ratio >= goal, detail)


def tokenise_section(work: Work) -> list[Figure]:
    """Megabytes of text a second against `datasets.map`."""
    write_corpus(work)
    pairs = alternate(work, "tokenise_ours", "tokenise_map", ("", ""))
    if any(pair["ours"]["tokens"] != pair["other"]["tokens"] for pair in pairs):
        sys.exit("the two tokenised differently")
    figures = []
    for name, parts, goal in (("from rows", ["tokenise_s"], 1.0), ("from the file", ["before_s", "tokenise_s"], None)):
        sides = [{side: work.mb / sum(found[part] for part in parts) for side, found in pair.items()} for pair in pairs]
        figures.append(_ratio("tokenise", name, sides, goal, "MB/s"))
    return figures


def loader_section(work: Work) -> list[Figure]:
    """Samples a second against a torch DataLoader."""
    found = data_measurements.measure("load_samples", work, "cache")
    return [_ratio("loader", name, pairs, 0.9, "samples/s") for name, pairs in found.items()]


def packing_section(work: Work) -> list[Figure]:
    """Useful tokens of padding, bucketing and packing."""
    figures = []
    for name, way in data_measurements.measure("fill_batches", work, "cache").items():
        detail = f"{way['shapes']} shapes, {way['steps']} steps, {way['mean_tokens']:.0f} tokens a row"
        packs = name.startswith("packing")
        met = way["share"] >= 0.97 and way["shapes"] == 1 if packs else None
        figures.append(Figure("packing", name, way["share"], ">= 0.97, 1 shape" if packs else "", met, detail))
    return figures


def startup_section(work: Work) -> list[Figure]:
    """First batch of a large text: the very first start, and later ones."""
    write_corpus(work)
    write_lines(work.folder / "large.txt", corpus(work.text_mb))
    cold = data_measurements.measure("start_up", work, "cache")
    warm = [data_measurements.measure("start_up", work, "cache") for _ in range(work.pairs)]
    seconds, total, own = (statistics.median(run[key] for run in warm) for key in ("seconds", "total_mb", "own_mb"))
    return [
        Figure("startup", "warm, s", seconds, "< 2", seconds < 2),
        Figure("startup", "warm, peak MB", total, "< 500", total < 500, f"{own:.0f} MB without mapped files"),
        Figure("startup", "cold, s", cold["seconds"], detail=f"{work.text_mb / cold['seconds']:.2f} MB/s"),
        Figure("startup", "cold, peak MB", cold["total_mb"], detail=f"{cold['own_mb']:.0f} MB without mapped files"),
    ]


def stream_section(work: Work) -> list[Figure]:
    """First batch of a stream, new and going on."""
    rows = ((json.dumps({"text": f"{index} {text[:200]}"}) + "\n") for index, text in enumerate(corpus(2**40)))
    write_lines(work.folder / "stream.jsonl", islice(rows, round(1.2 * work.stream_steps) + 100))
    reached = data_measurements.measure("reach_step", work, "cache")
    pairs = alternate(work, "stream_fresh", "stream_resumed", ("cache", "cache"))
    if any(pair["other"]["ids"] != reached["ids"] for pair in pairs):
        sys.exit("the stream does not go on with the batch that comes next")
    fresh, resumed = (statistics.median(pair[side]["seconds"] for pair in pairs) for side in ("ours", "other"))
    later = statistics.median(pair["other"]["seconds"] - pair["ours"]["seconds"] for pair in pairs)
    detail = f"fresh {fresh:.2f} s, at step {work.stream_steps:,} {resumed:.2f} s"
    speed = work.stream_steps / reached["seconds"]
    return [
        Figure("stream", "resumed - fresh, s", later, "< 1", later < 1, detail),
        Figure("stream", "steps/s on the way there", speed, detail=f"{reached['seconds']:.0f} s"),
    ]


SECTIONS = {
    "tokenise": tokenise_section,
    "loader": loader_section,
    "packing": packing_section,
    "startup": startup_section,
    "stream": stream_section,
}


def versions() -> dict[str, str]:
    """What the figures depend on."""
    names = ("torch", "transformers", "tokenizers", "datasets", "numpy")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in names},
        "cores": str(os.cpu_count()),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SECTIONS, action="append", help="one section; repeatable")
    parser.add_argument("--pairs", type=int, default=3, help="how often each comparison is made")
    parser.add_argument("--mb", type=float, default=50, help="text to tokenise")
    parser.add_argument("--vocab-size", type=int, default=8192, help="tokens of the trained tokenizer")
    parser.add_argument("--batches", type=int, default=1500, help="batches each loader gives")
    parser.add_argument("--rows", help="JSON Lines file to pack; default: rows with the lengths of GSM8K's")
    parser.add_argument("--prompt-field", default="prompt")
    parser.add_argument("--completion-field", default="completion")
    parser.add_argument("--text-mb", type=float, default=1000, help="text to start up with")
    parser.add_argument("--stream-steps", type=int, default=100_000, help="where the stream goes on")
    parser.add_argument("--json", action="store_true", dest="as_json")
    options = parser.parse_args(arguments)
    names = [name for name in Work.__annotations__ if name != "folder"]
    with tempfile.TemporaryDirectory() as folder:
        work = Work(Path(folder), **{name: getattr(options, name) for name in names})
        figures = [figure for name in options.only or SECTIONS for figure in SECTIONS[name](work)]
    if options.as_json:
        document = {"figures": [asdict(figure) for figure in figures], "versions": versions()}
        print(json.dumps({**document, "sizes": {name: getattr(work, name) for name in names}}, indent=2))
        return
    print(f"{'section':9} {'figure':28} {'value':>9}  {'goal':17} {'met':4} detail")
    for figure in figures:
        met = "" if figure.met is None else "yes" if figure.met else "NO"
        print(f"{figure.section:9} {figure.name:28} {figure.value:9.3f}  {figure.goal:17} {met:4} {figure.detail}")


if __name__ == "__main__":
    main()
