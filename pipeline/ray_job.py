"""A job of ``ray job submit``, as the command that it runs sees it. Knows nothing of Ray but its environment variables.

Ray unpacks the uploaded folder on each node, in a folder named after the content's hash: a changed byte is another
folder, and all of them go with the cluster.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from pipeline.errors import RequestError
from pipeline.store.path import user_path

# Environment variable in which Ray gives the command of a job its runtime environment and metadata.
_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
# Environment variable of the seconds between SIGTERM and SIGKILL of ``ray job stop``, read by Ray beside the command.
_GRACE = "RAY_JOB_STOP_WAIT_TIME_S"
# Ray's default for it.
_GRACE_S = 3
# Seconds in which a run of some size ends its step and saves.
_SAVE_S = 30
# A URI; ``Path`` makes one slash of the two.
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def _config() -> dict | None:
    """The job's configuration; None if this process is not the command of a job."""
    try:
        config = json.loads(os.environ.get(_CONFIG, "null"))
    except ValueError:
        return None
    return config if isinstance(config, dict) else None


def check_outlives(path: Path | str, option: str) -> None:
    """Raises RequestError if ``path``, which a command is to write to, would be lost with the job that it runs in.

    option: the argument that names the path, or would name it.
    """
    config = _config()
    if config is None or _URI.match(str(path)):
        return
    given = user_path(path)
    uploaded = bool((config.get("runtime_env") or {}).get("working_dir"))
    if given.is_absolute() and not (uploaded and given.resolve().is_relative_to(Path.cwd().resolve())):
        return
    found = f"{option} {path}" if given.is_absolute() else f"{option} {path}, a relative path"
    raise RequestError(
        f"{found}: expected a folder that outlives this job; its own folder is Ray's copy of the upload, which goes "
        f"with the cluster and is another one after any change. Give an absolute path on storage that all nodes "
        f"mount, e.g. {option} /mnt/runs/{given.name}"
    )


def upload_hint(path: str) -> str:
    """The end of a line on a file that is missing: the reason, if it was to come with a job's upload."""
    if _config() is None or not Path(path).is_relative_to(Path.cwd()):
        return ""
    return (
        "; relative paths of a job are those of its upload, which lacks what .rayignore and .gitignore name: give an "
        "absolute path or a URI that all nodes reach"
    )


def grace_warning() -> str | None:
    """A line on what to set if ``ray job stop`` would kill this run before it has saved; None if nothing is to be set.

    Ray reads the variable on the node of the command, whose environment it hands down.
    """
    if _config() is None:
        return None
    text = os.environ.get(_GRACE, "")
    grace_s = int(text) if text.isdecimal() else _GRACE_S
    if grace_s >= _SAVE_S:
        return None
    return (
        f"`ray job stop` kills this run {grace_s} s after asking it to save, which may lose the steps since the last "
        f"checkpoint; submit with --runtime-env deploy/job.yaml, or set {_GRACE}={4 * _SAVE_S} where the cluster starts"
    )
