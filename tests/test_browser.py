"""The browser of the tests sees the faults that pages are tested for."""

import pytest

_GOOD = "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'><p>text"


@pytest.mark.parametrize(
    ("body", "sees"),
    [
        ("", ""),
        ("<script>undefined_name()</script>", "exception"),
        ("<script>console.error('wrong')</script>", "console"),
        ("<img src='https://example.invalid/a.png' alt=''>", "request"),
        ("<div style='width: 500px'>wide</div>", "wide"),
    ],
)
def test_each_fault_of_a_page_is_seen_and_a_page_without_one_passes(tmp_path, browser, body, sees):
    path = tmp_path / "page.html"
    path.write_text(_GOOD + body)
    page = browser.opened(path, width=400)
    found = page.complaints + [f"wide: {line}" for line in page.too_wide()]
    assert any(line.startswith(sees) for line in found) if sees else found == []


def test_a_key_reaches_the_page_and_screenshots_and_prints_are_files(tmp_path, browser):
    path = tmp_path / "page.html"
    path.write_text(_GOOD + "<button onclick='document.title = \"pressed\"'>b</button>")
    page = browser.opened(path)
    page.press("Tab")
    page.press("Enter")
    assert page.run("document.title") == "pressed"
    page.screenshot("page", folder=tmp_path)
    page.print_pdf(tmp_path / "page.pdf")
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
