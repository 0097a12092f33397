"""CPU time of a process and all below it, Ray's processes among them."""

from __future__ import annotations

import time

import psutil


def family_cpu_s() -> float:
    """CPU seconds of this process and all below it, the dead ones that were waited for among them."""
    total = 0.0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def settle() -> None:
    """Waits until Ray's own processes, which start one after another, have nothing left to do."""
    while True:
        before = family_cpu_s()
        time.sleep(1.0)
        if family_cpu_s() - before < 0.15:
            return
