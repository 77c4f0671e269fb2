from __future__ import annotations

import io
import json
import logging
import multiprocessing
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from truthgpt.data import jsonl_source
from truthgpt.data.base import IGNORED_LABEL, Collator, Document, GlobalBatch, TrainLoader
from truthgpt.data.collate import LMCollator, PackedCollator
from truthgpt.data.jsonl_source import JsonlSource
from truthgpt.data.loader_processes import WorkerSettings
from truthgpt.data.rows import BadRowPolicy, RowFields
from truthgpt.data.stream import require_sample
from truthgpt.data.stream_holdout import held_out
from truthgpt.data.stream_loader import StreamLoader, StreamSettings, WeightedStream
from truthgpt.errors import DataError

from .conftest import byte_tokenizer
from .stream_fakes import ENCODER, END, ListStream, doc, numbered, settings

SHAPES: dict[str, tuple[Literal["stream", "rows"], dict[str, object]]] = {
    "rows": ("rows", {}),
    "joined text": ("stream", {"max_seq_len": 5}),
    "packing": ("rows", {"packing": True, "max_seq_len": 16}),
    "bucketing": ("rows", {"bins": (4, 6, 8), "max_tokens": 18}),
    "mixing by tokens": ("rows", {"mix_by": "tokens", "overlong": "split", "max_seq_len": 5}),
}


def streams_of(name: str) -> list[WeightedStream]:
    layout = SHAPES[name][0]
    first = ListStream([numbered(7), numbered(1, first=100), numbered(5, first=200)], layout)
    if name in ("rows", "bucketing"):
        return [WeightedStream("first", first, held_out=0.2)]
    second = ListStream([numbered(4, first=300, length=6)], layout)
    return [WeightedStream("first", first, weight=2.0), WeightedStream("second", second)]


def collator(shape: StreamSettings) -> Collator:
    if shape.packing:
        return PackedCollator(shape.micro_batch_size, shape.max_seq_len, END)
    return LMCollator(END, bins=shape.bins)


def loader_of(
    streams: Sequence[WeightedStream],
    shape: StreamSettings,
    num_workers: int = 0,
    state: dict[str, Any] | None = None,
    seed: int = 7,
) -> StreamLoader:
    loader = StreamLoader(streams, ENCODER, collator(shape), shape, seed, WorkerSettings(num_workers))
    if state is not None:
        loader.load_state_dict(state)
    return loader


def shaped(name: str, num_workers: int = 0, state: dict[str, Any] | None = None) -> StreamLoader:
    return loader_of(streams_of(name), settings(**SHAPES[name][1]), num_workers, state)  # type: ignore[arg-type]


def take(loader: TrainLoader, count: int, start: int = 0) -> list[Any]:
    with closing(loader.batches(start)) as batches:
        return [plain(batch) for batch in islice(batches, count)]


def plain(batch: GlobalBatch) -> Any:
    micro_batches = [{name: tensor.tolist() for name, tensor in part.items()} for part in batch.micro_batches]
    return micro_batches, batch.tokens, batch.samples, batch.epoch


def through_a_checkpoint(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


@pytest.mark.parametrize("name", SHAPES)
def test_going_on_after_every_step(name: str) -> None:
    loader = shaped(name)
    states, expected = [loader.state_dict(0)], []
    with closing(loader.batches()) as batches:
        for step, batch in enumerate(islice(batches, 24), start=1):
            expected.append(plain(batch))
            states.append(through_a_checkpoint(loader.state_dict(step)))
    assert expected[-1][3] >= 2, "past the second pass"
    for step, state in enumerate(states[:-4]):
        resumed = shaped(name, state=state)
        assert take(resumed, 4, step) == expected[step : step + 4]
        assert resumed.state_dict(step + 4) == states[step + 4]


@pytest.mark.parametrize("name", SHAPES)
def test_a_loader_process_changes_nothing(name: str) -> None:
    loader = shaped(name)
    expected = take(loader, 12)
    ahead = shaped(name, num_workers=1)
    assert take(ahead, 12) == expected
    assert ahead.state_dict(12) == loader.state_dict(12)


def test_a_global_batch_travels_in_one_piece() -> None:
    with closing(shaped("packing", num_workers=1).batches()) as batches:
        parts = next(batches).micro_batches
    assert len(parts) == 2
    assert len({tensor.untyped_storage().data_ptr() for part in parts for tensor in part.values()}) == 1


def test_going_on_with_another_number_of_processes() -> None:
    loader = shaped("packing", num_workers=2)
    take(loader, 5)
    state = loader.state_dict(5)
    assert take(shaped("packing", 2, state), 6, 5) == take(shaped("packing", 0, state), 6, 5)


def test_one_process_reads_whatever_their_number() -> None:
    before = set(multiprocessing.active_children())
    with closing(shaped("rows", num_workers=3).batches()) as batches:
        next(batches)
        assert len(set(multiprocessing.active_children()) - before) == 1
    assert set(multiprocessing.active_children()) <= before, "it ends with the batches"


def test_global_batches_are_full_and_count_their_labels() -> None:
    for micro_batches, tokens, samples, _ in take(shaped("rows"), 15):
        assert [len(part["input_ids"]) for part in micro_batches] == [2, 2]
        assert samples == 4
        labels = [label for part in micro_batches for row in part["labels"] for label in row]
        assert tokens == sum(label != IGNORED_LABEL for label in labels) > 0


def test_epoch_is_the_pass_of_the_slowest_source() -> None:
    shape = settings(16, micro_batch_size=1, grad_accum_steps=1)
    streams = [WeightedStream("long", ListStream([numbered(12)])), WeightedStream("short", ListStream([numbered(3)]))]
    epochs = [epoch for *_, epoch in take(loader_of(streams, shape), 26)]
    # Twelve samples of each source: the pass of the long one ends with its twelfth, the 23rd in all.
    assert epochs == [0] * 23 + [1] * 3
    assert loader_of(streams, shape).steps_per_epoch is None


def text_of(batches: list[Any]) -> Counter[str]:
    alphabet = {byte_tokenizer()(letter).input_ids[0]: letter for letter in "ab"}
    tokens = [token for parts, *_ in batches for part in parts for row in part["input_ids"] for token in row]
    return Counter(alphabet[token] for token in tokens if token in alphabet)


@pytest.mark.parametrize("mix_by", ["documents", "tokens"])
def test_sources_are_mixed_by_weight(mix_by: Literal["documents", "tokens"]) -> None:
    short = ListStream([[doc("a", key=f"{number}") for number in range(50)]])
    long = ListStream([[doc("b" * 4, key=f"{number}") for number in range(50)]])
    streams = [WeightedStream("short", short, weight=3.0), WeightedStream("long", long, weight=1.0)]
    loader = loader_of(streams, settings(8, mix_by=mix_by, micro_batch_size=1, grad_accum_steps=1))
    found = text_of(take(loader, 800))
    shares = {"a": found["a"], "b": found["b"] / 4} if mix_by == "documents" else {"a": found["a"], "b": found["b"]}
    assert shares["a"] / shares["b"] == pytest.approx(3, rel=0.03)


def test_split_rows_count_as_one_document() -> None:
    long = ListStream([[doc("a" * 16, key=f"{number}") for number in range(9)]])
    short = ListStream([[doc("b", key=f"{number}") for number in range(9)]])
    shape = settings(4, overlong="split", micro_batch_size=1, grad_accum_steps=1, shuffle_window=1)
    found = text_of(take(loader_of([WeightedStream("long", long), WeightedStream("short", short)], shape), 100))
    assert found["a"] / 16 == pytest.approx(found["b"], rel=0.06)


def test_batches_can_be_asked_for_again() -> None:
    loader = shaped("rows")
    expected = take(loader, 6)
    assert take(loader, 3) == expected[:3]
    assert take(loader, 2, start=3) == expected[3:5], "from one of the last steps handed out"
    take(loader, 6)
    with pytest.raises(ValueError, match=r"step 1 is not known: the loader began at step 0 and keeps the last 4 steps"):
        loader.state_dict(1)
    with pytest.raises(ValueError, match="step 9 is not known"):
        next(loader.batches(9))


def refusal(state: dict[str, Any], loader: StreamLoader) -> str:
    with pytest.raises(DataError, match="start a new run in another output_dir") as caught:
        loader.load_state_dict(state)
    return str(caught.value)


def test_other_data_or_settings_are_refused() -> None:
    def made(digest: str = "digest", weight: float = 1.0, seed: int = 7, **changes: object) -> StreamLoader:
        source = ListStream([numbered(8)])
        source.digest = digest
        return loader_of([WeightedStream("web", source, weight)], settings(8, **changes), seed=seed)

    state = made().state_dict(0)
    assert "web: fingerprint was digest, now other." in refusal(state, made("other"))
    assert "web: weight was 1.0, now 2.0" in refusal(state, made(weight=2.0))
    assert "1 sources then, 2 now" in refusal(
        state, loader_of([*made()._dataset.streams, *streams_of("rows")], settings())
    )
    message = refusal(state, made(shuffle_window=5))
    assert "shuffle_window was 4, now 5. Keep data.shuffle_window as it was" in message
    assert "global_batch was 4, now 6" in refusal(state, made(micro_batch_size=3))
    assert "bins was None, now [4, 8]" in refusal(state, made(bins=(4, 8)))
    assert "seed was 7, now 8" in refusal(state, made(seed=8))
    made().load_state_dict(through_a_checkpoint(state))
    made(micro_batch_size=1, grad_accum_steps=4).load_state_dict(state)
    bucketed = made(bins=(4, 8)).state_dict(0)
    assert "micro_batch_size was 2, now 1" in refusal(
        bucketed, made(bins=(4, 8), micro_batch_size=1, grad_accum_steps=4)
    )
    not_streamed = {"fingerprint": "f", "samples": 3, "order": {}, "step": 1}
    assert "keep data.streaming: false" in refusal(not_streamed, made())


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_keeps_its_message(num_workers: int) -> None:
    loader = loader_of([WeightedStream("fake", ListStream([[doc("a" * 9)]]))], settings(overlong="error"), num_workers)
    with pytest.raises(DataError) as caught:
        take(loader, 1)
    assert str(caught.value).startswith("file:aaaaaaaaa: 9 tokens, data.max_seq_len is 8;")


LONG, PROMPT = doc("a" * 20), doc("b" * 20, trained=False)
"""A row that `overlong: drop` leaves out, and one of which only a prompt is left where it is cut."""


@pytest.mark.parametrize(
    ("shards", "changes", "documents_read"),
    [
        ([numbered(9)], {}, 1),
        ([[], [LONG, LONG], [LONG, *numbered(9)]], {"overlong": "drop"}, 4),
        ([[PROMPT], [PROMPT, *numbered(9)]], {"overlong": "truncate"}, 3),
        ([[LONG, *numbered(9)]], {"packing": True, "overlong": "split"}, 1),
    ],
    ids=["first", "dropped", "untrained", "split"],
)
def test_a_stream_is_read_up_to_its_first_sample(
    shards: list[list[Document]], changes: dict[str, object], documents_read: int
) -> None:
    source = ListStream(shards)
    shape = settings(8, **changes)
    require_sample(WeightedStream("fake", source), ENCODER, shape)
    assert source.documents_read == documents_read
    expected = take(loader_of([WeightedStream("fake", ListStream(shards))], shape), 5)
    assert take(loader_of([WeightedStream("fake", source)], shape), 5) == expected, "it changes nothing"


def test_the_first_sample_is_of_a_training_document() -> None:
    documents = numbered(30)
    first = next(number for number, document in enumerate(documents, start=1) if not held_out(document.key, 0.9))
    assert first > 2
    for layout in ("rows", "stream"):
        source = ListStream([documents], layout)  # type: ignore[arg-type]
        require_sample(WeightedStream("fake", source, held_out=0.9), ENCODER, settings())
        assert source.documents_read == first


@pytest.mark.parametrize("layout", ["rows", "stream"])
def test_a_stream_without_a_sample_is_refused(layout: Literal["stream", "rows"]) -> None:
    for shards, share, changes, found in (
        ([[], []], 0.0, {}, "0 documents read, 0 held out"),
        ([numbered(3)], 1.0, {}, "0 documents read, 3 held out"),
        ([[LONG, LONG]], 0.0, {"packing": True, "overlong": "drop"}, "2 documents read, 0 held out .*, 2 longer than"),
        ([[PROMPT]], 0.0, {"packing": True}, "1 documents read, .*, 1 samples without a token the loss counts"),
    ):
        stream = WeightedStream("fake", ListStream(shards, layout), held_out=share)
        with pytest.raises(DataError, match=f"^0 usable documents in shard 0.*: {found}"):
            require_sample(stream, ENCODER, settings(8, **changes))  # type: ignore[arg-type]


def test_a_killed_process_is_named() -> None:
    before = set(multiprocessing.active_children())
    with closing(shaped("rows", num_workers=1).batches()) as batches:
        next(batches)
        for process in set(multiprocessing.active_children()) - before:
            process.kill()
        with pytest.raises(DataError, match="was killed by signal 9"):
            list(islice(batches, 20))


def test_the_tokenizers_threads_do_not_hang_a_forked_process() -> None:
    documents = [doc(f"{number} " * 40) for number in range(600)]
    assert sum(len(run.ids) for run in ENCODER.runs(documents)) > 0  # starts the threads, if there are any
    streams = [WeightedStream("large", ListStream([documents]))]
    shape = settings(256, shuffle_window=600)
    assert take(loader_of(streams, shape, num_workers=1), 2) == take(loader_of(streams, shape), 2)


def test_names_must_differ() -> None:
    source = ListStream([numbered(3)])
    with pytest.raises(ValueError, match="different names"):
        loader_of([WeightedStream("a", source), WeightedStream("a", source)], settings())
    with pytest.raises(ValueError, match="different names"):
        loader_of([], settings())


@pytest.mark.parametrize("num_workers", [0, 1])
def test_what_is_left_out_is_said_at_first_and_at_the_end(num_workers: int, caplog: pytest.LogCaptureFixture) -> None:
    documents: list[Document] = [doc("a" * 20), *numbered(6), doc("b", trained=True), doc("c" * 30)]
    shape = settings(8, shuffle_window=3)
    loader = loader_of([WeightedStream("web", ListStream([documents]))], shape, num_workers)
    with caplog.at_level(logging.WARNING):
        take(loader, 1)
        assert [record.getMessage() for record in caplog.records][:1] == [
            "web: 1 of 6 documents are longer than data.max_seq_len (data.overlong: truncate), so far"
        ]
        caplog.clear()
        with closing(loader.batches()) as batches:
            list(islice(batches, 8))
            assert caplog.records == []
    (record,) = caplog.records
    assert record.getMessage().startswith("web: 7 of 33 documents are longer than data.max_seq_len")


def test_ends_of_the_documents_own_are_said(caplog: pytest.LogCaptureFixture) -> None:
    documents = [doc("a<|endoftext|>"), doc("b"), doc("c<|endoftext|>"), doc("d")]
    with caplog.at_level(logging.WARNING):
        take(loader_of([WeightedStream("web", ListStream([documents]))], settings(8, shuffle_window=4)), 1)
    said = "web: 2 of 4 documents end with an end-of-text token of their own, and got no second one, so far"
    assert caplog.messages[0] == said


def written(folder: Path, rows: int) -> JsonlSource:
    folder.mkdir()
    with (folder / "big.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": f"row {number}"}) + "\n" for number in range(rows))
    fields = RowFields("text", "text", "prompt", "completion", "messages", "all")
    return JsonlSource([str(folder)], fields, BadRowPolicy("error", 0.01))


def test_resuming_far_in_a_file_is_as_quick_as_a_fresh_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more lines are read: a time would depend on what else the machine does."""
    lines, parse_row = 0, jsonl_source.parse_row

    def counted(content: bytes, offset: int = 0) -> dict[str, Any]:
        nonlocal lines
        lines += 1
        return parse_row(content, offset)

    monkeypatch.setattr(jsonl_source, "parse_row", counted)
    source = written(tmp_path / "data", 40_000)
    shape = StreamSettings(16, 1, 1, shuffle_window=256)
    loader = loader_of([WeightedStream("big", source)], shape)
    take(loader, 1)
    fresh = lines
    with closing(loader.batches()) as batches:
        for _ in islice(batches, 20_000):
            pass
        state = loader.state_dict(20_000)
        after = [plain(batch) for batch in islice(batches, 3)]
    resumed = loader_of([WeightedStream("big", source)], shape, state=state)
    lines = 0
    first = take(resumed, 1, 20_000)
    assert first == after[:1]
    assert 0 < lines <= fresh, f"fresh {fresh} lines, resumed {lines}"
