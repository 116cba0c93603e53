"""Byte-level BPE tokenizers on Hugging Face's library."""

import json
import random
import time
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers
from trimask.tokenizers import text
from trimask.tokenizers.text import TextTokenizer

SUMS = [f"{a}+{b}={a + b}" for a in range(0, 100, 7) for b in range(0, 100, 3)]
CAPTIONS = [
    "a handwritten seven",
    "a handwritten eight",
    "the word seven, spoken",
    "1999 was a year; 1999!",
] * 9
TOKENIZER = TextTokenizer.fit(SUMS + CAPTIONS, 320)

UNHURRIED = settings(deadline=None, max_examples=50)  # a busy machine is no failure

# Every string of valid Unicode, with what tends to go wrong made frequent.
UNICODE = st.text(st.characters(exclude_categories=["Cs"])) | st.lists(
    st.sampled_from([" ", "  ", "\r\n", "\t", "\0", "7", "٣", "½", "é", "e\u0301", "\ufeff", "<s>", "🤖", "a", "'s"])
).map("".join)


@UNHURRIED
@given(UNICODE)
def test_every_unicode_string_round_trips(text):
    ids = TOKENIZER.encode(text)
    assert ids.dtype == np.int32
    assert TOKENIZER.decode(ids) == text


@UNHURRIED
@given(st.lists(UNICODE, max_size=5))
def test_a_batch_is_its_texts_one_by_one(texts):
    batch = TOKENIZER.encode_batch(texts)
    assert len(batch) == len(texts)
    for ids, each in zip(batch, texts, strict=True):
        np.testing.assert_array_equal(ids, TOKENIZER.encode(each))
    assert TOKENIZER.decode_batch(batch) == texts


@UNHURRIED
@given(st.text("0123456789+= seven"))
def test_every_digit_is_a_token_of_its_own(text):
    pieces = [TOKENIZER.decode(ids[None]) for ids in TOKENIZER.encode(text)]
    assert "".join(pieces) == text
    assert all(len(piece) == 1 for piece in pieces if any(character.isdigit() for character in piece))


def test_no_token_of_the_vocabulary_holds_a_digit_and_anything_else():
    pieces = [TOKENIZER.decode(np.array([token], np.int32)) for token in range(TOKENIZER.size)]
    assert sorted(piece for piece in pieces if any(unicodedata.category(c) == "Nd" for c in piece)) == list(
        "0123456789"
    )


def test_frequent_words_become_single_tokens_within_the_cap():
    assert 256 < TOKENIZER.size <= 320
    assert len(TOKENIZER.encode(" handwritten")) == 1
    assert TextTokenizer.fit(SUMS + CAPTIONS, 260).size == 260


def test_all_bytes_are_in_the_alphabet_of_a_tokenizer_fitted_on_nothing():
    tokenizer = TextTokenizer.fit([], 300)
    assert tokenizer.size == 256
    text = "".join(map(chr, range(0x250))) + "🤖"
    assert len(tokenizer.encode(text)) == len(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_fit_does_not_depend_on_the_order_of_the_texts():
    shuffled = random.Random(0).sample(SUMS + CAPTIONS, len(SUMS + CAPTIONS))
    assert TextTokenizer.fit(iter(shuffled), 320).fingerprint == TOKENIZER.fingerprint
    assert TextTokenizer.fit(SUMS + CAPTIONS, 290).fingerprint != TOKENIZER.fingerprint


def test_broken_utf8_decodes_to_the_replacement_character():
    first_byte = TOKENIZER.encode("é")[:1]
    assert TOKENIZER.decode(first_byte) == "\ufffd"


def test_a_lone_surrogate_is_refused_with_its_place():
    for call in (TOKENIZER.encode, lambda text: TOKENIZER.encode_batch(["fine", text])):
        with pytest.raises(ValueError, match="lone surrogate at position 2"):
            call("ab\ud800")
    with pytest.raises(ValueError, match="lone surrogate"):
        TextTokenizer.fit(["\udfff"], 256)


@pytest.mark.parametrize("wrong", [-1, TOKENIZER.size])
def test_ids_outside_the_vocabulary_are_refused(wrong):
    with pytest.raises(ValueError, match=f"text ids must be from 0 to {TOKENIZER.size - 1}, got .*{wrong}"):
        TOKENIZER.decode(np.array([3, wrong], np.int32))


def test_a_vocabulary_smaller_than_the_bytes_is_refused():
    with pytest.raises(ValueError, match="vocabulary_size must be at least 256, one token per byte, got 255"):
        TextTokenizer.fit(SUMS, 255)


def _foreign_tokenizer() -> tokenizers.Tokenizer:
    """A word-level tokenizer with everything that could interfere: normaliser, special tokens, truncation, padding."""
    words = ["<unk>", "<s>", "<", "s", ">", "hello", "world"]
    foreign = tokenizers.Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, "<unk>"))
    foreign.normalizer = normalizers.Lowercase()
    foreign.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation(), pre_tokenizers.Split("s", "isolated")]
    )
    foreign.add_special_tokens(["<s>"])
    foreign.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    foreign.enable_truncation(4)
    foreign.enable_padding(length=9)
    return foreign


def test_any_tokenizer_json_is_read_by_its_own_rules_but_only_text_is_text(tmp_path):
    path = tmp_path / "tokenizer.json"
    _foreign_tokenizer().save(str(path))
    tokenizer = TextTokenizer.from_file(path)
    assert tokenizer.size == 7
    # No <s> before it, nothing cut off, nothing padded.
    assert tokenizer.encode("Hello world hello world hello").tolist() == [5, 6, 5, 6, 5]
    assert tokenizer.encode("hello <s>").tolist() == [5, 2, 3, 4]


def test_a_special_token_is_shown_when_decoded(tmp_path):
    path = tmp_path / "tokenizer.json"
    _foreign_tokenizer().save(str(path))
    assert TextTokenizer.from_file(path).decode(np.array([1, 5], np.int32)) == "<s> hello"


def test_a_tokenizer_file_that_is_none_is_refused_with_its_path(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        TextTokenizer.from_file(tmp_path / "absent.json")
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"model": 3}))
    with pytest.raises(ValueError, match=r"other\.json: not a tokenizer\.json"):
        TextTokenizer.from_file(path)


@pytest.mark.parametrize("letters", ["abcdefgh", " ", " \t", "\u00a0\n"])
def test_fitting_takes_a_text_without_words_in_pieces_that_lose_nothing(letters):
    words = "ab" * 1700 + " and " + "c" * 999
    pieces = [piece for piece in text._LONG_WORD.split(words) if piece]
    assert "".join(pieces) == words and [len(piece) for piece in pieces] == [1000, 1000, 1000, 1404]
    long = "".join(np.random.default_rng(0).choice(list(letters), 300_000)) + "x"
    begin = time.process_time()
    fitted = TextTokenizer.fit([long], 300)
    assert fitted.decode(fitted.encode(long)) == long
    assert time.process_time() - begin < 5  # a third of it in one piece took 1.4 s, and the time grows with the square
