"""How much a busy machine slows the README's first command, and what sleeping threads cost on an idle one.

    python tools/busy.py                   three turns of each, a minute or two on an idle machine
    python tools/busy.py --turns 5 --num_frames 480

terminal.py lets threads that wait spin for a moment and then sleep (GOMP_SPINCOUNT=4000); OpenMP's default is
to let them spin.
Both are measured alone and beside one busy process per core, in turns, so that other load falls on all alike.
The result is the median of the turns, in seconds of computing per second of video. Wanted: sleeping beside
busy processes at most 3 times slower than alone, and alone at most 5 % slower than spinning.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

SAMPLE = Path(__file__).resolve().parents[1] / "sample.py"
POLICIES = {"sleeping": {}, "spinning": {"GOMP_SPINCOUNT": "300000"}}        # the default of GNU's OpenMP
LOADS = {"alone": 0, "busy": os.cpu_count() or 1}


def seconds_per_second(policy: dict[str, str], others: int, num_frames: int, threads: int | None) -> float:
    """One run beside so many processes that only compute."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))} | policy
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(others)]
    try:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, SAMPLE, "--mode", "t2v", "--prompt", "a red ball bounces",
                       "--device", "cpu", "--num_frames", str(num_frames), "--out", f"{folder}/out.mp4"]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    return float(re.search(r"([\d.]+) s of computing per second", done.stdout)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--num_frames", type=int, default=240)
    parser.add_argument("--threads", type=int, help="OMP_NUM_THREADS; default: as many as cores")
    args = parser.parse_args()
    times: dict[tuple[str, str], list[float]] = {}
    for turn in range(args.turns):
        for load, others in LOADS.items():
            for name, policy in POLICIES.items():
                taken = seconds_per_second(policy, others, args.num_frames, args.threads)
                times.setdefault((name, load), []).append(taken)
                print(f"turn {turn + 1}: {name:8} {load:5} {taken:6.2f}", flush=True)
    median = {key: statistics.median(values) for key, values in times.items()}
    for (name, load), value in median.items():
        turns = ", ".join(map(str, times[name, load]))
        print(f"{name:8} {load:5} {value:6.2f} s per second of video ({turns})")
    slower = {name: median[name, "busy"] / median[name, "alone"] for name in POLICIES}
    cost = 100 * (median["sleeping", "alone"] / median["spinning", "alone"] - 1)
    print(f"beside {LOADS['busy']} busy processes {slower['sleeping']:.2f} times slower (spinning: "
          f"{slower['spinning']:.2f}); sleeping costs {cost:+.1f} % alone")


if __name__ == "__main__":
    main()
