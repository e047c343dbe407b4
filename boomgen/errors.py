"""What can go wrong, in three kinds. Each message is one line: what was got, what was expected, what to do."""


class BoomgenError(Exception):
    """The command cannot go on (exit code 1)."""


class UsageError(BoomgenError):
    """The user asked for something that cannot be (exit code 2)."""


class RowError(BoomgenError):
    """This row would fail on every machine, so it ends as a failed row of a good shard.

    `reason` is a short stable word that status and manifest count by: undecodable, too-large, nan.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


class ShardError(BoomgenError):
    """This shard failed for a cause that may pass (a disk, a device); the shard is tried again."""
