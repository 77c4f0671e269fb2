from __future__ import annotations

import gc
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from truthgpt.data import loader_processes
from truthgpt.data.base import Batch, BatchOrder, GlobalBatch, Sample
from truthgpt.data.batch_order import BucketedOrder, MixedOrder, ShuffledOrder, SourceShare
from truthgpt.data.collate import LMCollator
from truthgpt.data.loader import EvalLoader, GlobalBatchLoader, WorkerSettings, supervised_tokens
from truthgpt.data.stream_loader import StreamLoader, WeightedStream
from truthgpt.errors import DataError

from .stream_fakes import ENCODER, END, ListStream, numbered
from .stream_fakes import settings as stream_settings


class Counting:
    """Sample i holds `1 + i % 4` times the number i."""

    def __init__(self, samples: int, fingerprint: str = "a" * 64) -> None:
        self.fingerprint = fingerprint
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def read(self, index: int, epoch: int = 0) -> Sample:
        values = np.full(1 + index % 4, index, dtype=np.int64)
        return {"input_ids": values, "labels": values}


class Counted(Counting):
    """Counts the samples that its processes have read."""

    def __init__(self, samples: int) -> None:
        super().__init__(samples)
        self.count = multiprocessing.Value("q", 0)

    def read(self, index: int, epoch: int = 0) -> Sample:
        with self.count:
            self.count.value += 1
        return super().read(index, epoch)

    def wait_for(self, samples: int) -> None:
        while self.count.value < samples:
            time.sleep(0.01)
        time.sleep(0.2)  # for what was read last to be put into the pipe


def byte_stream(workers: WorkerSettings) -> StreamLoader:
    stream = WeightedStream("numbers", ListStream([numbered(2000)]))
    return StreamLoader([stream], ENCODER, LMCollator(END), stream_settings(), 7, workers)


def loader(
    samples: int = 23,
    micro: int = 2,
    accum: int = 3,
    seed: int = 1,
    workers: int = 0,
    dataset: Counting | None = None,
    prefetch: int = 2,
) -> GlobalBatchLoader:
    data = dataset or Counting(samples)
    order = ShuffledOrder(len(data), micro, accum, seed)
    return GlobalBatchLoader(data, LMCollator(0), order, WorkerSettings(workers, prefetch))


def epoch_steps(source: GlobalBatchLoader) -> int:
    assert source.steps_per_epoch is not None
    return source.steps_per_epoch


def take(source: GlobalBatchLoader, start_step: int, count: int) -> list[GlobalBatch]:
    with closing(source.batches(start_step)) as batches:
        return list(islice(batches, count))


def plain(batch: Batch) -> dict[str, list[list[int]]]:
    return {name: tensor.tolist() for name, tensor in batch.items()}


def values(batches: list[GlobalBatch]) -> list[object]:
    return [(b.epoch, b.samples, b.tokens, [plain(micro) for micro in b.micro_batches]) for b in batches]


def samples_of(batch: GlobalBatch) -> list[int]:
    return [int(row[0]) for micro in batch.micro_batches for row in micro["input_ids"]]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**40))
def test_an_epoch_holds_every_sample_once(samples: int, micro: int, accum: int, seed: int) -> None:
    source = loader(samples, micro, accum, seed)
    steps = epoch_steps(source)
    assert steps == -(-samples // (micro * accum))
    batches = take(source, 0, 2 * steps)
    for epoch in (0, 1):
        in_epoch = batches[epoch * steps : (epoch + 1) * steps]
        assert [batch.epoch for batch in in_epoch] == [epoch] * steps
        assert sorted(index for batch in in_epoch for index in samples_of(batch)) == list(range(samples))
        for batch in in_epoch[:-1]:
            assert [len(m["input_ids"]) for m in batch.micro_batches] == [micro] * accum
    for batch in batches:
        assert batch.samples == len(samples_of(batch))
        assert batch.tokens == sum(1 + index % 4 for index in samples_of(batch))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 3), st.integers(0, 50))
def test_starting_late_is_dropping_the_first_steps(samples: int, micro: int, accum: int, start: int) -> None:
    source = loader(samples, micro, accum)
    assert values(take(source, start, 5)) == values(take(source, 0, start + 5))[start:]


def test_any_step_is_reached_at_once() -> None:
    started = time.monotonic()
    (batch,) = take(loader(10**9, 4, 2), 10**12, 1)
    assert time.monotonic() - started < 20, "counted up to it, it takes for ever"
    assert batch.epoch == 10**12 // (10**9 // 8)
    assert len(set(samples_of(batch))) == 8


def test_partial_last_batch_is_kept() -> None:
    sizes = [[len(m["labels"]) for m in batch.micro_batches] for batch in take(loader(23, 2, 3), 0, 5)]
    assert sizes == [[2, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 1], [2, 2, 2]]
    assert [[len(m["labels"]) for m in batch.micro_batches] for batch in take(loader(3, 8, 2), 0, 2)] == [[3], [3]]


def test_splitting_a_batch_differently_keeps_its_samples() -> None:
    whole, split = take(loader(23, 6, 1), 0, 8), take(loader(23, 1, 6), 0, 8)
    assert [samples_of(batch) for batch in whole] == [samples_of(batch) for batch in split]


def test_seeds_and_epochs_have_their_own_orders() -> None:
    steps = epoch_steps(loader(40))
    orders = []
    for seed in (1, 2):
        batches = take(loader(40, seed=seed), 0, 2 * steps)
        orders += [[i for b in batches[e * steps : (e + 1) * steps] for i in samples_of(b)] for e in (0, 1)]
    assert len({tuple(order) for order in [*orders, range(40)]}) == 5
    assert samples_of(take(loader(40), 3, 1)[0]) == loader(40).sample_indices(3)


def no_child_left() -> bool:
    gc.collect()
    return multiprocessing.active_children() == []


def test_processes_change_nothing_and_end() -> None:
    expected = values(take(loader(), 3, 9))
    assert values(take(loader(workers=2), 3, 9)) == expected
    assert values(take(loader(workers=1), 3, 9)) == expected
    assert no_child_left()


DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.complex64, torch.complex128),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.uint16),
]


class OddBatches:
    """A collator of every kind of tensor; the first sample of a batch decides the bits of all of them."""

    def __init__(self, large: int = 0) -> None:
        self.large = large

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        generator = torch.Generator().manual_seed(int(samples[0]["input_ids"][0]))
        bits = torch.randint(0, 256, (6, 16), dtype=torch.uint8, generator=generator)
        batch = {str(dtype): (bits % 2 if dtype is torch.bool else bits).view(dtype) for dtype in DTYPES}
        return batch | {
            "labels": torch.arange(len(samples)),
            "scalar": bits[0, 0].to(torch.bfloat16),
            "odd length": bits[0, :3],
            "empty": torch.empty(3, 0, 2),
            "transposed": bits.T,
            "expanded": bits[:1].expand(5, 16),
            "parameter": torch.nn.Parameter(bits[0].float()),
            "gradient": bits[0].float().requires_grad_(),
            "sparse": bits.to_sparse(),
            "large": bits[0, 0].repeat(self.large),
        }


def memory(batch: Batch) -> set[int]:
    return {
        tensor.untyped_storage().data_ptr()
        for tensor in batch.values()
        if tensor.numel() and not tensor.is_sparse and not tensor.requires_grad
    }


def bytes_of(tensor: torch.Tensor) -> bytes:
    dense = tensor.detach().to_dense() if tensor.is_sparse else tensor.detach()
    return bytes(dense.contiguous().flatten().view(torch.uint8).tolist())


@pytest.mark.filterwarnings("ignore:Sparse invariant")
@pytest.mark.parametrize("large", [0, loader_processes.ONE_PIECE_BYTES])
def test_processes_hand_over_every_bit_of_any_tensor(large: int) -> None:
    def made(workers: int) -> list[Batch]:
        source = EvalLoader(Counting(9), OddBatches(large), 2, WorkerSettings(workers))
        return list(source)

    for expected, found in zip(made(0), made(2), strict=True):
        assert list(found) == list(expected)
        for name, tensor in expected.items():
            assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
            assert bytes_of(found[name]) == bytes_of(tensor), name
            assert found[name].requires_grad == tensor.requires_grad
        found["labels"] += 1  # not read-only
        assert bytes_of(found["scalar"]) == bytes_of(expected["scalar"]), "parts do not overlap"
        assert (len(memory(found)) == 1) == (large == 0), "small batches travel in one piece"


def test_global_random_state_is_left_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    take(loader(), 0, 3)
    list(EvalLoader(Counting(5), LMCollator(0), 2, WorkerSettings()))
    take(loader(workers=1), 0, 1)
    assert torch.equal(torch.get_rng_state(), before)


class Broken(Counting):
    """Sample 7 fails in the way given."""

    def __init__(self, failure: Callable[[], None]) -> None:
        super().__init__(23)
        self.failure = failure

    def read(self, index: int, epoch: int = 0) -> Sample:
        if index == 7:
            self.failure()
        return super().read(index, epoch)


def fail_value() -> None:
    raise ValueError("bad bytes in shard 3")


def fail_data() -> None:
    raise DataError("rows.jsonl:8: bad row")


def fail_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail_exit() -> None:
    os._exit(3)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("failure", "message"), [(fail_value, "ValueError.*shard 3"), (fail_data, r"rows\.jsonl:8")])
def test_sample_that_cannot_be_read(workers: int, failure: Callable[[], None], message: str) -> None:
    with pytest.raises(DataError, match=f"(?s){message}") as error:
        take(loader(dataset=Broken(failure), workers=workers), 0, 4)
    assert ("DataLoader worker process" in str(error.value)) == (workers > 0)
    assert no_child_left()


@pytest.mark.parametrize(
    ("failure", "message"), [(fail_killed, r"killed by signal 9 \(SIGKILL\)"), (fail_exit, r"ended \(3\)")]
)
def test_process_that_dies_is_named(failure: Callable[[], None], message: str) -> None:
    started = time.monotonic()
    with pytest.raises(DataError, match=rf"data loader process [01] \(pid \d+\) (was )?{message}.*num_workers"):
        take(loader(dataset=Broken(failure), workers=2), 0, 4)
    assert time.monotonic() - started < 60
    assert no_child_left()


def test_process_killed_between_batches_raises_only_at_the_next_batch() -> None:
    with closing(loader(200, workers=1).batches()) as batches:
        next(batches)
        (child,) = multiprocessing.active_children()
        os.kill(child.pid or 0, signal.SIGKILL)
        deadline = time.monotonic() + 0.5
        while time.monotonic() < deadline:  # a SIGCHLD handler that raises would do so here
            sum(range(1000))
        with pytest.raises(DataError, match="killed by signal 9"):
            list(islice(batches, 50))
    assert no_child_left()


def test_processes_ignore_the_signals_of_the_group() -> None:
    with closing(loader(2000, workers=2).batches()) as batches:
        next(batches)
        for child in multiprocessing.active_children():
            os.kill(child.pid or 0, signal.SIGTERM)
            os.kill(child.pid or 0, signal.SIGINT)
        assert values(list(islice(batches, 20))) == values(take(loader(2000), 1, 20))
    assert no_child_left()


PARENT = """
import multiprocessing, os, signal, time
from tests_data_test_loader import Counted, Counting, byte_stream, loader
from truthgpt.data.collate import LMCollator
from truthgpt.data.loader import EvalLoader, WorkerSettings
"""

PASSES = {
    "training": """
dataset = Counted(10**6)
batches = loader(workers=2, dataset=dataset, prefetch=300).batches()
next(batches)
dataset.wait_for(2 * 2 * 300)  # all that may be prepared: more messages than the pipe holds
""",
    "training and validation": """
batches = loader(2000, workers=1).batches()
next(batches)
validation = EvalLoader(Counting(9), LMCollator(0), 2, WorkerSettings(1, 2, True))
list(validation)
""",
    "a stream and validation": """
batches = byte_stream(WorkerSettings(2, 300)).batches()
next(batches)
dataset = Counted(10**6)
validation = iter(EvalLoader(dataset, LMCollator(0), 2, WorkerSettings(1, 600, True)))
next(validation)
dataset.wait_for(2 * 600)
""",
}


@pytest.mark.parametrize("ending", ["raise SystemExit(9)", "os.kill(os.getpid(), signal.SIGKILL)"])
@pytest.mark.parametrize("begun", PASSES)
def test_no_orphans_when_the_parent_ends_without_closing(begun: str, ending: str) -> None:
    tell = "print(*[child.pid for child in multiprocessing.active_children()], flush=True)"
    run_as_module = (
        f"import sys, runpy; sys.modules['tests_data_test_loader'] = __import__('{__name__}', fromlist=['x'])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-c", f"{run_as_module}\n{PARENT}{PASSES[begun]}{tell}\n{ending}"],
        stdout=subprocess.PIPE,
        env=environment,
        timeout=120,
        check=False,
    )
    ended_s = time.monotonic()
    assert done.returncode in (9, -signal.SIGKILL)
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    while any(_exists(pid) for pid in pids):
        assert time.monotonic() - ended_s < 60
        time.sleep(0.1)


def _exists(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # it may go between opening and reading
        return False


def fail_hanging() -> None:
    time.sleep(60)


def test_process_that_hangs_is_named_and_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_processes, "LOADER_TIMEOUT_S", 5.0)
    monkeypatch.setattr(loader_processes, "POLL_S", 0.2)
    source = loader(dataset=Broken(fail_hanging), workers=2)
    step = next(step for step in range(4) if 7 in source.sample_indices(step))
    micro_batch = next(n for n in range(3) if 7 in source.sample_indices(step)[2 * n : 2 * n + 2]) + 3 * step
    started = time.monotonic()
    with pytest.raises(DataError, match=rf"process {micro_batch % 2} \(pid \d+\) gave no batch for 5 s: it hangs"):
        take(source, 0, 4)
    assert 5 <= time.monotonic() - started < 30
    assert no_child_left()


class Slow(Counting):
    """Every sample takes longer than the loader waits at once."""

    def read(self, index: int, epoch: int = 0) -> Sample:
        time.sleep(0.15)
        return super().read(index, epoch)


@pytest.mark.parametrize("persistent", [False, True])
def test_slow_processes_lose_nothing(monkeypatch: pytest.MonkeyPatch, persistent: bool) -> None:
    monkeypatch.setattr(loader_processes, "POLL_S", 0.02)
    source = EvalLoader(Slow(6), LMCollator(0), 2, WorkerSettings(2, 1, persistent))
    next(iter(source))  # an unfinished pass before the whole ones
    passes = [[batch["input_ids"][:, 0].tolist() for batch in source] for _ in range(2)]
    assert passes == [[[0, 1], [2, 3], [4, 5]]] * 2
    del source
    assert no_child_left()


def test_persistent_process_killed_between_evaluations() -> None:
    source = EvalLoader(Counting(6), LMCollator(0), 2, WorkerSettings(1, 2, True))
    list(source)
    (child,) = multiprocessing.active_children()
    os.kill(child.pid or 0, signal.SIGKILL)
    child.join()
    with pytest.raises(DataError, match=r"process 0 \(pid \d+\) was killed by signal 9"):
        list(source)
    del source
    assert no_child_left()


def test_empty_dataset() -> None:
    with pytest.raises(DataError, match="0 training samples"):
        loader(0)


class Epochs(Counting):
    """Sample i of epoch e holds i and e."""

    def read(self, index: int, epoch: int = 0) -> Sample:
        values = np.array([index, epoch], dtype=np.int64)
        return {"input_ids": values, "labels": values}


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_are_read_with_their_epoch(workers: int) -> None:
    for batch in take(loader(dataset=Epochs(7), micro=2, accum=2, workers=workers), 1, 5):
        for micro in batch.micro_batches:
            assert micro["input_ids"][:, 1].tolist() == [batch.epoch] * len(micro["input_ids"])


ORDERS: list[BatchOrder] = [
    BucketedOrder(np.array([1 + index % 4 for index in range(23)]), [2, 4], 3, 2, 1),
    BucketedOrder(np.array([1 + index % 4 for index in range(23)]), [2, 4], 3, 2, 1, max_tokens=8),
    MixedOrder([SourceShare(3, 1.0), SourceShare(20, 2.0)], 2, 3, 1),
]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_every_order_is_kept(order: BatchOrder, workers: int) -> None:
    collate = LMCollator(0, bins=[2, 4])
    source = GlobalBatchLoader(Counting(23), collate, order, WorkerSettings(workers))
    assert source.steps_per_epoch == order.steps_per_epoch
    for step, batch in enumerate(take(source, 2, 6), start=2):
        found = [micro["input_ids"][:, 0].tolist() for micro in batch.micro_batches]
        assert found == order.micro_batches(step)
        assert source.sample_indices(step) == samples_of(batch)
        assert (batch.samples, batch.epoch) == (len(samples_of(batch)), step // order.steps_per_epoch)
        assert batch.tokens == sum(1 + index % 4 for index in samples_of(batch))


def test_bucketed_batches_have_few_shapes() -> None:
    source = GlobalBatchLoader(Counting(23), LMCollator(0, bins=[2, 4]), ORDERS[0], WorkerSettings())
    batches = take(source, 0, 2 * epoch_steps(source))
    assert {micro["input_ids"].shape[1] for batch in batches for micro in batch.micro_batches} == {2, 4}


class Unlabelled(Counting):
    """No label counts."""

    def read(self, index: int, epoch: int = 0) -> Sample:
        values = np.array([index], dtype=np.int64)
        return {"input_ids": values, "labels": np.full(1, -100, dtype=np.int64)}


def test_a_batch_without_labels_is_given_out_with_0_tokens() -> None:
    (batch,) = take(loader(dataset=Unlabelled(4), micro=2, accum=2), 0, 1)
    assert (batch.tokens, batch.samples, len(batch.micro_batches)) == (0, 4, 2)


def test_labels_of_images_are_counted() -> None:
    assert supervised_tokens({"labels": torch.tensor([0, 3, 1])}) == 3


def through_a_checkpoint(state: dict[str, object]) -> dict[str, object]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, object] = torch.load(file, weights_only=True)
    return loaded


def test_state_accepts_the_same_data_and_any_split_of_the_batch() -> None:
    state = loader(23, 2, 3).state_dict(17)
    assert state == {
        "fingerprint": "a" * 64,
        "samples": 23,
        "order": {"kind": "shuffled", "samples": 23, "global_batch": 6},
        "step": 17,
    }
    loader(23, 6, 1, seed=9, workers=2).load_state_dict(through_a_checkpoint(state))


@pytest.mark.parametrize("order", ORDERS)
def test_states_of_every_order_fit_a_checkpoint(order: BatchOrder) -> None:
    source = GlobalBatchLoader(Counting(23), LMCollator(0), order, WorkerSettings())
    source.load_state_dict(through_a_checkpoint(source.state_dict(5)))


@pytest.mark.parametrize("changed", [Counting(24), Counting(23, "b" * 64)])
def test_state_refuses_other_data(changed: Counting) -> None:
    with pytest.raises(DataError, match=r"the data is not what this run was trained on: 23 samples.*output_dir"):
        loader(dataset=changed).load_state_dict(loader(23).state_dict(5))


def test_state_refuses_another_batch_size() -> None:
    with pytest.raises(DataError, match=r"global_batch 6 then, 8 now.*train_batch_size x training.grad_accum_steps"):
        loader(23, 2, 4).load_state_dict(loader(23, 2, 3).state_dict(5))


def test_state_refuses_another_kind_of_order() -> None:
    source = GlobalBatchLoader(Counting(23), LMCollator(0), ORDERS[0], WorkerSettings())
    with pytest.raises(DataError, match=r"kind shuffled then, bucketed now.*data\.bucket_by_length"):
        source.load_state_dict(loader(23).state_dict(5))


def test_state_refuses_a_stream() -> None:
    with pytest.raises(DataError, match=r"trained on streamed data: keep data\.streaming: true"):
        loader(23).load_state_dict({"fingerprint": "a" * 64, "step": 5})


@pytest.mark.parametrize("workers", [WorkerSettings(0), WorkerSettings(2, 1, True), WorkerSettings(1, 3, False)])
def test_validation_is_sequential_and_repeatable(workers: WorkerSettings) -> None:
    source = EvalLoader(Counting(7), LMCollator(0), 3, workers)
    passes = [[batch["input_ids"][:, 0].tolist() for batch in source] for _ in range(2)]
    assert passes == [[[0, 1, 2], [3, 4, 5], [6]]] * 2
    assert len(source) == 3
    assert len(multiprocessing.active_children()) == (2 if workers.num_workers == 2 else 0)
    assert next(iter(source))["input_ids"][:, 0].tolist() == [0, 1, 2]
    del source
    assert no_child_left()
