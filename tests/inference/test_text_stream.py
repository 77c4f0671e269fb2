"""The streamed text of an answer against the whole of it, decoded at once."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from truthgpt.inference.text_stream import TextStream, continuation
from truthgpt.models.tokenizer import byte_tokenizer, train_bpe_tokenizer

CORPUS = "The cat's 12 naïve cafés: 日本語, 日本, é, ❤️ 👩‍👩‍👧 😀😀\n\tdef f(x): return x\n" * 3


def sentencepiece(decoder: decoders.Decoder) -> PreTrainedTokenizerFast:
    """Llama's kind: a mark for the space, and a token for each byte of characters that are no piece."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((f"<0x{byte:02X}>", -20.0) for byte in range(256))]
    pieces += [("▁", -3.0), ("▁the", -2.0), ("▁▁", -2.0), ("é", -4.0), ("語", -4.0), ("\ufffd", -4.0)]
    pieces += [(letter, -5.0) for letter in "abcdefghijklmnopqrstuvwxyz."]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoder
    return finished(backend, eos_token="</s>", unk_token="<unk>")


def word_pieces() -> PreTrainedTokenizerFast:
    words = ["<unk>", "the", "cat", "##s", "##é", ".", "n't", "do", *"abc", *(f"##{letter}" for letter in "abc")]
    backend = Tokenizer(models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=True)
    return finished(backend, unk_token="<unk>")


def words() -> PreTrainedTokenizerFast:
    """No decoder: words joined by spaces."""
    vocabulary = {word: index for index, word in enumerate(["<unk>", "a", "aa", "b", "aab", "é"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return finished(backend, unk_token="<unk>")


def suffixed() -> PreTrainedTokenizerFast:
    """GPT-1's kind: a mark at the end of each word."""
    vocabulary = {piece: index for index, piece in enumerate([*"abc", *(f"{letter}</w>" for letter in "abc")])}
    backend = Tokenizer(models.BPE(vocabulary, [], end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.BPEDecoder("</w>")
    return finished(backend)


def finished(backend: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.add_tokens(["<tool é>"])
    return tokenizer


LLAMA_STEPS = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
TOKENIZERS = {
    "byte": byte_tokenizer(),
    "bpe": train_bpe_tokenizer([CORPUS], 290),
    "llama": sentencepiece(decoders.Sequence(LLAMA_STEPS)),
    "metaspace": sentencepiece(decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])),
    "word_pieces": word_pieces(),
    "words": words(),
    "suffixed": suffixed(),
}
PARTS = [
    "é",
    "e\u0301",
    "語",
    "😀",
    "👩‍👩‍👧",
    "❤️",
    "🇩🇪",
    "\ufffd",
    " ",
    "  ",
    "a",
    "aab",
    "the",
    " the",
    "\n",
    "<0x41>",
    "\x00",
]
TEXTS = st.one_of(st.text(max_size=30), st.lists(st.sampled_from(PARTS), max_size=30).map("".join))
STOPS = st.lists(st.one_of(st.sampled_from([*PARTS, "aa", "aaa", "ab", "b"]), st.text("ab é", min_size=1)), max_size=3)
STOPS = STOPS.map(lambda texts: [text for text in texts if text])


def up_to_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The definition, read literally: whatever the text, as soon as one letter more ends with a stop text, it ends."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


def check(
    tokenizer: PreTrainedTokenizerFast, prompt: list[int], answer: list[int], stops: list[str], cuts: int
) -> None:
    """Stream `answer`, cut by the seed `cuts`, and compare; what is given out on the way must be certain."""
    stream = TextStream(tokenizer, prompt, tuple(stops))
    expected, stopped = up_to_stop(continuation(tokenizer, prompt, answer), stops)
    rng, start, given = random.Random(cuts), 0, ""
    while start < len(answer):
        end = start + (1 if cuts % 2 else rng.randint(0, 9))
        given += stream.push(answer[start:end])
        assert expected.startswith(given)
        start = end
    given += stream.finish()
    assert given == expected
    assert stream.stopped == stopped
    assert stream.finish() == ""


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_text_in_pieces_is_the_whole_text(name: str) -> None:
    tokenizer = TOKENIZERS[name]

    @settings(max_examples=60, deadline=None)
    @given(TEXTS, st.floats(0, 1), STOPS, st.integers(0, 99))
    @example("a 😀", 0.99, [], 1)
    @example("   the", 0.0, [], 1)
    def run(text: str, share: float, stops: list[str], cuts: int) -> None:
        ids = tokenizer(text)["input_ids"]
        cut = round(share * len(ids))  # anywhere, within a character too
        check(tokenizer, ids[:cut], ids[cut:], stops, cuts)

    run()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_any_tokens_in_pieces_are_the_whole_text(name: str) -> None:
    """What an untrained model writes: broken characters, special tokens, ids the tokenizer does not have."""
    tokenizer = TOKENIZERS[name]
    any_id = st.integers(0, len(tokenizer) + 3)
    some = [i for i in range(len(tokenizer)) if tokenizer.convert_ids_to_tokens(i) in ("▁", "▁▁", "<0xE2>", "<0x82>")]
    common = st.sampled_from([*some, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98, 0x80, len(tokenizer) - 1])
    ids = st.lists(st.one_of(any_id, common), max_size=60)

    @settings(max_examples=100, deadline=None)
    @given(ids, ids, STOPS, st.integers(0, 99))
    def run(prompt: list[int], answer: list[int], stops: list[str], cuts: int) -> None:
        check(tokenizer, prompt, answer, stops, cuts)

    run()


@pytest.mark.parametrize("name", ["byte", "bpe", "llama", "metaspace"])
@pytest.mark.parametrize("text", [CORPUS, "😀" * 50, " " * 50, "e\u0301" * 40, "👩‍👩‍👧" * 10 + " the"])
def test_long_texts(name: str, text: str) -> None:
    ids = TOKENIZERS[name](text)["input_ids"]
    for cut in range(0, len(ids), 7):
        check(TOKENIZERS[name], ids[:cut], ids[cut:], [], cut)


def pushed(name: str, text: str, stops: tuple[str, ...] = (), prompt: str = "a") -> list[str]:
    """What each token's push gives, and the end."""
    tokenizer = TOKENIZERS[name]
    start, whole = (tokenizer(part)["input_ids"] for part in (prompt, prompt + text))
    assert whole[: len(start)] == start
    stream = TextStream(tokenizer, start, stops)
    return [*(stream.push([index]) for index in whole[len(start) :]), stream.finish()]


def test_a_character_comes_with_its_last_byte() -> None:
    assert pushed("byte", "é😀!") == ["", "é", "", "", "", "😀", "!", ""]
    assert pushed("byte", "e\u0301") == ["e", "", "\u0301", ""]


def test_byte_tokens_of_sentencepiece_wait_for_the_end_of_their_run() -> None:
    """Until then a wrong byte could still take the whole run away."""
    assert pushed("llama", "😀😀b") == [""] * 8 + ["😀😀b", ""]
    tokenizer = TOKENIZERS["llama"]
    ids = tokenizer.convert_tokens_to_ids(["<0xC3>", "<0xA9>", "<0xFF>"])
    stream = TextStream(tokenizer, [], ())
    assert [stream.push([index]) for index in ids] == ["", "", ""]
    assert stream.finish() == "\ufffd\ufffd\ufffd"


def test_only_one_broken_character_is_held_back() -> None:
    stream = TextStream(TOKENIZERS["byte"], [], ())
    assert [stream.push([0xFF]) for _ in range(4)] == ["", "\ufffd", "\ufffd", "\ufffd"]
    assert stream.finish() == "\ufffd"


def test_a_space_is_kept_between_prompt_and_answer() -> None:
    assert pushed("llama", " the", prompt="a") == [" the", ""]
    tokenizer = TOKENIZERS["llama"]
    assert TextStream(tokenizer, [], ()).push(tokenizer("the")["input_ids"]) == "the"
    end = tokenizer.eos_token_id
    assert TextStream(tokenizer, [end] * 20, ()).push([end, *tokenizer("the")["input_ids"]]) == "the"


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("aaab!", ("aab",), ["", "", "a", "", "", ""]),  # the stop text begins twice
        ("xSTOPy", ("STOP",), ["x", "", "", "", "", "", ""]),  # over several tokens
        ("STOx", ("STOP",), ["", "", "", "STOx", ""]),
        ("xSTO", ("STOP",), ["x", "", "", "", "STO"]),  # the answer ends within it
        ("abc", ("abc", "b"), ["", "a", "", ""]),  # `b` is complete first, and the answer ended before `c`
        ("xab", ("b", "ab"), ["x", "", "", ""]),  # complete at the same place: the longest
        ("éx", ("é",), ["", "", "", ""]),
    ],
)
def test_stop_texts(text: str, stops: tuple[str, ...], expected: list[str]) -> None:
    assert pushed("byte", text, stops) == expected


def test_a_stop_text_within_one_push() -> None:
    stream = TextStream(TOKENIZERS["byte"], [], ("\n\n", "END"))
    assert (stream.push(list(b"one\ntwo\n")), stream.stopped) == ("one\ntwo", False)
    assert (stream.push(list(b"\nthree")), stream.stopped) == ("", True)
    assert stream.push(list(b"four")) == stream.finish() == ""


def test_a_stop_text_may_be_complete_only_at_the_end() -> None:
    tokenizer = TOKENIZERS["llama"]
    stream = TextStream(tokenizer, [], ("😀",))
    ids = tokenizer.convert_tokens_to_ids(["a", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>"])
    assert (stream.push(ids), stream.stopped) == ("", False)
    assert (stream.finish(), stream.stopped) == ("a", True)


def test_a_prompt_that_ends_within_a_character() -> None:
    """The answer alone is decoded, as for the whole text: its first bytes are no character."""
    tokenizer = TOKENIZERS["byte"]
    for answer in ([0x82, 0xAC, 65], [65, 66], [0x82], [0x82, 65], [0xE2, 0x82, 0xAC]):
        check(tokenizer, [65, 0xE2], answer, [], 1)
    runs = TOKENIZERS["llama"].convert_tokens_to_ids(["<0xEF>", "<0xBF>", "<0xBD>"])  # the replacement character itself
    check(TOKENIZERS["llama"], runs[:2], runs[2:], [], 1)
    stream = TextStream(tokenizer, [65, 0xE2], ())
    assert [stream.push([byte]) for byte in (0x82, 0xAC, 65)] == ["", "\ufffd", "\ufffdA"]


@pytest.mark.parametrize(
    ("name", "token"),
    [("byte", lambda n: 97), ("byte", lambda n: 0xFF), ("llama", lambda n: 258), ("bpe", lambda n: n * 37 % 290)],
)
def test_the_work_a_token_does_not_grow(
    name: str, token: Callable[[int], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = TOKENIZERS[name]
    decoded: list[int] = []
    decode = PreTrainedTokenizerFast.decode

    def counting(self: PreTrainedTokenizerFast, ids: list[int], **options: bool) -> str:
        decoded.append(len(ids))
        return str(decode(self, ids, **options))

    monkeypatch.setattr(PreTrainedTokenizerFast, "decode", counting)
    stream = TextStream(tokenizer, [token(n) for n in range(2000)], ())
    for n in range(500):
        stream.push([token(n)])
    assert max(decoded) <= 17
    assert len(decoded) <= 600


def test_a_long_run_of_byte_tokens_is_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = TOKENIZERS["llama"]
    byte, letter = tokenizer.convert_tokens_to_ids(["<0x41>", "b"])
    stream = TextStream(tokenizer, [letter], ())
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerFast, "decode", None)
        assert [stream.push([byte]) for _ in range(1000)] == [""] * 1000
    assert stream.push([letter]) == "A" * 1000 + "b"
    assert stream.push([letter]) == "b"
