"""Seconds per image against t_boom: a line, since every level costs one network call. One worker, in this process."""

import argparse
import tempfile

import numpy as np
import torch
from common import machine, table

from boomgen import env
from boomgen.job import Job, Launch
from boomgen.prepare import prepare
from boomgen.worker import Worker


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=64, help="one batch")
    parser.add_argument("--steps", type=int, default=50, help="length of the whole chain")
    parser.add_argument("--threads", type=int, default=env.cores())
    args = parser.parse_args()
    print(machine(), flush=True)

    torch.set_num_threads(args.threads)
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
            seconds = Worker(run).make_shard(0)["seconds"]["total"] / args.images
        rows.append((tenth / 10, run.plan.chain.level, 1e3 * seconds))
    x, _, y = (np.array(column) for column in zip(*rows, strict=True))
    slope, start = np.polyfit(x, y, 1)
    line = slope * x + start
    r2 = 1 - np.square(y - line).sum() / np.square(y - y.mean()).sum()
    cells = [(t, calls, f"{ms:.1f}", f"{fit:.1f}") for (t, calls, ms), fit in zip(rows, line, strict=True)]
    print(table(("t_boom", "network calls", "ms per image", "line"), cells))
    print(f"ms per image = {start:.2f} + {slope:.1f} t_boom, R^2 {r2:.5f}")


if __name__ == "__main__":
    main()
