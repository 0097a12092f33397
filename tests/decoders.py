"""Decoders as a user would write them, named in recipes as tests.decoders:NAME: good ones and the worst there are.

Files that begin with a word of ``_DEADLY`` do what the word says; all others are left to the project's own decoders.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
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


def _fork_and_return(source) -> None:
    """A library that forks, and whose child comes back to the caller with an error."""
    if os.fork() == 0:
        raise ValueError("in the child")
    os.wait()


def _leave_a_process(source) -> None:
    """A process that keeps all files of this one open, whose end nobody would see; later than the first look at it."""
    time.sleep(1.5)
    if os.fork() == 0:
        time.sleep(1000)
    os._exit(3)


def _close_all_files(source) -> None:
    """As a library does that makes a daemon of its process."""
    os.closerange(3, 1 << 12)
    time.sleep(1000)


def _wait_for_a_program(source) -> None:
    """A program that hangs, as ffmpeg may on a damaged file; its process number is in a file."""
    with subprocess.Popen(["sleep", "1000"]) as program, open(f"{source}.pid", "w") as file:
        file.write(str(program.pid))
        file.flush()
        program.wait()


def _start_a_thread(source) -> None:
    threading.Thread(target=time.sleep, args=(1000,)).start()


def _panic(source) -> None:
    """As a decoder written in Rust: its panics are no Exceptions."""
    raise type("PanicException", (BaseException,), {})("index out of bounds")


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
    b"QUIT": lambda source: sys.exit("usage: decoder FILE"),
    b"RUST": _panic,
    b"FORK": _fork_and_return,
    b"LEFT": _leave_a_process,
    b"SHUT": _close_all_files,
    b"PROG": _wait_for_a_program,
    b"LIVE": _start_a_thread,
    b"READ": lambda source: subprocess.run(["cat"], stdout=subprocess.DEVNULL),
}
