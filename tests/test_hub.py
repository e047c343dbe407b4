"""boomgen against a server that speaks the Hugging Face Hub's API: what goes wrong ends in one line, then goes well."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from boomgen.run import RunDir

from .conftest import save_model
from .hub.server import Fault, Hub, commit_of, serving
from .test_sources_hf import table

TOKEN = "hf_dummy"
CARD = "---\nlicense: apache-2.0\n---\n# Own\n"
DECOYS = ("v1-5-pruned.safetensors", "unet/diffusion_pytorch_model.bin", "safety_checker/config.json", "train.py")
OFFLINE = {"HF_HUB_OFFLINE": "1"}


class Answer(NamedTuple):
    """What one call of the command line came to."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model and a data set, laid out as on the Hub."""
    model, data = (tmp_path_factory.mktemp(name) for name in ("model", "data"))
    save_model(model, (8, 16))
    for name in DECOYS:
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_bytes(b"never fetched")
    for split, count in (("train", 6), ("test", 2)):
        (data / "data").mkdir(exist_ok=True)
        table(count).to_parquet(data / "data" / f"{split}-00000-of-00001.parquet")
    (data / "own.py").write_text("raise SystemExit('a stranger ran')\n")
    for folder in (model, data):
        (folder / "README.md").write_text(CARD)
    return {"models": model, "datasets": data}


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def environment(hub: Hub, home: Path) -> dict[str, str]:
    ours = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "HF_HUB_DOWNLOAD_TIMEOUT": "1"}
    quiet = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_ETAG_TIMEOUT": "1"}
    return {name: value for name, value in os.environ.items() if name not in OFFLINE} | ours | quiet


@pytest.fixture(scope="module")
def call(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Answer]]:
    """The command line in one other process, whose folder must stay empty."""
    folder, written = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("written")
    command = [sys.executable, "-m", "tests.hub.again", str(written / "out"), str(written / "err")]
    paths = {"PYTHONPATH": str(Path(__file__).parents[1])}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=folder, env=environment | paths, **pipes) as process:

        def one(*args: Any) -> Answer:
            print(json.dumps(list(map(str, args))), file=process.stdin, flush=True)
            answer = Answer(*json.loads(process.stdout.readline()))
            assert not list(folder.iterdir())
            assert TOKEN not in answer.out + answer.err
            assert "Traceback" not in answer.err
            return answer

        yield one
        process.stdin.close()


@pytest.fixture
def names(hub: Hub, folders: dict[str, Path], request: pytest.FixtureRequest) -> dict[str, str]:
    """A model and a data set that no other test fetched."""
    own = "".join(c for c in request.node.name if c.isalnum())[-60:]
    hub.faults.clear()
    for kind, folder in folders.items():
        hub.repos[f"{kind}/own/{own}"] = folder
    return dict.fromkeys(folders, f"own/{own}")


def options(kind: str, name: str) -> list[str]:
    """The options of a job whose model or data set is on the Hub; the other is in the package."""
    job = {"datasets": "fashion-sample", "models": "fashion-patched-ddpm"} | {kind: name}
    return ["--dataset", job["datasets"], "--model", job["models"], "--t-boom", "0.4"]


GATED, DENIED, BUSY = (403, {"X-Error-Code": "GatedRepo"}), (403, {}), (429, {"Retry-After": "3"})
AGAIN = "give the same command again: what was fetched stays"
ELSEWHERE = (
    f"{AGAIN}; or run `boomgen fetch` where there is network and go on here with HF_HUB_OFFLINE=1, or pass a local "
    "copy with OPTION"
)
FILES, API = "GET .*(config.json|parquet)", "GET /api"
HEADS = "HEAD .*resolve"

FAILURES = {
    "gated": (HEADS, GATED, 2, "WHAT is gated; accept its terms at PAGE and run `hf auth login` (or set HF_TOKEN)"),
    "denied": (API, DENIED, 2, "the Hugging Face Hub refused WHAT (403); see PAGE, and `hf auth whoami` for whom it "
               "takes you"),
    "limit": (API, BUSY, 1, f"the Hugging Face Hub has had too many requests for WHAT (429); wait 3 s and {AGAIN}"),
    "long": (API, (429, {"RateLimit": '"api";r=0;t=900'}), 1, "the Hugging Face Hub has had too many requests for WHAT "
             f"(429); wait 901 s and {AGAIN}"),
    "down": (API, (503, {}), 1, f"the Hugging Face Hub failed at WHAT (503); wait a little and {AGAIN}"),
    "file": (FILES, (500, {}), 1, f"the Hugging Face Hub failed at WHAT (500); wait a little and {AGAIN}"),
    "heads": (HEADS, (502, {}), 1, f"the Hugging Face Hub failed at WHAT (502); wait a little and {AGAIN}"),
    "drop": (FILES, "drop", 1, "cannot get WHAT from the Hugging Face Hub (Server disconnected without sending a "
             f"response.); {ELSEWHERE}"),
    "silent": (API, 1.5, 1, f"cannot get WHAT from the Hugging Face Hub (timed out); {ELSEWHERE}"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["models", "datasets"])
@pytest.mark.parametrize("case", FAILURES)
def test_a_failure_is_one_line_and_the_same_command_then_succeeds(
    case: str, kind: str, hub: Hub, home: Path, names: dict[str, str], call: Callable[..., Answer]
) -> None:
    pattern, fault, code, said = FAILURES[case]
    hub.faults[pattern] = [fault] * 1000
    name, option = names[kind], "--data-dir" if kind == "datasets" else "--model"
    page = f"{hub.url}/{'datasets/' if kind == 'datasets' else ''}{name}"
    said = said.replace("WHAT", f"{'data set' if kind == 'datasets' else 'model'} {name}").replace("PAGE", page)
    said = said.replace("OPTION", option)
    failed = call("fetch", *options(kind, name))
    *waits, last = failed.err.splitlines()
    assert (failed.code, failed.out, last) == (code, "", f"boomgen: {said}")
    assert all(line.startswith("the Hugging Face Hub is busy; asking again in ") for line in waits)
    assert not list(home.rglob("*.incomplete"))
    hub.faults.clear()
    assert call("fetch", *options(kind, name))._replace(out="") == (0, "", "")


PASSING: dict[str, tuple[str, list[Fault], str]] = {
    "limit": (API, [BUSY, BUSY], "the Hugging Face Hub is busy; asking again in 3 s\n"
              "the Hugging Face Hub is busy; asking again in 8 s\n"),
    "down": (API, [(502, {})], "the Hugging Face Hub is busy; asking again in 2 s\n"),
    "limit-of-a-file": (FILES, [BUSY], ""),
    "cut": (FILES, ["cut", "cut"], ""),
    "drop": (FILES, ["drop"], ""),
    "slow": (FILES, [1.5], ""),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["models", "datasets"])
@pytest.mark.parametrize("case", PASSING)
def test_what_passes_by_itself_is_waited_for(
    case: str, kind: str, hub: Hub, names: dict[str, str], call: Callable[..., Answer]
) -> None:
    pattern, faults, said = PASSING[case]
    hub.faults[pattern] = list(faults)
    done = call("fetch", *options(kind, names[kind]))
    assert (done.code, done.err) == (0, said)
    assert hub.faults == {pattern: []}


def test_a_repository_that_moved_is_found(hub: Hub, names: dict[str, str], call: Callable[..., Answer]) -> None:
    for kind, name in names.items():
        old = f"{kind}/own/old-{kind}"
        hub.moved[old] = f"{kind}/{name}"
        assert call("fetch", *options(kind, f"own/old-{kind}"))._replace(out="") == (0, "", "")


@pytest.mark.parametrize("kind", ["models", "datasets"])
def test_what_is_not_there(kind: str, hub: Hub, names: dict[str, str], call: Callable[..., Answer]) -> None:
    what, path = {"models": ("model", ""), "datasets": ("data set", "datasets/")}[kind]
    said = (
        f"boomgen: own/none is neither a local path nor a {what} on the Hugging Face Hub; check the name, or run "
        "`hf auth login` if it is private\n"
    )
    assert call("fetch", *options(kind, "own/none")) == (2, "", said)
    name = names[kind]
    said = f"boomgen: {what} {name} has no revision 'v9'; see {hub.url}/{path}{name}/commits/main\n"
    assert call("fetch", *options(kind, f"{name}@v9")) == (2, "", said)
    said = (
        f"boomgen: {what} own/a--b: Cannot have -- or .. in repo_id: 'own/a--b'.; expected owner/name or "
        "owner/name@REVISION\n"
    )
    assert call("fetch", *options(kind, "own/a--b")) == (2, "", said)


def test_fetched_once_a_run_needs_no_network(
    hub: Hub,
    home: Path,
    folders: dict[str, Path],
    names: dict[str, str],
    call: Callable[..., Answer],
    boomgen: Callable[..., subprocess.CompletedProcess[str]],
    environment: dict[str, str],
    tmp_path: Path,
) -> None:
    model, data = names["models"], names["datasets"]
    asked = ["--dataset", data, "--model", f"{model}@v1", "--t-boom", "0.4", "--steps", "10"]
    done = call("fetch", *asked)
    commits = {kind: commit_of(folder) for kind, folder in folders.items()}
    places = {
        kind: home / "hub" / f"{kind}--{names[kind].replace('/', '--')}" / "snapshots" / commits[kind] for kind in names
    }
    fetched = {kind: sorted(file for file in place.rglob("*") if file.is_file()) for kind, place in places.items()}
    assert [str(file.relative_to(places["models"])) for file in fetched["models"]] == [
        "README.md", "scheduler/scheduler_config.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"
    ]  # fmt: skip
    assert not [file for file in fetched["datasets"] if file.suffix == ".py"]
    told = {
        kind: f"commit {commits[kind]}, {sum(file.stat().st_size for file in files):,} bytes, licence apache-2.0, in "
        f"{places[kind]}"
        for kind, files in fetched.items()
    }
    assert done == (
        0,
        f"model     {model}@v1, {told['models']}\ndata set  {data}, {told['datasets']}\n"
        "run with  HF_HUB_OFFLINE=1 boomgen anonymize and the same options, without network\n",
        "",
    )
    hub.asked.clear()
    run = tmp_path / "run"
    boomgen("plan", *asked, "--device", "cpu", "--out", run, env=environment | OFFLINE)
    plan = RunDir(run).plan
    assert (plan.source.revision, plan.model.path) == (commits["datasets"], str(places["models"]))
    boomgen("resume", run, "--workers", 1, env=environment)  # not told to be offline
    assert RunDir(run).status().finalised
    assert hub.asked == []


def test_half_a_snapshot_is_not_taken_for_a_whole_one(
    hub: Hub, home: Path, names: dict[str, str], call: Callable[..., Answer], environment: dict[str, str]
) -> None:
    hub.faults["GET .*safetensors"] = [(403, {})]
    assert call("fetch", *options("models", names["models"])).code == 2
    command = [sys.executable, "-m", "boomgen", "fetch", *options("models", names["models"])]
    done = subprocess.run(command, env=environment | OFFLINE, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        2,
        f"boomgen: model {names['models']} is not whole in the cache {home}/hub, and HF_HUB_OFFLINE is set; run "
        "`boomgen fetch` with the same options where there is network, or pass a local copy with --model\n",
    )
