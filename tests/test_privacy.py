"""An anonymize run: without its secret nobody gets from an output to its source, and the data set tells nothing."""

import hashlib
import io
import json
import os
import re
import stat
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from boomgen import catalog, cli, images, index, keys, manifest, plan
from boomgen.errors import BoomgenError, UsageError
from boomgen.finalise import finalise
from boomgen.job import Job, Launch
from boomgen.plan import Plan, PlannedRow, planned_rows
from boomgen.prepare import prepare
from boomgen.run import RunDir
from boomgen.worker import Worker
from tests.conftest import SECRET
from tests.finished import PEOPLE, finish, make_shards, pixel_hash, samples, write_portraits
from tests.scanner import leaks

CLASSES = ("patients", "healthy_volunteers")


@pytest.fixture(scope="module")
def tiny(plan_tiny, tmp_path_factory) -> RunDir:
    return finish(plan_tiny(tmp_path_factory.mktemp("privacy") / "run"))


@pytest.fixture(scope="module")
def portraits(tmp_path_factory) -> Path:
    """A source whose every name, text chunk and EXIF entry tells who is shown."""
    return write_portraits(tmp_path_factory.mktemp("saint_mary_hospital") / "portrait_source")


def rows_of(run: RunDir) -> list[dict]:
    return manifest.read(run.manifest).to_pylist()


# The known-seed attack: redo the run on a guessed source and compare


def guesses(published: Plan) -> list[bytes]:
    """Secrets that an attacker tries: seeds, and whatever the plan holds, as it is and hashed."""
    texts = set(re.findall(r'"([^"]*)"', published.to_bytes().decode()))
    from_plan = [bytes.fromhex(text) for text in texts if re.fullmatch(r"(?:[0-9a-f]{2}){16,}", text)]
    from_plan += [hashlib.sha256(text.encode()).digest() for text in sorted(texts)]
    whole = hashlib.sha256(published.to_bytes()).digest()
    return [*(keys.secret_of_seed(seed) for seed in range(51)), *from_plan, whole, b"", bytes(32)]


def outputs(worker: Worker, secret: bytes, numbers: range) -> list[str]:
    """Pixel hashes of these source rows under that secret, as the run's code makes them."""
    sources = worker.index.take(numbers)
    rows = [PlannedRow(0, 0, -1, row, "", keys.noise_key(secret, row.key, 0)) for row in sources]
    loaded = worker.load(rows)
    (pixels,), _ = worker.sample(loaded)
    return [pixel_hash(images.unfit(pixels[i].numpy(), item.box)) for i, item in enumerate(loaded) if item.box]


def test_a_guessed_source_is_confirmed_with_the_secret_only(tiny):
    """The attacker knows the images, the model, the plan and the data set, but not RUN/secret."""
    published = {pixel_hash(Image.open(io.BytesIO(members["png"]))) for members in samples(tiny).values()}
    worker, guessed = Worker(tiny), range(20, 28)
    candidates = guesses(tiny.plan)
    assert len(candidates) > 90
    assert bytes.fromhex(tiny.plan.secret_commitment) in candidates
    for secret in candidates:
        assert not published & set(outputs(worker, secret, guessed))
    expected = {row["source_row"]: row["pixel_sha256"] for row in rows_of(tiny)}
    secret = bytes.fromhex((tiny.path / "secret").read_text())
    assert outputs(worker, secret, guessed) == [expected[row] for row in guessed]


def test_the_attack_works_where_the_seed_is_public(plan_tiny, tmp_path):
    """The same attack finds an augment run's outputs: it is the secret that stops it."""
    run = finish(plan_tiny(tmp_path / "run", mode="augment", seed=17))
    published = {pixel_hash(Image.open(io.BytesIO(members["png"]))) for members in samples(run).values()}
    worker = Worker(run)
    found = [n for n, secret in enumerate(guesses(run.plan)[:51]) if published & set(outputs(worker, secret, range(8)))]
    assert found == [17]


# Output keys


def test_keys_are_opaque_and_follow_the_secret(plan_tiny, tiny_source, tiny_model, tmp_path):
    def planned(name: str, secret: bytes | None) -> dict[str, str]:
        file = tmp_path / f"{name}.secret"
        file.write_text((secret or b"").hex())
        job = Job(mode="anonymize", dataset=str(tiny_source), model=str(tiny_model), t_boom="0.4", steps=10)
        launch = Launch(out=str(tmp_path / name), device="cpu", secret_file=str(file) if secret else None)
        run = prepare(job, launch)
        rows = planned_rows(run.plan, run.index, run.secret, range(run.plan.rows))
        return {row.source.key: row.key for row in rows}

    one, same, other, fresh, fresher = (
        planned(name, secret)
        for name, secret in [("a", SECRET), ("b", SECRET), ("c", SECRET[::-1]), ("d", None), ("e", None)]
    )
    for found in (one, other, fresh, fresher):
        assert len(set(found.values())) == 100
        assert all(re.fullmatch("[0-9a-f]{24}", key) for key in found.values())
    assert one == same
    for first, second in [(one, other), (one, fresh), (fresh, fresher)]:
        assert not set(first.values()) & set(second.values())


def test_a_run_with_the_same_secret_is_the_same_run(tiny, plan_tiny, tmp_path):
    assert samples(finish(plan_tiny(tmp_path / "again"))) == samples(tiny)


# Row order tells nothing


ROWS = 2048


@pytest.fixture(scope="module")
def telling_order(plan_tiny, tmp_path_factory) -> RunDir:
    """A planned run whose source order, file sizes and labels all rise together."""
    home = tmp_path_factory.mktemp("order")
    for number in range(ROWS):
        path = home / "source" / f"class_{number // 256}" / f"{number:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(100 + number // 2))
    return plan_tiny(home / "run", dataset=str(home / "source"), split=None)


def ranks(values: list[int]) -> np.ndarray:
    """Ranks from 1, ties at their mean rank."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def spearman(run: RunDir, secret: bytes) -> dict[str, tuple[float, float]]:
    """95 % intervals of the rank correlation of output order with source order, file size and label.

    Fisher's z with the standard error of Bonett & Wright, Psychometrika 65 (2000).
    """
    rows = planned_rows(run.plan, run.index, secret, range(run.plan.rows))
    assert sorted(row.source_row for row in rows) == list(range(run.plan.rows))
    about = {
        "source order": [row.source_row for row in rows],
        "file size": [row.source.size for row in rows],
        "label": [row.source.label for row in rows],
    }
    found = {}
    for name, values in about.items():
        rho = float(np.corrcoef(np.arange(len(rows)), ranks(values))[0, 1])
        rho = min(rho, 1 - 1e-12)
        error = 1.96 * np.sqrt((1 + rho**2 / 2) / (len(rows) - 3))
        found[name] = (float(np.tanh(np.arctanh(rho) - error)), float(np.tanh(np.arctanh(rho) + error)))
    return found


def correlated(run: RunDir, secret: bytes) -> set[str]:
    """What the output order is seen to follow: the interval leaves out 0."""
    return {name for name, (low, high) in spearman(run, secret).items() if not low <= 0 <= high}


def test_row_order_follows_neither_source_nor_size_nor_label(telling_order):
    assert not correlated(telling_order, SECRET)
    for low, high in spearman(telling_order, SECRET).values():
        assert high - low < 0.09  # narrow enough to mean something


def test_the_same_check_sees_an_order_that_tells(telling_order, monkeypatch):
    monkeypatch.setattr(plan, "permuted", lambda secret, n, positions: np.asarray(positions))
    assert correlated(telling_order, SECRET) == {"source order", "file size", "label"}


def test_the_same_check_sees_an_order_that_tells_a_little(telling_order, monkeypatch):
    """One row in eight stays where it was."""

    def lazy(secret: bytes, n: int, positions: range) -> np.ndarray:
        moved = np.array([i for i in positions if i % 8])
        order = np.arange(n)
        order[moved] = moved[index.permuted(secret, len(moved), range(len(moved)))]
        return order

    monkeypatch.setattr(plan, "permuted", lazy)
    assert correlated(telling_order, SECRET) == {"source order", "file size", "label"}


def test_over_many_secrets_95_percent_of_the_intervals_hold_0(telling_order):
    held = dict.fromkeys(("source order", "file size", "label"), 0)
    for number in range(40):
        seen = correlated(telling_order, hashlib.sha256(f"secret {number}".encode()).digest())
        for name in held:
            held[name] += name not in seen
    for count in held.values():
        assert 34 <= count <= 40  # 38 expected, less than 34 once in 300 times


# What the data set tells


def needles(run: RunDir, names: tuple[str, ...] = ()) -> list[str | bytes]:
    """All that must not be in the data set: the source's names, hashes and places, the secret and what follows."""
    root = Path(run.plan.source.location)
    found: set[str | bytes] = {*names, *PEOPLE, "jane_doe", "born 1980-02-29", "Saint Mary", "saint_mary"}
    found |= {str(root), root.name, str(run.path), run.path.name, run.plan.model.path, Path(run.plan.model.path).name}
    found |= {run.secret, keys.derive(run.secret, "order"), bytes.fromhex(run.plan.secret_commitment)}
    found |= {
        bytes.fromhex(run.plan.source.index_sha256),
        hashlib.sha256((run.path / "plan.json").read_bytes()).digest(),
    }
    for row in rows_of(run):
        file = (root / row["source_key"]).read_bytes()
        found |= {row["source_key"], Path(row["source_key"]).name, Path(row["source_key"]).stem}
        found |= {bytes.fromhex(row["source_sha256"]), bytes.fromhex(row["noise_key"])}
        found |= {hashlib.new(name, file).digest() for name in ("md5", "sha1", "sha512", "blake2b")}
        found |= {file[:200], pixel_bytes(file)}
    return list(found)


def pixel_bytes(file: bytes) -> bytes:
    return Image.open(io.BytesIO(file)).tobytes()


@pytest.mark.parametrize("linkage", ["private", "public"])
def test_nothing_of_the_source_is_in_the_data_set(plan_tiny, portraits, tmp_path, linkage):
    """With public linkage, source keys are there because they were asked for; the scanner sees each of them."""
    run = finish(plan_tiny(tmp_path / "run_at_home", dataset=str(portraits), split=None, linkage=linkage))
    found = {needle for _, needle in leaks(run.dataset, needles(run))}
    if linkage == "private":
        assert not found
    else:
        assert {row["source_key"] for row in rows_of(run)} <= found
        assert not any(isinstance(needle, bytes) for needle in found)
        assert str(portraits) not in found


@pytest.mark.parametrize("file_format", ["webp", "jpg"])
def test_nothing_is_in_other_formats(plan_tiny, portraits, tmp_path, file_format):
    run = finish(plan_tiny(tmp_path / "run_at_home", dataset=str(portraits), split=None, format=file_format))
    assert not leaks(run.dataset, needles(run))


def test_dropped_labels_leave_no_class_name(plan_tiny, portraits, tmp_path):
    kept = finish(plan_tiny(tmp_path / "kept_labels", dataset=str(portraits), split=None))
    dropped = finish(plan_tiny(tmp_path / "dropped_labels", dataset=str(portraits), split=None, labels="drop"))
    assert {needle for _, needle in leaks(kept.dataset, CLASSES)} == set(CLASSES)
    assert not leaks(dropped.dataset, needles(dropped, CLASSES))


@pytest.fixture
def identities(monkeypatch, portraits) -> str:
    """A named data set whose label is who is shown."""
    entry = catalog.DataSet(
        name="portraits",
        title="Portraits",
        licence="unknown",
        label_is_identity=True,
        model="unused",
        t_boom="0.4",
        size="25 images",
    )
    known = catalog.datasets() | {"portraits": entry}
    monkeypatch.setattr(catalog, "datasets", lambda: known)
    return str(portraits)


def test_labels_that_are_identities_are_dropped(identities, plan_tiny, tmp_path):
    run = finish(plan_tiny(tmp_path / "run_at_home", dataset="portraits", data_dir=identities))
    assert run.plan.job.labels == "drop"
    assert {extension for members in samples(run).values() for extension in members} == {"png", "json"}
    assert not leaks(run.dataset, needles(run, CLASSES))
    assert {(row["label"], row["class_name"]) for row in rows_of(run)} == {(-1, "")}
    assert {row["source_label"] for row in rows_of(run)} == {0, 1}  # the owner still knows
    assert "class_label" not in (run.dataset / "README.md").read_text()


@pytest.mark.parametrize("changes", [{"labels": "keep"}, {"mode": "augment"}], ids=["asked for", "augment"])
def test_labels_that_are_identities_can_be_kept(identities, plan_tiny, tmp_path, changes):
    run = finish(plan_tiny(tmp_path / "run", dataset="portraits", data_dir=identities, **changes))
    assert {needle for _, needle in leaks(run.dataset, CLASSES)} == set(CLASSES)
    assert all(members["cls"] in (b"0", b"1") for members in samples(run).values())


# Who may read what


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(params=[0o000, 0o022, 0o077], ids=lambda mask: f"umask {mask:03o}")
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_an_anonymize_run_is_its_owners_alone(umask, plan_tiny, tmp_path):
    run = finish(plan_tiny(tmp_path / "run"))
    assert mode(run.path) == 0o700
    assert mode(run.path / "secret") == 0o600


def test_an_augment_run_may_be_read(umask, plan_tiny, tmp_path):
    run = finish(plan_tiny(tmp_path / "run", mode="augment", limit=16))
    assert mode(run.path) == 0o755
    assert mode(run.path / "secret") == 0o600
    assert mode(next(run.dataset.glob("data/*.tar"))) & 0o444 == 0o444 & ~umask


@pytest.mark.parametrize("linkage", [None, "private", "public", "none"])
def test_linkage_decides_what_links(plan_tiny, tmp_path, linkage):
    run = finish(plan_tiny(tmp_path / "run", linkage=linkage))
    about = {name for members in samples(run).values() for name in json.loads(members["json"])}
    columns = set(manifest.read(run.manifest).column_names)
    assert run.plan.job.linkage == (linkage or "private")
    assert about >= {"class_name", "t_boom", "abar"}
    assert ("source_key" in about) == ("source_row" in about) == (linkage == "public")
    assert columns.issuperset(manifest.LINK_COLUMNS) == (linkage != "none")
    assert columns.isdisjoint(manifest.LINK_COLUMNS) == (linkage == "none")
    assert (run.path / "secret").exists() == (run.path / "index.parquet").exists() == (linkage != "none")
    assert mode(run.path) == (0o755 if linkage == "public" else 0o700)


def test_destroyed_links_are_nowhere_in_the_run(plan_tiny, portraits, tmp_path):
    run = make_shards(plan_tiny(tmp_path / "run_at_home", dataset=str(portraits), split=None, linkage="none"))
    secret = run.secret
    linking = [bytes.fromhex(row["noise_key"]) for row in part_rows(run)] + [
        row["source_key"] for row in part_rows(run)
    ]
    before = leaks(run.path, [secret, *linking])
    finalise(run)
    assert secret in {needle for _, needle in before}
    assert not leaks(run.path, [secret, *linking])
    assert cli.main(["verify", str(run.path)]) == 0
    for use in (lambda: RunDir(run.path).secret, lambda: RunDir(run.path).index):
        with pytest.raises(BoomgenError, match="nothing can be made again"):
            use()


def part_rows(run: RunDir) -> list[dict]:
    import pyarrow.parquet as pq

    return [row for n in range(run.plan.shards) for row in pq.read_table(run.shard(n) / "manifest.parquet").to_pylist()]


def test_augment_has_no_private_linkage(plan_tiny, tmp_path):
    for linkage in ("private", "none"):
        with pytest.raises(UsageError, match=rf"^--linkage {linkage} with augment; [^\n]*use anonymize$"):
            plan_tiny(tmp_path / "run", mode="augment", linkage=linkage)
