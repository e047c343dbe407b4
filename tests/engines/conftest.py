"""The engines, each started once for all tests of a process."""

import contextlib
import functools
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ..s3.conftest import s3, s3_server
from .engines import Engine, Slurm, engine
from .slurm_cluster import Cluster

__all__ = ["s3", "s3_server"]


@pytest.fixture(scope="session")
def engine_of(tmp_path_factory: pytest.TempPathFactory, boomgen: Any) -> Iterator[Callable[[str], Engine]]:
    """An engine by its name."""
    with contextlib.ExitStack() as stack:

        @functools.cache
        def of(name: str) -> Engine:
            made = engine(name, tmp_path_factory.mktemp("slurm"), boomgen)
            stack.callback(made.close)
            return made

        yield of


@pytest.fixture(scope="session")
def slurm(engine_of: Callable[[str], Engine]) -> Slurm:
    """A machine without SLURM fails, since a skipped proof proves nothing."""
    if not shutil.which("slurmctld"):
        pytest.fail("SLURM is missing: apt-get install --no-install-recommends slurm-wlm munge", pytrace=False)
    found = engine_of("slurm")
    assert isinstance(found, Slurm)
    return found


@pytest.fixture(scope="session")
def cluster(slurm: Slurm) -> Cluster:
    """Of SLURM."""
    return slurm.cluster
