"""The studies of masks and schedules, in worlds where the truth is known."""

import csv
import dataclasses
import hashlib
import math
from types import SimpleNamespace

import fakes
import pytest
from madeup import MadeUp

from trimask.configs import studies
from trimask.diffusion.data.batches import Batches
from trimask.diffusion.data.prepared import Prepared
from trimask.diffusion.data.sources import SourceConfig
from trimask.diffusion.pretraining.description import TrainConfig
from trimask.diffusion.sampling.generation_config import GenerationConfig
from trimask.diffusion.studies import arms, masks, mixing, schedules
from trimask.diffusion.studies.arms import Compared, arm_of, mean_bits, mean_distance, mean_share
from trimask.diffusion.studies.judged_trainings import Judged
from trimask.diffusion.studies.masks import MaskStudy, default_of
from trimask.diffusion.studies.mixing import MixingStudy
from trimask.diffusion.studies.schedules import ScheduleStudy, best_of_modalities, best_single


@pytest.fixture(autouse=True)
def figures(monkeypatch):
    """Name of every figure that a study draws → its panels."""
    drawn = {}
    monkeypatch.setattr(arms, "draw_intervals", lambda path, panels, *_: drawn.update({path.name: panels}))
    return drawn


SAMPLINGS = {"fixed": {"image": GenerationConfig()}}


def noise(*parts):
    """A number in [−1, 1) that is fixed by its parts."""
    return int(hashlib.sha256(repr(parts).encode()).hexdigest()[:8], 16) / 2**31 - 1


def judged(image, text, *, share=0.5, distance=2.0):
    return Judged(
        bits={"text_to_image": image, "image_to_text": text},
        judged={"fixed": {"text_to_image label": share, "text_to_image frechet": distance}},
        epochs={"drawn": 0.5},
        steps=10,
        batch_tokens=100.0,
        num_parameters=1000,
        seconds=1.0,
    )


class Stream(Prepared):
    """Prepared data that say only where they come from."""

    def __init__(self, splits=("train", "validation")):
        self.tokenizers = SimpleNamespace(vocabulary=fakes.VOCABULARY)
        self.manifest = SimpleNamespace(datasets={"drawn": SimpleNamespace(splits=dict.fromkeys(splits, 9))})

    def dataset(self, name):
        source = SourceConfig(kind="stream", where=(f"{name}:12390",))
        return SimpleNamespace(source=source, splits={"train": 12_390})


class World(MadeUp):
    """Trials whose outcome follows from the masks, the weights and the seed."""

    def __init__(self, folder, bits, deviation=0.001):
        def outcome(trial):
            shared = 0.05 * noise(trial.train.seed)  # what paired seeds have in common
            own = deviation * noise(trial.train.seed, repr(trial.train.masking), trial.train.loss.weighting)
            image, text = bits(trial.train)
            return judged(image * (1 + shared + own), text * (1 + shared + own))

        super().__init__(folder, outcome)
        self.prepared = Stream()


def study_of_masks(folder, bits, **changes):
    trials = World(folder, bits)
    config = MaskStudy(base=TrainConfig(), samplings=SAMPLINGS, **changes)
    return config, trials, masks.study(config, trials)


def test_a_way_to_mask_that_is_better_is_shown_and_becomes_the_default(tmp_path, figures):
    def bits(train):
        gain = 0.97 if train.masking.counts else 0.998 if train.masking.complementary else 1.0
        return 3 * gain, 0.1 * gain

    _, trials, found = study_of_masks(tmp_path, bits)
    verdicts = {claim.claim: claim.verdict for claim in found.claims}
    assert verdicts["masks by counts lower the held-out bound (elbo loss)"] == "shown"
    assert verdicts["complementary masks lower the held-out bound (unweighted loss)"] == "refuted"
    assert len(verdicts) == 6 and "The default by the rule: counts" in found.report
    assert "drawn 0.50 (1,239 originals, warped anew each time, 5.0 times each)" in found.report
    assert "Counts with complements beside counts alone, of which no claim was stated: elbo " in found.report
    effect = next(claim.effect for claim in found.claims if claim.claim.startswith("masks by counts lower"))
    assert "5 paired seeds" in effect and effect.startswith("+3.0")
    assert all("0.50%" in claim.rule for claim in found.claims)
    assert list(figures["masks.png"]) == ["mean over tasks", "text_to_image", "image_to_text"]
    of_arms = figures["masks.png"]["text_to_image"][""]
    assert len(of_arms) == 6 and of_arms["counts, elbo"] == pytest.approx((3, 3, 3), abs=0.3)
    # A pilot of three other seeds, and then five of every arm; nothing else differs between the arms of a seed.
    (_, _, pilot), (_, _, main) = trials.asked
    assert [len(pilot), len(main)] == [3 * 8, 5 * 8]
    assert not {t.train.seed for t in pilot} & {t.train.seed for t in main}
    plain = {repr(dataclasses.replace(t.train, masking=TrainConfig().masking, loss=TrainConfig().loss)) for t in main}
    assert len(plain) == 5 and len({repr(trial) for trial in main}) == 40
    with (tmp_path / "masks.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 40 and rows[0]["arm"] == "independent, elbo" and rows[0]["epochs drawn"] == "0.5"
    assert rows[0]["fixed text_to_image label"] == "0.5" and float(rows[0]["bits text_to_image"]) > 2


def test_a_claim_can_be_tried_again_by_seeds_kept_aside(tmp_path):
    _, trials, _ = study_of_masks(tmp_path, lambda train: (3.0, 0.1), first_seed=2000)
    with (tmp_path / "masks.csv").open() as file:
        assert {row["seed"] for row in csv.DictReader(file)} == {str(seed) for seed in range(2000, 2005)}
    seeds = [{trial.train.seed for trial in asked} for _, _, asked in trials.asked]
    assert seeds == [{3000, 3001, 3002}, {2000, 2001, 2002, 2003, 2004}]
    with pytest.raises(ValueError, match="first_seed must be a multiple of 2,000, got 1000"):
        MaskStudy(base=TrainConfig(), first_seed=1000)


def test_data_without_a_validation_split_are_refused_before_training(tmp_path):
    trials = World(tmp_path, lambda train: (3.0, 0.1))
    trials.prepared = Stream(splits=("train", "test"))
    with pytest.raises(ValueError, match="drawn has no validation split, on which models are compared"):
        masks.study(MaskStudy(base=TrainConfig()), trials)
    assert not trials.asked


def test_a_training_that_diverged_leaves_its_claim_undecided_and_no_other(tmp_path):
    def bits(train):
        if train.masking.complementary and train.loss.weighting == "elbo" and train.seed == 2:
            return math.inf, math.inf
        return (2.9, 0.09) if train.masking.counts else (3.0, 0.1)

    def outcome(trial):
        image, text = bits(trial.train)
        found = judged(image, text)
        return found if math.isfinite(image) else dataclasses.replace(found, judged={"fixed": {}})

    trials = World(tmp_path, bits)
    trials.outcome = outcome
    config = MaskStudy(base=TrainConfig(), samplings=SAMPLINGS)
    found = masks.study(config, trials)
    claims = {claim.claim: claim for claim in found.claims}
    of_pairs = claims["complementary masks lower the held-out bound (elbo loss)"]
    assert of_pairs.verdict == "undecided" and of_pairs.effect.endswith("; 1 trainings diverged")
    assert claims["masks by counts lower the held-out bound (elbo loss)"].verdict == "shown"
    assert "| complementary, elbo | 1 of 5 diverged | 1 of 5 diverged |" in found.report and "nan" not in found.report
    # If the pilot diverges, nothing says how many seeds are needed.
    trials.outcome = lambda trial: dataclasses.replace(judged(math.inf, math.inf), judged={"fixed": {}})
    with pytest.raises(ValueError, match=r"of the pilot diverged, .*: independent, elbo, complementary, elbo"):
        masks.study(config, trials)


def test_a_difference_of_nothing_is_no_higher_bound():
    compared = Compared({"a": [judged(3.0, 0.1)] * 5, "b": [judged(3.0, 0.1)] * 5}, list(range(5)), 5, 0.0)
    claim = arms.claim_on_bound("so", compared, "a", "b", 0.005)
    assert (claim.verdict, claim.effect) == (
        "refuted",
        "+0.00% (+0.00% to +0.00%), 5 paired seeds; if at all, by less than 0.50%",
    )


def test_samples_without_distances_have_no_column_for_them(tmp_path):
    trials = World(tmp_path, lambda train: (3.0, 0.1))
    made_up = trials.outcome
    trials.outcome = lambda trial: dataclasses.replace(made_up(trial), judged={"fixed": {"text exact_match": 0.5}})
    report = masks.study(MaskStudy(base=TrainConfig(), samplings=SAMPLINGS), trials).report
    assert "| fixed: right |" in report and "| fixed: Fréchet |" not in report


@pytest.mark.parametrize(
    "kind, field", [(MaskStudy, "weightings"), (ScheduleStudy, "weightings"), (MixingStudy, "batches")]
)
def test_a_comparison_of_nothing_is_refused(kind, field):
    with pytest.raises(ValueError, match=f"{field} must name at least one, got none"):
        kind(base=TrainConfig(), **{field: ()})


def test_a_single_dataset_is_not_mixed(tmp_path):
    with pytest.raises(ValueError, match="has a single dataset, so there is nothing to mix"):
        mixing.study(MixingStudy(base=TrainConfig()), World(tmp_path, lambda train: (3.0, 0.1)))


def test_without_a_better_way_the_default_stays(tmp_path):
    _, _, found = study_of_masks(tmp_path, lambda train: (3.0, 0.1))
    assert {claim.verdict for claim in found.claims} == {"refuted"}
    assert "The default by the rule: independent." in found.report


def test_noisy_seeds_are_undecided_and_the_page_says_how_many_would_decide(tmp_path):
    trials = World(tmp_path, lambda train: (3.0 - 0.02 * train.masking.counts, 0.1), deviation=0.02)
    config = MaskStudy(base=TrainConfig(), samplings=SAMPLINGS)
    found = masks.study(config, trials)
    undecided = [claim for claim in found.claims if claim.verdict == "undecided"]
    assert undecided and all(
        claim.more.startswith("about ") and claim.more.endswith(" more seeds") for claim in undecided
    )
    after = found.report.split("By the pilot its noisiest arm needs ")[1]
    asked = int(after.split(" seeds to show a true effect of 0.50%")[0])
    assert asked > 5 and "5 were run (`--max-seeds`), which show it with a probability of " in found.report
    again = World(tmp_path, lambda train: (3.0 - 0.02 * train.masking.counts, 0.1), deviation=0.02)
    masks.study(dataclasses.replace(config, max_seeds=500), again)
    assert len(again.asked[1][2]) == asked * 8


def test_measures_are_means_over_tasks():
    outcome = judged(3.0, 0.2, share=0.25, distance=4.0)
    outcome.judged["fixed"]["image_to_text exact_match"] = 0.75
    outcome.judged["fixed"]["text_to_audio frechet"] = 9.0
    assert mean_bits(outcome) == pytest.approx(1.6) and mean_share("fixed")(outcome) == pytest.approx(0.5)
    assert mean_distance("fixed")(outcome) == pytest.approx(6.0)


def test_effects_are_relative_to_the_reference_within_seeds():
    outcomes = {"a": [judged(2.0, 0.0), judged(4.0, 0.0)], "b": [judged(4.0, 0.0), judged(8.0, 0.0)]}
    compared = Compared(outcomes, [0, 1], 5, 0.0)
    assert compared.effect("a", "b", mean_bits).mean == pytest.approx(0.5)
    assert compared.effect("a", "b", mean_bits).half_width == pytest.approx(0)


def bits_of_schedules(train):
    """Pictures want cosine_md4, texts polynomial 2, if weights are flat; with the ELBO's weights all are alike."""
    masking = train.masking
    if train.loss.weighting == "elbo":
        return 3.0, 0.1
    image, text = (masking.schedules.get(name, masking.schedule) for name in ("image", "text"))
    return 3.0 * (0.95 if image.kind == "cosine_md4" else 1.0), 1.0 * (0.9 if text.kind == "polynomial" else 1.0)


def test_each_modality_gets_its_best_schedule_and_that_is_confirmed_by_other_seeds(tmp_path, figures):
    trials = World(tmp_path, bits_of_schedules)
    config = ScheduleStudy(base=TrainConfig(), samplings=SAMPLINGS)
    found = schedules.study(config, trials)
    verdicts = {claim.claim: claim.verdict for claim in found.claims}
    assert verdicts["cosine_md4 has a lower held-out bound than linear (unweighted loss)"] == "shown"
    assert verdicts["cosine_mdlm has a lower held-out bound than linear (elbo loss)"] == "refuted"
    assert verdicts["a schedule per modality lowers the held-out bound (unweighted loss)"] == "shown"
    assert (
        "unweighted: text polynomial" in found.report and "image cosine_md4; the best single schedule" in found.report
    )
    (_, _, pilot), (_, _, choosing), (_, _, last) = trials.asked
    assert len(pilot) == 3 * 4 and len(choosing) == 5 * 10 and len(last) == 5 * 2
    assert len({t.train.seed for asked in (pilot, choosing, last) for t in asked}) == 3 + 5 + 5
    own = [t.train.masking for _, _, asked in trials.asked[2:] for t in asked if t.train.masking.schedules]
    assert all(masking.schedules["image"].kind for masking in own)
    # The page says of each task by itself what a schedule does for it.
    by_task = found.report.split("Each task by itself:")[1].split("Passes over")[0].splitlines()
    (line,) = (line for line in by_task if line.startswith("| cosine_md4, unweighted |"))
    image, text = (float(cell.split("%")[0]) for cell in line.split("|")[2:4])
    assert image == pytest.approx(5, abs=0.2) and text == pytest.approx(0, abs=0.2)
    assert {path.name for path in tmp_path.glob("*.csv")} == {"schedules.csv", "modalities.csv"}
    assert set(figures) == {"schedules.png", "modalities.png"}
    assert set(figures["modalities.png"]["image_to_text"][""]) == {"own, unweighted"}


def test_one_schedule_that_is_best_for_all_is_not_compared_with_itself(tmp_path, figures):
    trials = World(tmp_path, lambda train: (3.0, 0.1) if train.masking.schedule.kind == "cosine_md4" else (3.3, 0.11))
    found = schedules.study(ScheduleStudy(base=TrainConfig(), samplings=SAMPLINGS), trials)
    of_modalities = [claim for claim in found.claims if claim.claim.startswith("a schedule per modality")]
    assert [(c.verdict, c.effect) for c in of_modalities] == [
        ("undecided", "not trained: cosine_md4 is the best schedule of every modality")
    ] * 2
    assert len(trials.asked) == 2 and set(figures) == {"schedules.png"}


def test_the_best_schedule_has_the_lowest_bound():
    outcomes = {
        f"{name}, elbo": [judged(3.0 + number, 0.5 - number / 10)] for number, name in enumerate(schedules.SCHEDULES)
    }
    compared = Compared(outcomes, [0, 1], 5, 0.0)
    assert best_of_modalities(compared, "elbo", fakes.VOCABULARY) == {"text": "polynomial 3", "image": "linear"}
    assert best_single(compared, "elbo") == "linear"


def test_presets_sample_on_the_grids_that_they_name():
    assert {how.grid for how in studies.masks_cpu().samplings["fixed"].values()} == {"linear"}
    assert {how.grid for how in studies.schedules_cpu().samplings["own"].values()} == {"trained"}
    large, small = studies.masks_accelerator().base, studies.masks_cpu().base
    assert large.optimizer.horizon_tokens == 10 * small.optimizer.horizon_tokens
    assert large.parametrization.base_width == small.model.width < large.model.width


def test_the_default_is_that_of_the_elbos_weights():
    outcomes = {
        arm_of(weighting, name): [judged(3.0 if name != "counts" else 2.5, 0.1)] * 5
        for weighting in ("elbo", "unweighted")
        for name in masks.MASKS
    }
    assert default_of(Compared(outcomes, [0], 5, 0.0), 0.005) == "counts"
    outcomes[arm_of("elbo", "counts")] = [judged(2.5, 0.1)] * 4
    outcomes[arm_of("elbo", "independent")] = [judged(3.0, 0.1)] * 4
    assert default_of(Compared(outcomes, [0], 5, 0.0), 0.005) == "independent"  # too few seeds


def test_mixing_is_compared_at_the_same_tokens_per_step(tmp_path, prepared, loaded, monkeypatch):
    def bits(train):
        return (2.9 if train.batch.mix == "update" and train.batch.tokens > 300 else 3.0), 0.1

    monkeypatch.setattr(mixing, "_LARGEST_DIFFERENCE", 0.1)  # rows of these data have few lengths
    trials = World(tmp_path, bits)
    trials.prepared = prepared
    config = MixingStudy(base=loaded.description.train, samplings=SAMPLINGS, batches=(60, 300))
    found = mixing.study(config, trials)
    assert [claim.verdict for claim in found.claims] == ["refuted", "shown"]
    trained = {repr(trial.train.batch) for _, _, asked in trials.asked for trial in asked}
    assert len(trained) == 4
    for wanted in (60, 300):
        batches = [train.batch for train in mixing.with_equal_tokens(config.base, prepared, wanted)]
        assert [batch.mix for batch in batches] == ["step", "update"]
        one, other = (Batches(prepared, batch, 0).mean_tokens(500) for batch in batches)
        assert one == pytest.approx(other, rel=0.1) and other == pytest.approx(wanted, rel=0.2)
    monkeypatch.setattr(mixing, "_LARGEST_DIFFERENCE", 0.02)
    with pytest.raises(
        ValueError, match=r"have 65.3 tokens .* have 61.0; choose other --batches than 60, .* at most 2%"
    ):
        mixing.with_equal_tokens(config.base, prepared, 60)
