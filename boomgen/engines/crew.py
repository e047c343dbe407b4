"""What engines with a driver share: who takes the next shard, who is given up, and who is started again."""

import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from boomgen.engines.handout import Event, HandOut
from boomgen.errors import BoomgenError
from boomgen.heartbeat import forget
from boomgen.run import RunDir


class Hand(Protocol):
    """One worker, as its driver sees it."""

    number: int
    device: str
    started: bool
    """Whether it has been of use, so that its death is no failure to start."""

    @property
    def idle(self) -> bool:
        """Whether it is ready for a shard."""

    def give(self, shard: int) -> None:
        """Have it make one."""


H = TypeVar("H", bound=Hand)


class Crew(ABC, Generic[H]):
    """The workers of a run."""

    def __init__(self, run: RunDir) -> None:
        self.run_dir = run
        self.hands: dict[int, H] = {}

    @abstractmethod
    def start(self, number: int) -> H:
        """Begin a worker."""

    @abstractmethod
    def dismiss(self, hand: H) -> None:
        """End a worker where it stands."""

    def hire(self, number: int) -> None:
        """Begin a worker, who is to be handed shards."""
        self.hands[number] = self.start(number)

    def wake(self, handout: HandOut) -> list[Event]:
        """Whoever is idle takes the next shard, also one that came back; whoever is hung is given up."""
        now = time.monotonic()
        for hand in self.hands.values():
            if hand.idle and (shard := handout.take(hand.number, now)) is not None:
                hand.give(shard)
        late = [self.hands[number] for number in handout.overdue(now)]
        return [event for hand in late for event in self.lost(hand, handout, "hung and was killed")]

    def lost(self, hand: H, handout: HandOut, what: str) -> list[Event]:
        """A worker has gone, or has to: its shard is for somebody else to try, and another worker takes its place.

        Raises:
            BoomgenError: it was the last that can start.
        """
        self.leave(hand)
        log = self.log(hand.number)
        if not handout.again(hand.number, hand.started):
            if handout.open and not self.hands:
                raise BoomgenError(f"workers die while starting ({what}); see {log}")
            return [Event("gone", -1, f"worker {hand.number} ({hand.device}) dies while starting; see {log}")]
        cause = f"worker {hand.number} {what}"
        shard = handout.failed(hand.number, cause)
        if handout.open:
            self.hire(hand.number)
        return [] if shard is None else [Event("lost", shard, cause)]

    def leave(self, hand: H) -> None:
        """A worker is handed nothing any more, and says nothing."""
        self.dismiss(hand)
        del self.hands[hand.number]
        forget(self.run_dir, hand.number)

    def log(self, number: int) -> Path:
        """Where a worker writes."""
        return self.run_dir.logs / f"worker-{number:03d}.log"
