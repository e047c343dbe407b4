"""Time per image against t_boom: a line, since every level costs one network call. One worker, in this process.

On a busy machine the CPU time is the one to read.
"""

import argparse
import tempfile
import time

import numpy as np
from common import machine, table

from boomgen.job import Job, Launch
from boomgen.prepare import prepare
from boomgen.worker import Worker


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=64, help="one batch")
    parser.add_argument("--steps", type=int, default=50, help="length of the whole chain")
    args = parser.parse_args()
    print(machine(), flush=True)

    rows = []
    for tenth in range(1, 11):
        job = Job(
            mode="anonymize",
            dataset="fashion-sample",
            limit=args.images,
            t_boom=str(tenth / 10),
            steps=args.steps,
            compile="no",
            batch_size=args.images,
        )
        with tempfile.TemporaryDirectory() as folder:
            run = prepare(job, Launch(out=f"{folder}/run", device="cpu"))
            worker, cpu = Worker(run), time.process_time()
            seconds = worker.make_shard(0)["seconds"]["total"]
            cpu = time.process_time() - cpu
        rows.append((tenth / 10, run.plan.chain.level, 1e3 * seconds / args.images, 1e3 * cpu / args.images))
    cells = [(t, calls, f"{wall:.1f}", f"{used:.1f}") for t, calls, wall, used in rows]
    print(table(("t_boom", "network calls", "ms per image", "ms of CPU per image"), cells))
    x, _, *timings = (np.array(column) for column in zip(*rows, strict=True))
    for name, y in zip(("ms per image", "ms of CPU per image"), timings, strict=True):
        slope, start = np.polyfit(x, y, 1)
        r2 = 1 - np.square(y - slope * x - start).sum() / np.square(y - y.mean()).sum()
        print(f"{name} = {start:.2f} + {slope:.1f} t_boom, R^2 {r2:.5f}")


if __name__ == "__main__":
    main()
