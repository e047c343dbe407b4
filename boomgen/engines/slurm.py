"""SLURM: an array of workers, and a job that closes the run after it. The scripts are pure text, from `slurm/`.

An element makes its part of the plan's shards and leaves alone what is whole. So nothing is remembered between
submissions, and parts of another number, elements that run again or two arrays on one run are all right.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from boomgen import catalog
from boomgen.errors import BoomgenError, UsageError

if TYPE_CHECKING:
    from boomgen.run import RunDir

MAX_ARRAY_SIZE = 1001
"""SLURM's own default: an array's ids are less than this."""

WARNING = 120
"""Seconds before the time limit, as in the template: a worker drops its batch then, and is requeued."""

AGAIN = "mend that and submit again with boomgen slurm"

_NAMES = r"[\w.+@-]+(,[\w.+@-]+)*"
_FORMS = {
    "time": (
        r"\d+|\d+:\d\d(:\d\d)?|\d+-\d+(:\d\d){0,2}",
        "minutes, hours:minutes:seconds or days-hours:minutes:seconds",
    ),
    "partition": (_NAMES, "a partition's name, or several with commas between them"),
    "account": (_NAMES, "an account's name"),
    "gres": (r"[\w.:=+/-]+(,[\w.:=+/-]+)*", "devices such as gpu:1 or gpu:a100:1, or none"),
    "mem": (r"\d+[KMGT]?", "a number and K, M, G or T, such as 16G"),
    "sbatch": (r"--[a-z][a-z-]*(=[!-~]+)?( --[a-z][a-z-]*(=[!-~]+)?)*", "--NAME=VALUE, with a space before the next"),
}
"""What an option looks like, so that it is refused here and not by a job that was waited for."""


_VARIABLES = {"time": "TIMELIMIT", "mem": "MEM_PER_NODE"}
_AGAINST = {f"SBATCH_{name}" for name in ("ARRAY_INX", "ERROR", "MEM_PER_CPU", "MEM_PER_GPU", "NO_REQUEUE", "WAIT")}
"""sbatch heeds its variables more than a script: those not called like their option, and those that undo others."""


class SlurmOptions(BaseModel):
    """What is asked of SLURM. What no option says may be said by sbatch's own variables, such as SBATCH_CONSTRAINT."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    array_size: int = Field(64, description="elements of the array, at most one for each shard", ge=1)
    time: str | None = Field(None, description="time limit; requeued when it is reached (default: the partition's)")
    partition: str | None = Field(None, description="partition, or several")
    account: str | None = Field(None, description="account that pays")
    gres: str | None = Field(None, description="devices of each element (default: gpu:1 where the plan is for GPUs)")
    cpus_per_task: int = Field(4, description="cores of each element; a GPU's worker reads and encodes on 3", ge=1)
    mem: str = Field("16G", description="memory of each element")
    sbatch: str | None = Field(None, description="more of sbatch's own, as --sbatch='--exclude=n17 --nice=100'")
    container: str | None = Field(
        None, description="Apptainer image with boomgen in it; APPTAINER_BIND says what it sees"
    )

    @field_validator(*_FORMS)
    @classmethod
    def _of_its_form(cls, value: str | None, info: ValidationInfo) -> str | None:
        form, expected = _FORMS[str(info.field_name)]
        if value is not None and not re.fullmatch(form, value, re.ASCII):
            raise ValueError(f"expected {expected}")
        return value

    @field_validator("time")
    @classmethod
    def _beyond_the_warning(cls, value: str | None) -> str | None:
        if value is not None and 0 < _seconds(value) <= WARNING:  # 0 is no limit
            raise ValueError(f"expected more than {WARNING // 60} minutes, since so long before it workers are warned")
        return value

    @field_validator("container")
    @classmethod
    def _there(cls, value: str | None) -> str | None:
        if value is None or "://" in value:
            return value
        if not value or not Path(value).exists():
            raise ValueError("no such image; expected a file, or an address such as docker://owner/name")
        return str(Path(value).resolve())


def _seconds(limit: str) -> int:
    """A time limit, as sbatch reads it."""
    days, dash, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    hours = parts if dash or len(parts) == 3 else [0, *parts]
    return sum(part * unit for part, unit in zip([int(days or 0), *hours], (86400, 3600, 60, 1), strict=False))


class Scripts(NamedTuple):
    """Texts for sbatch."""

    arrays: list[str]
    closing: str


def scripts(
    run: Path, shards: int, missing: Sequence[int], device: str, options: SlurmOptions, largest: int = MAX_ARRAY_SIZE
) -> Scripts:
    """The arrays that make what is `missing` of a plan's shards on `device` (cpu or cuda), and the job that closes it.

    `largest`: the cluster's MaxArraySize; more elements than that are several arrays.

    Raises:
        UsageError: a name with a line break, or with something else that no script should hold.
    """
    from boomgen.run import ranges

    run, parts = run.resolve(), min(options.array_size, shards)
    ids = sorted({shard % parts for shard in missing})
    gres = options.gres or ("gpu:1" if device == "cuda" else None)
    boomgen = _command(options.container, device)
    work = f'{boomgen} work {_quoted(run)} --part "$part/{parts}" --device {device}'
    start = _template("container.sh").format(command=work).rstrip() if options.container else f"exec {work}"
    arrays = []
    for offset in range(0, parts, largest):
        if chosen := [number - offset for number in ids if offset <= number < offset + largest]:
            asked = _directives(run, "logs/slurm-%A_%a.log", options, array=ranges(chosen), gres=gres)
            arrays.append(
                _template("array.sbatch").format(
                    directives=asked, parts=parts, offset=offset, warning=WARNING, start=start
                )
            )
    asked = _directives(run, "finalise-%j.log", options.model_copy(update={"cpus_per_task": 1}))
    return Scripts(
        arrays, _template("finalise.sbatch").format(directives=asked, command=f"{boomgen} finalise {_quoted(run)}")
    )


def _template(name: str) -> str:
    return (catalog.shipped("slurm") / name).read_text(encoding="utf-8")


def _command(container: str | None, device: str) -> str:
    """This very boomgen, or the one in an image."""
    if container is None:
        return f"{_quoted(sys.executable)} -m boomgen"
    return f"apptainer exec {'--nv ' if device == 'cuda' else ''}{_quoted(container)} boomgen"


def _directives(run: Path, log: str, options: SlurmOptions, **more: str | None) -> str:
    asked: dict[str, Any] = {
        "job-name": f"boomgen-{re.sub(r'[^a-zA-Z0-9_.-]', '_', run.name)}",
        **more,
        "output": _quoted(f"{str(run).replace('%', '%%')}/{log}"),
        "ntasks": 1,
        "cpus-per-task": options.cpus_per_task,
        "mem": options.mem,
        "time": options.time,
        "partition": options.partition,
        "account": options.account,
    }
    lines = [f"--{name}={value}" for name, value in asked.items() if value is not None]
    return "\n".join(f"#SBATCH {line}" for line in lines + (options.sbatch or "").split())


def _quoted(value: Path | str) -> str:
    text = str(value)
    if not text.isprintable() or "\\" in text:  # SLURM drops backslashes from the name of a log
        raise UsageError(f"{text!r} holds a line break, backslash or control character; expected a plainer name")
    return shlex.quote(text)


def offer(run: "RunDir", options: SlurmOptions, submitted: bool) -> str:
    """What `boomgen slurm` prints: the scripts for what is missing, or the jobs that they became."""
    found = run.status()
    if found.finalised and not found.missing:
        return f"# {run.path} is whole and closed: there is nothing to submit"
    largest = max_array_size() if submitted else MAX_ARRAY_SIZE
    texts = scripts(run.path, found.planned, found.missing, run.plan.network.device, options, largest)
    run.logs.mkdir(exist_ok=True)  # SLURM makes no folders: without this one, a job fails and says nothing
    if submitted:
        return submit(texts, run.path)
    return "\n".join((*texts.arrays, texts.closing)).rstrip()


def submit(texts: Scripts, run: Path) -> str:
    """Submit the arrays, and the job that closes the run when all of them have ended, in whatever way.

    Raises:
        BoomgenError: sbatch refused an array, and those before it are taken back; or the closing job alone, as a
            partition for GPU jobs does: then the arrays stay.
    """
    jobs: list[str] = []
    try:
        for text in texts.arrays:
            jobs.append(_sbatch(text))
    except BoomgenError:
        if jobs:
            _ask("scancel", *jobs)
        raise
    closing = _submit_after(jobs, texts.closing, run) if jobs else _sbatch(texts.closing)
    return "\n".join(
        [
            *(f"array     {job}" for job in jobs),
            f"finalise  {closing}",
            f"watch     boomgen status {shlex.quote(str(run))} --watch",
        ]
    )


def _submit_after(jobs: Sequence[str], closing: str, run: Path) -> str:
    after = f"--dependency=afterany:{':'.join(jobs)}", "--kill-on-invalid-dep=yes"
    these, it = (f"array {jobs[0]} is", "it has") if len(jobs) == 1 else (f"arrays {', '.join(jobs)} are", "they have")
    try:
        return _sbatch(closing, *after, hint=f"when {it} ended: boomgen finalise {shlex.quote(str(run))}")
    except BoomgenError as err:
        raise BoomgenError(f"{these} submitted, but not the job that closes the run: {err}") from err


def _sbatch(text: str, *options: str, hint: str = AGAIN) -> str:
    """The number of the job that a script became. What it says is what is asked, whatever variables say."""
    names = re.findall(r"^#SBATCH --([a-z-]+)", text, re.MULTILINE)
    said = {f"SBATCH_{_VARIABLES.get(name, name.upper().replace('-', '_'))}" for name in names}
    environ = {name: value for name, value in os.environ.items() if name not in said | _AGAINST}
    return _ask("sbatch", "--parsable", *options, text=text, hint=hint, environ=environ).partition(";")[0]


def max_array_size() -> int:
    """The cluster's own.

    Raises:
        BoomgenError: it takes no arrays.
    """
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", _ask("scontrol", "show", "config"), re.MULTILINE)
    if found and int(found[1]) < 2:
        raise BoomgenError(f"this cluster takes no arrays (MaxArraySize {found[1]}); take slurm/accelerate.sbatch")
    return int(found[1]) if found else MAX_ARRAY_SIZE


def _ask(*command: str, text: str = "", hint: str = AGAIN, environ: dict[str, str] | None = None) -> str:
    try:
        done = subprocess.run(command, input=text, env=environ, capture_output=True, text=True, check=False)
    except OSError as err:
        raise BoomgenError(f"{command[0]}: {err.strerror}; expected a machine where SLURM's commands are") from err
    if done.returncode:
        why = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise BoomgenError(f"{why}; {hint}")
    return done.stdout.strip()


def requeue(progress: bool) -> bool:
    """Have SLURM run this element of an array again, whose time was about to end. False: it is none, or SLURM refused.

    SLURM then sends TERM to all that runs in the job, which has nothing more to do: from here on signals are ignored.

    `progress`: whether a shard became whole in this start. A first one may have waited for a cold cache; where a later
    one makes none either, the time limit is shorter than a shard, and the element would be requeued for ever.

    Raises:
        BoomgenError: no progress, and this was not the first start.
    """
    array, element = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    restarts = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    if array and restarts and not progress:
        raise BoomgenError(
            f"no shard became whole in start {restarts + 1} of this element; give a longer --time, or plan with a "
            "smaller --shard-size"
        )
    if not array or not element:
        return False
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    try:
        _ask("scontrol", "requeue", f"{array}_{element}")
    except BoomgenError as err:
        print(f"not requeued: {err}", file=sys.stderr, flush=True)
        return False
    return True
