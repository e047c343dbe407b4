"""Where data lies: a path on this machine, or a URL that fsspec knows, such as s3://bucket/folder.

Credentials, endpoints and time limits come from the environment and from fsspec's own configuration. Every request
goes through `insist`; the libraries below are told to try once, since theirs multiply (25 requests, 47 s for one 503).
"""

import errno
import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from io import BufferedReader, RawIOBase
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import fsspec
from fsspec.config import conf, set_conf_env
from upath import UPath

from boomgen.errors import UsageError

URL = re.compile(r"([a-z][a-z0-9+.-]*)://(.*)", re.DOTALL)
ONE_SLASH = re.compile(r"(s3a?|gs|gcs|az|abfss?|hf|https?):/([^/].*)", re.DOTALL)
SECRET = re.compile(
    r"^[^/?]*@|^[^@]*:[^@]*@|[?&][^=]*(?:signature|credential|token|key|secret|password|sig)=", re.IGNORECASE
)
EXTRAS = {"s3": "pip install 'boomgen[s3]'", "s3a": "pip install 'boomgen[s3]'"}
PATIENCE = {"connect_timeout": 20, "read_timeout": 20, "retries": {"total_max_attempts": 1}}  # s, of botocore
PAUSES = (1, 3, 9, 18)  # seconds between five tries, each made shorter or longer by up to a quarter
AT_ONCE = 4  # parts of 50 MiB of a file that goes up
START, SLOWEST = 120.0, 2**18  # seconds, and bytes a second: what takes longer is not going up any more
BUFFER = 2**23  # bytes of one request where a file is read from one end to the other

PRECONDITION_FAILED = 412
LASTING = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
LASTING_NUMBERS = {errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.ENAMETOOLONG, errno.EMSGSIZE, errno.EREMCHG}
PASSING = {
    "botocore.HTTPClientError",
    "botocore.ConnectionError",
    "botocore.ResponseParserError",
    "aiohttp.ClientError",
}
UNKNOWN = {"botocore.NoCredentialsError", "botocore.PartialCredentialsError", "botocore.ProfileNotFound"}

Place = Path | UPath
T = TypeVar("T")


class StorageError(OSError):
    """A place that does not answer, or not as it should, after all tries. Its text is one line for people."""


class Listed(NamedTuple):
    """One entry of a folder at a URL, to be asked as an os.DirEntry is."""

    folder: UPath
    name: str
    folder_itself: bool
    size: int

    @property
    def place(self) -> UPath:
        return self.folder / self.name

    @property
    def path(self) -> str:
        return f"{self.folder.path.rstrip('/')}/{self.name}"

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        return self.folder_itself

    def is_file(self) -> bool:
        return not self.folder_itself

    def stat(self) -> os.stat_result:
        """Nothing but the size is known."""
        return os.stat_result((0, 0, 0, 0, 0, 0, self.size, 0, 0, 0))


Entry = os.DirEntry[str] | Listed


def is_url(text: str) -> bool:
    """Whether a place is told by a URL."""
    return URL.match(text) is not None


def place(text: str) -> Place:
    """The place that a path or a URL tells.

    Raises:
        UsageError: a URL of a protocol that fsspec does not know or whose library is missing, or with a secret in it.
    """
    found = URL.match(text)
    if found is None:
        if slash := ONE_SLASH.match(text):
            raise UsageError(f"{text}: a URL has two slashes; expected {slash[1]}://{slash[2]}")
        return Path(text)
    protocol, rest = found.groups()
    if SECRET.search(rest):
        raise UsageError(
            f"a URL {protocol}:// with a user, password or key in it, which plans and logs would show; expected "
            f"{protocol}://PLACE, and credentials in the environment (AWS_PROFILE, AWS_ACCESS_KEY_ID ...)"
        )
    if protocol in ("file", "local"):
        return Path(rest)
    if not rest.strip("/"):
        raise UsageError(f"{text} names no place; expected as much as {protocol}://bucket/folder")
    _configure_s3()
    try:
        where = UPath(text.rstrip("/"))
        files(where)
    except ImportError as err:
        how = EXTRAS.get(protocol, "install it beside boomgen")
        raise UsageError(f"{text}: {' '.join(str(err).split())}; {how}") from err
    except ValueError as err:
        raise UsageError(
            f"{text}: {' '.join(str(err).split())}; expected a path, or a URL that fsspec knows, as s3://bucket/folder"
        ) from err
    return where


def _configure_s3() -> None:
    """One try a request and no listings from memory, an index shows what is there; but as the user has it, if asked."""
    set_conf_env(conf)  # a worker is told its secrets after its imports
    asked = conf.get("s3", {}) | conf.pop("s3a", {})  # s3fs goes by both names, and what stands under the second wins
    patient = PATIENCE | asked.get("config_kwargs", {})
    conf["s3"] = {"use_listings_cache": False, "max_concurrency": AT_ONCE, **asked, "config_kwargs": patient}


def settled(text: str) -> str:
    """A path without links or dots, or a URL, as a plan writes it; errors as `place` has them."""
    where = place(text)
    return str(where.resolve() if isinstance(where, Path) else where)


def files(where: UPath) -> Any:
    """The fsspec file system of a place, also after a fork."""
    fs = where.fs
    if fs._pid != os.getpid():
        fs = fsspec.filesystem(where.protocol, **where.storage_options)
    if where.protocol in ("s3", "s3a"):
        fs.retries = 1
    return fs


def bulk(where: UPath) -> Any:
    """The file system of a place for large files: of a thousand parts some fail, and S3's client sends each again."""
    if where.protocol not in ("s3", "s3a"):
        return files(where)
    again = conf["s3"]["config_kwargs"] | {"retries": {"total_max_attempts": 1 + len(PAUSES), "mode": "standard"}}
    fs = fsspec.filesystem(where.protocol, **where.storage_options, config_kwargs=again)
    fs.retries = 1
    return fs


def upload(fs: Any, local: Path, where: UPath) -> None:
    """Put a file, tried as `insist` does. No client notices by itself that what it sends is not taken."""
    limit = {"timeout": START + local.stat().st_size / SLOWEST} if fs.async_impl else {}
    insist(lambda: fs.put_file(str(local), where.path, **limit), where)


def insist(call: Callable[[], T], where: object) -> T:
    """What `call` returns; it is tried five times, for about half a minute, where its failure may pass.

    Raises:
        FileNotFoundError, FileExistsError, PermissionError: at once.
        StorageError: any other failure of the place, when no try is left or none would help.
    """
    for pause in (*PAUSES, None):
        try:
            return call()
        except Exception as err:
            if pause is None or not _may_pass(err):
                raise _told(err, where) from err
            seconds = pause * random.uniform(0.75, 1.25)
            print(f"{where}: {line(err)}; asking again in {seconds:.0f} s", file=sys.stderr, flush=True)
            time.sleep(seconds)
    raise AssertionError("the last try has no pause")


def put_first(fs: Any, where: UPath, data: bytes) -> None:
    """Put a small file on the condition that there is none; tried as `insist` does.

    FileExistsError: there is one. s3fs sees that only where S3's answer names the condition, which not all servers do.
    """

    def put() -> None:
        try:
            fs.pipe_file(where.path, data, mode="create")
        except OSError as err:
            answer = getattr(err.__cause__, "response", None) or {}
            if answer.get("ResponseMetadata", {}).get("HTTPStatusCode") == PRECONDITION_FAILED:
                raise FileExistsError(where.path) from err
            raise

    insist(put, where)


def _kinds(err: Exception) -> set[str]:
    return {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(err).__mro__}


def _may_pass(err: Exception) -> bool:
    if isinstance(err, OSError):
        return not isinstance(err, LASTING) and err.errno not in LASTING_NUMBERS
    return not PASSING.isdisjoint(_kinds(err))


def _told(err: Exception, where: object) -> Exception:
    """What to raise for a failure that stays."""
    kinds = _kinds(err)
    if isinstance(err, PermissionError) or not UNKNOWN.isdisjoint(kinds):
        return PermissionError(
            f"{where}: {line(err)}; expected credentials that may use it, in AWS_PROFILE, AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY or ~/.aws (FSSPEC_S3_ANON=true for a public bucket)"
        )
    if isinstance(err, LASTING):
        return err
    if "botocore.ParamValidationError" in kinds and (name := re.search(r'Invalid bucket name "[^"]*"', str(err))):
        return StorageError(f"{where}: {name[0]}; expected s3://BUCKET/FOLDER")
    if isinstance(err, ValueError) and str(err).startswith("Invalid endpoint"):
        return StorageError(f"{where}: {err}; expected a URL in AWS_ENDPOINT_URL")
    if isinstance(err, OSError) or any(kind.startswith(("botocore.", "aiohttp.")) for kind in kinds):
        return StorageError(f"{where}: {line(err)}; expected an answer: check network and AWS_ENDPOINT_URL, or wait")
    return err


def line(err: Exception) -> str:
    """One line; the number of an error stands for nothing at a place that is no disk."""
    text = (err.strerror if isinstance(err, OSError) else None) or str(err) or type(err).__name__
    return " ".join(text.split())[:300].rstrip(".")


def exists(where: Place) -> bool:
    """Whether there is a file, or a folder with something in it."""
    return where.exists() if isinstance(where, Path) else bool(insist(lambda: files(where).exists(where.path), where))


def is_folder(where: Place) -> bool:
    """Whether there is a folder; at most URLs, one that holds nothing does not exist."""
    return where.is_dir() if isinstance(where, Path) else bool(insist(lambda: files(where).isdir(where.path), where))


def is_file(where: Place) -> bool:
    """Whether there is a file."""
    return where.is_file() if isinstance(where, Path) else bool(insist(lambda: files(where).isfile(where.path), where))


def scan(folder: Place | Entry) -> Iterator[Entry]:
    """What a folder holds, in no order. At a URL one request tells of a thousand entries.

    FileNotFoundError or NotADirectoryError where it is none.
    """
    if isinstance(folder, UPath | Listed):
        yield from _listing(folder.place if isinstance(folder, Listed) else folder)
    else:
        with os.scandir(folder) as entries:
            yield from entries


@lru_cache(maxsize=4)  # opening a source looks at the same few folders several times; `forget` ends that
def _listing(folder: UPath) -> tuple[Listed, ...]:
    def ask() -> tuple[Listed, ...]:
        found = ((entry["name"].rstrip("/"), entry) for entry in files(folder).ls(folder.path, detail=True))
        inside = ((name.rpartition("/")[2], entry) for name, entry in found if name != folder.path.rstrip("/"))
        return tuple(
            Listed(folder, name, entry["type"] == "directory", entry["size"] or 0)
            for name, entry in inside
            if name not in ("", ".", "..")  # a path cannot tell these apart
        )

    return insist(ask, folder)


def forget() -> None:
    """Look again at what folders hold."""
    _listing.cache_clear()


def below(entry: Entry, folder: Place) -> str:
    """The path of an entry relative to a folder above it."""
    if isinstance(folder, Path):
        return Path(entry.path).relative_to(folder).as_posix()
    return entry.path.removeprefix(folder.path.rstrip("/")).lstrip("/")


def beside(entry: Entry, name: str) -> Place:
    """The place of that name in the folder of an entry."""
    return entry.folder / name if isinstance(entry, Listed) else Path(entry.path).with_name(name)


def names(folder: Place) -> list[str]:
    """The sorted names in a folder; none where there is no folder."""
    try:
        return sorted(entry.name for entry in scan(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []


def walk(folder: Place) -> list[Place]:
    """All files below a folder, sorted by name."""
    if isinstance(folder, Path):
        return sorted(path for path in folder.rglob("*") if path.is_file())
    base = f"{folder.path.rstrip('/')}/"
    found: list[str] = insist(lambda: list(files(folder).find(folder.path)), folder)
    return [folder / name.removeprefix(base) for name in sorted(found)]


def read(where: Place, start: int, size: int) -> bytes:
    """Up to `size` bytes from `start`, fewer where the file ends before; one request at a URL."""
    if isinstance(where, Path):
        with where.open("rb") as file:
            file.seek(start)
            return file.read(size)

    def ask() -> bytes:
        try:
            return bytes(files(where).cat_file(where.path, start=start, end=start + size))
        except OSError as err:
            answer = getattr(err.__cause__, "response", {})
            if answer.get("Error", {}).get("Code") in ("InvalidRange", "416"):  # the file ends before `start`
                return b""
            raise

    return insist(ask, where) if size else b""


def beginning(where: Place, size: int) -> bytes:
    """The first bytes of a file; none where there is no file."""
    if isinstance(where, Path) and not where.is_file():  # a pipe would be waited for
        return b""
    try:
        return read(where, 0, size)
    except FileNotFoundError:
        return b""


def opened(where: Place) -> IO[bytes]:
    """A file to be read from one end to the other."""
    return where.open("rb") if isinstance(where, Path) else BufferedReader(_Ranges(where), BUFFER)


class _Ranges(RawIOBase):
    """A file at a URL, each `readinto` one request. The size is not asked: a read beyond the end finds nothing."""

    def __init__(self, where: UPath) -> None:
        self._where, self._at = where, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        if whence == os.SEEK_END:
            raise OSError("the end of a file at a URL is not known")
        self._at = offset + (self._at if whence == os.SEEK_CUR else 0)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        data = read(self._where, self._at, len(buffer))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
