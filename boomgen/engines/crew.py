"""What engines with a driver share: who takes the next shard, who is given up, and who is started again."""

import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from boomgen.engines.handout import ATTEMPTS, Event, HandOut
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
    """The workers of a run. `patience`: as HandOut has it."""

    def __init__(self, run: RunDir, patience: float | None) -> None:
        self.run_dir, self.patience = run, patience
        self.hands: dict[int, H] = {}
        self.handout = HandOut(())

    @abstractmethod
    def start(self, number: int) -> H:
        """Begin a worker."""

    @abstractmethod
    def dismiss(self, hand: H) -> None:
        """End a worker where it stands."""

    def hire(self, number: int) -> None:
        """Begin a worker, who is to be handed shards."""
        self.hands[number] = self.start(number)

    def wake(self) -> list[Event]:
        """Whoever is idle takes the next shard, also one that came back; whoever is hung is given up."""
        now = time.monotonic()
        for hand in self.hands.values():
            if hand.idle and (shard := self.handout.take(hand.number, now)) is not None:
                hand.give(shard)
        late = [self.hands[number] for number in self.handout.overdue(now)]
        events = [event for hand in late for event in self.lost(hand, "hung and was killed")]
        while self.handout.resting:
            number = self.handout.resting.pop()
            text = f"worker {number} failed at {ATTEMPTS} shards in a row and rests while others make some"
            events.append(Event("waiting", -1, f"{text}; see {self.log(number)}"))
        return events

    def fatal(self, hand: H, text: str) -> list[Event]:
        """A worker says in one line what it cannot do: perhaps its machine alone.

        Raises:
            BoomgenError: nobody else is known to do better.
        """
        if hand.started:
            if self.handout.alone(hand.number):
                raise BoomgenError(text)
            return self.lost(hand, f"gave up: {text}")
        self.refuse(hand)
        if not self.hands:
            raise BoomgenError(text)
        return [Event("gone", -1, f"worker {hand.number} ({hand.device}): {text}")]

    def refuse(self, hand: H) -> None:
        """A worker cannot work where it is. Another may begin elsewhere."""
        self.leave(hand)

    def lost(self, hand: H, what: str) -> list[Event]:
        """A worker has gone, or has to: its shard is for somebody else to try, and another worker takes its place.

        Raises:
            BoomgenError: it was the last that can start.
        """
        self.leave(hand)
        log = self.log(hand.number)
        if not self.handout.again(hand.number, hand.started):
            if self.handout.open and not self.hands:
                raise BoomgenError(f"workers die while starting ({what}); see {log}")
            return [Event("gone", -1, f"worker {hand.number} ({hand.device}) dies while starting; see {log}")]
        cause = f"worker {hand.number} {what}"
        shard = self.handout.failed(hand.number, cause)
        if self.handout.open:
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
