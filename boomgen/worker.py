"""The worker: loads the model once, then makes shards. Everything it does follows from the plan and a shard number."""

import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from boomgen import __version__, env, images, manifest, models
from boomgen.boomerang import cascade
from boomgen.errors import BoomgenError, RowError
from boomgen.images import Box, Pixels
from boomgen.models import conditions
from boomgen.models.denoiser import Denoiser
from boomgen.models.denoiser import Pixels as PixelCoder
from boomgen.models.latents import Latents
from boomgen.models.network import NetworkCall, build, load_compiled
from boomgen.noise import Stream, normal
from boomgen.places import is_url
from boomgen.plan import PlannedRow, label_of, pass_fields, planned_rows
from boomgen.run import RunDir
from boomgen.samplers import sampler_of
from boomgen.shard import ShardWriter, sha256_file
from boomgen.sources.base import NO_LABEL, RawImage

READS = 16  # at once, of a source at a URL
Tick = Callable[[int], None]
"""Called after every batch with the number of its rows; may raise to drop the shard."""


@dataclass
class Loaded:
    """One planned row with its source read; `failure` instead of pixels where it could not be decoded."""

    row: PlannedRow
    source_sha256: str = ""
    pixels: Pixels | None = None
    box: Box | None = None
    width: int = 0
    height: int = 0
    failure: RowError | None = None


class Made(NamedTuple):
    """A finished row: its manifest entry, and its tar members unless it failed."""

    entry: dict[str, Any]
    members: dict[str, bytes]


@dataclass
class Clock:
    """Seconds per kind of work. Reading and writing overlap the network, so the sum may exceed the total."""

    spent: dict[str, float] = field(default_factory=lambda: {"read": 0.0, "infer": 0.0, "write": 0.0})

    def timed(self, name: str, work: Callable[..., Any], *args: Any) -> Any:
        start = time.perf_counter()
        try:
            return work(*args)
        finally:
            self.spent[name] += time.perf_counter() - start


class Worker:
    """Makes the shards of one run on one device ('cpu' or 'cuda').

    Raises:
        BoomgenError: this device is not of the planned class, or model or network package are not the planned ones.
    """

    def __init__(self, run: RunDir, device: str | None = None, allow_mixed: bool = False) -> None:
        env.fix_kernels()
        self.run, self.plan = run, run.plan
        self.device = device or self.plan.network.device
        self.environment = env.environment(self.device)
        differs = env.difference(self.plan.environment, self.environment)
        if differs and not allow_mixed:
            raise BoomgenError(
                f"this device is not of the planned class: {differs}; run on the planned class, plan anew here, or "
                "accept other bytes with --allow-mixed"
            )
        self.secret, self.index, self.source = run.secret, run.index, self.plan.source.open()
        self.levels = self.plan.chain.levels
        self.denoiser = self._denoiser()
        network, device = self.plan.network, self.device
        self.encode = conditions.text_encoder(self.plan.model, network.dtype, device) if network.template else None
        self.pool = ThreadPoolExecutor(max_workers=3, thread_name_prefix="boomgen")
        away = is_url(self.plan.source.location)  # what takes time there is the way
        self._each = ThreadPoolExecutor(READS, thread_name_prefix="boomgen-read").map if away else map
        self.spent = Clock().spent  # of the shard in hand

    def _denoiser(self) -> Denoiser:
        info, planned = self.plan.model, self.plan.network
        models.check(info)
        coder = Latents(info, getattr(torch, planned.dtype), self.device) if info.latent else PixelCoder(self.device)
        told = tuple(table.to(self.device) for table in self._conditions())
        return Denoiser(
            info, self.levels, self._network(), coder, told, 1.0 if info.tells_guidance else planned.guidance
        )

    def _network(self) -> NetworkCall:
        planned, package = self.plan.network, self.run.package
        if planned.package_sha256 is None:
            return build(self.plan.model, getattr(torch, planned.dtype), planned.guidance).to(self.device)
        return load_compiled(_planned_file(package, planned.package_sha256))

    def _conditions(self) -> conditions.Conditions:
        planned = self.plan.network
        if planned.conditions_sha256 is None:
            return conditions.of_classes(self.plan.model, planned.classes)
        return conditions.load(_planned_file(self.run.conditions, planned.conditions_sha256))

    def make_shard(self, number: int, tick: Tick = lambda rows: None) -> dict[str, Any]:
        """Make and publish one shard; its done record. A failure of the machine raises and leaves nothing behind."""
        start, clock = time.perf_counter(), Clock()
        self.spent = clock.spent
        shard = ShardWriter(self.run.shards, self.run.staging, number)
        try:
            entries = []
            for batch in self._overlapped(number, clock, tick):
                for made in batch:
                    entries.append({**made.entry, "shard": number})
                    if made.members:
                        shard.row(made.entry["key"], made.members)
                shard.touch()
            record = self._record(entries, clock.spent | {"total": time.perf_counter() - start})
            with _heard(shard, tick):
                shard.seal(manifest.table(entries), record)
                self.run.store.publish(shard)
        except BaseException:
            shard.abandon()
            raise
        return record

    def make_batch(self, number: int, batch: int) -> list[Made]:
        """One batch of a shard again, nothing written: the same rows in the same planned shape."""
        rows = self.batches(number)[batch]
        return self._finish(self.load(rows), Clock())

    def batches(self, number: int) -> list[list[PlannedRow]]:
        rows = planned_rows(self.plan, self.index, self.secret, self.plan.positions(number))
        size = self.plan.network.batch_size
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def _overlapped(self, number: int, clock: Clock, tick: Tick) -> Iterator[list[Made]]:
        """Batches in order; the next one is read and the last one encoded while the network runs."""
        batches = self.batches(number)
        loading: Future[list[Loaded]] = self.pool.submit(clock.timed, "read", self.load, batches[0])
        encoding: Future[list[Made]] | None = None
        for following in [*batches[1:], None]:
            loaded = loading.result()
            if following is not None:
                loading = self.pool.submit(clock.timed, "read", self.load, following)
            outputs = clock.timed("infer", self.sample, loaded)
            if encoding is not None:
                yield encoding.result()
            encoding = self.pool.submit(clock.timed, "write", self._encode, loaded, outputs)
            tick(len(loaded))
        if encoding is not None:
            yield encoding.result()

    def _finish(self, loaded: list[Loaded], clock: Clock) -> list[Made]:
        return self._encode(loaded, clock.timed("infer", self.sample, loaded))

    def load(self, rows: Sequence[PlannedRow]) -> list[Loaded]:
        return list(self._each(self._load_row, rows))

    def _load_row(self, row: PlannedRow) -> Loaded:
        loaded = Loaded(row)
        try:
            if row.source.size > images.MAX_BYTES:
                raise RowError("too-large", f"{row.source.size} bytes, at most {images.MAX_BYTES} are read")
            raw = self.source.read(row.source)
            loaded.source_sha256 = hashlib.sha256(_as_bytes(raw)).hexdigest()
            pixels = images.decode(raw, self.plan.model.channels)
            loaded.height, loaded.width = pixels.shape[:2]
            loaded.pixels, loaded.box = images.fitted(pixels, self.plan.model.size, self.plan.job)
        except RowError as err:
            loaded.failure = err
        return loaded

    def sample(self, loaded: list[Loaded]) -> tuple[list[Tensor], Tensor]:
        """Boomerang over one batch, padded to the planned shape: images (B, H, W, C) uint8 of each pass that is kept,
        the last pass last, and which rows are finite in all of them.

        Raises:
            BoomgenError: the batch does not fit in memory; a smaller one would give other bytes, so none is tried.
        """
        try:
            return self._sample(loaded)
        except torch.OutOfMemoryError as err:
            size = self.plan.network.batch_size
            raise BoomgenError(
                f"a batch of {size} does not fit in the memory of {self.device}; plan a new run with --batch-size "
                f"{max(1, size // 2)}"
            ) from err

    @torch.inference_mode()
    def _sample(self, loaded: list[Loaded]) -> tuple[list[Tensor], Tensor]:
        info, job, size = self.plan.model, self.plan.job, self.plan.network.batch_size
        pixels = np.zeros((size, info.size, info.size, info.channels), np.uint8)
        labels = torch.full((size,), NO_LABEL)
        for place, item in enumerate(loaded):
            if item.pixels is not None:
                pixels[place] = item.pixels
            labels[place] = item.row.source.label
        noise_keys = [item.row.noise_key for item in loaded]
        noise_keys += noise_keys[:1] * (size - len(loaded))
        condition = self._captions(loaded) if self.encode else self.denoiser.prepare(labels.to(self.device))
        sampler = self.plan.chain.sampler
        predict: Callable[..., Any] = self.denoiser.predict if sampler == "learned" else self.denoiser.predict_x0
        passes = cascade(
            self.denoiser.encode(torch.from_numpy(pixels)),
            job.cascade,
            self.plan.chain.level,
            self.levels,
            lambda x, k: predict(x, k, condition),
            lambda number: NoiseAhead(self.pool, noise_keys, info.state, self.device, number),
            job.eta,
            sampler_of(sampler, self.plan.chain.snr),
        )
        kept = deque(passes, maxlen=None if job.keep_intermediates else 1)
        finite = torch.stack([x.isfinite().flatten(1).all(1) for x in kept]).all(0).cpu()
        return [self.denoiser.decode(x.nan_to_num(0.0)) for x in kept], finite

    def _captions(self, loaded: list[Loaded]) -> conditions.Conditions:
        """What the prompts of a batch are to the network, in the planned shape."""
        assert self.encode is not None
        template, classes = self.plan.network.template or "", (*self.plan.source.classes, "")  # the last of label -1
        rows = [item.row.source for item in loaded]
        prompts = [conditions.prompt_of(template, classes[row.label], row.caption) for row in rows]
        return self.encode(prompts + [""] * (self.plan.network.batch_size - len(prompts)))[1]

    def _encode(self, loaded: list[Loaded], outputs: tuple[list[Tensor], Tensor]) -> list[Made]:
        kept, finite = outputs
        return [self._made(item, [x[i].numpy() for x in kept], bool(finite[i])) for i, item in enumerate(loaded)]

    def _made(self, item: Loaded, kept: list[Pixels], finite: bool) -> Made:
        failure = item.failure or (None if finite else RowError("nan", "the network's output is not finite"))
        if failure is not None:
            detail = str(failure).partition(": ")[2]
            return Made(self._entry(item) | {"status": manifest.FAILED, "reason": failure.reason, "detail": detail}, {})
        assert item.box is not None  # a row that did not fail was decoded
        *before, pixels = (np.ascontiguousarray(images.unfit(each, item.box)) for each in kept)
        file = images.encode(pixels, self.plan.job.format)
        made = {
            "output_sha256": hashlib.sha256(file).hexdigest(),
            "pixel_sha256": hashlib.sha256(pixels.tobytes()).hexdigest(),
            "height": pixels.shape[0],
            "width": pixels.shape[1],
            "model_width": item.box.width,
            "model_height": item.box.height,
        }
        entry = self._entry(item) | made
        passes = [images.encode(x, self.plan.job.format) for x in before]
        return Made(entry, self._members(entry, file) | dict(zip(pass_fields(self.plan.job), passes, strict=True)))

    def _entry(self, item: Loaded) -> dict[str, Any]:
        plan, row = self.plan, item.row
        level = plan.chain.level
        label, class_name = label_of(plan, row.source.label)
        return {
            "key": row.key,
            "status": manifest.OK,
            "reason": "",
            "detail": "",
            "row": row.position,
            "variant": row.variant,
            "label": label,
            "class_name": class_name,
            "output_sha256": "",
            "pixel_sha256": "",
            "width": -1,
            "height": -1,
            "source_row": row.source_row,
            "source_key": row.source.key,
            "source_label": row.source.label,
            "source_sha256": item.source_sha256,
            "source_width": item.width or -1,
            "source_height": item.height or -1,
            "fit": plan.job.fit,
            "model_width": -1,
            "model_height": -1,
            "scale": plan.job.scale or 1.0,
            "interpolation": plan.job.interpolation or "",
            "degrade": plan.job.degrade or "",
            "cascade": plan.job.cascade,
            "model_sha256": plan.model.sha256,
            "level": level,
            "levels": self.levels.count,
            "t": float(self.levels.t[level]),
            "abar": self.levels.abar(level),
            "sampler": plan.chain.sampler,
            "eta": plan.job.eta,
            "noise_key": row.noise_key.hex(),
            "attempt": 0,
        }

    def _members(self, entry: dict[str, Any], file: bytes) -> dict[str, bytes]:
        """Tar members by extension. The json always has the same keys: loaders infer a type from the first ones."""
        about = {
            "class_name": entry["class_name"],
            "t_boom": f"{entry['level']}/{entry['levels']}",
            "abar": entry["abar"],
        }
        if self.plan.job.linkage == "public":
            about |= {name: entry[name] for name in ("source_key", "source_row", "variant")}
        members = {self.plan.job.format: file, "json": json.dumps(about, sort_keys=True).encode()}
        if entry["label"] != NO_LABEL:
            members["cls"] = str(entry["label"]).encode()
        return members

    def _record(self, entries: list[dict[str, Any]], seconds: dict[str, float]) -> dict[str, Any]:
        """The done record: identity, counts, environment class."""
        failed: dict[str, int] = {}
        for entry in entries:
            if entry["status"] == manifest.FAILED:
                failed[entry["reason"]] = failed.get(entry["reason"], 0) + 1
        return {
            "boomgen": __version__,
            "plan_sha256": self.run.plan_sha256,
            "rows": len(entries),
            "ok": len(entries) - sum(failed.values()),
            "failed": failed,
            "rejected": {},
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
            "environment": self.environment,
        }


class NoiseAhead:
    """The noise of one batch in one pass, each reverse step's drawn in a thread while the network runs the step before.

    The number of the pass is the noise's `draw`.
    """

    def __init__(
        self, pool: ThreadPoolExecutor, noise_keys: list[bytes], shape: tuple[int, ...], device: str, draw: int = 0
    ) -> None:
        self.pool, self.noise_keys, self.shape, self.device, self.draw = pool, noise_keys, shape, device, draw
        self.ahead: tuple[int, Future[Any]] | None = None

    def __call__(self, stream: Stream, step: int) -> Tensor:
        ready = self.ahead[1].result() if self.ahead and (stream, step) == (Stream.STEP, self.ahead[0]) else None
        if ready is None:
            ready = self._draw(stream, step)
        if stream == Stream.STEP and step > 1:
            self.ahead = (step - 1, self.pool.submit(self._draw, Stream.STEP, step - 1))
        return torch.from_numpy(ready).to(self.device)

    def _draw(self, stream: Stream, step: int) -> Any:
        return normal(self.noise_keys, stream, step, self.shape, self.draw)


@contextmanager
def _heard(shard: ShardWriter, tick: Tick) -> Iterator[None]:
    """Show every second that a shard goes on, while it is hashed and put: a large one takes longer than a batch."""
    ended = Event()

    def tell() -> None:
        while not ended.wait(1.0):
            with suppress(OSError):  # it is published, or nobody listens: the block ends soon
                shard.touch()
                tick(0)

    teller = Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        ended.set()
        teller.join()


def _planned_file(path: Path, sha256: str) -> Path:
    if not path.exists() or sha256_file(path) != sha256:
        raise BoomgenError(f"{path} is missing or not the planned one; restore it, or plan a new run")
    return path


def _as_bytes(raw: RawImage) -> bytes:
    return raw if isinstance(raw, bytes) else raw.tobytes()
