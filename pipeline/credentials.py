"""Credentials in URIs: hidden in everything that is shown, logged or stored."""

from __future__ import annotations

import re
from typing import Any

HIDDEN = "***"

# "scheme://user:password@host" and "s3://KEY:SECRET@bucket", whose secret may contain slashes (a number after the ":"
# is a port); for the web also a name alone, which may be a token. Azure's "abfs://container@account" is not secret.
_USER = re.compile(
    r"\b(?P<scheme>[a-z][a-z0-9+.-]{0,20}://)[^\s'\"<>/?#@:]*:(?!\d+/)[^\s'\"<>?#@]*@"
    r"|\b(?P<web>(?:https?|s?ftp)://)[^\s'\"<>/?#@:]+@",
    re.IGNORECASE,
)
# "?token=...&X-Amz-Signature=...": parameters whose names contain such words.
_PARAMETER = re.compile(
    r"(?P<name>[?&;#](?:"
    r"[\w.%-]{0,60}(?:signature|secret|token|password|passwd|credential|api[_-]?key|access[_-]?key)[\w.%-]{0,60}"
    r"|[\w.%-]{0,60}key-pair-id|auth|authorization|code|key|policy|pw|pwd|sig"
    r")=)[^\s&;#'\"<>]+",
    re.IGNORECASE,
)


def redacted(text: str) -> str:
    """Replaces the credentials of every URI in a text by three stars; other text is unchanged."""
    if "://" not in text:
        return text
    return _PARAMETER.sub(rf"\g<name>{HIDDEN}", _USER.sub(_without_user, text))


def _without_user(found: re.Match) -> str:
    return f"{found['scheme'] or found['web']}{HIDDEN}@"


def redacted_values(value: Any) -> Any:
    """Applies ``redacted`` to every string in a mapping, list or value, keys included."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, dict):
        return {redacted_values(key): redacted_values(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(redacted_values(inner) for inner in value)
    return value
