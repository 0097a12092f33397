"""The recipe: strict YAML in, plain dataclasses out. The one place that knows pydantic.

Unknown keys are errors that name the nearest known one; every value is checked before anything starts.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml

from model.config import ModelConfig, from_variant
from model.step import OptimizerConfig
from pipeline.data import spec
from pipeline.data.variants import make_variant
from pipeline.errors import RequestError


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 5e-4 as text, YAML 1.2 and people as a number."""


class _Dumper(yaml.SafeDumper):
    """Quotes the text that ``_Loader`` would read as a number."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+"), list("-+0123456789")
    )


def read_yaml(text: str):
    """The value of a YAML document. Raises yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class MoESettings(_Strict):
    num_experts: int | None = pydantic.Field(None, ge=1)
    num_layers: int | None = pydantic.Field(None, ge=1)
    capacity_factor: float | None = pydantic.Field(None, gt=0)
    group: Literal["sample", "tokens"] | None = None
    group_size: int | None = pydantic.Field(None, ge=1)


class ModelSettings(_Strict):
    """variant: a name of model/config.py; the rest replaces its fields."""

    variant: str = "imp-tiny-moe"
    moe: MoESettings = MoESettings()
    common_dim: int | None = pydantic.Field(None, ge=1)
    temperature_init: float | None = pydantic.Field(None, gt=0)
    temperature_floor: float | None = pydantic.Field(None, gt=0)
    position_scale: float | None = pydantic.Field(None, gt=0)
    remat: Literal["none", "full", "dots"] | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"


class TextSettings(_Strict):
    """tokenizer: a sentencepiece model; null trains one of vocab_size pieces on the data sets' own text."""

    tokenizer: str | None = None
    vocab_size: int = pydantic.Field(1000, ge=16)


class ImageSettings(_Strict):
    short_side: int = pydantic.Field(256, ge=16)
    max_pixels: int = pydantic.Field(100_000_000, ge=1)


class VideoSettings(_Strict):
    fps: float = pydantic.Field(12.5, gt=0)
    short_side: int = pydantic.Field(256, ge=16)
    max_frames: int = pydantic.Field(16, ge=1)


class AudioSettings(_Strict):
    sample_rate_hz: int = pydantic.Field(16_000, ge=1000)
    frame_length: int = pydantic.Field(2048, ge=16)
    hop_length: int = pydantic.Field(1024, ge=1)
    num_frames: int = pydantic.Field(128, ge=16)
    num_mels: int = pydantic.Field(128, ge=16)
    min_hz: float = pydantic.Field(80.0, ge=0)
    max_hz: float = pydantic.Field(7600.0, gt=0)
    mean: float = 0.0
    std: float = pydantic.Field(1.0, gt=0)


class DataSetSettings(_Strict):
    """held_out: one manifest, or several by name. classes: a list, or a file with one class a line."""

    manifest: str
    held_out: str | dict[str, str] = {}
    shards: str | None = None
    classes: list[str] | str = []
    image: ImageSettings = ImageSettings()
    video: VideoSettings = VideoSettings()
    audio: AudioSettings = AudioSettings()
    max_reject_fraction: float | None = pydantic.Field(None, ge=0, le=1)


class VariantSettings(_Strict):
    """batch_size: follows from the first variant's vision tokens where it is not given."""

    size: int = pydantic.Field(ge=1)
    frames: int = pydantic.Field(16, ge=1)
    drop_rate: float = pydantic.Field(0.0, ge=0, lt=1)


class AugmentSettings(_Strict):
    area: tuple[float, float] = pydantic.Field((1.0, 1.0), strict=False)
    aspect: tuple[float, float] = pydantic.Field((1.0, 1.0), strict=False)
    flip: bool = False


class TaskSettings(_Strict):
    """One (data set, objective) pair. weight: null counts the data set's examples (the paper's rule)."""

    data_set: str
    objective: Literal["softmax", "sigmoid", "nce"]
    modalities: list[Literal["image", "video", "audio", "text"]] = pydantic.Field(min_length=1)
    batch_size: int = pydantic.Field(ge=1)
    weight: float | None = pydantic.Field(None, ge=0)
    variants: list[VariantSettings] = []
    classes: list[str] = []
    text: Literal["captions", "labels"] = "captions"
    text_length: int = pydantic.Field(64, ge=1)
    positives: Literal["labels", "text", "instance"] | None = None
    augment: AugmentSettings = AugmentSettings()


class TrainSettings(_Strict):
    num_steps: int = pydantic.Field(ge=1)
    learning_rate: float = pydantic.Field(1e-3, gt=0)
    warmup_fraction: float = pydantic.Field(0.05, ge=0, lt=1)
    end_learning_rate: float = pydantic.Field(0.0, ge=0)
    clip_norm: float = pydantic.Field(1.0, gt=0)
    patch_learning_rate_scale: float = pydantic.Field(1.0, ge=0)
    checkpoint_every: int = pydantic.Field(1000, ge=1)
    log_every: int = pydantic.Field(1, ge=1)
    log_samples: bool = False


class CheckpointSettings(_Strict):
    keep_last: int = pydantic.Field(2, ge=1)


class ClusterSettings(_Strict):
    """num_workers: 0 trains in the driver's process; N starts N Ray Train workers, one a host with all its devices.

    decode: "tasks" (pooled Ray tasks), "actors" (a pool of actors a task), or "auto" (actors from 8 CPUs on).
    block_steps: a block of a stream lasts for about so many steps of the run. queue_blocks: how many it may be ahead.
    compile_cache: folder of compiled steps; null: below the user's cache folder.
    """

    num_workers: int = pydantic.Field(0, ge=0)
    accelerator: Literal["cpu", "gpu", "tpu"] = "cpu"
    accelerators_per_worker: int = pydantic.Field(1, ge=0)
    cpus_per_worker: float = pydantic.Field(1.0, ge=0)
    topology: str | None = None
    accelerator_type: str | None = None
    address: str | None = None
    decode: Literal["auto", "tasks", "actors"] = "auto"
    block_steps: int = pydantic.Field(16, ge=1)
    queue_blocks: int = pydantic.Field(2, ge=1)
    clip_cache_mb: int = pydantic.Field(0, ge=0)
    compile_cache: str | None = None


class LoggingSettings(_Strict):
    progress: Literal["auto", "rich", "plain", "none"] = "auto"
    progress_every_s: float = pydantic.Field(10.0, gt=0)


class EvaluationSettings(_Strict):
    """One thing to measure on a held-out manifest. kind "classify" uses the classifier, "zero_shot" prompts."""

    data_set: str
    kind: Literal["zero_shot", "classify", "retrieval"]
    modality: Literal["image", "video", "audio"]
    held_out: str | None = None
    classes: list[str] = []
    prompts: list[str] = []
    name: str | None = None

    def served_by(self, task: TaskSettings | spec.TaskSpec) -> bool:
        """Whether a task trains the heads that this measurement needs."""
        want_text = self.kind != "classify"
        fits = self.modality in task.modalities and ("text" in task.modalities) == want_text
        return task.data_set == self.data_set and fits and (task.objective == "nce") == want_text and task.weight != 0


class Recipe(_Strict):
    seed: int = 0
    model: ModelSettings = ModelSettings()
    text: TextSettings = TextSettings()
    data_sets: dict[str, DataSetSettings] = pydantic.Field(min_length=1)
    tasks: dict[str, TaskSettings] = pydantic.Field(min_length=1)
    train: TrainSettings
    max_reject_fraction: float = pydantic.Field(0.05, ge=0, le=1)
    evaluate: list[EvaluationSettings] = []
    checkpoint: CheckpointSettings = CheckpointSettings()
    cluster: ClusterSettings = ClusterSettings()
    logging: LoggingSettings = LoggingSettings()

    def to_dict(self) -> dict:
        """Plain YAML types, every default filled in."""
        return self.model_dump(mode="json")

    def optimizer(self) -> OptimizerConfig:
        t = self.train
        return OptimizerConfig(
            peak_learning_rate=t.learning_rate,
            warmup_steps=max(1, round(t.warmup_fraction * t.num_steps)),
            num_steps=t.num_steps,
            end_learning_rate=t.end_learning_rate,
            clip_norm=t.clip_norm,
            patch_scale=t.patch_learning_rate_scale,
        )

    def model_config_for(self, *, vocab_size: int) -> ModelConfig:
        settings = self.model.model_dump(exclude={"variant", "moe"}, exclude_none=True)
        moe = self.model.moe.model_dump(exclude_none=True)
        return _request(from_variant, self.model.variant, moe=moe, vocab_size=vocab_size, where="model", **settings)

    def data_set_specs(self) -> dict[str, spec.DataSetSpec]:
        return {name: self._data_set(name, s) for name, s in self.data_sets.items()}

    def _data_set(self, name: str, s: DataSetSettings) -> spec.DataSetSpec:
        held_out = {"held_out": s.held_out} if isinstance(s.held_out, str) else s.held_out
        limit = self.max_reject_fraction if s.max_reject_fraction is None else s.max_reject_fraction
        return spec.DataSetSpec(
            name=name,
            manifest=locate(s.manifest),
            held_out={k: locate(v) for k, v in held_out.items()},
            shards=s.shards and locate(s.shards),
            classes=tuple(s.classes),
            image=spec.ImageSpec(**s.image.model_dump()),
            video=spec.VideoSpec(**s.video.model_dump()),
            audio=spec.AudioSpec(**s.audio.model_dump()),
            max_reject_fraction=limit,
        )

    def task_specs(self) -> dict[str, spec.TaskSpec]:
        return {name: self._task(name, t) for name, t in self.tasks.items()}

    def token_spec(self) -> spec.TokenSpec:
        return spec.TokenSpec()

    def _task(self, name: str, t: TaskSettings) -> spec.TaskSpec:
        fields = t.model_dump(exclude={"variants", "batch_size", "augment", "modalities", "classes", "positives"})
        return spec.TaskSpec(
            name=name,
            modalities=tuple(t.modalities),
            classes=tuple(t.classes),
            positives=t.positives
            or ("labels" if t.text == "labels" else "text" if "text" in t.modalities else "instance"),
            augment=spec.Augment(**t.augment.model_dump()),
            variants=self._variants(name, t),
            **fields,
        )

    def _variants(self, name: str, t: TaskSettings) -> tuple[spec.Variant, ...]:
        if not {"image", "video"} & set(t.modalities):
            return (spec.Variant(name="all", global_batch_size=t.batch_size),)
        if not t.variants:
            raise RequestError(f"tasks.{name}.variants: expected at least one {{size: ...}} for images or video")
        out, budget = [], None
        for v in t.variants:
            variant = _request(
                make_variant,
                where=f"tasks.{name}.variants",
                num_frames=v.frames if "video" in t.modalities else 0,
                size=v.size,
                drop_rate=v.drop_rate,
                budget=budget,
                batch_size=None if out else t.batch_size,
                spec=self.token_spec(),
            )
            out.append(variant)
            budget = out[0].global_batch_size * out[0].num_vision_tokens
        return tuple(out)


def _request(function, *args, where: str, **kwargs):
    """Calls a function whose ValueError is the recipe's fault."""
    try:
        return function(*args, **kwargs)
    except ValueError as e:
        raise RequestError(f"{where}: {e}") from e


def locate(uri: str) -> str:
    """An absolute path or URI; "demo:" paths lie in the demo corpus' cache folder."""
    if uri.startswith("demo:"):
        from pipeline.data import demo

        return str(demo.cache_dir() / uri.removeprefix("demo:"))
    return uri if "://" in uri else str(Path(uri).expanduser().absolute())


def uses_demo(recipe: Recipe) -> bool:
    return any(s.manifest.startswith("demo:") for s in recipe.data_sets.values())


def load(path: Path, overrides: list[str] = ()) -> Recipe:
    """Reads a recipe and applies KEY=VALUE overrides (VALUE is YAML). Raises RequestError with one clear line."""
    try:
        raw = read_yaml(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise RequestError(f"--config {path}: no such file") from e
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as e:
        raise RequestError(f"--config {path}: expected YAML: {' '.join(str(e).split())}") from e
    if not isinstance(raw, dict):
        raise RequestError(f"--config {path}: expected a mapping of settings, found {type(raw).__name__}")
    for text in overrides:
        _override(raw, text)
    return from_dict(raw)


def _override(raw: dict, text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals:
        raise RequestError(f"--set {text}: expected KEY=VALUE, e.g. --set train.num_steps=100")
    try:
        parsed = read_yaml(value)
    except yaml.YAMLError as e:
        raise RequestError(f"--set {text}: the value is not YAML: {' '.join(str(e).split())}") from e
    *outer, last = key.split(".")
    node = raw
    for part in outer:
        node = node.setdefault(part, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict):
            raise RequestError(f"--set {text}: {part!r} is not a mapping in this recipe")
    node[last] = parsed


def from_dict(raw: dict) -> Recipe:
    """A checked recipe. Raises RequestError for the first thing that is wrong."""
    try:
        recipe = Recipe.model_validate(_with_class_files(raw))
    except pydantic.ValidationError as e:
        raise RequestError(_message(e)) from e
    _check_references(recipe)
    recipe.task_specs()
    _check_model(recipe)
    return recipe


def _with_class_files(raw: dict) -> dict:
    """Class lists that name a file are read into the recipe, so that the resolved config holds them."""
    sets = raw.get("data_sets")
    if not isinstance(sets, dict):
        return raw
    out = {}
    for name, settings in sets.items():
        if isinstance(settings, dict) and isinstance(settings.get("classes"), str):
            path = Path(settings["classes"]).expanduser()
            try:
                lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
            except (OSError, UnicodeDecodeError) as e:
                reason = e.strerror if isinstance(e, OSError) else "it is not UTF-8 text"
                raise RequestError(f"data_sets.{name}.classes: {path} cannot be read: {reason}") from e
            settings = settings | {"classes": [line for line in lines if line]}
        out[name] = settings
    return raw | {"data_sets": out}


def _message(error: pydantic.ValidationError) -> str:
    errors = error.errors()
    first = errors[0]
    path = [str(part) for part in first["loc"]]
    key = ".".join(path)
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    if first["type"] == "extra_forbidden":
        known = _known_keys(path[:-1])
        nearest = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {'.'.join([*path[:-1], nearest[0]])!r}?" if nearest else f"known: {', '.join(known)}"
        return f"unknown key {key!r}; {hint}{more}"
    if first["type"] == "missing":
        return f"missing key {key!r}{more}"
    found = repr(first["input"])[:80]
    return f"{key}: {first['msg']}; found {found}{more}"


def _known_keys(path: list[str]) -> list[str]:
    """The keys of the mapping at ``path`` in the recipe's schema."""
    node: Any = Recipe
    for part in path:
        if isinstance(node, type) and issubclass(node, pydantic.BaseModel):
            node = node.model_fields[part].annotation
            continue
        # A dict or list of models: the part is a name or a number; its last argument is what it holds.
        node = [a for a in getattr(node, "__args__", ()) if a is not type(None)][-1]
    while not (isinstance(node, type) and issubclass(node, pydantic.BaseModel)):
        inner = [a for a in getattr(node, "__args__", ()) if a is not type(None)]
        if not inner:
            return []
        node = inner[-1]
    return list(node.model_fields)


def _check_references(recipe: Recipe) -> None:
    """What one part of the recipe says of another."""
    for name, data_set in recipe.data_sets.items():
        twice = sorted({c for c in data_set.classes if data_set.classes.count(c) > 1})
        if twice:
            raise RequestError(f"data_sets.{name}.classes: {twice[:3]} stand there more than once")
    for name, task in recipe.tasks.items():
        where = f"tasks.{name}"
        _known(task.data_set, recipe.data_sets, f"{where}.data_set")
        _check_task(where, task, recipe.data_sets[task.data_set])
    for number, e in enumerate(recipe.evaluate):
        where = f"evaluate.{number}"
        _known(e.data_set, recipe.data_sets, f"{where}.data_set")
        data_set = recipe.data_sets[e.data_set]
        if not data_set.held_out:
            raise RequestError(
                f"{where}: data_sets.{e.data_set}.held_out is not set, so there is nothing to measure on"
            )
        if e.held_out is not None and (isinstance(data_set.held_out, str) or e.held_out not in data_set.held_out):
            raise RequestError(f"{where}.held_out: {e.held_out!r} is none of data_sets.{e.data_set}.held_out")
        _subset(e.classes, data_set.classes, f"{where}.classes", e.data_set)
        _check_evaluation(where, e, recipe)
    if not any(t.weight is None or t.weight > 0 for t in recipe.tasks.values()):
        raise RequestError("tasks: every weight is 0, so no task would ever run; give one a positive weight")


def _check_model(recipe: Recipe) -> None:
    """What the model's tables can hold."""
    model = recipe.model_config_for(vocab_size=16)
    for name, task in recipe.tasks.items():
        if "text" in task.modalities and task.text_length > model.text_positions[0]:
            raise RequestError(
                f"tasks.{name}.text_length: {task.text_length} tokens, but {recipe.model.variant} has "
                f"{model.text_positions[0]} text positions"
            )
    for name, data_set in recipe.data_set_specs().items():
        heard = any("audio" in t.modalities for t in recipe.tasks.values() if t.data_set == name)
        if heard and any(n > most for n, most in zip(data_set.audio.grid, model.audio_positions, strict=True)):
            raise RequestError(
                f"data_sets.{name}.audio: a grid of {data_set.audio.grid} patches is larger than the position tables "
                f"{model.audio_positions}; lower num_frames or num_mels"
            )


def _check_evaluation(where: str, e: EvaluationSettings, recipe: Recipe) -> None:
    """There must be a trained task with the heads that the measurement needs."""
    if any(e.served_by(task) for task in recipe.tasks.values()):
        return
    raise RequestError(
        f"{where}: {e.kind} of {e.modality} on {e.data_set} needs a task there with "
        f"{'a classifier' if e.kind == 'classify' else 'text (nce)'}; the recipe has none"
    )


def _check_task(where: str, task: TaskSettings, data_set: DataSetSettings) -> None:
    modalities = task.modalities
    if len(set(modalities)) != len(modalities) or {"image", "video"} <= set(modalities):
        raise RequestError(
            f"{where}.modalities: expected different ones, and image or video, not both; found {modalities}"
        )
    if task.objective == "nce" and len(modalities) < 2:
        raise RequestError(f"{where}.modalities: nce needs two or three, found {modalities}")
    if task.objective != "nce":
        if len(modalities) != 1 or modalities == ["text"]:
            raise RequestError(
                f"{where}.modalities: {task.objective} needs one of image, video, audio; found {modalities}"
            )
        if not data_set.classes:
            raise RequestError(f"{where}: {task.objective} needs data_sets.{task.data_set}.classes, found none")
    if task.positives == "text" and "text" not in modalities:
        raise RequestError(f'{where}.positives: "text" needs text among the modalities, found {modalities}')
    for key, low in (("area", 1.0), ("aspect", None)):
        first, last = getattr(task.augment, key)
        if not 0 < first <= last or (low and last > low):
            limit = " and at most 1" if low else ""
            raise RequestError(
                f"{where}.augment.{key}: expected [low, high], rising, above 0{limit}; found {[first, last]}"
            )
    _subset(task.classes, data_set.classes, f"{where}.classes", task.data_set)
    if "video" in modalities:
        most = max((v.frames for v in task.variants), default=0)
        if most > data_set.video.max_frames:
            raise RequestError(
                f"{where}.variants: {most} frames, but data_sets.{task.data_set}.video.max_frames is "
                f"{data_set.video.max_frames}; raise it"
            )
    for side in ("num_frames", "num_mels"):
        if "audio" in modalities and getattr(data_set.audio, side) % 16:
            raise RequestError(f"data_sets.{task.data_set}.audio.{side}: must divide by the patch of 16")


def _known(name: str, known, where: str) -> None:
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known: {', '.join(known)}"
        raise RequestError(f"{where}: unknown name {name!r}; {hint}")


def _subset(classes: list[str], of, where: str, data_set: str) -> None:
    unknown = [c for c in classes if c not in of]
    if unknown:
        raise RequestError(f"{where}: {unknown[:3]} are not among the {len(of)} classes of data_sets.{data_set}")


def differences(old: dict, new: dict, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(key, old value, new value) of everything that differs between two resolved recipes."""
    out = []
    for key in sorted(old.keys() | new.keys()):
        path, a, b = f"{prefix}{key}", old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            out += differences(a, b, f"{path}.")
        elif a != b:
            out.append((path, a, b))
    return out


_FREE_PREFIXES = ("cluster.", "logging.", "checkpoint.")


def check_resume(old: dict, new: dict) -> None:
    """Raises RequestError for a difference a resume may not make: any but cluster, logging, checkpoint, more steps."""
    for key, a, b in differences(old, new):
        if key.startswith(_FREE_PREFIXES) or (key == "train.num_steps" and b > a):
            continue
        raise RequestError(
            f"this run directory was made with {key} = {a!r}, the recipe now says {b!r}; "
            "use another --run-dir, or set it back"
        )


def dump(recipe: dict) -> str:
    return yaml.dump(recipe, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
