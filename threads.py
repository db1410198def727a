"""How many threads PyTorch starts, and what they do while they wait. sample.py and live.py ask for it
before they import PyTorch; tools/busy.py measures what it is worth."""

from __future__ import annotations

import os


def share_the_machine() -> None:
    """Set what OpenMP reads when PyTorch is imported; what the user has set stays.

    Threads that wait for each other spin for a moment and then sleep: those that only spin keep, on a busy
    machine, the very thread they wait for from running. Where every core is busy already, half as many
    threads as cores lose less time in waiting. Another number of threads adds in another order: the same seed
    may then give a pixel that differs by a level of 255; a number set by the user makes runs equal.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "4000")
    cores = os.cpu_count() or 1
    try:
        with open("/proc/loadavg") as file:
            others = int(file.read().split()[3].split("/")[0]) - 1           # that run or want to, without us
    except (OSError, ValueError, IndexError):                                # not Linux
        others = 0
    if others >= cores:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // 2)))
