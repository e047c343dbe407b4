"""What can go wrong. Each message is one line: what was got, what was expected, what to do.

Any other exception in a worker is transient: it fails the shard, which is tried again.
"""

from pathlib import Path


class BoomgenError(Exception):
    """The command cannot go on (exit code 1)."""


class UsageError(BoomgenError):
    """The user asked for something that cannot be (exit code 2)."""


class Stopped(BaseException):
    """A signal asked for the end (exit code 75); what is published stays. `run` is its folder, once it is planned;
    `requeued`: a scheduler goes on by itself."""

    run: Path | None = None
    requeued = False


class RowError(BoomgenError):
    """This row would fail on every machine, so it ends as a failed row of a good shard.

    `reason` is a short stable word that status and manifest count by: undecodable, too-large, nan.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
