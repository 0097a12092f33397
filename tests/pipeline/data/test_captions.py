"""Usable texts, and the faults of the others."""

import pytest

from pipeline.data.captions import best_reason, text_fault
from pipeline.data.columns import NOT_UTF8


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a cat", None),
        ("x" * 50, None),
        ("x" * 51, "text_too_long"),
        (" " * 51, "text_too_long"),
        ("", "no_text"),
        (" \t\r\n\u3000", "no_text"),
        (NOT_UTF8 + "caf\\xe9", "bad_text"),
        (NOT_UTF8 + "x" * 80, "bad_text"),
        ("caf\ufffd", None),
        ("\0", None),
    ],
)
def test_faults_of_texts(text, reason):
    found = text_fault(text, max_characters=50)
    assert (found and found[0]) == reason
    assert reason != "bad_text" or found[1] == f"not UTF-8: {text[1:]}"


def test_the_most_informative_fault_is_given():
    empty, long, bad = ("no_text", "e"), ("text_too_long", "l"), ("bad_text", "b")
    assert best_reason([empty, long, bad, ("bad_text", "c")]) == bad and best_reason([empty, long]) == long
    assert best_reason([empty]) == empty and best_reason([])[0] == "no_text"
