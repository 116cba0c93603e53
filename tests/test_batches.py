"""Batches as a pure function of the step."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimask.diffusion.data.batches import BatchConfig, Batches, pack
from trimask.diffusion.run.step_loop import LoopConfig, prefetched
from trimask.tokenizers.sequence import disassemble


def ids_in(batch, prepared):
    """Task and codes of every example of a batch."""
    vocabulary = prepared.tokenizers.vocabulary
    rows = [type(batch)(*(getattr(batch, f)[i] for f in batch.__dataclass_fields__)) for i in range(len(batch.tokens))]
    return [
        (e.task, tuple((s.modality, s.codes.tobytes()) for s in e.segments))
        for row in rows
        for e in disassemble(vocabulary, row)
    ]


def test_a_batch_depends_on_seed_and_step_alone(prepared):
    config = BatchConfig(tokens=120)
    forwards = [Batches(prepared, config, seed=3)(step) for step in range(5)]
    other_instance = Batches(prepared, config, seed=3)
    for step in reversed(range(5)):
        np.testing.assert_array_equal(other_instance(step).tokens, forwards[step].tokens)
    assert any(
        (Batches(prepared, config, seed=4)(s).tokens.shape != forwards[s].tokens.shape)
        or (Batches(prepared, config, seed=4)(s).tokens != forwards[s].tokens).any()
        for s in range(5)
    )


def test_a_process_fills_only_its_local_rows_and_counts_the_tokens_of_all(prepared):
    config = BatchConfig(tokens=120)
    whole, own = (
        Batches(prepared, config, seed=3),
        Batches(prepared, config, seed=3, local_rows=lambda n: np.arange(n) % 3 == 1),
    )
    for step in range(12):
        everything, part = whole(step), own(step)
        assert whole.num_tokens(step) == own.num_tokens(step) == np.count_nonzero(~everything.is_padding)
        np.testing.assert_array_equal(part.tokens[1::3], everything.tokens[1::3])
        assert part.is_padding[0::3].all() and part.is_padding[2::3].all() and not part.is_padding[1::3].all()


@pytest.mark.parametrize("copies", [1, 2])
def test_mean_targets_are_those_of_the_batches_of_a_run(prepared, copies):
    """Against 600 batches, whose conditions are counted with the probability that they are masked, too."""
    config = BatchConfig(
        tokens=240, weights={"drawn": 2.0}, final_weights={"sums": 3.0}, anneal_tokens=(20_000, 60_000),
        task_weights={"image_to_text": 3.0}, masked_prompt_share=0.3,
    )  # fmt: skip
    batches, vocabulary, steps = Batches(prepared, config, seed=1, copies=copies), prepared.tokenizers.vocabulary, 600
    counts = np.zeros(len(vocabulary.modalities))
    for step in range(steps):
        batch = batches(step)
        is_text = batch.tokens[:, :1] == vocabulary.task_id("text")
        weight = batch.is_target + 0.4 * (batch.is_condition & ~is_text)
        counts += copies * np.bincount(batch.modality.reshape(-1), weight.reshape(-1), len(counts))
    means = batches.mean_targets(steps, joint_probability=0.4)
    assert list(means) == list(vocabulary.modalities[1:])
    # Tasks and prompts are drawn for each example; the standard error of the means is about 1 %.
    np.testing.assert_allclose(list(means.values()), counts[1:] / steps, rtol=0.04)


def test_modalities_without_targets_have_no_mean(prepared):
    config = BatchConfig(tokens=120, weights={"spoken": 0.0, "sums": 0.0}, task_weights={"image_to_text": 0.0})
    batches = Batches(prepared, config, seed=0)
    assert list(batches.mean_targets(5, joint_probability=0.0)) == ["image"]
    assert list(batches.mean_targets(5, joint_probability=0.1)) == ["text", "image"]


def test_an_epoch_visits_every_example_once(prepared):
    config = BatchConfig(tokens=140, weights={"drawn": 1.0, "spoken": 0.0, "sums": 0.0})
    batches = Batches(prepared, config, seed=0)
    rows = len(batches(0).tokens)
    examples = len(prepared.examples("drawn", "train"))
    assert rows == 10 and examples == 20
    seen = [key[1] for step in range(examples // rows) for key in ids_in(batches(step), prepared)]
    unordered = [frozenset(segments) for segments in seen]
    assert len(unordered) == len(set(unordered)) == examples
    again = [
        key[1] for step in range(examples // rows, 2 * examples // rows) for key in ids_in(batches(step), prepared)
    ]
    assert {frozenset(s) for s in again} == set(unordered)
    assert [frozenset(s) for s in again] != unordered


def test_shares_of_tokens_of_datasets_follow_the_weights(prepared):
    config = BatchConfig(tokens=120, weights={"drawn": 3.0, "spoken": 1.0, "sums": 2.0})
    batches = Batches(prepared, config, seed=0)
    tokens = dict.fromkeys(prepared.manifest.datasets, 0)
    for step in range(400):
        tokens[batches.describe(step)["dataset"]] += np.count_nonzero(~batches(step).is_padding)
    shares = np.array([tokens[name] for name in config.weights]) / sum(tokens.values())
    # Low discrepancy: a share is off by a few of 400 steps.
    np.testing.assert_allclose(shares, [3 / 6, 1 / 6, 2 / 6], atol=0.01)


def test_a_description_names_the_examples_of_the_batch(prepared):
    batches = Batches(prepared, BatchConfig(tokens=120), seed=0)
    for step in range(6):
        described, batch = batches.describe(step), batches(step)
        examples = {e["id"]: e for e in prepared.examples(described["dataset"], "train")}
        assert len(described["ids"]) == len(batch.tokens)
        texts = {codes for _, segments in ids_in(batch, prepared) for name, codes in segments if name == "text"}
        assert texts == {examples[id]["text"].tobytes() for row in described["ids"] for id in row}


def test_epochs_are_counted(prepared):
    config = BatchConfig(tokens=140, weights={"spoken": 0.0, "sums": 0.0})
    (use,) = Batches(prepared, config, seed=0).dataset_use(steps=7)
    assert (use.name, use.examples, use.steps, use.epochs) == ("drawn", 20, 7, 3.5)


def test_tasks_are_drawn_in_proportion_to_their_weights(prepared):
    config = BatchConfig(
        tokens=600, weights={"spoken": 0.0, "sums": 0.0}, task_weights={"text_to_image": 3.0, "image_to_text": 1.0}
    )
    batches = Batches(prepared, config, seed=0)
    tasks = [task for step in range(40) for task, _ in ids_in(batches(step), prepared)]
    # Five standard deviations of the share of some 2,000 rows.
    assert abs(tasks.count("text_to_image") / len(tasks) - 0.75) < 0.05


def test_a_share_of_the_sums_has_a_prompt_that_may_be_masked(prepared):
    config = BatchConfig(tokens=600, weights={"drawn": 0.0, "spoken": 0.0}, masked_prompt_share=0.25)
    batches = Batches(prepared, config, seed=0)
    given = [
        example.segments[0].num_given
        for batch in map(batches, range(20))
        for row in range(len(batch.tokens))
        for example in disassemble(
            prepared.tokenizers.vocabulary, type(batch)(*(getattr(batch, f)[row] for f in batch.__dataclass_fields__))
        )
    ]
    assert set(given) == {0, 6}
    # Five standard deviations of the share of some 800 examples.
    assert abs(given.count(0) / len(given) - 0.25) < 0.08


def test_rows_are_a_multiple_of_the_micro_batches(prepared):
    batches = Batches(prepared, BatchConfig(tokens=120), seed=0, micro_batches=3)
    assert {len(batches(step).tokens) % 3 for step in range(6)} == {0}


def test_texts_are_packed_into_one_row(prepared):
    config = BatchConfig(
        tokens=120,
        weights={"drawn": 0.0, "spoken": 0.0},
        packed_length=2 * prepared.dataset("sums").layout.example_length(),
    )
    batch = Batches(prepared, config, seed=0)(0)
    assert batch.tokens.shape == (120 // batch.length, 2 * prepared.dataset("sums").layout.example_length())
    np.testing.assert_array_equal(batch.segment.max(axis=1), 2)


def test_the_number_of_steps_of_a_horizon_counts_only_tokens_that_are_not_padding(prepared):
    config = BatchConfig(tokens=120, weights={"spoken": 0.0})
    batches = Batches(prepared, config, seed=0)
    steps = batches.num_steps(20_000)
    measured = sum(np.count_nonzero(~batches(step).is_padding) for step in range(steps))
    assert measured == pytest.approx(20_000, rel=0.02)
    assert Batches(prepared, config, seed=0, copies=2)(0).tokens.shape[0] == batches(0).tokens.shape[0] // 2


@given(st.lists(st.integers(1, 9), min_size=1, max_size=60), st.integers(9, 12))
def test_packing_keeps_every_example_within_capacity_and_leaves_no_two_half_empty_rows(lengths, capacity):
    rows = pack(np.array(lengths), capacity)
    assert sorted(example for row in rows for example in row) == list(range(len(lengths)))
    filled = [sum(lengths[example] for example in row) for row in rows]
    assert max(filled) <= capacity
    assert sum(2 * total <= capacity for total in filled) <= 1


def test_every_update_has_the_same_rows_of_all_datasets(prepared):
    config = BatchConfig(tokens=480, mix="update", weights={"drawn": 2.0})
    batches = Batches(prepared, config, seed=3)
    (group,) = batches.groups
    rows = {dataset.name: dataset.num_rows for dataset in batches.datasets}
    assert group.row_length == max(d.row_length for d in batches.datasets) and min(rows.values()) >= 1
    assert sum(rows.values()) == 480 // group.row_length
    # Shares of tokens are those of the weights as nearly as whole rows allow.
    tokens = {d.name: d.num_rows * d.mean_row_tokens for d in batches.datasets}
    wanted = {name: (2.0 if name == "drawn" else 1.0) for name in rows}
    for dataset in batches.datasets:
        share = wanted[dataset.name] / sum(wanted.values()) * sum(tokens.values())
        assert abs(tokens[dataset.name] - share) <= 1.5 * dataset.mean_row_tokens
    for step in range(4):
        batch, described = batches(step), batches.describe(step)
        assert batch.tokens.shape == (sum(rows.values()), group.row_length)
        assert described["dataset"] == " and ".join(rows) and len(described["ids"]) == sum(rows.values())
        assert batches.num_tokens(step) == np.count_nonzero(~batch.is_padding)
        # Every dataset goes through its rows as it does alone.
        start = 0
        for number, dataset in enumerate(batches.datasets):
            indices = dataset.row_numbers(step, (3, number))
            part = batch.tokens[start : start + dataset.num_rows]
            alone = dataset.batch(step, (3, number), np.ones(dataset.num_rows, bool), group.row_length)
            np.testing.assert_array_equal(part, alone.tokens)
            own = {dataset.examples[e]["id"] for index in indices for e in dataset.rows[index]}
            assert own == {id for row in described["ids"][start : start + dataset.num_rows] for id in row}
            start += dataset.num_rows
    assert batches.mean_tokens(5) == pytest.approx(np.mean([batches.num_tokens(s) for s in range(300)]), rel=0.02)
    assert {use.name: use.steps for use in batches.dataset_use(7)} == dict.fromkeys(rows, 7)
    own = Batches(prepared, config, seed=3, local_rows=lambda n: np.arange(n) % 3 == 1)
    np.testing.assert_array_equal(own(2).tokens[1::3], batches(2).tokens[1::3])
    assert own(2).is_padding[0::3].all() and own.num_tokens(2) == batches.num_tokens(2)


def test_mean_targets_of_updates_are_those_of_their_rows(prepared):
    config, vocabulary = BatchConfig(tokens=240, mix="update", masked_prompt_share=0.0), prepared.tokenizers.vocabulary
    batches, counts = Batches(prepared, config, seed=1), np.zeros(len(vocabulary.modalities))
    for step in range(200):
        batch = batches(step)
        counts += np.bincount(batch.modality[batch.is_target], minlength=len(counts))
    means = batches.mean_targets(200, 0.0)
    expected = dict(zip(vocabulary.modalities, (counts / 200).tolist(), strict=True))
    assert means == pytest.approx({name: count for name, count in expected.items() if count}, rel=0.05)


def test_an_update_without_room_for_all_datasets_or_with_moving_weights_is_refused(prepared):
    with pytest.raises(ValueError, match=r"holds 1 rows of .* and needs one of each of .*; choose larger batches"):
        Batches(prepared, BatchConfig(tokens=40, mix="update"), seed=0)
    with pytest.raises(ValueError, match="weights that change need mix = step"):
        BatchConfig(mix="update", final_weights={"a": 1.0}, anneal_tokens=(0, 1))


def test_packing_of_many_lengths_is_tight():
    lengths = np.random.default_rng(0).integers(3, 120, 2000)
    rows = pack(lengths, 256)
    assert lengths.sum() / (256 * len(rows)) > 0.97


def test_wrong_weights_are_refused_with_the_names_that_exist(prepared):
    with pytest.raises(ValueError, match=r"unknown digits; .*drawn, spoken, sums"):
        Batches(prepared, BatchConfig(weights={"digits": 1.0}), seed=0)
    with pytest.raises(ValueError, match="all datasets have weight 0"):
        Batches(prepared, BatchConfig(weights={"drawn": 0.0, "spoken": 0.0, "sums": 0.0}), seed=0)
    with pytest.raises(ValueError, match="holds fewer than 1 rows"):
        Batches(prepared, BatchConfig(tokens=5), seed=0)
    with pytest.raises(ValueError, match="-1"):
        BatchConfig(weights={"drawn": -1.0})


def test_a_shard_that_lost_records_is_noticed(prepared, tmp_path):
    manifest = prepared.folder / "manifest.json"
    text = manifest.read_text()
    content = json.loads(text)
    content["datasets"]["sums"]["splits"]["train"] += 1
    manifest.write_text(json.dumps(content))
    try:
        with pytest.raises(ValueError, match="the manifest says"):
            type(prepared)(prepared.folder).examples("sums", "train")
    finally:
        manifest.write_text(text)


def test_worker_processes_give_the_same_batches_in_the_same_order(prepared):
    batches = Batches(prepared, BatchConfig(tokens=120), seed=0)
    found = [list(prefetched(batches, 3, 9, LoopConfig(workers=workers))) for workers in (0, 2)]
    assert [step for step, _ in found[0]] == [step for step, _ in found[1]] == [3, 4, 5, 6, 7, 8]
    for (step, one), (_, other) in zip(*found, strict=True):
        for field in ("tokens", "modality", "coordinates", "segment", "is_condition"):
            np.testing.assert_array_equal(getattr(one, field), getattr(batches(step), field))
            np.testing.assert_array_equal(getattr(one, field), getattr(other, field))


@pytest.mark.parametrize(
    "config, split, message",
    [
        ({"task_weights": {"text": 0.0}}, "train", "all tasks of sums have weight 0"),
        ({}, "later", "sums has no split later, only train, validation, test; give it the weight 0"),
    ],
)  # fmt: skip
def test_a_missing_split_and_tasks_without_weight_are_refused(prepared, config, split, message):
    with pytest.raises(ValueError, match=message):
        Batches(prepared, BatchConfig(tokens=120, weights={"drawn": 0.0, "spoken": 0.0}, **config), 0, split=split)


def test_an_example_longer_than_a_row_is_refused():
    assert pack(np.array([4, 5]), 5) == [[1], [0]]
    with pytest.raises(ValueError, match="an example of 6 tokens does not fit a row of 5"):
        pack(np.array([4, 6]), 5)
