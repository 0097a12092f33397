"""Credentials in URIs stand in nothing that is shown, logged or stored."""

import pytest

from pipeline import pretrain
from pipeline.credentials import redacted, redacted_values
from pipeline.data.manifest import Manifest
from pipeline.data.media.errors import Reject
from pipeline.data.sources import MediaSource
from pipeline.errors import DataError, RequestError, one_line
from pipeline.recipe import check_resume, from_dict


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("see https://user:pw@host:80/x.png, a@b.c", "see https://***@host:80/x.png, a@b.c"),
        ("s3://AKIA0:se/cr+et@bucket/key?region=eu", "s3://***@bucket/key?region=eu"),
        ("'https://ghp_abc@host/x' and gs://anonymous@b", "'https://***@host/x' and gs://anonymous@b"),
        ("ray://me:pw@head:10001", "ray://***@head:10001"),
        (
            "https://h/x?X-Amz-Credential=A%2Fb&w=3&X-Amz-Security-Token=t&X-Amz-Signature=0f&size=2",
            "https://h/x?X-Amz-Credential=***&w=3&X-Amz-Security-Token=***&X-Amz-Signature=***&size=2",
        ),
        ("https://h/b?sv=1&sig=a%2B&se=9 (404)", "https://h/b?sv=1&sig=***&se=9 (404)"),
        ('{"a": "https://h/?api_key=1"}', '{"a": "https://h/?api_key=***"}'),
    ],
)
def test_credentials_are_left_out(text, shown):
    assert redacted(text) == shown and redacted(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "/data/a?token=b.png",
        "https://host:8080/users/@me/a:b@2x.png",
        "s3://bucket/a@b/c:d@e.png",
        "abfs://container@account.dfs.core.windows.net/x",
        "https://h/x?keyword=cat&monkey=1&author=me",
        "hf://datasets/a/b@main/x.parquet",
    ],
)
def test_what_is_no_secret_stays(text):
    assert redacted(text) == text


def test_a_long_text_takes_no_time():
    assert redacted("x://" + "a." * 50_000 + "?" + "b" * 50_000).endswith("b")


def test_values_of_any_shape():
    found = redacted_values({"https://u:p@h": [("s3://k:s@b", 1, None)], "n": 2.5})
    assert found == {"https://***@h": [("s3://***@b", 1, None)], "n": 2.5}


@pytest.mark.parametrize("kind", [RequestError, DataError])
def test_errors_never_hold_them(kind):
    assert one_line(kind("storage: https://u:p@h/x: 403")) == "storage: https://***@h/x: 403"


def test_what_is_journalled_of_a_bad_row_never_holds_them(tmp_path, write_manifest, make_data_set):
    rows = [{"id": "a", "image": "https://u:p@h/a.png?sig=1"}]
    source = MediaSource(make_data_set(write_manifest(tmp_path / "m.parquet", rows)), modalities=("image",))
    assert source.media_path(0) == "https://***@h/a.png?sig=***"
    assert Reject("missing_file", rows[0]["image"]).detail == "https://***@h/a.png?sig=***"


def test_the_command_to_go_on_with_never_holds_them(monkeypatch):
    monkeypatch.setattr("sys.argv", ["jobs/pretrain.py", "--set", "data_sets.x.manifest=s3://KEY:SECRET@bucket/m"])
    assert pretrain._command() == "python jobs/pretrain.py --set data_sets.x.manifest=s3://***@bucket/m"


def test_a_resume_may_bring_other_credentials():
    task = {
        "data_set": "a",
        "objective": "softmax",
        "modalities": ["image"],
        "batch_size": 4,
        "variants": [{"size": 64}],
    }
    raw = {"tasks": {"t": task}, "train": {"num_steps": 3}}
    old, new, other = (
        from_dict(raw | {"data_sets": {"a": {"manifest": uri, "classes": ["x"]}}}).to_dict()
        for uri in ("s3://k:1@b/m.parquet", "s3://k:2@b/m.parquet", "s3://k:2@c/m.parquet")
    )
    assert check_resume(redacted_values(old), new) == []
    with pytest.raises(RequestError, match=r"s3://\*\*\*@b/m.parquet', the recipe now says 's3://\*\*\*@c"):
        check_resume(redacted_values(old), other)


def test_a_stored_recipe_says_that_its_credentials_are_missing():
    with pytest.raises(RequestError, match="without its credentials, which are never stored; name a recipe with them"):
        Manifest("s3://***@b/m.parquet")
