"""The list of graphs before the first step."""

from model.config import from_variant
from model.sizes import structure_flops, structure_memory
from pipeline.data.run_data import DataSpec
from pipeline.data.spec import DataSetSpec, TaskSpec, TokenSpec, Variant
from pipeline.recipe.specs import loss_fields
from pipeline.train.mixture.schedule import MixtureSpec, Schedule
from pipeline.train.mixture.shape_budget import shape_budget, table

LARGE = Variant("128x128", 8, size=128, grid=(1, 8, 8), num_vision_tokens=64)
SMALL = Variant("64x64", 32, size=64, grid=(1, 4, 4), num_vision_tokens=16)


def test_every_input_is_listed_with_its_size():
    classify = {"variants": (LARGE, SMALL), **loss_fields((("softmax", 1.0),), ("image",))}
    compare = {"variants": (SMALL,), **loss_fields((("nce", 1.0),), ("image", "text"))}
    tasks = {
        "classes": TaskSpec("classes", "photos", weight=3.0, **classify),
        "captions": TaskSpec("captions", "photos", weight=1.0, **compare),
        "twin": TaskSpec("twin", "photos", weight=0.0, **compare),
    }
    data_sets = {"photos": DataSetSpec("photos", "unused", {}, classes=("a", "b"))}
    data = DataSpec(tasks, data_sets, TokenSpec(), fingerprints={"photos": {"num_rows": 50}})
    schedule = Schedule(data, MixtureSpec(seed=0, num_steps=10))
    config = from_variant("imp-tiny", dtype="float32")
    budget = shape_budget(schedule, config)
    assert [(b.task, b.variant, b.batch_size) for b in budget] == [
        ("classes", "128x128", 8),
        ("classes", "64x64", 32),
        ("captions", "64x64", 32),
    ]
    # 8 x 64 and 32 x 16 vision tokens; captions have 32 x 64 text tokens beside them.
    assert [(b.tokens, b.vision_tokens) for b in budget] == [(512, 512), (512, 512), (32 * 80, 512)]
    # Three quarters of the steps over two variants.
    assert [round(b.share, 9) for b in budget] == [0.375, 0.375, 0.25]
    for b in budget:
        assert b.flops == structure_flops(config, b.structure)
        assert b.memory_bytes == sum(structure_memory(config, b.structure).values())
    lines = table(budget).splitlines()
    assert lines[0].startswith("shape budget: 3 graphs for 3 inputs") and len(lines) == 5
    assert lines[2].split()[:4] == ["classes", "128x128", "8", "512"] and lines[4].split()[-1] == "25.0%"
