"""The Hugging Face Hub: every request of boomgen, and the one line that each failure of it ends in.

A snapshot is the folder of one commit in the Hub's own cache. One that is whole there is found without any request.
"""

import glob
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from boomgen.errors import BoomgenError, UsageError
from boomgen.untrusted import read_yaml

ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w./-]*))?")
"""owner/name or owner/name@REVISION: a branch, a tag or a commit."""
CARD = "README.md"
PAUSES = (2, 8)  # seconds before the second and the third try, where the Hub itself names no others
LONGEST = 310  # seconds; the Hub counts requests in windows of five minutes
BUSY = (429, 500, 502, 503, 504)

COMPONENT = re.compile(r"([^/]+/)?[^/]+")
LEFT_OUT = ("safety_checker/", "feature_extractor/")
SMALL = (".json", ".yaml", ".txt", ".model")
WEIGHTS = re.compile(
    r"(?P<folder>[^/]+/)?(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<variant>[\w-]+?))?"
    r"(?:-\d{5}-of-\d{5})?\.(?P<kind>safetensors|bin)"
)

T = TypeVar("T")
Choice = Callable[[list[str]], list[str]]


def model(name: str, allow_pickle: bool = False) -> Path:
    """The snapshot of the model owner/name[@REVISION], with the files that `wanted` names; errors as in `explain`."""
    return _snapshot("model", *parsed(name), choose=partial(wanted, allow_pickle=allow_pickle))


def dataset(name: str, commit: str | None = None) -> Path:
    """The snapshot of the data set owner/name[@REVISION], at `commit` if that is given; no programs are fetched."""
    repo, revision = parsed(name)
    return _snapshot("dataset", repo, commit or revision, choose=_no_programs)


def parsed(name: str) -> tuple[str, str | None]:
    """owner/name and the revision of what `ID` matches."""
    repo, _, revision = name.partition("@")
    return repo, revision or None


def wanted(files: list[str], allow_pickle: bool) -> list[str]:
    """The files of a model's repository that are loaded: configs, tokenizers, and each component's weights once.

    Of each folder's weights, the first kind that there is: safetensors, a variant of it (fp16), and if pickles are
    allowed .bin, a variant of it. Whole checkpoints (.ckpt, sd_xl_base_1.0.safetensors) are never among them.
    """
    near = [file for file in files if COMPONENT.fullmatch(file) and not file.startswith(LEFT_OUT)]
    found = [match for file in near if (match := WEIGHTS.fullmatch(file))]
    rank: dict[str, tuple[bool, str]] = {}
    for match in found:
        if match["kind"] == "safetensors" or allow_pickle:
            folder = match["folder"] or ""
            rank[folder] = min(_rank(match), rank.get(folder, _rank(match)))
    weights = [match.string for match in found if rank.get(match["folder"] or "") == _rank(match)]
    return [file for file in near if file.endswith(SMALL)] + weights


def _rank(match: re.Match[str]) -> tuple[bool, str]:
    return match["kind"] == "bin", match["variant"] or ""


def _no_programs(files: list[str]) -> list[str]:
    return [file for file in files if not file.endswith((".py", ".gitattributes"))]


def _snapshot(kind: str, repo: str, revision: str | None, choose: Choice) -> Path:
    from huggingface_hub import HfApi, get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    _quieten()

    def fetch() -> Path:
        commit = HfApi().resolve_revision(repo, repo_type=kind, revision=revision)
        get = partial(snapshot_download, repo, repo_type=kind, revision=commit)
        try:
            tree = get_cached_repo_tree(repo, repo_type=kind, revision=commit)
        except CachedRepoTreeNotFoundError:
            get(allow_patterns=[CARD])  # caches the tree as well
            tree = get_cached_repo_tree(repo, repo_type=kind, revision=commit)
        names = {CARD, *choose([file.path for file in tree])}
        return Path(get(allow_patterns=[glob.escape(name) for name in sorted(names)]))

    return _patiently(fetch, partial(explain, kind=kind, repo=repo, revision=revision))


def _quieten() -> None:
    """Have the Hub's library show bars to people only, say nothing itself, and wait for no answer for ever."""
    from huggingface_hub import get_session
    from huggingface_hub.utils.tqdm import disable_progress_bars

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its warnings quote addresses that are keys
    if not sys.stderr.isatty():
        disable_progress_bars()
    hooks = get_session().event_hooks
    if _limit not in hooks["request"]:
        get_session().event_hooks = hooks | {"request": [*hooks["request"], _limit]}


def _limit(request: Any) -> None:
    """By itself the library waits without end for most answers."""
    from huggingface_hub import constants

    most = constants.HF_HUB_DOWNLOAD_TIMEOUT
    limits = request.extensions["timeout"].items()
    request.extensions["timeout"] = {what: min(seconds or most, most) for what, seconds in limits}


def _patiently(act: Callable[[], T], explained: Callable[[Exception], Exception]) -> T:
    """Ask again where the Hub is busy; a Hub that cannot be reached fails at once."""
    for pause in (*PAUSES, None):
        try:
            return act()
        except Exception as err:
            seconds = None if pause is None else _pause(err, pause)
            if seconds is None:
                raise explained(err) from err
            print(f"the Hugging Face Hub is busy; asking again in {seconds} s", file=sys.stderr)
            time.sleep(seconds)
    raise AssertionError("the last try has no pause")


def _pause(err: Exception, least: int) -> int | None:
    """Seconds to wait before the next try; None where waiting does not help."""
    answer = _answer(err)
    if answer is None or answer.status_code not in BUSY:
        return None
    seconds = max(least, _named_wait(answer))
    return seconds if seconds <= LONGEST else None


def _named_wait(answer: Any) -> int:
    """The seconds that an answer asks for, 0 where it names none."""
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

    limit = parse_ratelimit_headers(answer.headers)
    after = answer.headers.get("Retry-After", "")
    return limit.reset_in_seconds + 1 if limit else int(after) if after.isdecimal() else 0


def _causes(err: BaseException | None) -> Iterator[BaseException]:
    while err is not None:
        yield err
        err = err.__cause__


def _answer(err: Exception) -> Any:
    """The Hub's answer behind an error of one of its libraries, None where there was none."""
    from huggingface_hub.errors import HfHubHTTPError

    return next((cause.response for cause in _causes(err) if isinstance(cause, HfHubHTTPError)), None)


def explain(err: Exception, kind: str, repo: str, revision: str | None) -> Exception:
    """What to tell of a failed request. UsageError: the user must change something; BoomgenError: may pass by itself.

    Errors of this machine's own disk come back as they are.
    """
    from huggingface_hub import constants, errors

    what = f"{'data set' if kind == 'dataset' else kind} {repo}"
    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{repo}"
    if isinstance(err, OSError) and err.errno:
        return err
    causes, answer = list(_causes(err)), _answer(err)

    def is_(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if is_(errors.GatedRepoError):
        return UsageError(f"{what} is gated; accept its terms at {page} and run `hf auth login` (or set HF_TOKEN)")
    if is_(errors.RevisionNotFoundError):
        return UsageError(f"{what} has no revision {revision!r}; see {page}/commits/main")
    if is_(errors.RepositoryNotFoundError):
        return UsageError(
            f"{repo} is neither a local path nor a {what.removesuffix(f' {repo}')} on the Hugging Face Hub; check the "
            "name, or run `hf auth login` if it is private"
        )
    if is_(errors.HFValidationError):
        return UsageError(f"{what}: {line(err)}; expected owner/name or owner/name@REVISION")
    if answer is not None and answer.status_code == 429:
        wait = f"wait {seconds} s" if (seconds := _named_wait(answer)) else "wait some minutes"
        return BoomgenError(f"the Hugging Face Hub has had too many requests for {what} (429); {wait} and {AGAIN}")
    if answer is not None and answer.status_code >= 500:
        return BoomgenError(f"the Hugging Face Hub failed at {what} ({answer.status_code}); wait a little and {AGAIN}")
    if answer is not None:
        return UsageError(
            f"the Hugging Face Hub refused {what} ({answer.status_code}); see {page}, and `hf auth whoami` for whom it "
            "takes you"
        )
    local = f"or pass a local copy with {'--data-dir' if kind == 'dataset' else '--model'}"
    if constants.HF_HUB_OFFLINE:
        return UsageError(
            f"{what} is not whole in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set; run "
            f"`boomgen fetch` with the same options where there is network, {local}"
        )
    return BoomgenError(
        f"cannot get {what} from the Hugging Face Hub ({line(causes[-1])}); {AGAIN}; or run `boomgen fetch` where "
        f"there is network and go on here with HF_HUB_OFFLINE=1, {local}"
    )


AGAIN = "give the same command again: what was fetched stays"


def line(err: BaseException) -> str:
    """The first line of an error's text."""
    return (str(err).strip() or type(err).__name__).splitlines()[0][:200]


def licence(folder: Path) -> str | None:
    """The licence in the front matter of a snapshot's card; None where it names none."""
    try:
        front = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", (folder / CARD).read_text(encoding="utf-8"), re.DOTALL)
        card = read_yaml(front[1]) if front else None
    except (OSError, ValueError):
        return None
    if not isinstance(card, dict) or not card.get("license"):
        return None
    named = card["license"] if isinstance(card["license"], list) else [card["license"]]
    name = card.get("license_name")
    return ", ".join(map(str, named)) + (f" ({name})" if name else "")


def whereabouts(folder: Path) -> str:
    """Commit, bytes, licence and place of a snapshot, for people; of any other folder its place."""
    if folder.parent.name != "snapshots":
        return f"on this machine, {folder}"
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return f"commit {folder.name}, {size:,} bytes, licence {licence(folder) or 'not stated'}, in {folder}"
