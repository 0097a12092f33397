"""Decoders as a user would write them, named in recipes as tests.decoders:NAME: good ones and the worst there are.

Files that begin with a word of ``_DEADLY`` do what the word says; all others are left to the project's own decoders.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time

import numpy as np

from pipeline.data.media import audio, image, video


def grey_image(source, spec, *, start_s, end_s):
    return np.full((32, 32, 3), 7, np.uint8)


def broken(source, spec, *, start_s, end_s):
    raise RuntimeError("does not work")


def wrong_type(source, spec, *, start_s, end_s):
    return np.zeros(2)


def deadly_image(source, spec, *, start_s, end_s):
    _obey(source)
    return image.BUILT_IN["pillow"](source, spec, start_s=start_s, end_s=end_s)


def deadly_video(source, spec, *, start_s, end_s):
    _obey(source)
    return video.BUILT_IN["pyav"](source, spec, start_s=start_s, end_s=end_s)


def deadly_audio(source, spec, *, start_s, end_s):
    _obey(source)
    return audio.BUILT_IN["soundfile"](source, spec, start_s=start_s, end_s=end_s)


def _obey(source) -> None:
    if isinstance(source, bytes):
        head = source[:8]
    else:
        with open(source, "rb") as file:
            head = file.read(8)
    for word, action in _DEADLY.items():
        if head.startswith(word):
            action(source)


def _sleep_with_the_interpreter_lock(source) -> None:
    """PyDLL keeps the lock: no other thread and no Python signal handler of the process runs meanwhile."""
    ctypes.PyDLL(None).sleep(1000)


def _spin(source) -> None:
    while True:
        pass


def _crash_once(source) -> None:
    """A process that dies although the sample is good: the second try reads it."""
    mark = f"{source}.tried"
    if not os.path.exists(mark):
        open(mark, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0)


def _hoard(source) -> None:
    _KEPT.append(np.ones(64 << 20, np.uint8))


_KEPT: list = []
_DEADLY = {
    b"SEGV": lambda source: os.kill(os.getpid(), signal.SIGSEGV),
    b"NULL": lambda source: ctypes.string_at(0),
    b"ABRT": lambda source: os.abort(),
    b"EXIT": lambda source: os._exit(3),
    b"LOCK": _sleep_with_the_interpreter_lock,
    b"SPIN": _spin,
    b"HUGE": lambda source: np.ones(1 << 40, np.uint8),
    b"ONCE": _crash_once,
    b"LEAK": _hoard,
}
