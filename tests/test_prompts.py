"""Prompts: examples with masked codes from what a user gives."""

import numpy as np
import pytest

from trimask.diffusion.data.layout import Layout
from trimask.diffusion.sampling.prompts import Prompts, parse_infill
from trimask.tokenizers.image import PatchCodec, PatchConfig
from trimask.tokenizers.media import MediaTokenizers
from trimask.tokenizers.sequence import Example, Segment
from trimask.tokenizers.text import TextTokenizer

RNG = np.random.default_rng(0)
LAYOUTS = {
    "words": Layout(shapes={"text": [3], "image": [2, 3]}, fill="whole"),
    "phrases": Layout(shapes={"text": [6], "image": [2, 3]}, fill="whole"),
    "sums": Layout(shapes={"text": [9]}, fill="whole"),
}


@pytest.fixture(scope="module")
def prompts():
    images = RNG.integers(0, 256, (5, 4, 6, 1), np.uint8)
    codecs = {"image": PatchCodec.fit(images, PatchConfig(codebook_size=5))}
    return Prompts(MediaTokenizers(TextTokenizer.fit(["1"], 256), codecs), LAYOUTS)


@pytest.mark.parametrize(
    ("pattern", "pieces"),
    [
        ("47+__=85", ["47+", 2, "=85"]),
        ("_", [1]),
        ("a[MASK:12]_b", ["a", 13, "b"]),
        (r"a\_b_", ["a_b", 1]),
        (r"\[MASK:2]_", ["[MASK:2]", 1]),
        (r"\\_", ["\\", 1]),
        (r"\n_", [r"\n", 1]),
    ],
)
def test_infill_patterns_are_read(pattern, pieces):
    assert parse_infill(pattern) == pieces


@pytest.mark.parametrize("pattern", ["47+38=85", "", r"\_", r"a\[MASK:3]"])
def test_a_pattern_without_a_hole_is_refused(pattern):
    with pytest.raises(ValueError, match="nothing is masked"):
        parse_infill(pattern)


@pytest.mark.parametrize("hole", ["[MASK]", "[MASK:0]", "[MASK:-1]", "[MASK:x]", "[MASK:]", "[MASK:²]"])
def test_a_hole_without_a_number_is_refused(hole):
    with pytest.raises(ValueError, match="n at least 1"):
        parse_infill(f"a{hole}_")


def test_an_answer_is_as_long_as_those_of_its_dataset_and_a_prompt_prefers_them():
    layouts = {
        "prose": Layout(shapes={"text": [12]}, fill="none"),
        "questions": Layout(shapes={"text": [9]}, fill="answer", answer_length=4),
    }
    tokenizers = MediaTokenizers(TextTokenizer.fit(["1"], 256), {})
    (segment,) = Prompts(tokenizers, layouts).complete("4+").segments
    assert len(segment.codes) == 2 + 4
    (segment,) = Prompts(tokenizers, layouts, dataset="prose").complete("4+").segments
    assert len(segment.codes) == 12
    (segment,) = Prompts(tokenizers, layouts, dataset="prose").complete("4+", length=3).segments
    assert segment.codes[2:].tolist() == [-1] * 3
    (segment,) = Prompts(tokenizers, layouts, dataset="prose").infill("4_").segments
    assert segment.codes.tolist() == [*tokenizers.text.encode("4"), -1, tokenizers.vocabulary.eos_code]
    with pytest.raises(ValueError, match="6 tokens; at most 5 fit"):
        Prompts(tokenizers, layouts, dataset="questions").complete("123456")
    with pytest.raises(ValueError, match="not trained on a dataset 'prse', only prose, questions"):
        Prompts(tokenizers, layouts, dataset="prse")
    questions = Prompts(tokenizers, layouts, dataset="questions")
    known = questions.with_answer({"text": "12345"}, "text", "678").segments[0]
    assert known.codes.tolist() == [*tokenizers.text.encode("12345678"), tokenizers.vocabulary.eos_code]
    assert known.num_given == 5
    assert len(questions.infill("12345_78").segments[0].codes) == 9
    with pytest.raises(ValueError, match="a text of 9 tokens does not fit a buffer of 9"):
        questions.with_answer({"text": "12345"}, "text", "6789")
    twice = Prompts(tokenizers, layouts, dataset="prose").complete("4+", length=24)
    assert len(twice.segments[0].codes) == 26
    with pytest.raises(ValueError, match="at least 1 token to write, not 0"):
        Prompts(tokenizers, layouts, dataset="prose").complete("4+", length=0)


def test_a_completion_is_the_prompt_and_then_only_masks(prompts):
    (segment,) = prompts.complete("4+").segments
    assert segment.codes.tolist() == [*prompts.tokenizers.text.encode("4+"), *[-1] * 7]
    assert not segment.is_condition


def test_an_infill_masks_its_holes_and_ends_with_eos(prompts):
    (segment,) = prompts.infill("4__=2").segments
    eos = prompts.tokenizers.vocabulary.eos_code
    given = [int(code) for code in prompts.tokenizers.text.encode("4=2")]
    assert segment.codes.tolist() == [given[0], -1, -1, *given[1:], *[eos] * 4]


def test_a_medium_is_asked_for_by_a_text_that_is_the_condition(prompts):
    text, image = prompts.from_text("ab", "image").segments
    eos = prompts.tokenizers.vocabulary.eos_code
    assert text.codes.tolist() == [*prompts.tokenizers.text.encode("ab"), eos] and text.is_condition
    assert (image.codes == -1).all() and image.codes.shape == (2, 3) and not image.is_condition


def test_a_text_is_asked_for_by_a_medium_that_is_the_condition(prompts):
    picture = RNG.integers(0, 256, prompts.media_shape("image"), np.uint8)
    image, text = prompts.from_medium("image", picture).segments
    np.testing.assert_array_equal(image.codes, prompts.tokenizers.encode("image", [picture])[0])
    assert image.is_condition and text.codes.tolist() == [-1] * 3


def test_a_prompt_takes_the_first_layout_it_fits(prompts):
    lengths = [len(prompts.from_text("x" * n, "image").segments[0].codes) for n in (2, 3, 5)]
    assert lengths == [3, 6, 6]


@pytest.mark.parametrize(
    ("ask", "count", "fit"),
    [
        (lambda p: p.from_text("x" * 6, "image"), 6, 5),
        (lambda p: p.complete("x" * 9), 9, 8),
        (lambda p: p.infill("x[MASK:999999999]"), 10**9, 8),
    ],
)
def test_a_prompt_that_does_not_fit_is_refused_with_both_numbers(prompts, ask, count, fit):
    with pytest.raises(ValueError, match=f"{count} tokens; at most {fit} fit"):
        ask(prompts)


@pytest.mark.parametrize("prompt", ["", " \n"])
def test_an_empty_prompt_is_refused(prompts, prompt):
    with pytest.raises(ValueError, match="must not be empty"):
        prompts.complete(prompt)


def test_a_task_without_a_layout_is_refused_and_the_others_are_named(prompts):
    with pytest.raises(ValueError, match="not trained on text to audio; it has text, text to image, image to text"):
        prompts.from_text("x", "audio")


def decoded(prompts, asked, written):
    """Decoded answer whose target codes are those of the text `written`, in which `$` stands for EOS."""
    eos = prompts.tokenizers.vocabulary.eos_code
    codes = [eos if c == "$" else int(prompts.tokenizers.text.encode(c)[0]) for c in written]
    return prompts.decode(asked, Example("text", (Segment("text", np.array(codes)),)))


def test_a_completion_ends_at_its_first_eos(prompts):
    assert decoded(prompts, prompts.complete("4+"), "4+12$3$$$") == "4+12"


def test_an_eos_in_a_hole_is_nothing_and_does_not_cut_what_was_given(prompts):
    assert decoded(prompts, prompts.infill("4__=2"), "4$7=2$$$$") == "47=2"
    assert decoded(prompts, prompts.infill("4=__"), "4=$7$$$$$") == "4="
