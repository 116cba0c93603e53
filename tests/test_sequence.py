"""Examples are assembled into rows of tokens, and disassembled again."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimask.tokenizers.sequence import Example, Segment, assemble, disassemble, example_starts, stack_rows, task_tokens
from trimask.tokenizers.vocabulary import Vocabulary

VOCABULARY = Vocabulary(text_size=7, codebook_sizes={"image": (5,), "audio": (3, 4)})


def codes_of(modality, shape, rng):
    sizes = {"text": 8, "image": 5, "audio": np.array([3, 4])}
    codes = rng.integers(0, sizes[modality], shape).astype(np.int32)
    return np.where(rng.random(shape) < 0.3, -1, codes)


# Numbers, of which the test makes an example: beartype draws by Python's `random`, which strategies must not.
NUMBERS = st.tuples(
    st.integers(0, 1000),
    st.sampled_from(sorted(VOCABULARY.tasks)),
    st.tuples(st.integers(1, 4)),
    st.tuples(st.integers(1, 2), st.integers(1, 3)),
    st.tuples(st.integers(1, 3), st.just(2)),
    st.integers(0, 1),
)


def example_of(seed, name, text, image, audio, num_given):
    rng, task = np.random.default_rng(seed), VOCABULARY.tasks[name]
    shapes = {"text": text, "image": image, "audio": audio}
    return Example.of_task(task, {m: codes_of(m, shapes[m], rng) for m in task.modalities}, num_given)


@given(st.lists(NUMBERS, min_size=1, max_size=3), st.integers(0, 4))
def test_packed_examples_come_back_whole(numbers, padding):
    packed = [example_of(*of_example) for of_example in numbers]
    length = sum(example.length for example in packed) + padding
    row = assemble(VOCABULARY, packed, length)
    back = disassemble(VOCABULARY, row)
    assert [e.task for e in back] == [e.task for e in packed]
    for old, new in zip(packed, back, strict=True):
        for a, b in zip(old.segments, new.segments, strict=True):
            assert (a.modality, a.num_given) == (b.modality, b.num_given)
            np.testing.assert_array_equal(a.codes, b.codes)
    assert row.is_padding.sum() == padding


def test_a_pair_is_laid_out_task_condition_target_with_coordinates():
    codes = {"text": np.array([3, 7]), "audio": np.array([[0, 1], [2, -1]])}
    row = assemble(VOCABULARY, [Example.of_task(VOCABULARY.tasks["audio_to_text"], codes)], 10)
    v = VOCABULARY
    audio = [v.ranges[3].start, v.ranges[4].start + 1, v.ranges[3].start + 2, v.mask_id]
    text = [v.text_range.start + 3, v.eos_id]
    expected = [v.task_id("audio_to_text"), v.begin_id("audio"), *audio, v.begin_id("text"), *text, v.padding_id]
    np.testing.assert_array_equal(row.tokens, expected)
    np.testing.assert_array_equal(row.modality, [0, 0, 3, 3, 3, 3, 0, 1, 1, 0])
    np.testing.assert_array_equal(row.coordinates[2:6], [[0, 0], [0, 1], [1, 0], [1, 1]])
    np.testing.assert_array_equal(row.coordinates[7:9], [[0, 0], [1, 0]])
    np.testing.assert_array_equal(row.is_condition, [0, 0, 1, 1, 1, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(row.is_target, [0, 0, 0, 0, 0, 0, 0, 1, 1, 0])


def test_the_first_codes_of_a_text_can_be_given():
    row = assemble(
        VOCABULARY, [Example.of_task(VOCABULARY.tasks["text"], {"text": np.array([1, 2, 3])}, num_given=2)], 5
    )
    np.testing.assert_array_equal(row.is_condition, [0, 0, 1, 1, 0])


def test_starts_and_tasks_are_found_for_every_position():
    packed = [Example("text", (Segment("text", np.array([1, 2])),)), Example("text", (Segment("text", np.array([3])),))]
    rows = stack_rows([assemble(VOCABULARY, packed, 8), assemble(VOCABULARY, packed[::-1], 8)])
    np.testing.assert_array_equal(example_starts(rows), [[0, 0, 0, 0, 4, 4, 4, 7], [0, 0, 0, 3, 3, 3, 3, 7]])
    assert (np.asarray(task_tokens(rows))[:, :7] == VOCABULARY.task_id("text")).all()


def test_text_is_filled_with_eos_and_read_until_the_first():
    filled = VOCABULARY.pad_with_eos(np.array([4, 5]), 5)
    np.testing.assert_array_equal(filled, [4, 5, 7, 7, 7])
    np.testing.assert_array_equal(VOCABULARY.until_eos(filled), [4, 5])
    with pytest.raises(ValueError, match="5 tokens does not fit a buffer of 5"):
        VOCABULARY.pad_with_eos(np.arange(5), 5)


def test_examples_that_do_not_fit_a_row_are_refused():
    example = Example("text", (Segment("text", np.array([1, 2])),))
    with pytest.raises(ValueError, match="8 tokens do not fit a row of 7"):
        assemble(VOCABULARY, [example, example], 7)
