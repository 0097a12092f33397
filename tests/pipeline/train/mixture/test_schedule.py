"""The run laid out before step 0: tasks, batches, positions, structures."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.structure import InputShape
from pipeline.data.batches import SampleMaker
from pipeline.data.media.clip import Clip
from pipeline.data.run_data import DataSpec
from pipeline.data.spec import DataSetSpec, TaskSpec, TokenSpec, Variant
from pipeline.recipe.specs import loss_fields
from pipeline.train.mixture.schedule import START, MixtureSpec, Position, Schedule
from pipeline.train.mixture.settings import KINDS, BanditSettings
from pipeline.train.mixture.spec import SamplerSpec
from pipeline.train.mixture.structures import structure_of

CLASSES = ("a", "b", "c", "d")
LARGE = Variant("128x128", 8, size=128, grid=(1, 8, 8), num_vision_tokens=64)
SMALL = Variant("64x64", 32, size=64, grid=(1, 4, 4), num_vision_tokens=16)
VIDEO = Variant("16x64x64-drop0.75", 8, num_frames=16, size=64, drop_rate=0.75, grid=(4, 4, 4), num_vision_tokens=16)
DATA_SETS = {name: DataSetSpec(name, "unused", {}, classes=CLASSES) for name in ("photos", "films")}
FINGERPRINTS = {"photos": {"num_rows": 300}, "films": {"num_rows": 100}}
PAPERS_RULE = SamplerSpec()


def task(
    name: str, data_set: str, objective: str, modalities: tuple[str, ...], *variants: Variant, **fields
) -> TaskSpec:
    loss = loss_fields(((objective, 1.0),), modalities)
    return TaskSpec(name, data_set, variants=variants, **loss, **fields)


TASKS = {
    t.name: t
    for t in (
        task("classes", "photos", "softmax", ("image",), LARGE, SMALL),
        task("captions", "photos", "nce", ("image", "text"), SMALL, text_length=12),
        task("sounds", "films", "nce", ("video", "audio"), VIDEO),
        task("tags", "films", "sigmoid", ("audio",), Variant("all", 16), classes=("d", "b")),
    )
}


def schedule(
    num_steps: int, *, seed: int = 0, tasks: dict[str, TaskSpec] = TASKS, sampler=PAPERS_RULE, position=START
) -> Schedule:
    data = DataSpec(tasks, DATA_SETS, TokenSpec(), fingerprints=FINGERPRINTS)
    return Schedule(data, MixtureSpec(seed, num_steps, sampler), position)


def weighted(**weights: float | None) -> dict[str, TaskSpec]:
    return {n: dataclasses.replace(t, weight=weights.get(n, t.weight)) for n, t in TASKS.items()}


# --- steps ---


@given(num_steps=st.integers(1, 60), seed=st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_counts_and_positions_follow_from_the_steps(num_steps, seed):
    plan = schedule(num_steps, seed=seed)
    batches, positions = dict.fromkeys(TASKS, 0), dict.fromkeys(TASKS, 0)
    for step in range(num_steps):
        assert plan.batches_before(step) == batches and plan.positions_before(step) == positions
        what = plan[step]
        assert what.batch == batches[what.task]
        variant, samples = plan.plans[what.task].batch(what.batch, rank=0, world_size=1)
        assert variant == what.variant and samples.start == positions[what.task]
        assert what.structure == plan.structures[what.task, what.variant.name]
        batches[what.task] += 1
        positions[what.task] = samples.stop
    assert plan.batches_before(num_steps) == batches and plan.positions_before(num_steps) == positions


@given(more=st.integers(0, 40), seed=st.integers(0, 10_000))
@settings(max_examples=15, deadline=None)
def test_a_longer_run_begins_like_a_shorter_one(more, seed):
    short, long = schedule(20, seed=seed), schedule(20 + more, seed=seed)
    assert [short[step] for step in range(20)] == [long[step] for step in range(20)]


def test_seeds_differ():
    steps = [[schedule(40, seed=seed)[step].task for step in range(40)] for seed in range(3)]
    assert steps[0] != steps[1] != steps[2]


def test_weights_default_to_the_number_of_examples():
    # classes and captions 300 rows each, sounds and tags 100 each.
    assert [schedule(8).share(name) for name in TASKS] == pytest.approx([0.375, 0.375, 0.125, 0.125])
    given = schedule(1, tasks=weighted(classes=1.0, captions=2.0, sounds=1.0, tags=0.0))
    assert [given.share(name) for name in TASKS] == pytest.approx([0.25, 0.5, 0.25, 0.0])


def test_a_new_task_changes_no_batch_of_the_others():
    few = {name: TASKS[name] for name in ("classes", "captions")}
    for name, plan in schedule(200, tasks=few).plans.items():
        other = schedule(200).plans[name]
        shared = min(len(plan.variants), len(other.variants))
        assert (plan.variants[:shared] == other.variants[:shared]).all()
        assert plan.order == other.order


# --- structures ---


def test_structures_of_every_task_and_variant():
    found = schedule(10).structures
    assert list(found) == [
        ("classes", "128x128"),
        ("classes", "64x64"),
        ("captions", "64x64"),
        ("sounds", "16x64x64-drop0.75"),
        ("tags", "all"),
    ]
    image = InputShape("vision", 16, 16 * 16 * 3, 3)
    assert found["captions", "64x64"].inputs == (image, InputShape("text", 12, 0, 1))
    # 16 frames: tubelets of 4; 128 frames of 128 mels: 64 patches of 256.
    assert found["sounds", "16x64x64-drop0.75"].inputs == (
        InputShape("vision", 16, 3072, 3),
        InputShape("audio", 64, 256, 2),
    )
    assert [found[key].global_batch_size for key in found] == [8, 32, 32, 8, 16]
    tags = found["tags", "all"]
    assert (tags.objectives, tags.classifier, tags.num_classes, tags.classes) == (
        (("sigmoid", 1.0),),
        "films",
        4,
        (3, 1),
    )
    classes = found["classes", "64x64"]
    assert (classes.classifier, classes.num_classes, classes.classes) == ("photos", 4, (0, 1, 2, 3))
    assert found["captions", "64x64"].classifier is None


def test_the_structure_of_a_weighted_sum():
    terms = (("nce", 1.0), ("softmax", 0.5))
    both = dataclasses.replace(TASKS["captions"], **loss_fields(terms, ("image", "text")), classes=("c",))
    found = structure_of(both, SMALL, DATA_SETS["photos"], TokenSpec())
    assert found.objectives == terms and [i.modality for i in found.inputs] == ["vision", "text"]
    assert (found.classifier, found.num_classes, found.classes) == ("photos", 4, (2,))
    assert found.pairs == (("text", "vision"),) and found.classified == "vision"


def test_the_work_for_many_classes_grows_with_their_number_and_not_with_its_square():
    class Name(str):
        compared = 0
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            Name.compared += 1
            return str.__eq__(self, other)

    names = tuple(Name(f"class {i}") for i in range(500))
    asked = dataclasses.replace(TASKS["classes"], classes=tuple(Name(name) for name in reversed(names)))
    data_set = DataSetSpec("photos", "unused", {}, classes=names)
    assert structure_of(asked, SMALL, data_set, TokenSpec()).classes == tuple(range(499, -1, -1))
    maker = SampleMaker(asked, data_set, tokenizer=None, tokens=TokenSpec())
    labels = (Name("class 400"), Name("class 7"), Name("none"))
    assert np.flatnonzero(maker.multi_hot(Clip("a", labels=labels))).tolist() == [7, 400]
    assert Name.compared < 10 * len(names)


def test_pair_weights_and_microbatches_reach_the_structure():
    weights = (("audio_text", 0.0), ("text_vision", 2.0))
    triplet = task("triplet", "films", "nce", ("video", "audio", "text"), VIDEO, pair_weights=weights)
    found = structure_of(triplet, VIDEO, DATA_SETS["films"], TokenSpec())
    assert found.pair_weights == weights and found.pairs == (("audio", "vision"), ("text", "vision"))
    parts = dataclasses.replace(TASKS["classes"], microbatches=4)
    assert structure_of(parts, LARGE, DATA_SETS["photos"], TokenSpec()).microbatches == 4
    assert schedule(1).structures["classes", "64x64"].microbatches == 1


def test_shapes_of_a_structure_are_those_of_the_arrays(make_task, make_data_set):
    from pipeline.data.sample_tokens import View

    data_set, variant = make_data_set(classes=CLASSES), VIDEO
    sample = make_task(objective="nce", modalities=("video", "audio"), variants=(variant,), positives="instance")
    clip = Clip("x", {"video": np.zeros((16, 64, 64, 3), np.uint8), "audio": np.zeros(4096, np.float32)})
    maker = SampleMaker(sample, data_set, tokenizer=None, tokens=TokenSpec())
    arrays = maker.arrays(clip, View(variant, rng=np.random.default_rng(0)))
    for inputs in structure_of(sample, variant, data_set, TokenSpec()).inputs:
        assert arrays[f"{inputs.modality}/tokens"].shape == (inputs.num_tokens, inputs.num_values)
        assert arrays[f"{inputs.modality}/positions"].shape == (inputs.num_tokens, inputs.num_axes)


def test_tasks_that_never_run_have_no_structure():
    plan = schedule(100, tasks=weighted(sounds=0.0))
    assert all(name != "sounds" for name, _ in plan.structures)
    assert plan.batches_before(100)["sounds"] == 0


def test_tasks_of_equal_shape_share_their_structure():
    twins = {n: dataclasses.replace(TASKS["captions"], name=n) for n in ("one", "two")}
    assert len(set(schedule(10, tasks=twins).structures.values())) == 1


@pytest.mark.parametrize("start", [0, 7, 99, 100])
def test_structures_in_order_of_first_use(start):
    whole, expected = schedule(100), []
    for step in range(start, 100):
        if whole[step].structure not in expected:
            expected.append(whole[step].structure)
    rest = schedule(100, position=whole.position_at(start))
    assert rest.in_order_of_first_use() == expected
    assert start > 0 or set(expected) == set(whole.structures.values())


# --- going on from a position ---


def losses_seen(plan: Schedule, start: int, stop: int) -> list:
    """The steps as a run takes them: each loss is known once the step has run."""
    taken = []
    for step in range(start, stop):
        assert plan.wait(step, timeout_s=0)
        taken.append(plan[step])
        plan.observe(step, 1.0 / (1 + taken[-1].batch))
    return taken


@given(kind=st.sampled_from(KINDS), stop=st.integers(0, 90), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_a_run_goes_on_as_if_it_had_never_stopped(kind, stop, seed):
    spec = SamplerSpec(kind=kind, bandit=BanditSettings(lag=8))
    whole = schedule(90, seed=seed, sampler=spec)
    expected = losses_seen(whole, 0, 90)
    first = schedule(90, seed=seed, sampler=spec)
    taken = losses_seen(first, 0, stop)
    stored = json.loads(json.dumps(dataclasses.asdict(first.position_at(stop))))
    second = schedule(90, seed=seed, sampler=spec, position=Position(**stored))
    assert taken + losses_seen(second, stop, 90) == expected
    end, other = second.position_at(90), whole.position_at(90)
    assert end.batches == other.batches and end.sampler == other.sampler
    assert end.expected == pytest.approx(other.expected)
    assert second.positions_before(90) == whole.positions_before(90)


def test_an_adaptive_sampler_decides_its_steps_as_losses_come():
    plan = schedule(100, sampler=SamplerSpec(kind="bandit", bandit=BanditSettings(lag=8)))
    assert plan.adaptive and plan.decided_until == 16 and not plan.wait(16, timeout_s=0)
    assert plan.batches_at_most("tags") == plan.batches_before(16)["tags"] + 84
    losses_seen(plan, 0, 8)
    assert plan.decided_until == 24
    # All structures may yet be used, whether or not a decided step does.
    assert set(plan.in_order_of_first_use()) == set(plan.structures.values())


def test_a_mixture_may_change_and_the_others_go_on_where_they_were():
    old = schedule(60)
    at = Position(**json.loads(json.dumps(dataclasses.asdict(old.position_at(40)))))
    late = dataclasses.replace(TASKS["tags"], name="late")
    mixture = {n: t for n, t in weighted(classes=500.0).items() if n != "sounds"} | {"late": late}
    new = schedule(80, tasks=mixture, position=at)
    steps = [new[step] for step in range(40, 80)]
    for name in mixture:
        batches = [s.batch for s in steps if s.task == name]
        first = old.batches_before(40).get(name, 0)
        assert batches == list(range(first, first + len(batches))), name
        if name != "late":
            assert new.positions_before(40)[name] == old.positions_before(40)[name]
    assert {s.task for s in steps} == {"classes", "captions", "tags", "late"}
    # A task that left is remembered, should it come back.
    assert new.position_at(80).batches["sounds"] == old.batches_before(40)["sounds"]


def test_what_a_task_without_weight_has_learned_stays_in_the_model():
    at = schedule(60, seed=1).position_at(40)
    assert at.batches["sounds"] > 0
    rest = schedule(80, tasks=weighted(sounds=0.0), position=at)
    assert all(task != "sounds" for task, _ in rest.structures)
    assert schedule(10).structures["sounds", VIDEO.name] in rest.model_structures
    assert (
        schedule(10).structures["sounds", VIDEO.name] not in schedule(80, tasks=weighted(sounds=0.0)).model_structures
    )
