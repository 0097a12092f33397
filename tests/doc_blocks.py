"""The fenced code blocks of a Markdown page, with the comments directly above them."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_FENCE = re.compile(r"^```(\w*)$")
_MARK = re.compile(r"^<!-- (not run|file): (.+) -->$")


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block. marks: of the comments directly above it."""

    where: str
    language: str
    text: str
    marks: dict[str, str]


def blocks(name: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    out, marks, lines = [], {}, iter(enumerate((ROOT / name).read_text(encoding="utf-8").splitlines(), 1))
    for number, line in lines:
        if mark := _MARK.match(line):
            marks[mark[1]] = mark[2]
        elif line.lstrip().startswith("```"):
            fence = _FENCE.match(line)
            assert fence, f"{name}:{number}: {line!r} is not ```LANGUAGE"
            body = []
            for _, inner in lines:
                if inner == "```":
                    break
                body.append(inner)
            out.append(Block(f"{name}:{number}", fence[1], "\n".join(body) + "\n", marks))
            marks = {}
        else:
            assert not marks, f"{name}:{number}: no block below the comment above"
    return out
