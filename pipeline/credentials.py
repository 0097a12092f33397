"""Credentials inside URIs: left out of everything that is shown, logged or stored."""

from __future__ import annotations

import re

HIDDEN = "***"

# "scheme://user:password@host" and "s3://KEY:SECRET@bucket", whose secret may hold slashes (a number behind the ":" is
# a port); for the web also a name alone, which may be a token. Azure's "abfs://container@account" is no secret.
_USER = re.compile(
    r"\b(?P<scheme>[a-z][a-z0-9+.-]{0,20}://)[^\s'\"<>/?#@:]*:(?!\d+/)[^\s'\"<>?#@]*@"
    r"|\b(?P<web>(?:https?|s?ftp)://)[^\s'\"<>/?#@:]+@",
    re.IGNORECASE,
)
# "?token=...&X-Amz-Signature=...": names that say so, as parts of longer ones too.
_PARAMETER = re.compile(
    r"(?P<name>[?&;#](?:"
    r"[\w.%-]{0,60}(?:signature|secret|token|password|passwd|credential|api[_-]?key|access[_-]?key)[\w.%-]{0,60}"
    r"|[\w.%-]{0,60}key-pair-id|auth|authorization|code|key|policy|pw|pwd|sig"
    r")=)[^\s&;#'\"<>]+",
    re.IGNORECASE,
)


def redacted(text: str) -> str:
    """The text with the credentials of every URI in it replaced by three stars; other text comes back as it is."""
    if "://" not in text:
        return text
    return _PARAMETER.sub(rf"\g<name>{HIDDEN}", _USER.sub(_without_user, text))


def _without_user(found: re.Match) -> str:
    return f"{found['scheme'] or found['web']}{HIDDEN}@"


def redacted_values(value):
    """The same mapping, list or value with every string in it ``redacted``, keys too."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, dict):
        return {redacted_values(key): redacted_values(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(redacted_values(inner) for inner in value)
    return value
