from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from truthgpt.data.base import Document, Segment
from truthgpt.data.split import split_documents
from truthgpt.data.text_source import TextSource
from truthgpt.errors import DataError

from .conftest import ListSource, rows


def texts(count: int) -> list[Document]:
    return rows(*[f"text {index}" for index in range(count)])


@given(st.integers(2, 200), st.floats(0, 0.99))
def test_sizes(count: int, fraction: float) -> None:
    split = split_documents(ListSource(texts(count)), fraction)
    held_out = len(split.validation) if split.validation is not None else 0
    assert len(split.train) + held_out == count
    assert held_out == (0 if fraction == 0 else min(max(round(fraction * count), 1), count - 1))
    assert len(list(split.train)) == len(split.train)
    assert len(list(split.validation or [])) == held_out


def test_smallest_hashes_of_the_keys_are_held_out_in_source_order() -> None:
    documents = texts(50)
    split = split_documents(ListSource(documents), 0.2)
    by_hash = sorted(documents, key=lambda d: hashlib.sha256(d.key.encode()).digest())
    expected = {document.key for document in by_hash[:10]}
    assert split.validation is not None
    assert list(split.validation) == [document for document in documents if document.key in expected]
    assert list(split.train) == [document for document in documents if document.key not in expected]
    assert list(split.train) == list(split.train)


def test_choice_depends_on_neither_order_nor_seed_but_the_digest_sees_both() -> None:
    documents = texts(100)
    shuffled = random.Random(1).sample(documents, k=100)
    first, second = split_documents(ListSource(documents), 0.1), split_documents(ListSource(shuffled), 0.1)
    assert first.validation is not None and second.validation is not None
    assert {d.key for d in first.validation} == {d.key for d in second.validation}
    assert first.digest != second.digest


def test_growing_data_never_moves_many_documents() -> None:
    before, after = split_documents(ListSource(texts(100)), 0.1), split_documents(ListSource(texts(110)), 0.1)
    assert before.validation is not None and after.validation is not None
    assert len({d.key for d in before.validation} - {d.key for d in after.validation}) <= 3


def variants() -> list[list[Document]]:
    one = Document("k", (Segment("ab"), Segment("c")), "here")
    return [
        [one],
        [one, one],
        [Document("l", one.segments, "here")],
        [Document("k", (Segment("a"), Segment("bc")), "here")],
        [Document("k", (Segment("ab"), Segment("c", trained=False)), "here")],
        [Document("k", (Segment("abc"),), "here")],
        [Document("k", one.segments, "here", continues=True)],
    ]


def test_digest_sees_every_change_and_nothing_else() -> None:
    digests = [split_documents(ListSource(documents), 0).digest for documents in variants()]
    assert len(set(digests)) == len(digests)
    elsewhere = [Document("k", (Segment("ab"), Segment("c")), "moved")]
    assert split_documents(ListSource(elsewhere), 0).digest == digests[0]


def test_set_digests_tell_the_sets_and_fractions_apart() -> None:
    source = ListSource(texts(40))
    some, more = split_documents(source, 0.1), split_documents(source, 0.2)
    assert some.validation is not None and more.validation is not None
    assert len({some.train.digest, some.validation.digest, more.train.digest, more.validation.digest}) == 4
    assert some.digest == more.digest


def test_validation_source_holds_nothing_out() -> None:
    split = split_documents(ListSource(texts(10)), 0.5, ListSource(rows("other")))
    assert split.validation is not None
    assert (len(split.train), [d.text for d in split.validation]) == (10, ["other"])
    assert split.digest != split_documents(ListSource(texts(10)), 0.5, ListSource(rows("changed"))).digest


def test_one_document_is_not_held_out(caplog: pytest.LogCaptureFixture) -> None:
    split = split_documents(ListSource(texts(1)), 0.5)
    assert split.validation is None and len(split.train) == 1
    assert "data.validation_path" in caplog.text


def test_no_document() -> None:
    with pytest.raises(DataError, match="0 usable documents"):
        split_documents(ListSource([]), 0.1)


@pytest.mark.parametrize(
    ("count", "message"),
    [(6, r"^rows.jsonl:6: .*changed.*behind the 5"), (4, r"^rows.jsonl:4: .*changed.*the last of 4.*were 5")],
)
def test_source_that_changes_is_noticed_and_named(count: int, message: str) -> None:
    source = ListSource(texts(5))
    split = split_documents(source, 0)
    source.items = texts(count)
    with pytest.raises(DataError, match=message):
        list(split.train)


class NamedSource(ListSource):
    """A source whose identity can change."""

    name = "first"

    def identity(self) -> str | None:
        return self.name


def test_same_number_of_other_documents_is_noticed_by_the_identity() -> None:
    source = NamedSource(texts(5))
    split = split_documents(source, 0)
    assert len(list(split.train)) == 5
    source.name = "second"
    with pytest.raises(DataError, match="a file has another size or time"):
        list(split.train)


def test_pieces_of_one_file_continue_only_their_own_predecessor(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("".join(f"line {index}\n" for index in range(2000)))
    source = TextSource([str(path)])
    split = split_documents(source, 0.1)
    everything = list(source.documents())
    for documents in (split.train, split.validation):
        assert documents is not None
        chosen = list(documents)
        places = [next(i for i, d in enumerate(everything) if d.key == piece.key) for piece in chosen]
        assert [piece.continues for piece in chosen] == [
            place - 1 == before for place, before in zip(places, [-9, *places], strict=False)
        ]
