"""The files that make an exported folder a model of sentence-transformers."""

from __future__ import annotations

from pathlib import Path

from pipeline.export.hub import CODE
from pipeline.export.inputs import SETTINGS, Input
from pipeline.files import write_bytes, write_json

MODULES, SETTINGS_FILE = "modules.json", "config_sentence_transformers.json"
# Modalities that the copied code prepares; those that a recipe adds need code of the run's own.
_PREPARED = ("text", *SETTINGS)
_ENTRY = f"{CODE[0].removesuffix('.py')}.ImpModule"


def has_vectors(inputs: tuple[Input, ...]) -> bool:
    """Whether a model places an input that the copied code prepares in a common space."""
    return any(one.pair and one.modality in _PREPARED for one in inputs)


def write_hub_files(folder: Path) -> None:
    """Writes the code and the files that name it into a folder that is being filled."""
    for name in CODE:
        write_bytes(folder / name, (Path(__file__).parent / name).read_bytes())
    write_json(folder / MODULES, [{"idx": 0, "name": "0", "path": "", "type": _ENTRY}])
    # Between two modalities the dot product of vectors is the cosine in the space of their pair.
    settings = {"model_type": "SentenceTransformer", "similarity_fn_name": "dot", "prompts": {}}
    write_json(folder / SETTINGS_FILE, settings)
