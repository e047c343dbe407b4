"""Handing out, on a clock of the tests' own."""

import random
from pathlib import Path

import pytest

from benchmarks.handout import simulate
from boomgen.engines.handout import ATTEMPTS, HOPELESS, LOADING, PATIENCE, TICK, WORTH, Event, HandOut, set_aside
from boomgen.errors import BoomgenError


def test_shards_go_out_in_order_and_end() -> None:
    handout = HandOut([4, 2, 9])
    assert [handout.take(worker, 0.0) for worker in range(4)] == [4, 2, 9, None]
    for worker in (2, 0, 1):
        assert handout.open
        handout.done(worker, 1.0)
    assert not handout.open
    assert handout.take(0, 2.0) is None


def test_a_failed_shard_comes_again_at_the_end_until_it_is_set_aside() -> None:
    handout, taken = HandOut([0, 1]), []
    while (shard := handout.take(7, 0.0)) is not None:
        taken.append(shard)
        if shard == 0:
            assert handout.failed(7, "disk") == 0
        else:
            handout.done(7, 1.0)
    assert taken == [0, 1] + [0] * (ATTEMPTS - 1)
    assert not handout.open
    said = f"1 shards failed {ATTEMPTS} times and were set aside; shard 0: disk; see boomgen logs runs/a"
    with pytest.raises(BoomgenError, match=said):
        set_aside(handout.aside, Path("runs/a"))


def test_a_worker_without_a_shard_loses_none() -> None:
    handout = HandOut([0])
    assert handout.failed(3, "died") is None
    assert handout.take(0, 0.0) == 0


def slow_and_quick(usual: float) -> HandOut:
    """Worker 0 has shard 0 since 0.0; worker 1 made shard 1 in the usual time."""
    handout = HandOut([0, 1])
    handout.take(0, 0.0)
    handout.take(1, 0.0)
    handout.done(1, usual)
    return handout


def test_what_is_slow_at_the_end_is_not_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the longer the end takes, the later a straggler would be seen."""
    monkeypatch.setattr("boomgen.engines.handout.RECENT", 1)
    handout = HandOut(range(4))
    for worker in (0, 1, 2):
        handout.take(worker, 0.0)
    handout.done(0, 100.0)
    assert handout.take(0, 100.0) == 3
    handout.done(1, 190.0)
    assert handout.take(1, 200.1) == 2


def test_a_shard_that_others_failed_at_may_still_be_made() -> None:
    """By who had it first; it is then not set aside."""
    handout = slow_and_quick(1.0)
    for worker in (1, 2, 3):
        assert handout.take(worker, 100.0) == 0
        handout.failed(worker, "disk")
    assert list(handout.aside) == [0]
    handout.done(0, 101.0)
    assert not handout.aside


# Whose fault it is --------------------------------------------------------------------------------------------------


def fails_at(handout: HandOut, worker: int, *shards: int) -> None:
    for shard in shards:
        assert handout.take(worker, 0.0) == shard
        handout.failed(worker, "disk")


def test_a_shard_that_failed_waits_for_somebody_else_who_is_in_order() -> None:
    handout = HandOut([0, 1, 2])
    assert handout.take(1, 0.0) == 0
    fails_at(handout, 0, 1, 2)
    assert handout.take(0, 0.0) is None
    handout.done(1, 1.0)
    assert handout.take(1, 1.0) == 1
    handout.failed(1, "disk")
    assert handout.take(0, 1.0) == 2  # nobody is in order now
    handout.done(0, 2.0)
    assert handout.take(1, 2.0) == 1  # who is failed at it as well


def test_who_fails_in_a_row_rests_until_others_made_as_many_and_then_twice_as_many() -> None:
    handout, made = HandOut(range(100)), 0
    assert handout.take(1, 0.0) == 0
    fails_at(handout, 0, *range(1, 1 + ATTEMPTS))
    assert handout.resting == [0]
    for needed, following in ((3, 7), (6, 14)):
        for _ in range(needed):
            assert handout.take(0, 0.0) is None
            handout.done(1, 1.0)
            handout.take(1, 1.0)
        fails_at(handout, 0, following)
        made += needed
    assert handout.failures.total() == ATTEMPTS + 2
    assert max(handout.failures.values()) == 1
    assert handout.resting == [0]


def test_where_all_fail_nobody_rests_and_shards_are_set_aside() -> None:
    handout = HandOut(range(9))
    while handout.open:
        for worker in range(3):
            if handout.take(worker, 0.0) is not None:
                handout.failed(worker, "disk")
    assert list(handout.aside.values()) == ["disk"] * 9
    assert handout.failures == dict.fromkeys(range(9), ATTEMPTS)


def test_of_many_shards_that_fail_without_one_that_is_made_the_run_ends() -> None:
    """Each may have cost an hour, and a full disk stays full. Not while somebody is in order, who may make some."""
    handout = HandOut(range(1000))
    assert handout.take(99, 0.0) == 0
    for number in range(1, 2 * HOPELESS):
        fails_at(handout, number, number)
    with pytest.raises(BoomgenError, match="60 shards in a row failed, the last with disk full"):
        handout.failed(99, "disk full")
    handout = HandOut(range(1000))
    for number in range(HOPELESS - 1):
        fails_at(handout, number % 8, number)
    handout.take(9, 0.0)
    with pytest.raises(BoomgenError, match=f"{HOPELESS} shards in a row failed, the last with disk full"):
        handout.failed(9, "disk full")


def test_a_worker_that_never_gets_ready_is_overdue_and_waiting_for_a_place_is_no_loading() -> None:
    handout = HandOut([0], patience=5)
    handout.began(0, 0.0)
    handout.began(1, 0.0)
    handout.hear(1, Event("ready", -1), 9.0)
    assert handout.overdue(LOADING) == []
    assert handout.overdue(LOADING + 1) == [0]
    handout.failed(0, "hung")
    assert handout.overdue(LOADING + 1) == []


@pytest.mark.parametrize(("usual", "straggles"), [(1.0, WORTH), (100.0, 200.0)])
def test_a_stragglers_shard_is_made_twice_and_whoever_is_first_ends_it(usual: float, straggles: float) -> None:
    handout = slow_and_quick(usual)
    assert handout.take(1, straggles) is None
    assert handout.take(1, straggles + 0.1) == 0
    assert handout.take(2, straggles + 9999) is None  # two are enough
    handout.done(1, straggles + 5)
    assert not handout.open
    handout.done(0, straggles + 9)  # the straggler's comes too late, and is no harm


def test_one_of_two_copies_may_fail() -> None:
    handout = slow_and_quick(1.0)
    assert handout.take(1, 50.0) == 0
    handout.done(1, 60.0)
    assert handout.failed(0, "died") is None
    assert handout.take(0, 61.0) is None
    assert not handout.aside


@pytest.mark.parametrize(
    ("patience", "heard", "limit"), [(None, 1.0, PATIENCE), (None, 100.0, 2000.0), (5.0, 0.1, 5.0), (5.0, 1.0, 20.0)]
)
def test_silence_is_measured_by_the_longest_so_far(patience: float | None, heard: float, limit: float) -> None:
    handout = HandOut([0, 1], patience)
    handout.take(0, 0.0)
    handout.take(1, 0.0)
    handout.tick(0, heard)
    handout.tick(1, heard)
    assert handout.overdue(heard + TICK + limit) == []
    handout.tick(1, heard + limit)
    handout = HandOut([0, 1], patience)
    handout.take(0, 0.0)
    handout.tick(0, heard)
    assert handout.overdue(heard + TICK + limit + 0.1) == [0]


def test_nobody_knows_how_long_a_first_batch_takes() -> None:
    handout = HandOut([0])
    handout.take(0, 0.0)
    assert handout.overdue(1e9) == []
    asked = HandOut([0], patience=60)
    asked.take(0, 0.0)
    assert asked.overdue(61.0 + TICK) == [0]


@pytest.mark.parametrize("seed", range(50))
def test_whatever_workers_do_each_shard_is_made_or_set_aside(seed: int) -> None:
    rng = random.Random(seed)
    handout, made, now = HandOut(range(40), patience=30), set[int](), 0.0
    while handout.open:
        now += rng.expovariate(1)
        worker = rng.randrange(6)
        held = handout.held(worker)
        if held is None:
            handout.take(worker, now)
        elif rng.random() < 0.6:
            made.add(held)
            handout.done(worker, now)
        elif rng.random() < 0.3:
            handout.failed(worker, "x")
        for late in handout.overdue(now):
            handout.failed(late, "hung")
    assert made | handout.aside.keys() == set(range(40))
    assert not made & handout.aside.keys()


@pytest.mark.parametrize(("shards", "workers"), [(12_800, 128), pytest.param(100_000, 1_024, marks=pytest.mark.slow)])
def test_workers_of_heavy_tailed_speed_come_near_the_ideal(shards: int, workers: int) -> None:
    """`benchmarks/handout.py`, and a smaller case with as many shards for each worker. The sick have none set aside."""
    found = simulate(shards, workers)
    assert found.made < 1.01 * shards
    assert found.failed < 1.5 * workers
    assert found.ideal / found.took > 0.95
