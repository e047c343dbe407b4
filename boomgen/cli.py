"""The commands: parse, call, print. Imports no torch at start-up."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from boomgen import __version__, catalog
from boomgen.errors import BoomgenError, Stopped, UsageError
from boomgen.job import Job, Launch
from boomgen.options import Parser, add_flags, given, job_and_launch, read_job_file

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
    return _summary(run.path)


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
    print(_table({**found, "run with": f"boomgen resume {run.path}"}))
    return DONE


def resume(args: argparse.Namespace) -> int:
    from boomgen import drive
    from boomgen.run import RunDir

    _, launch = job_and_launch({"mode": "anonymize", "dataset": "-", **given(args)})
    run = RunDir(args.run)
    drive.resume(run, launch)
    return _summary(run.path)


def status(args: argparse.Namespace) -> int:
    from boomgen.run import RunDir, ranges

    run = RunDir(args.run)
    found = run.status()
    if args.json:
        print(json.dumps({**found._asdict(), "missing": ranges(found.missing), "rows": run.plan.rows}))
    else:
        print(_status_text(run.path))
    return INCOMPLETE_ROWS if found.failed else DONE


def finalise(args: argparse.Namespace) -> int:
    from boomgen.finalise import finalise as close
    from boomgen.run import RunDir

    run = RunDir(args.run)
    close(run)
    return _summary(run.path)


def verify(args: argparse.Namespace) -> int:
    from boomgen.run import RunDir
    from boomgen.verify import remake
    from boomgen.verify import verify as check

    run = RunDir(args.run)
    faults = list(check(run))
    if args.remake and not faults:
        faults += remake(run, args.remake)
    print("\n".join(faults) or f"{run.path} is sound: {run.plan.shards} shards, {run.plan.rows} rows")
    return ERROR if faults else DONE


def logs(args: argparse.Namespace) -> int:
    from boomgen.run import RunDir

    for path in sorted(RunDir(args.run).logs.glob("*.log")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if not args.failed or " done: " not in line:
                print(f"{path.stem}: {line}")
    return DONE


def sweep(args: argparse.Namespace) -> int:
    from boomgen.sweep import sweep as draw

    job, launch = job_and_launch({"mode": "augment", "limit": 10, "t_boom": "0", **given(args)})
    out = Path(launch.out or "sweep.png")
    print(_table(draw(job, launch, args.levels.split(","), out)))
    print(f"picture  {out}")
    return DONE


def list_models(args: argparse.Namespace) -> int:
    rows = [(m.id, f"{m.size}x{m.size}", m.classes or "-", m.licence, m.title) for m in catalog.models().values()]
    print(_columns([("model", "size", "classes", "licence", "what"), *rows]))
    return DONE


def list_datasets(args: argparse.Namespace) -> int:
    rows = [(d.name, d.model, d.t_boom, d.licence, d.title) for d in catalog.datasets().values()]
    print(_columns([("data set", "model", "t_boom", "licence", "what"), *rows]))
    return DONE


def doctor(args: argparse.Namespace) -> int:
    from boomgen.doctor import findings

    found = list(findings(Path(args.out)))
    print("\n".join(f"{'ok  ' if good else 'BAD '} {text}" for good, text in found))
    return DONE if all(good for good, _ in found) else ERROR


def _summary(path: Path) -> int:
    from boomgen.run import RunDir

    print(_status_text(path))
    return INCOMPLETE_ROWS if RunDir(path).status().failed else DONE


def _status_text(path: Path) -> str:
    from boomgen.run import RunDir, ranges

    run = RunDir(path)
    found, levels, level = run.status(), run.plan.chain.levels, run.plan.chain.level
    failed = ", ".join(f"{count} failed ({reason})" for reason, count in sorted(found.failed.items()))
    lines = {
        "rows": f"{found.ok} ok{', ' if failed else ''}{failed} of {run.plan.rows}",
        "t_boom": f"level {level}/{levels.count}, abar {levels.abar(level):.4f}",
        "shards": f"{found.whole} of {found.planned} whole"
        + (f", missing {ranges(found.missing)}" if found.missing else ""),
    }
    if found.finalised:
        lines |= {
            "data set": str(run.dataset),
            "manifest": str(run.manifest),
            "next": f"boomgen verify {path} --remake 5",
        }
    else:
        lines |= {"next": f"boomgen {'resume' if found.missing else 'finalise'} {path}"}
    if run.plan.job.linkage == "private":
        lines |= {"private": f"everything in {path} but dataset/ links outputs to people; share only {run.dataset}"}
    return _table(lines)


def _table(rows: dict[str, Any]) -> str:
    width = max(len(name) for name in rows)
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows.items())


def _columns(rows: Sequence[Sequence[Any]]) -> str:
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(f"{cell!s:{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _parser() -> Parser:
    parser = Parser(prog="boomgen", description="Run a labelled image data set through Boomerang local sampling.")
    parser.add_argument("--version", action="version", version=f"boomgen {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    def command(name: str, run: Command, text: str, example: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text, epilog=f"example: {example}")
        added.set_defaults(call=run)
        added.add_argument("-v", "--verbose", action="store_true", help="show a traceback with an error")
        return added

    def on_run(name: str, run: Command, text: str, more: str = "") -> argparse.ArgumentParser:
        added = command(name, run, text, f"boomgen {name} runs/fashion-sample-anonymize-0.4{more}")
        added.add_argument("run", help="run folder")
        return added

    mode = frozenset({"mode"})
    for name, text in (
        ("anonymize", "make a Boomerang version of every image, links kept private"),
        ("augment", "make Boomerang versions of every image, links public"),
    ):
        example = f"boomgen {name} --dataset fashion-sample --t-boom 0.4"
        add_flags(command(name, anonymize, text, example), Job, Launch, leave_out=mode)
    add_flags(
        on_run("resume", resume, "make what is missing of a run and close it"), Launch, leave_out=frozenset({"out"})
    )
    on_run("status", status, "what a run holds, and how to go on").add_argument("--json", action="store_true")
    checking = on_run("verify", verify, "hash everything again, and make some rows again", " --remake 5")
    checking.add_argument(
        "--remake", type=int, default=0, metavar="N", help="make N random rows again and compare bytes"
    )
    planning = command(
        "plan", plan, "write the plan without running it", "boomgen plan --dataset fashion-sample --calibrate"
    )
    planning.add_argument("--calibrate", action="store_true", help="time a batch here and tell the device-hours")
    add_flags(planning, Job, Launch)
    from_file = command("run", run_file, "run a YAML job; flags win over the file", "boomgen run jobs/quickstart.yaml")
    from_file.add_argument("job", help="YAML file, or the name of a shipped job")
    add_flags(from_file, Job, Launch)
    on_run("logs", logs, "what the workers said", " --failed").add_argument("--failed", action="store_true")
    on_run("finalise", finalise, "close a run whose shards are all whole")
    sweeping = command(
        "sweep", sweep, "a picture of some images at several t_boom", "boomgen sweep --dataset fashion-sample"
    )
    sweeping.add_argument(
        "--levels", default="0.2,0.4,0.6,0.8", help="t_boom values, comma-separated (default %(default)s)"
    )
    add_flags(sweeping, Job, Launch, leave_out=mode | {"t_boom"})
    command("models", list_models, "models that are known by name", "boomgen models")
    command("datasets", list_datasets, "data sets that are known by name", "boomgen datasets")
    checkup = command("doctor", doctor, "check this machine", "boomgen doctor --out runs")
    checkup.add_argument("--out", default=".", help="folder where runs are to be written (default: here)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0 done, 1 error, 2 wrong use, 3 rows failed, 75 stopped but resumable."""
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
        return _complain(f"{err.strerror or err}{f': {err.filename}' if err.filename else ''}", ERROR, verbose)
    except Exception as err:
        return _complain(f"{type(err).__name__}: {err} (a fault of boomgen; -v shows where)", ERROR, verbose)
    except (Stopped, KeyboardInterrupt) as err:
        run = getattr(err, "run", None)
        again = f"what is whole stays, go on with: boomgen resume {run}" if run else "run the same command again"
        return _complain(f"stopped ({str(err) or 'SIGINT'}); {again}", STOPPED, False)


def _complain(text: str, code: int, verbose: bool) -> int:
    if verbose:
        import traceback

        traceback.print_exc()
    print(f"boomgen: {' '.join(text.split())}", file=sys.stderr)
    return code
