"""Documents say what is: every code block runs or is parsed, every link leads somewhere, pages stay short.

A page is a story: its blocks are taken in order, in one folder with a few sample files.

* ``python`` is executed; a page's blocks share their names.
* ``yaml`` is read by the recipe's reader: a whole recipe as it is, a fragment merged into the page's last whole recipe
  (or that of docs/own-data.md).
* ``bash`` is taken apart. Each ``imp ...`` and ``python jobs/...`` is parsed by the product's own parser, and its
  recipe is read with its ``--set``. Cheap ones run (``_runs``); the others train. Other programs: see ``_others``.
* ``text`` is a picture.

``<!-- not run: REASON -->`` above a block leaves it out, but its ``imp`` commands are parsed all the same.
``<!-- file: NAME -->`` keeps a block as a file of the story.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import re
import shlex
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from pipeline import cli
from pipeline import recipe as recipes
from pipeline.data.importers import LAYOUTS
from pipeline.data.spec import ImageSpec, Variant
from pipeline.errors import RequestError
from tests.doc_blocks import ROOT, Block, blocks

PAGES = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not any(part.startswith(".") or part in ("runs", "build") for part in path.relative_to(ROOT).parts[:-1])
)
NAMES = [str(path.relative_to(ROOT)) for path in PAGES]
MAX_LINES = 150
LANGUAGES = ("bash", "python", "yaml", "text")
# Generated, or lists that grow.
LONGER = {"docs/settings.md", "docs/architecture.md", "docs/benchmarks.md", "CHANGELOG.md"}
_VARIABLE = re.compile(r"^[A-Z]+=")
# Checked by continuous integration itself.
_TOOLS = {"pytest", "ruff", "lint-imports", "pyrefly", "pre-commit"}


def commands(text: str) -> list[list[str]]:
    """The commands of a bash block as words, without comments, variables and redirections."""
    lines = text.replace("\\\n", " ").splitlines()
    found = [shlex.split(part, comments=True) for line in lines for part in line.split(" && ")]
    found = [[word for n, word in enumerate(words) if n or not _VARIABLE.match(word)] for words in found]
    return [words for words in found if words]


def product_arguments(words: list[str]) -> list[str] | None:
    """The arguments of ``imp`` that a command gives, itself or through ``ray job submit``; None for other programs."""
    if words[:3] == ["ray", "job", "submit"] and "--" in words:
        words = words[words.index("--") + 1 :]
    if words[0] == "imp":
        return words[1:]
    if words[0] == "python" and words[1].startswith("jobs/"):
        assert (ROOT / words[1]).is_file(), words[1]
        return [Path(words[1]).stem, *words[2:]]
    return None


def run_product(arguments: list[str]) -> int:
    if hasattr(cli, "main"):
        return cli.main(arguments)
    name, *rest = arguments
    return cli.preprocess_main(arguments) if name == "import" else getattr(cli, f"{name}_main")(rest)


class Story:
    """A folder in which a page's blocks are taken in order."""

    def __init__(self, monkeypatch, recipe: dict):
        self._patch, self._recipe, self._names = monkeypatch, recipe, {}

    def take(self, block: Block) -> None:
        assert block.language in ("bash", "python", "yaml", "text"), f"{block.where}: language {block.language!r}"
        if "file" in block.marks:
            Path(block.marks["file"]).write_text(block.text)
        if block.language == "bash":
            for words in commands(block.text):
                self._command(words, block)
        elif "not run" in block.marks:
            assert len(block.marks["not run"].split()) >= 3, f"{block.where}: a reason is a sentence"
        elif block.language == "python":
            exec(compile(block.text, block.where, "exec"), self._names)
        elif block.language == "yaml":
            self._yaml(block)

    def _yaml(self, block: Block) -> None:
        raw = recipes.read_yaml(block.text)
        if {"data_sets", "tasks", "train"} <= raw.keys():
            self._recipe = raw
        recipes.from_dict(merged(self._recipe, raw))

    def _command(self, words: list[str], block: Block) -> None:
        arguments = product_arguments(words)
        if arguments is None:
            assert "not run" in block.marks or _others(words), f"{block.where}: {words[0]} is unknown: say why not run"
            return
        parsed = self._parsed(arguments, block)
        if config := getattr(parsed, "config", None):
            found = Path(config) if Path(config).is_file() else ROOT / config
            recipes.load(found, getattr(parsed, "overrides", []))
        if "not run" not in block.marks and _runs(arguments):
            assert run_product(arguments) == 0, block.where

    def _parsed(self, arguments: list[str], block: Block) -> argparse.Namespace:
        taken = []
        with self._patch.context() as patch:
            patch.setattr(cli, "run_job", lambda job, parsed: taken.append(parsed) or 0)
            try:
                run_product(arguments)
            except SystemExit as e:
                raise AssertionError(f"{block.where}: the parser refuses: imp {' '.join(arguments)}") from e
        assert taken, f"{block.where}: no such command: imp {arguments[0]}"
        return taken[0]


def _runs(arguments: list[str]) -> bool:
    """Whether a command is cheap enough to run: it neither trains, nor decodes a data set, nor needs a run."""
    return arguments[0] == "import" or "--print-config" in arguments or "--explain" in arguments


def _others(words: list[str]) -> bool:
    """Whether another program's command holds: extras that exist, modules that run, the project's own tools."""
    if words[:2] == ["pip", "install"]:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        return set(",".join(re.findall(r"^\.\[([\w,]+)\]$", "\n".join(words), re.M)).split(",")) <= {*extras, ""}
    if words[:3] == ["python", "-m", "model.sizes"]:
        from model import sizes

        return sizes.main(words[3:]) == 0
    return words[0] in _TOOLS


def merged(base: dict, over: dict) -> dict:
    """A recipe with a fragment's values in place of its own, key by key."""
    out = copy.deepcopy(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = merged(out[key], value) if both else copy.deepcopy(value)
    return out


SMALL = Variant("32x32", global_batch_size=1, size=32, grid=(1, 2, 2), num_vision_tokens=4)


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """A small model as ``imp export`` writes it, with a classifier of the data set "pets" and a tokenizer."""
    from model.config import ModelConfig
    from model.imp import Imp
    from pipeline.data.tokenizer import train_tokenizer
    from pipeline.export import save_model
    from pipeline.export.inputs import Input

    folder = tmp_path_factory.mktemp("exported")
    tokenizer = train_tokenizer(["a cat on a mat", "a dog in the fog"], vocab_size=24, into=folder / "tokenizer.model")
    sizes = {"width": 8, "depth": 1, "num_heads": 1, "head_dim": 8, "mlp_dim": 8, "common_dim": 8}
    config = ModelConfig(vocab_size=tokenizer.vocab_size, **sizes)
    imp = Imp(config, modalities=("text", "vision"), pairs=(("text", "vision"),), classifiers={"pets": 2})
    classes = {"pets": ["cat", "dog"]}
    image = Input("pets", "image", "vision", settings=ImageSpec(short_side=32), variants=(SMALL,))
    inputs = (
        dataclasses.replace(image, pair=("text", "vision")),
        dataclasses.replace(image, classes=("cat", "dog"), objective="softmax"),
        Input("pets", "text", "text", text_length=16, pair=("text", "vision"), beside=("image",)),
    )
    save_model(folder / "model", imp, imp.init(0), step=1, classes=classes, tokenizer=tokenizer.model, inputs=inputs)
    return folder / "model"


@pytest.fixture
def story(tmp_path, monkeypatch, exported) -> Story:
    """The sample files that the pages speak of."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "depth", raising=False)
    monkeypatch.setenv("IMP_CACHE", str(tmp_path / "cache"))
    own_data = next(block for block in blocks("docs/own-data.md") if block.marks.get("file") == "pets.yaml")
    for name in ("pets.yaml", "more.yaml", "new.yaml"):
        Path(name).write_text(own_data.text)
    pixels = Image.fromarray(np.full((48, 48, 3), 128, np.uint8))
    pictures = [f"pets/{part}/{kind}/1.png" for part in ("train", "test") for kind in ("cat", "dog")]
    for name in ("cat.jpg", "images/cat.jpg", *pictures):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        pixels.save(name)
    Path("data").mkdir()
    Path("captions.csv").write_text("path,title,kind\nimages/cat.jpg,a cat on a mat,cat\n")
    Path("runs/pets").mkdir(parents=True)
    Path("runs/pets/metrics.jsonl").write_text(json.dumps({"step": 1, "task": "pet_classes", "loss": 0.7}) + "\n")
    Path("exported").symlink_to(exported)
    return Story(monkeypatch, yaml.safe_load(own_data.text))


@pytest.mark.parametrize("name", NAMES)
def test_the_code_blocks_of_a_page_hold(name, story):
    for block in blocks(name):
        story.take(block)


def test_a_stale_flag_key_or_program_is_found(story):
    """The test above can fail."""
    for language, text in [
        ("bash", "imp pretrain --no-such-flag\n"),
        ("bash", "imp pretrain --config pets.yaml --set train.no_such_key=1\n"),
        ("bash", "no-such-program\n"),
        ("bash", "pip install -e '.[no_such_extra]'\n"),
        ("yaml", "train: {no_such_key: 1}\n"),
        ("python", "import no_such_module\n"),
        ("", "no language\n"),
    ]:
        with pytest.raises((AssertionError, ImportError, RequestError)):
            story.take(Block("here", language, text, {}))


def test_imports_in_tables_name_layouts_and_options_that_exist():
    """Commands inside a line, as in docs/own-data.md's table."""
    import inspect

    found = [shlex.split(code) for name in NAMES for code in inline_code(name) if code.startswith("imp import ")]
    layouts = {words[2]: re.findall(r"--option (\w+)=", " ".join(words)) for words in found if len(words) > 3}
    assert layouts.keys() == LAYOUTS.keys()
    for layout, options in layouts.items():
        assert set(options) <= set(inspect.signature(LAYOUTS[layout]).parameters), layout


def inline_code(name: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", (ROOT / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", NAMES)
def test_links_of_a_page_lead_somewhere(name):
    text = re.sub(r"^```.*?^```$", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.M | re.S)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("name", NAMES)
def test_paths_in_a_page_exist(name):
    """In words, as `configs/demo.yaml`; blocks are parsed, and decisions may speak of what is gone."""
    top = "configs|jobs|pipeline|model|tests|benchmarks|docs|deploy"
    path = re.compile(rf"({top})/([\w./-]*(/|\.(json|md|py|yaml)))?")
    paths = [code for code in inline_code(name) if path.fullmatch(code)]
    assert not [path for path in paths if not (ROOT / path).exists()]


def anchors(file: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", NAMES)
def test_pages_are_short(name):
    if name in LONGER or name.startswith("docs/decisions/"):
        return
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MAX_LINES
