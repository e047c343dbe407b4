"""Tars made to do harm: each attack works on Python's tarfile and fails on our reader."""

import subprocess
import sys
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import PlanTiny
from .finished import finish, samples, tree
from .source_checks import member, picture, refused, write_tar


def hostile_members(outside: Path) -> dict[str, list[tuple[tarfile.TarInfo, Any]]]:
    return {
        "up": [member("../outside/up.png", picture(1))],
        "absolute": [member(f"{outside}/absolute.png", picture(1))],
        "symlink": [
            member("a", kind=tarfile.SYMTYPE, link=str(outside)),
            member("a/through.png", picture(1)),
        ],
        "hard link": [member("b.png", kind=tarfile.LNKTYPE, link="../outside/there"), member("c.png", picture(1))],
        "pipe": [member("../outside/pipe.png", kind=tarfile.FIFOTYPE), member("d.png", picture(1))],
    }


@pytest.mark.parametrize("attack", ["up", "absolute", "symlink", "hard link", "pipe"])
def test_tars_reach_nothing_outside(attack: str, plan_tiny: PlanTiny, tmp_path: Path) -> None:
    outside, home = tmp_path / "outside", tmp_path / "home"
    outside.mkdir()
    home.mkdir()
    (outside / "there").write_bytes(b"private")
    before = tree(outside)
    archive = write_tar(tmp_path / "set.tar", *hostile_members(outside)[attack])
    with tarfile.open(archive) as tar:
        tar.extractall(home, filter="fully_trusted")
    reached = tree(outside) != before or (outside / "pipe.png").exists() or (home / "b.png").exists()
    assert reached, "the attack does not work on tarfile itself"
    for path in outside.iterdir():
        path.unlink()
    run = finish(plan_tiny(tmp_path / "run", mode="augment", dataset=str(archive)))
    assert list(outside.iterdir()) == []
    assert list(samples(run)) == ["00000000"]
    assert {path.name for path in tmp_path.iterdir()} == {"outside", "home", "set.tar", "run"}


def raw_header(name: str, size: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A header block with any bytes as its size."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    block[124:136], block[156:157] = size.ljust(12, b"\0"), kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


NEGATIVE = b"\xff" * 10 + b"\xfe\x00"  # base 256: -512, so that the next header is this one
HUGE = b"\x80" + b"\0" * 6 + b"\x10" + b"\0" * 4  # 64 GiB


@pytest.mark.parametrize(
    ("archive", "said"),
    [
        (raw_header("a.png", NEGATIVE), "a header that claims -512 bytes"),
        (raw_header("a.png", NEGATIVE, b"Z"), "a header that claims -512 bytes"),
        (raw_header("a.png", HUGE), "unexpected end of data"),
        (raw_header("a.json", HUGE) + picture(1), "'a.json' has 68719476736 bytes, at most 16777216 are read"),
        (raw_header("x", HUGE, tarfile.GNUTYPE_LONGNAME), "a header that claims 68719476736 bytes"),
        (raw_header("x", HUGE, tarfile.XHDTYPE), "a header that claims 68719476736 bytes"),
        (raw_header("x", HUGE, tarfile.SOLARIS_XHDTYPE), "a header that claims 68719476736 bytes"),
        (raw_header("a.png", b"0000001000\0", tarfile.GNUTYPE_SPARSE) + bytes(512), "'a.png' is sparse"),
    ],
)
def test_sizes_that_lie(archive: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "set.tar").write_bytes(archive + bytes(1024))
    assert said in refused(tmp_path / "set.tar")


def test_a_negative_size_is_an_endless_tar_to_a_naive_reader(tmp_path: Path) -> None:
    """CVE-2025-8194; mended in later versions of Python, which refuse it."""
    (tmp_path / "set.tar").write_bytes(raw_header("a", b"0") + raw_header("b", NEGATIVE, b"Z") + bytes(1024))
    listing = "import sys, tarfile\nfor _ in zip(range(100000), tarfile.open(sys.argv[1])): print('again')"
    done = subprocess.run([sys.executable, "-c", listing, tmp_path / "set.tar"], capture_output=True, check=False)
    assert done.stdout.count(b"again") == 100_000 or b"ReadError" in done.stderr
    assert "expected a whole, uncompressed tar" in refused(tmp_path / "set.tar")


def test_a_long_name_is_not_read_into_memory(tmp_path: Path) -> None:
    size = 2**28
    with (tmp_path / "set.tar").open("wb") as file:
        file.write(raw_header("x", b"%011o\0" % size, tarfile.GNUTYPE_LONGNAME))
        file.truncate(2**28 + 4096)  # the rest is a hole

    def peak(read: Callable[[], Any]) -> int:
        tracemalloc.start()
        try:
            read()
        finally:
            found = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        return found

    def naive() -> None:
        with pytest.raises(tarfile.TarError), tarfile.open(tmp_path / "set.tar") as tar:
            tar.getmembers()

    assert peak(naive) > size
    assert peak(lambda: refused(tmp_path / "set.tar")) < 2**22
