from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
from multiprocessing.connection import Connection

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from truthgpt.data import tokenization
from truthgpt.data.base import Document, Segment
from truthgpt.data.tokenization import (
    DocumentEncoder,
    SpecialFrame,
    TokenRun,
    group_documents,
    special_frame,
    tokenizer_digest,
)
from truthgpt.errors import DataError

from .conftest import BEGIN, END, byte_tokenizer, rows

MERGES = ("he", "ll", "Ġw")


def summary(runs: list[TokenRun]) -> list[tuple[object, ...]]:
    """Runs as plain values, which compare."""
    return [(run.ids.tolist(), run.trained, run.opens, run.document, run.end, run.problems) for run in runs]


def test_frame_of_a_tokenizer_without_habits() -> None:
    assert special_frame(byte_tokenizer()) == SpecialFrame((), 256)


@pytest.mark.parametrize("close", [False, True])
def test_frame_takes_the_begin_token_and_leaves_the_closing_one(close: bool) -> None:
    assert special_frame(byte_tokenizer(begin=True, close=close)) == SpecialFrame((257,), 256)


def test_frame_needs_an_end_of_text_token() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end-of-text token"):
        special_frame(tokenizer)


@given(st.text(max_size=60))
def test_frame_and_ids_are_what_generation_sees(text: str) -> None:
    tokenizer = byte_tokenizer(begin=True, merges=MERGES)
    (run,) = DocumentEncoder(tokenizer, 300).runs(rows(text))
    assert run.ids.tolist() == tokenizer(text).input_ids


def test_padding_and_truncation_left_on_change_nothing() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer(["long enough", "b"], padding="max_length", truncation=True, max_length=4)
    encoder = DocumentEncoder(tokenizer, 300)
    assert encoder.frame.prefix == ()
    assert [run.ids.size for run in encoder.runs(rows("long enough", "b"))] == [11, 1]


def test_runs_keep_documents_segments_and_pieces_apart() -> None:
    documents = [
        Document("a", (Segment("ab", trained=False), Segment("c")), "here"),
        Document("b", (Segment("d"),), "here", continues=True),
        Document("c", (Segment("", trained=False), Segment("e")), "here"),
        Document("d", (Segment("", trained=False), Segment("")), "here"),
    ]
    runs = list(DocumentEncoder(byte_tokenizer(begin=True), 258).runs(documents))
    assert [(run.ids.size, run.trained, run.opens, run.document) for run in runs] == [
        (3, False, True, 1),
        (1, True, False, 1),
        (1, True, False, 2),
        (2, True, True, 3),
        (1, True, True, 4),
    ]
    assert all(run.end == (256,) and run.problems == () for run in runs)


@pytest.mark.parametrize("prompt", ["", BEGIN])
def test_begin_token_in_the_text_is_kept_once_and_reported_with_the_last_run(prompt: str) -> None:
    documents = rows((prompt, f"{BEGIN if not prompt else ''}ab"), "c")
    runs = list(DocumentEncoder(byte_tokenizer(begin=True), 258).runs(documents))
    first, second = [[*group] for _, group in itertools.groupby(runs, key=lambda run: run.document)]
    ids = [token for run in first for token in run.ids.tolist()]
    assert ids == [257, *byte_tokenizer()("ab").input_ids]
    assert [run.problems for run in first] == [()] * (len(first) - 1) + [("double_bos",)]
    assert [run.problems for run in second] == [()]


def test_begin_token_inside_a_text_or_without_the_habit_is_text() -> None:
    (inside,) = DocumentEncoder(byte_tokenizer(begin=True), 258).runs(rows("a" + BEGIN))
    assert (inside.ids.tolist()[0], inside.ids.size, inside.problems) == (257, 3, ())
    document = Document("k", (Segment(BEGIN + "a"),), "here", continues=True)
    (further,) = DocumentEncoder(byte_tokenizer(begin=True), 258).runs([document])
    assert (further.ids.tolist()[0], further.ids.size, further.problems) == (257, 2, ())
    (plain,) = DocumentEncoder(byte_tokenizer(), 258).runs(rows(BEGIN + "a"))
    assert (plain.ids.size, plain.problems) == (2, ())


@pytest.mark.parametrize("text", ["word word\n" * 100, "x" * 1000, "\n" * 300, "short", "é\n" * 200 + "tail"])
def test_cutting_a_huge_text_loses_nothing(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenization, "PIECE_CHARACTERS", 64)
    monkeypatch.setattr(tokenization, "BATCH_CHARACTERS", 200)
    tokenizer = byte_tokenizer()
    runs = list(DocumentEncoder(tokenizer, 258).runs(rows(text)))
    assert tokenizer.decode([token for run in runs for token in run.ids.tolist()]) == text
    assert [run.opens for run in runs] == [True] + [False] * (len(runs) - 1)
    assert len(runs) >= len(text) // 64
    assert all(run.ids.size <= 64 * 2 for run in runs)


def letter_tokenizer(habit: str) -> PreTrainedTokenizerFast:
    """One token a letter. As its habit is, it puts a space in front of a text: Llama 2's is `Prepend`."""
    backend = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate("<▁Ġab\n")}, merges=[]))
    if habit == "Prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif habit == "ByteLevel":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    else:
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(prepend_scheme=habit)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<")


@pytest.mark.parametrize("habit", ["Prepend", "ByteLevel", "always", "first", "never"])
@given(texts=st.lists(st.text(alphabet="ab ", min_size=1, max_size=9), min_size=1, max_size=4), size=st.integers(1, 5))
def test_no_space_comes_between_the_pieces_of_a_document(habit: str, texts: list[str], size: int) -> None:
    """What a tokenizer puts in front of a text stands in front of the whole: as in generation, where nothing comes
    between a prompt and what is written behind it."""
    tokenizer = letter_tokenizer(habit)
    first = Document("0", tuple(Segment(text) for text in texts), "0")
    more = Document("1", tuple(Segment(text) for text in texts), "1", continues=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenization, "PIECE_CHARACTERS", size)
        runs = list(DocumentEncoder(tokenizer, len(tokenizer)).runs([first, more, *rows("ab")]))
    expected = [tokenizer("".join(texts) * 2).input_ids, tokenizer("ab").input_ids]
    found = [[token for run in runs if (run.document == 3) == last for token in run.ids.tolist()] for last in (0, 1)]
    assert found == expected


def test_only_a_tokenizer_with_a_habit_has_another_digest() -> None:
    """One more part: runs and caches of all others stay as they were."""
    digest = {habit: DocumentEncoder(letter_tokenizer(habit), 300) for habit in ("never", "always")}
    parts = {name: [2, tokenizer_digest(encoder._tokenizer), repr(encoder.frame)] for name, encoder in digest.items()}
    before = {
        name: hashlib.sha256(json.dumps([*parts[name], encoder._renderer.identity]).encode()).hexdigest()
        for name, encoder in digest.items()
    }
    assert [digest[name].digest == before[name] for name in ("never", "always")] == [True, False]


@given(
    st.lists(st.text(alphabet="ab w\nhel", max_size=30), max_size=8),
    st.integers(1, 40),
    st.integers(1, 5),
)
def test_batches_change_no_run(texts: list[str], characters: int, pieces: int) -> None:
    documents = rows(*texts, *[(text, BEGIN + text) for text in texts])
    encoder = DocumentEncoder(byte_tokenizer(begin=True, merges=MERGES), 300)
    whole = summary(list(encoder.runs(documents)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenization, "BATCH_CHARACTERS", characters)
        patch.setattr(tokenization, "BATCH_PIECES", pieces)
        assert summary(list(encoder.runs(documents))) == whole


def test_documents_are_read_no_further_than_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenization, "BATCH_PIECES", 4)
    taken = itertools.count()
    endless = (Document(str(number), (Segment("text"),), "here") for number in taken)
    runs = DocumentEncoder(byte_tokenizer(), 258).runs(endless)
    assert [next(runs).document for _ in range(6)] == [1, 2, 3, 4, 5, 6]
    assert next(taken) <= 9


def test_token_the_model_does_not_have_names_document_id_and_limit() -> None:
    encoder = DocumentEncoder(byte_tokenizer(merges=("he",)), 259)
    encoder.vocab_size = 256
    with pytest.raises(DataError, match=r"rows\.jsonl:2: .* token id 256 \('he'\), .* model has ids 0 to 255;.*259"):
        list(encoder.runs(rows("fine", "he")))


def test_framing_token_the_model_does_not_have_is_refused_at_once() -> None:
    with pytest.raises(DataError, match=r"^the tokenizer gives token id 256 \('<\|endoftext\|>'\)"):
        DocumentEncoder(byte_tokenizer(), 256)


def test_digest_changes_with_tokenizer_frame_and_template() -> None:
    encoders = [
        DocumentEncoder(byte_tokenizer(), 300),
        DocumentEncoder(byte_tokenizer(merges=MERGES), 300),
        DocumentEncoder(byte_tokenizer(begin=True), 300),
        DocumentEncoder(byte_tokenizer(), 300, "{{ messages }}"),
        DocumentEncoder(byte_tokenizer(), 300, "{{ messages }} "),
    ]
    own = byte_tokenizer()
    own.chat_template = "{{ bos_token }}"
    digests = [encoder.digest for encoder in [*encoders, DocumentEncoder(own, 300)]]
    assert len(set(digests)) == len(digests)
    assert digests[0] == DocumentEncoder(byte_tokenizer(), 400).digest


def test_documents_are_joined_closed_and_told_apart() -> None:
    documents = [
        Document("a", (Segment("ab", trained=False), Segment("c")), "here"),
        Document("b", (Segment("d"),), "here", continues=True),
        Document("c", (Segment("e"),), "here"),
    ]
    grouped = list(group_documents(DocumentEncoder(byte_tokenizer(), 258).runs(documents)))
    a, b, c, d, e = byte_tokenizer()("abcde").input_ids
    assert [(ids.tolist(), trained.tolist(), opens) for ids, trained, opens in grouped] == [
        ([a, b, c], [False, False, True], True),
        ([d, 256], [True, True], False),
        ([e, 256], [True, True], True),
    ]
    assert all(ids.dtype == np.int64 and trained.dtype == np.bool_ for ids, trained, _ in grouped)
    assert list(group_documents([])) == []


def test_a_run_mask_and_a_missing_end_are_kept_by_grouping() -> None:
    mask = np.array([False, True])
    run = TokenRun(np.array([5, 6]), mask, True, 1, ())
    ((ids, trained, opens),) = group_documents([run])
    assert (ids.tolist(), trained.tolist(), opens) == ([5, 6], [False, True], True)


def _encode_in_child(encoder: DocumentEncoder, texts: list[str], connection: Connection) -> None:
    connection.send([run.ids.tolist() for run in encoder.runs(rows(*texts))])


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_tokenises_with_the_parents_encoder() -> None:
    texts = [f"hello world {number}" for number in range(200)]
    encoder = DocumentEncoder(byte_tokenizer(merges=MERGES), 300)
    here = [run.ids.tolist() for run in encoder.runs(rows(*texts))]
    context = multiprocessing.get_context("fork")
    parent, child = context.Pipe()
    process = context.Process(target=_encode_in_child, args=(encoder, texts, child))
    process.start()
    try:
        assert parent.poll(20), "the forked process hangs"
        assert parent.recv() == here
    finally:
        process.kill()
        process.join()


@pytest.mark.parametrize("begin", [False, True])
def test_text_that_ends_with_the_end_token_gets_no_second_one(begin: bool) -> None:
    encoder = DocumentEncoder(byte_tokenizer(begin=begin), 258)
    documents = rows("a" + END, "a" + END + END, END + "a", "a" + END + "\n", ("a" + END, "b"), ("a", "b" + END))
    grouped = group_documents(encoder.runs(documents))
    a, b, line = byte_tokenizer()("ab\n").input_ids
    bodies = [[a, 256], [a, 256, 256], [256, a, 256], [a, 256, line, 256], [a, 256, b, 256], [a, b, 256]]
    prefix = [257] if begin else []
    found = [(ids.tolist(), trained.tolist()) for ids, trained, _ in grouped]
    assert [ids for ids, _ in found] == [prefix + body for body in bodies]
    assert [sum(trained) for _, trained in found] == [len(prefix + body) for body in bodies[:4]] + [2, 2]
    last = {run.document: run.problems for run in encoder.runs(documents)}
    assert [last[number] for number in range(1, 7)] == [("double_eos",), ("double_eos",), (), (), (), ("double_eos",)]


def test_both_ends_in_the_text_are_reported() -> None:
    (run,) = DocumentEncoder(byte_tokenizer(begin=True), 258).runs(rows(BEGIN + "a" + END))
    assert (run.ids.size, run.end, run.problems) == (3, (), ("double_bos", "double_eos"))


def test_an_end_token_that_begins_a_text_does_not_end_it() -> None:
    """Of tokenizers that have one token for both, and put it in front."""
    tokenizer = byte_tokenizer()
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 256)])
    both = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, bos_token=END)
    documents = rows(END, "a", END + END)
    found = [ids.tolist() for ids, _, _ in group_documents(DocumentEncoder(both, 258).runs(documents))]
    assert found == [[256, 256], [256, *byte_tokenizer()("a").input_ids, 256], [256, 256]]


@settings(deadline=None)
@given(
    texts=st.lists(st.lists(st.sampled_from(["a", "\n", END]), max_size=6).map("".join), min_size=1, max_size=6),
    continues=st.lists(st.booleans(), min_size=6, max_size=6),
    size=st.integers(1, 30),
    pieces=st.integers(1, 4),
)
def test_only_the_last_token_of_a_document_decides(
    texts: list[str], continues: list[bool], size: int, pieces: int
) -> None:
    """Wherever its text is cut, and wherever a batch ends."""
    documents = [
        Document(str(number), (Segment(text), Segment("")), "here", continues=goes_on and number > 0)
        for number, (text, goes_on) in enumerate(zip(texts, continues, strict=False))
    ]
    encoder = DocumentEncoder(byte_tokenizer(), 258)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenization, "PIECE_CHARACTERS", size)
        patch.setattr(tokenization, "BATCH_PIECES", pieces)
        runs = list(encoder.runs(documents))
        grouped = [ids.tolist() for ids, _, _ in group_documents(runs)]
    expected = []
    for number, document in enumerate(documents, start=1):
        ids = [token for run in runs if run.document == number for token in run.ids.tolist()]
        goes_on = number < len(documents) and documents[number].continues
        expected.append(ids if goes_on or ids[-1:] == [256] else [*ids, 256])
        assert document.text == encoder._tokenizer.decode(ids)
    assert grouped == expected


def test_a_last_piece_without_tokens_hides_no_end() -> None:
    tokenizer = letter_tokenizer("never")  # it leaves out what it does not know
    document = Document("0", (Segment("a<"), Segment("?")), "here")
    ((ids, _, _),) = group_documents(DocumentEncoder(tokenizer, len(tokenizer)).runs([document]))
    assert tokenizer.convert_ids_to_tokens(ids.tolist()) == ["a", "<"]
    empty_behind = group_documents(DocumentEncoder(byte_tokenizer(), 258).runs(rows("a" + END, "")))
    assert [ids.tolist()[-1:] for ids, _, _ in empty_behind] == [[256], [256]], "each document has its own end"
