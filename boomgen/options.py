"""Command-line flags and YAML keys, derived from Job and Launch: each option is declared there, once."""

import argparse
import functools
import types
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from boomgen import catalog
from boomgen.errors import UsageError
from boomgen.job import Job, Launch, build, split_options
from boomgen.untrusted import read_yaml


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are UsageErrors, one line each."""

    def __init__(self, **options: Any) -> None:
        layout = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=28)
        super().__init__(**{"formatter_class": layout} | options)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def add_flags(
    parser: argparse.ArgumentParser, *models: type[BaseModel], leave_out: frozenset[str] = frozenset()
) -> None:
    """One flag per field. Only given flags appear in the parsed namespace, so that they can win over a YAML file."""
    for model in models:
        group = parser.add_argument_group("what is made" if model is Job else "where it runs")
        for name, field in model.model_fields.items():
            if name not in leave_out:
                _add_flag(group, name, field)


def _add_flag(group: Any, name: str, field: FieldInfo) -> None:
    flag = "--" + name.replace("_", "-")
    text = (field.description or "").replace("%", "%%")
    if field.annotation is bool:
        group.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=text)
        return
    choices = _choices(field.annotation)
    extra = field.json_schema_extra
    bare = {"nargs": "?", "const": extra["bare"]} if isinstance(extra, dict) and "bare" in extra else {}
    default = "" if field.default is None or field.is_required() else f" (default {field.default})"
    group.add_argument(
        flag,
        default=argparse.SUPPRESS,
        choices=choices,
        metavar=None if choices else name.upper(),
        help=text + default,
        **bare,
    )


def _choices(annotation: Any) -> tuple[str, ...] | None:
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    if get_origin(annotation) in (Union, types.UnionType):
        return next((found for part in get_args(annotation) if (found := _choices(part))), None)
    return None


def given(namespace: argparse.Namespace, *models: type[BaseModel]) -> dict[str, Any]:
    """The options of these models, or of Job and Launch, that the user typed."""
    known = {name for model in models or (Job, Launch) for name in model.model_fields}
    return {name: value for name, value in vars(namespace).items() if name in known}


def job_and_launch(values: dict[str, Any]) -> tuple[Job, Launch]:
    """The two checked models of mixed options."""
    job, launch = split_options(values)
    return build(Job, job), build(Launch, launch)


def read_job_file(path: Path) -> dict[str, Any]:
    """The options in a YAML job.

    Raises:
        UsageError: unreadable, or not a mapping of option names to values.
    """
    try:
        found = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        why = getattr(err, "strerror", None) or " ".join(str(err).split())
        known = [job.stem for job in catalog.shipped("jobs").glob("*.yaml")]
        missing = isinstance(err, FileNotFoundError)
        others = f", or a shipped job such as quickstart{catalog.suggest(path.stem, known)}" if missing else ""
        raise UsageError(f"job {path}: {why}; expected a YAML file of options{others}") from err
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise UsageError(f"job {path} is no mapping; expected lines such as 't_boom: 0.4'")
    return {name.replace("-", "_"): value for name, value in found.items()}
