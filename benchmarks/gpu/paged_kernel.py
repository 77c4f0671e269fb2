"""Attention over the paged cache, one new token a sequence: its time, and the share of the memory's bandwidth.

    python benchmarks/gpu/paged_kernel.py
    python benchmarks/gpu/paged_kernel.py --json benchmarks/results/paged_kernel.jsonl
    python benchmarks/gpu/paged_kernel.py --batches 64 --contexts 512 --tiles 64,4,3 64,4,4 128,4,3

The shape is that of a layer of Llama 3.2 1B in bf16: 32 query heads, 8 of keys and values, heads of 64. Calls are
replayed as a CUDA graph, as decoding does, each on pages of its own, so that no cache on the GPU knows them already.
Bandwidth is that of a large copy on the same GPU, read and written bytes together.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from processes import ROOT, append_record, gpu_state

if TYPE_CHECKING:
    import torch

HEADS, KV_HEADS, HEAD_SIZE = 32, 8, 64
BATCHES = (1, 8, 64, 256)
CONTEXTS = (128, 512, 1024, 8192)
COLD_BYTES = 256 * 2**20
"""Pages that a replay goes through at least: several times the GPU's L2 cache."""
MOST_CALLS = 512
COPY_BYTES = 4 * 2**30
REPEATS = 20


@dataclass(frozen=True)
class Point:
    """Sequences and their tokens, all of one length; size of a block; the tile, or the kernel's own choice."""

    batch: int
    context: int
    block_size: int
    tile: tuple[int, int, int] | None

    @property
    def kv_bytes(self) -> int:
        """What a call has to read: keys and values of all sequences."""
        return 2 * self.batch * self.context * KV_HEADS * HEAD_SIZE * 2


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print every point."""
    options = _parse(argv)
    # The source beside this folder, so that nothing need be installed.
    sys.path.insert(0, str(ROOT / "src"))
    import torch

    from truthgpt.runtime.environment import package_versions

    if not torch.cuda.is_available():
        raise SystemExit("the kernels need a CUDA GPU, and there is none")
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}: a copy moves {bandwidth / 1e12:.2f} TB/s", flush=True)
    for batch, context, block_size, tile in product(
        options.batches, options.contexts, options.block_sizes, options.tiles
    ):
        point = Point(batch, context, block_size, tile)
        seconds, splits = measure(point)
        share = point.kv_bytes / seconds / bandwidth
        chosen = "" if tile is None else f", tile {tile}"
        print(
            f"B={batch:<4} context={context:<5} blocks of {block_size}{chosen}: {seconds * 1e6:8.1f} us, "
            f"{splits} parts, {share:.0%} of bandwidth",
            flush=True,
        )
        if options.json is not None:
            record = {"kind": "paged_kernel", "batch": batch, "context": context, "block_size": block_size}
            record |= {"tile": tile, "splits": splits, "seconds": seconds, "kv_bytes": point.kv_bytes}
            record |= {"copy_bytes_per_s": bandwidth, "gpu": gpu_state(), "versions": package_versions()}
            append_record(options.json, record)


def measure(point: Point) -> tuple[float, int]:
    """Seconds of a call, and the parts that its sequences were read in at most."""
    import torch

    from truthgpt.attention.paged_kernels import Tile, decode, paged_decode, split_count

    columns = -(-point.context // point.block_size)
    blocks = point.batch * columns
    calls = max(2, min(MOST_CALLS, -(-COLD_BYTES // point.kv_bytes)))
    shape = (calls, 2, blocks, point.block_size, KV_HEADS, HEAD_SIZE)
    pages = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_()
    query = torch.randn(point.batch, HEADS, HEAD_SIZE, device="cuda").bfloat16()
    tables = torch.randperm(blocks, device="cuda", dtype=torch.int32).view(point.batch, columns)
    lengths = torch.full((point.batch,), point.context, dtype=torch.int32, device="cuda")
    processors = torch.cuda.get_device_properties(query.device).multi_processor_count
    splits = split_count(point.batch, KV_HEADS, columns * point.block_size, processors)
    tile = None if point.tile is None else Tile(*point.tile)

    def call(keys: torch.Tensor, values: torch.Tensor) -> None:
        if tile is None:
            paged_decode(query, keys, values, tables, lengths, HEAD_SIZE**-0.5)
        else:
            decode(query, keys, values, tables, lengths, HEAD_SIZE**-0.5, None, None, splits, tile)

    call(pages[0, 0], pages[0, 1])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for keys, values in pages:
            call(keys, values)
    return time_of(graph.replay) / calls, splits


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy far larger than any cache."""
    import torch

    source = torch.empty(COPY_BYTES // 4, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / time_of(lambda: target.copy_(source))


def time_of(work: Callable[[], object]) -> float:
    """Median seconds of `work` by the GPU's own clock, after two unmeasured runs."""
    import torch

    work()
    work()
    times = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    return statistics.median(times)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES, help="sequences")
    parser.add_argument("--contexts", nargs="+", type=int, default=CONTEXTS, help="tokens of a sequence")
    parser.add_argument("--block-sizes", nargs="+", type=int, default=[16])
    parser.add_argument(
        "--tiles", nargs="+", type=_tile, default=[None], metavar="positions,warps,stages",
        help="instead of the kernel's own choice",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="file to append the records to")
    return parser.parse_args(argv)


def _tile(text: str) -> tuple[int, int, int]:
    positions, warps, stages = (int(part) for part in text.split(","))
    return positions, warps, stages


if __name__ == "__main__":
    main()
