"""The commands: parse, call, print. Imports no torch at start-up."""

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import shtab

from boomgen import __version__, catalog
from boomgen.engines.slurm import SlurmOptions, offer
from boomgen.errors import BoomgenError, Stopped, UsageError
from boomgen.job import ENHANCE, Job, Launch, build
from boomgen.options import Parser, add_flags, given, job_and_launch, read_job_file
from boomgen.tell import columns, log_lines, part_text, show_status, status_text, table
from boomgen.untrusted import printable

if TYPE_CHECKING:
    from boomgen.run import RunDir

DONE, ERROR, USAGE, INCOMPLETE_ROWS, STOPPED = 0, 1, 2, 3, 75
Command = Callable[[argparse.Namespace], int]


def anonymize(args: argparse.Namespace) -> int:
    return _run_job({"mode": args.command, **given(args)})


def run_file(args: argparse.Namespace) -> int:
    path = Path(args.job)
    if not path.exists() and (catalog.shipped("jobs") / f"{args.job}.yaml").exists():
        path = catalog.shipped("jobs") / f"{args.job}.yaml"
    return _run_job({**read_job_file(path), **given(args)})


def _run_job(values: dict[str, Any]) -> int:
    from boomgen import drive

    run = drive.run(*job_and_launch(values))
    return _summary(run) if drive.is_first() else DONE


def plan(args: argparse.Namespace) -> int:
    from boomgen import env
    from boomgen.calibrate import calibrate
    from boomgen.plan import describe
    from boomgen.prepare import prepare

    job, launch = job_and_launch({"mode": "anonymize", **given(args)})
    env.choose_device(launch)
    run = prepare(job, launch)
    found = describe(run.plan)
    if args.calibrate:
        found |= calibrate(run)
    _say(table({**found, "run with": f"boomgen resume {run.path}"}))
    return DONE


def fetch(args: argparse.Namespace) -> int:
    from boomgen import prepare

    found = prepare.fetch(*job_and_launch({"mode": "anonymize", **given(args)}))
    _say(table({**found, "run with": "HF_HUB_OFFLINE=1 boomgen anonymize and the same options, without network"}))
    return DONE


def resume(args: argparse.Namespace) -> int:
    from boomgen import drive
    from boomgen.run import RunDir

    _, launch = job_and_launch({"mode": "anonymize", "dataset": "-", **given(args)})
    run = RunDir(args.run)
    drive.resume(run, launch)
    return _summary(run) if drive.is_first() else DONE


def work(args: argparse.Namespace) -> int:
    from boomgen import drive
    from boomgen.engines import ranks
    from boomgen.run import RunDir, numbers

    _, launch = job_and_launch({"mode": "anonymize", "dataset": "-", **given(args)})
    run = RunDir(args.run)
    shards = numbers(args.shards, run.plan.shards) if args.shards else None
    part = ranks.part(args.part) if args.part else None
    chosen = drive.work(run, launch, part, shards)
    if part or shards is not None:
        _say(part_text(run, args.part, args.shards, chosen))
    elif drive.is_first():
        _say(status_text(run))
    return DONE


def status(args: argparse.Namespace) -> int:
    from boomgen.run import RunDir

    return INCOMPLETE_ROWS if show_status(RunDir(args.run), args.json, args.watch).failed else DONE


def finalise(args: argparse.Namespace) -> int:
    from boomgen.drive import close
    from boomgen.run import RunDir

    run = RunDir(args.run)
    close(run)
    return _summary(run)


def slurm(args: argparse.Namespace) -> int:
    from boomgen.run import RunDir

    print(offer(RunDir(args.run), build(SlurmOptions, given(args, SlurmOptions)), args.submit))
    return DONE


def verify(args: argparse.Namespace) -> int:
    from boomgen.run import RunDir
    from boomgen.verify import remake
    from boomgen.verify import verify as check

    run = RunDir(args.run)
    if args.remake < 0:
        raise UsageError(f"--remake {args.remake}; expected a number of rows, 0 or more")
    faults = list(check(run))
    if args.remake and not faults:
        faults += remake(run, args.remake)
    again = f", {min(args.remake, run.plan.rows)} of them made again" if args.remake else ""
    _say("\n".join(faults) or f"{run.path} is sound: {run.plan.shards} shards, {run.plan.rows} rows{again}")
    return ERROR if faults else DONE


def logs(args: argparse.Namespace) -> int:
    from boomgen.run import RunDir

    for line in log_lines(RunDir(args.run), args.failed):
        _say(line)
    return DONE


def sweep(args: argparse.Namespace) -> int:
    from boomgen.sweep import sweep as draw

    job, launch = job_and_launch({"mode": "augment", "limit": 10, "t_boom": "0", **given(args)})
    out = Path(launch.out or "sweep.png")
    _say(table(draw(job, launch, args.levels.split(","), out)))
    _say(f"picture  {out}")
    return DONE


def models(args: argparse.Namespace) -> int:
    if (args.action == "list") != (args.what is None):
        raise UsageError(
            f"models {args.action} {args.what or ''}".rstrip() + "; expected list, show MODEL or import FILE"
        )
    if args.action != "import" and (args.out or args.size):
        raise UsageError(f"--out and --size with models {args.action}; they are for models import")
    return {"list": list_models, "show": show_model, "import": import_model}[args.action](args)


def import_model(args: argparse.Namespace) -> int:
    from boomgen.models.checkpoints import import_checkpoint
    from boomgen.models.describe import described

    out = Path(args.out or Path(args.what).stem)
    import_checkpoint(Path(args.what), out, args.size)
    _say(table({"folder": out, **described(str(out.resolve()))}))
    return DONE


def show_model(args: argparse.Namespace) -> int:
    from boomgen.models.describe import described

    _say(table(described(args.what)))
    return DONE


def list_models(args: argparse.Namespace) -> int:
    rows = [
        (m.id, f"{m.size}x{m.size}", m.classes or "-", m.levels or "-", m.noise_line, m.licence, m.title)
        for m in catalog.models().values()
    ]
    _say("noise: its power 1 - abar at t_boom 0.1, 0.2, ..., 0.9")
    _say(columns([("model", "size", "classes", "levels", "noise", "licence", "what"), *rows]))
    return DONE


def list_datasets(args: argparse.Namespace) -> int:
    if args.name is None:
        rows = [(d.name, d.model, d.t_boom, d.licence, d.title) for d in catalog.datasets().values()]
        _say(columns([("data set", "model", "t_boom", "licence", "what"), *rows]))
    elif found := catalog.dataset(args.name):
        _say(table(catalog.described(found)))
    else:
        raise UsageError(
            f"no data set {args.name!r}{catalog.suggest(args.name, catalog.datasets())}; see boomgen datasets"
        )
    return DONE


def completion(args: argparse.Namespace) -> int:
    print(shtab.complete(_parser(), args.shell))
    return DONE


def doctor(args: argparse.Namespace) -> int:
    from boomgen.doctor import findings

    found = list(findings(Path(args.out)))
    _say("\n".join(f"{'ok  ' if good else 'BAD '} {seen}\n     {meaning}" for good, seen, meaning in found))
    return DONE if all(finding.good for finding in found) else ERROR


def _summary(run: "RunDir") -> int:
    """Tell of a closed run. Of ranks, none may fail for a row's sake: its launcher would end or restart the others."""
    from boomgen.drive import is_alone

    _say(status_text(run))
    return INCOMPLETE_ROWS if run.status().failed and is_alone() else DONE


def _say(text: str) -> None:
    print(printable(text))


FIRST = "runs/first"
MADE = f"--dataset fashion-sample --limit 16 --out {FIRST}"


def _parser() -> Parser:
    parser = Parser(prog="boomgen")
    parser.add_argument("--version", action="version", version=f"boomgen {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, title="all commands", metavar="COMMAND")

    def command(name: str, run: Command, text: str, *examples: str) -> Parser:
        shown = "examples:\n" + "\n".join(f"  boomgen {name} {example}".rstrip() for example in examples)
        added: Parser = commands.add_parser(name, help=text, description=text, epilog=shown)
        added.set_defaults(call=run)
        added.add_argument("-v", "--verbose", action="store_true", help="show a traceback with an error")
        return added

    def on_run(name: str, run: Command, text: str, *more: str) -> Parser:
        added = command(name, run, text, *(f"{FIRST} {options}".rstrip() for options in more))
        added.add_argument("run", help="run folder").complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        return added

    _first_hour(command, on_run)
    _after_that(command, on_run)
    what = "Run a labelled image data set through Boomerang local sampling."
    first = [(made.description, str(made.epilog).splitlines()[1]) for made in list(commands.choices.values())[:5]]
    parser.description = f"{what}\n\nthe first hour:" + "".join(f"\n  {text}:\n  {example}" for text, example in first)
    return parser


def _first_hour(command: Callable[..., Parser], on_run: Callable[..., Parser]) -> None:
    checkup = command("doctor", doctor, "check this machine", "", "--out runs")
    checkup.add_argument("--out", default=".", help="folder where runs are to be written (default: here)")
    examples = ("--dataset fashion-sample --limit 4", "--dataset fashion-sample --limit 4 --levels 0.2,0.5 --out 2.png")
    sweeping = command("sweep", sweep, "a picture of some images at several t_boom", *examples)
    levels = "t_boom values, comma-separated (default %(default)s)"
    sweeping.add_argument("--levels", default="0.2,0.4,0.6,0.8", help=levels)
    drawing = "picture to write (default sweep.png)"
    sweeping.add_argument("--out", default=argparse.SUPPRESS, help=drawing).complete = shtab.FILE  # type: ignore[attr-defined]
    written = {"variants", "linkage", "labels", "format", "shard_size", "compile", *ENHANCE}
    launched = {"out", "gpus", "workers", "engine", "ray_address", "secret_file", "allow_mixed"}
    add_flags(sweeping, Job, Launch, leave_out=frozenset({"mode", "t_boom"} | written | launched))
    examples = (MADE, "--dataset fashion-sample --limit 16 --t-boom 20/50 --device cpu --workers 1 --out runs/second")
    making = command("anonymize", anonymize, "make a Boomerang version of every image, links kept private", *examples)
    add_flags(making, Job, Launch, leave_out=frozenset({"mode"}))
    telling = on_run("status", status, "how far a run is, and how to go on", "", "--watch")
    telling.add_argument("--json", action="store_true", help="for programs")
    telling.add_argument("--watch", action="store_true", help="look again every 2 s, until all shards are whole")
    checking = on_run("verify", verify, "hash everything again, and make some rows again", "", "--remake 5")
    remake = "make N random rows again and compare bytes"
    checking.add_argument("--remake", type=int, default=0, metavar="N", help=remake)


def _after_that(command: Callable[..., Parser], on_run: Callable[..., Parser]) -> None:
    examples = ("--dataset fashion-sample --limit 8 --variants 2", f"{MADE}-augmented --t-boom 0.2 --seed 7")
    making = command("augment", anonymize, "make Boomerang versions of every image, links public", *examples)
    add_flags(making, Job, Launch, leave_out=frozenset({"mode"}))
    half = "--dataset fashion-sample --scale 2 --degrade"
    examples = (f"{half} --limit 8", f"{half} area --cascade 3 --t-boom 0.2 --limit 8 --out runs/enhanced")
    making = command("enhance", anonymize, "make better versions of low-resolution images, links public", *examples)
    add_flags(making, Job, Launch, leave_out=frozenset({"mode"}))
    planned = frozenset({"out", "private_dir", "secret_file", "allow_pickle"})
    again = on_run("resume", resume, "make what is missing of a run and close it", "", "--device cpu --workers 2")
    add_flags(again, Launch, leave_out=planned)
    text = "one worker, of a cluster's job: makes shards, closes nothing"
    working = on_run("work", work, text, "--part 0/4", "--shards 0 --device cpu")
    working.add_argument("--part", metavar="I/N", help="only every Nth shard, from the Ith (counted from 0)")
    working.add_argument("--shards", metavar="LIST", help="only these, as 0-3,7")
    add_flags(working, Launch, leave_out=planned | {"gpus", "workers", "engine", "ray_address", "patience"})
    logs_of = on_run("logs", logs, "what the workers said", "", "--failed")
    logs_of.add_argument(
        "--failed", action="store_true", help="only what failed: each row, and each attempt at a shard"
    )
    examples = ("--dataset fashion-sample --calibrate", "--dataset fashion-sample --t-boom 0.2 --out runs/planned")
    planning = command("plan", plan, "write the plan without running it", *examples)
    planning.add_argument("--calibrate", action="store_true", help="time a batch here and tell the device-hours")
    add_flags(planning, Job, Launch, leave_out=frozenset({"workers", "engine", "ray_address", "allow_mixed"}))
    examples = ("--dataset fashion-sample", "--dataset fashion-sample --model fashion-patched-ddpm --t-boom 0.2")
    fetching = command("fetch", fetch, "get model and data set from the Hub, for a run without network", *examples)
    add_flags(fetching, Job, Launch, leave_out=frozenset({"mode"}))
    examples = ("quickstart --limit 16 --out runs/quick", "quickstart --t-boom 0.2 --limit 16 --out runs/near")
    from_file = command("run", run_file, "run a YAML job; flags win over the file", *examples)
    from_file.add_argument("job", help="YAML file, or the name of a shipped job").complete = shtab.FILE  # type: ignore[attr-defined]
    add_flags(from_file, Job, Launch)
    on_run("finalise", finalise, "close a run whose shards are all whole", "", f"&& boomgen verify {FIRST}")
    arraying = on_run(
        "slurm", slurm, "an array of SLURM jobs that makes what is missing of a run", "", "--time 4:00:00"
    )
    arraying.add_argument("--submit", action="store_true", help="give it to sbatch instead of printing it")
    add_flags(arraying, SlurmOptions)
    listing = command("datasets", list_datasets, "data sets that are known by name", "", "imagenet-200")
    listing.add_argument("name", nargs="?", help="all that is known of this one (a name, or your own YAML file)")
    what = "models that are known by name; show: what one is; import: one from an original checkpoint"
    about = command("models", models, what, "", "show fashion-patched-ddpm")
    about.add_argument("action", nargs="?", default="list", choices=["list", "show", "import"])
    known = "preset, folder or hub id to show; checkpoint of pytorch_diffusion, FastDPM or guided-diffusion to import"
    about.add_argument("what", nargs="?", help=known).complete = shtab.FILE  # type: ignore[attr-defined]
    folder = "folder that import writes (default: the file's name, without its ending)"
    about.add_argument("--out", help=folder).complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    about.add_argument("--size", type=int, metavar="PIXELS", help="side of its images (default: that of the originals)")
    completing = command("completion", completion, "a script that completes commands in your shell", "bash", "zsh")
    completing.add_argument("shell", choices=["bash", "zsh"])


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0 done, 1 error, 2 wrong use, 3 rows failed, 75 stopped but resumable."""
    if argv is None:
        _speak_utf8()
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal cannot show stops nothing
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    verbose = "-v" in (argv or sys.argv) or "--verbose" in (argv or sys.argv)
    try:
        args = _parser().parse_args(argv)
        return int(args.call(args))
    except UsageError as err:
        return _complain(str(err), USAGE, verbose)
    except BoomgenError as err:
        return _complain(str(err), ERROR, verbose)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ERROR
    except OSError as err:
        where = f": {err.filename}" if err.filename else ""
        return _complain(f"{err.strerror or err}{where}; mend that and give the same command again", ERROR, verbose)
    except Exception as err:
        return _complain(f"{type(err).__name__}: {err} (a fault of boomgen; -v shows where)", ERROR, verbose)
    except (Stopped, KeyboardInterrupt) as err:
        run = getattr(err, "run", None)
        again = f"what is whole stays, go on with: boomgen resume {run}" if run else "run the same command again"
        again = "requeued, what is whole stays" if getattr(err, "requeued", False) else again
        return _complain(f"stopped ({str(err) or 'SIGINT'}); {again}", STOPPED, False)


def _speak_utf8() -> None:
    """Start again where the locale reads file names otherwise: keys, and with them the noise, would differ."""
    if sys.getfilesystemencoding() != "utf-8":
        os.environ["PYTHONUTF8"] = "1"  # for the workers
        os.execv(sys.executable, [sys.executable, "-X", "utf8", "-m", "boomgen", *sys.argv[1:]])


def _complain(text: str, code: int, verbose: bool) -> int:
    if verbose:
        import traceback

        traceback.print_exc()
    print(f"boomgen: {printable(' '.join(text.split()))}", file=sys.stderr)
    return code
