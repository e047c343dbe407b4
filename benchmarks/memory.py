"""Memory of the driver and of its workers over a long job: it must not grow with the number of images made.

The whole Fashion-MNIST training split (Debian package dataset-fashion-mnist, or --data-dir), one network call an
image. Resident memory is read from /proc at intervals; peaks of the first and the last quarter of the shards are
compared, so that loading the model is in neither.
"""

import argparse
import itertools
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, machine, table

from boomgen import env

INTERVAL = 0.5  # seconds


def resident(pid: int) -> float:
    """MB of memory that a process holds; 0 where it has gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")), 0.0)


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()]
    except OSError:
        return []


def watch(driver: subprocess.Popen[str], shards: Path) -> list[tuple[int, float, float]]:
    """(shards published, MB of the driver, MB of the largest worker) until the driver ends."""
    samples = []
    while driver.poll() is None:
        made = sum(1 for _ in shards.iterdir()) if shards.is_dir() else 0
        workers = [resident(child) for child in children(driver.pid)]
        samples.append((made, resident(driver.pid), max(workers, default=0.0)))
        time.sleep(INTERVAL)
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=60_000)
    parser.add_argument("--data-dir", default="/usr/share/datasets/fashion-mnist")
    parser.add_argument("--workers", type=int, default=env.cores())
    args = parser.parse_args()
    print(machine(), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        source = ["--dataset", "fashion-mnist", "--data-dir", args.data_dir, "--split", "train"]
        job = ["--limit", args.images, "--steps", 10, "--t-boom", 0.1, "--compile", "no"]
        where = ["--device", "cpu", "--workers", args.workers, "--out", f"{folder}/run"]
        command = [sys.executable, "-m", "boomgen", "anonymize", *source, *job, *where]
        start = time.perf_counter()
        driver = subprocess.Popen(
            [*map(str, command)], cwd=ROOT, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        samples = watch(driver, Path(folder) / "run" / "shards")
        seconds = time.perf_counter() - start
        if driver.returncode != 0:
            sys.exit(driver.communicate()[1])
    samples = [sample for sample in samples if sample[0]]
    whole = samples[-1][0]
    quarters = {
        quarter: [(driver, worker) for _, driver, worker in group]
        for quarter, group in itertools.groupby(samples, lambda sample: min(3, 4 * sample[0] // (whole + 1)))
    }
    peaks = [[max(pair[who] for pair in quarters[quarter]) for quarter in range(4)] for who in (0, 1)]
    rows = [
        (name, *(f"{mb:.0f}" for mb in peak), f"{peak[3] / peak[0]:.3f}")
        for name, peak in zip(("driver", "largest worker"), peaks, strict=True)
    ]
    print(f"{args.images} images in {whole} shards, {args.workers} workers, {seconds:.0f} s, {len(samples)} samples")
    print(table(("peak resident memory, MB", "1st quarter", "2nd", "3rd", "last quarter", "last to first"), rows))


if __name__ == "__main__":
    main()
