"""What a planned job will cost here: one batch timed, the rest multiplied."""

import time

from boomgen.run import RunDir


def calibrate(run: RunDir) -> dict[str, str]:
    """Device-hours and bytes of the whole job, from three network calls and one encoded batch on one device."""
    import torch

    from boomgen.models.network import example_inputs
    from boomgen.worker import Worker

    plan, worker = run.plan, Worker(run)
    inputs = example_inputs(plan.model, plan.network.batch_size, worker.denoiser.conditions, worker.device)
    with torch.inference_mode():
        worker.denoiser.network(*inputs)
        start = time.perf_counter()
        for _ in range(3):
            worker.denoiser.network(*inputs)
        if worker.device != "cpu":
            torch.cuda.synchronize()
        call = (time.perf_counter() - start) / 3
    batch = worker.make_batch(0, 0)
    size = sum(len(data) for made in batch for data in made.members.values()) / len(batch)
    return {
        "call": f"{call * 1e3:.1f} ms, {plan.network.batch_size / call:.0f} image-calls/s on one {worker.device}",
        "device-hours": f"{plan.calls * call / 3600:.2f} (divide by the number of workers)",
        "bytes": f"{plan.rows * (size + 3 * 512) / 1e6:,.1f} MB of tars",
    }
