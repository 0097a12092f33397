"""An exported IMP model in PyTorch, as a module of sentence-transformers: texts, images, videos and sounds → vectors.

    model = SentenceTransformer("exported", trust_remote_code=True)
    cosines = model.similarity(model.encode(["a cat"]), model.encode([Image.open("cat.jpg")]))

A copy goes with every exported model and runs without the package that trained it.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .decoding_imp import clip, picture, waveform
from .network_imp import ImpEncoder
from .preparing_imp import Tokenizer, sound_tokens, vision_tokens

_TOKENIZERS = ("tokenizer.model", "tokenizer.json")
_SUFFIXES = {
    "image": (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".tiff", ".webp"),
    "video": (".mp4", ".avi", ".mov", ".wmv", ".flv", ".mkv", ".webm"),
    "audio": (".mp3", ".wav", ".ogg", ".flac", ".aac", ".m4a"),
}
_MODALITIES = ("text", *_SUFFIXES)


class ImpModule(nn.Module):
    """The first and only module of a sentence-transformers model.

    A vector is the item's place in the common space of each pair that the run trained, one after the other and zeros
    where its modality is in no such pair: the dot product of two modalities is the cosine in the space of their pair.
    With ``space`` it is the place in that space alone. data_set: the one whose preparation is used, where data sets
    differ; without it each modality is prepared in its largest form.
    """

    save_in_root = True

    def __init__(self, folder: str, *, space: str | None = None, data_set: str | None = None) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        inputs = [one for one in self.config["inputs"] if one["pair"] and one["modality"] in _MODALITIES]
        known = list(dict.fromkeys("_".join(one["pair"]) for one in inputs))
        if space is not None and space not in known:
            raise ValueError(f"space: expected one of {', '.join(known)}, found {space!r}")
        self.spaces = known if space is None else [space]
        inputs = [one for one in inputs if "_".join(one["pair"]) in self.spaces]
        if data_set is not None and all(one["data_set"] != data_set for one in inputs):
            raise ValueError(f"data_set: expected one of {sorted({o['data_set'] for o in inputs})}, found {data_set!r}")
        self.inputs = {name: _chosen(inputs, name, data_set) for name in _MODALITIES if _chosen(inputs, name, data_set)}
        self._pairs = {name: _pairs_of(inputs, name) for name in self.inputs}
        self.encoder = ImpEncoder(self.config["model"], load_file(self.folder / "model.safetensors"))
        self.tokenizer = self._load_tokenizer()

    def _load_tokenizer(self) -> Tokenizer | None:
        found = [self.folder / name for name in _TOKENIZERS if (self.folder / name).is_file()]
        return Tokenizer(found[0].read_bytes()) if found and "text" in self.inputs else None

    @property
    def modalities(self) -> list[str]:
        return list(self.inputs)

    @property
    def max_seq_length(self) -> int | None:
        """Tokens of a text; longer ones are cut."""
        return self.inputs["text"]["text_length"] if "text" in self.inputs else None

    def get_embedding_dimension(self) -> int:
        return len(self.spaces) * self.config["model"]["common_dim"]

    def get_sentence_embedding_dimension(self) -> int:
        """``get_embedding_dimension``, as older versions of sentence-transformers call it."""
        return self.get_embedding_dimension()

    def preprocess(self, inputs: list, prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """Arrays of items of one modality.

        A text is a str; an image a path, a PIL image or (H, W, 3) uint8; a sound or a video a path or a dict as
        ``decoding_imp`` has it. {"audio": x} says what x is.
        """
        found = [_modality(item) for item in inputs]
        names = list(dict.fromkeys(name for name, _ in found))
        if len(names) != 1 or names[0] not in self.inputs:
            raise ValueError(f"expected items of one of {', '.join(self.inputs)}, found {', '.join(names) or 'none'}")
        items = [item for _, item in found]
        if names == ["text"]:
            return self._texts([f"{prompt or ''}{text}" for text in items])
        tokens, positions = zip(*(self._media(names[0], item) for item in items), strict=True)
        return {"modality": names[0], "tokens": torch.from_numpy(np.stack(tokens)), "positions": _whole(positions[0])}

    tokenize = preprocess

    def _media(self, name: str, item: Any) -> tuple[np.ndarray, np.ndarray]:
        one, model = self.inputs[name], self.config["model"]
        if name == "audio":
            return sound_tokens(waveform(item, one["settings"], one["clip_s"]), one["settings"], model)
        frames = clip(item, one["settings"]) if name == "video" else picture(item, one["settings"])[None]
        return vision_tokens(frames, one["variants"][0], model)

    def _texts(self, texts: list[str]) -> dict[str, Any]:
        length, moe = self.inputs["text"]["text_length"], self.config["model"]["moe"]
        ids = [self.tokenizer.ids(text, length) for text in texts]
        # Padding changes nothing unless it takes part in the routing.
        length = length if moe and moe["route_padding"] else max(map(len, ids))
        tokens = torch.tensor([one + [0] * (length - len(one)) for one in ids])
        rows = np.arange(length)[:, None]
        return {"modality": "text", "tokens": tokens, "positions": _whole(rows), "mask": tokens != 0}

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Adds "sentence_embedding" (B, spaces x K)."""
        name, size = features["modality"], self.config["model"]["common_dim"]
        embedder = self.inputs[name]["embedder"]
        pooled = self.encoder.features(embedder, features["tokens"], features["positions"], features.get("mask"))
        places = [
            self.encoder.project(pooled, self._pairs[name][space], embedder)
            if space in self._pairs[name]
            else pooled.new_zeros(len(pooled), size)
            for space in self.spaces
        ]
        return features | {"sentence_embedding": torch.cat(places, dim=1)}

    @classmethod
    def load(cls, model_name_or_path: str, model_kwargs: dict | None = None, **kwargs: Any) -> ImpModule:
        """The module of a folder or of a repository. model_kwargs: ``space``, ``data_set`` and ``dtype``."""
        if not os.path.isdir(model_name_or_path):
            from huggingface_hub import snapshot_download

            names = {"token": "token", "cache_folder": "cache_dir", "revision": "revision"}
            place = {new: kwargs.get(old) for old, new in names.items()}
            local = bool(kwargs.get("local_files_only"))
            model_name_or_path = snapshot_download(model_name_or_path, local_files_only=local, **place)
        options = dict(model_kwargs or {})
        dtype = options.pop("dtype", options.pop("torch_dtype", None))
        module = cls(model_name_or_path, **options)
        return module if dtype in (None, "auto") else module.to(dtype)

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Writes the parameters, the tokenizer and a config.json that names both; no self-test, whose values differ."""
        out = Path(output_path)
        arrays = {name: array.detach().cpu().contiguous() for name, array in self.encoder.arrays.items()}
        save_file(arrays, out / "model.safetensors")
        for path in (self.folder / name for name in _TOKENIZERS):
            if path.is_file() and out.resolve() != self.folder.resolve():
                (out / path.name).write_bytes(path.read_bytes())
        names = [name for name in ("model.safetensors", *_TOKENIZERS) if (out / name).is_file()]
        files = {name: (out / name).read_bytes() for name in names}
        files = {n: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for n, data in files.items()}
        (out / "config.json").write_text(json.dumps(self.config | {"files": files}, indent=2), encoding="utf-8")


def _chosen(inputs: list[dict], modality: str, data_set: str | None) -> dict | None:
    """How a modality is prepared: as a data set does, or in the largest form, the first of equals."""
    of_modality = [one for one in inputs if one["modality"] == modality]
    named = [one for one in of_modality if one["data_set"] == data_set]

    def size(one: dict) -> tuple[int, int]:
        return max((v["num_vision_tokens"] for v in one["variants"]), default=0), one["text_length"]

    return max(named or of_modality, key=size, default=None)


def _pairs_of(inputs: list[dict], modality: str) -> dict[str, list[str]]:
    return {"_".join(one["pair"]): one["pair"] for one in inputs if one["modality"] == modality}


def _modality(item: Any) -> tuple[str, Any]:
    """(modality, the item), by its type, its keys or, for a str that names a file, its suffix."""
    item = item.numpy() if isinstance(item, Tensor) else item
    if isinstance(item, str):
        named = (name for name, ends in _SUFFIXES.items() if item.lower().endswith(ends) and os.path.isfile(item))
        return next(named, "text"), item
    if isinstance(item, dict):
        if len(item) == 1 and (name := next(iter(item))) in _MODALITIES:
            return name, item[name]
        return ("audio" if "sampling_rate" in item else "video"), item
    return ("image" if hasattr(item, "getexif") or np.ndim(item) == 3 else type(item).__name__), item


def _whole(rows: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(rows, np.int64))
