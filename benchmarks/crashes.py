"""Kills the driver or a worker of a search at random moments, and counts evaluations that were lost or repeated.

A search of cheap evaluations on two worker processes writes a line to a log when an evaluation starts and one when it
ends. At random moments SIGKILL ends the driver, which is then resumed, or one of its workers, which the driver has to
replace. After every death of a driver, every row that the archive had before must be there unchanged, and at the end
there must be a row for every proposal. An evaluation that started more than once is a repetition; it is excused where
it was under way at a kill: it had started, and its row was not there yet.

    python -m benchmarks.crashes [--kills 50] [--seed 0] [--evaluations 600] [--asynchronous]

Ends with one JSON line: `kills` (of `drivers` and `workers`), `lost`, `repeated` (both 0 where all is well), and
`repeated_under_way`.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import argparse
import json
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]

PARTS = """
import hashlib, json, os, pathlib, time

log = pathlib.Path(__file__).parent / "log.txt"

def write(line):
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, (line + "\\n").encode())  # one write: lines of several processes do not mix
    os.close(file)

def work(choices):
    key = hashlib.sha256(json.dumps(choices, sort_keys=True).encode()).hexdigest()[:16]
    write(f"start {key}")
    time.sleep(SECONDS)
    write(f"end {key}")
    return int(key[:6], 16) / 0xFFFFFF
"""

EXPERIMENT = """
[space]
name = "nasbench201"
[task]
name = "npz"
path = "images.npz"
[objectives.accuracy]
[objectives.macs]
[evaluator]
name = "parts:work"
samples = 0
verify = 1
[strategy]
name = "random"
[execution]
backend = "processes"
workers = 2
"""


def rows(path: Path) -> dict[int, tuple[str, str]]:
    """The archive of the search: architecture and values by id; empty while there is none."""
    try:
        database = sqlite3.connect(f"file:{path / 'archive.sqlite'}?mode=ro", uri=True, timeout=30)
        found = database.execute("SELECT id, arch, vals FROM evaluations WHERE phase = 'search'").fetchall()
        database.close()
    except sqlite3.OperationalError:
        return {}
    return {id: (arch, values) for id, arch, values in found}


def children(pid: int) -> list[int]:
    """Worker processes of a driver."""
    try:
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(c) for c in found if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--evaluations", type=int, default=600)
    parser.add_argument("--seconds", type=float, default=0.3, help="that an evaluation takes")
    parser.add_argument("--driver-share", type=float, default=0.4, help="of the kills that hit the driver")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--asynchronous", action="store_true")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="nasbench-crashes-") as name:
        result = crash(Path(name), args, rng)
    print(json.dumps(result))


def crash(folder: Path, args: argparse.Namespace, rng: random.Random) -> dict[str, object]:
    """Run, kill, resume until all kills are spent and the search has ended."""
    import numpy as np

    labels = np.arange(80) % 4
    np.savez(folder / "images.npz", images=np.zeros((80, 32, 32, 3), dtype=np.uint8), labels=labels)
    (folder / "parts.py").write_text(PARTS.replace("SECONDS", str(args.seconds)))
    (folder / "crashes.toml").write_text(EXPERIMENT)
    path, log = folder / "run", folder / "log.txt"
    sets = [f"strategy.evaluations={args.evaluations}", f"execution.asynchronous={str(args.asynchronous).lower()}"]
    start = [str(folder / "crashes.toml"), *(w for s in sets for w in ("--set", s)), "--output", str(path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def launch() -> subprocess.Popen[str]:
        resume = (path / "config.toml").exists()
        arguments = ["--resume", str(path)] if resume else start
        return subprocess.Popen(
            [sys.executable, "-m", "nasbench", "run", *arguments, "--quiet"],
            env=environment, cwd=folder, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    driver = launch()
    kills: Counter[str] = Counter()
    kept: dict[int, tuple[str, str]] = {}
    excused: set[tuple[str, int]] = set()  # evaluations under way at a kill, and which attempts at them these were
    lost = 0
    while kills.total() < args.kills:
        known = len(rows(path))
        while driver.poll() is None and len(rows(path)) < known + 2:  # until it works again
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 3 * args.seconds))
        if driver.poll() is not None:
            break  # it has ended: too few evaluations for so many kills
        victim = "driver"
        workers = children(driver.pid)
        if rng.random() >= args.driver_share and workers:
            victim = "worker"
            os.kill(rng.choice(workers), signal.SIGKILL)
        else:
            driver.kill()
            driver.wait()
            deadline = time.monotonic() + 20
            while any(Path(f"/proc/{w}").exists() for w in workers) and time.monotonic() < deadline:
                time.sleep(0.01)  # they end with their driver
        kills[victim] += 1
        excused.update(under_way(log))
        now = rows(path)
        lost += sum(now.get(id) != row for id, row in kept.items())
        kept = now
        if victim == "driver":
            driver = launch()
        print(f"kill {kills.total()}: {victim}; {len(now)} rows", flush=True)
    _, errors = driver.communicate()
    if driver.returncode != 0:
        raise SystemExit(f"the run ended with an error: {errors}")
    now = rows(path)
    lost += sum(now.get(id) != row for id, row in kept.items()) + max(args.evaluations - len(now), 0)
    started = Counter(line.split()[1] for line in log.read_text().splitlines() if line.startswith("start"))
    forgiven = Counter(key for key, _ in excused)
    repeats = {key: count - 1 for key, count in started.items()}
    unexcused = sum(max(count - forgiven[key], 0) for key, count in repeats.items())
    return {
        "kills": kills.total(),
        "drivers": kills["driver"],
        "workers": kills["worker"],
        "evaluations": len(now),
        "lost": lost,
        "repeated": unexcused,
        "repeated_under_way": sum(repeats.values()) - unexcused,
        "asynchronous": args.asynchronous,
    }


def under_way(log: Path) -> list[tuple[str, int]]:
    """Evaluations that were under way, with how often they had started: without an end, or with one just now."""
    lines = [line.split() for line in log.read_text().splitlines()] if log.is_file() else []
    started = Counter(key for what, key in lines if what == "start")
    last = {key: what for what, key in lines}
    recent = {key for _, key in lines[-4:]}  # two workers: an end among these may not have been committed
    return [(key, started[key]) for key, what in last.items() if what == "start" or key in recent]


if __name__ == "__main__":
    main()
