"""What one secret gives: frozen for ever, separate for each purpose, and telling nothing of each other (promise 4)."""

import hashlib
import hmac
import itertools
import re

import pytest

from boomgen.errors import UsageError
from boomgen.keys import (
    commitment,
    derive,
    new_secret,
    noise_key,
    output_key,
    read_secret,
    secret_of_seed,
    shared_noise_key,
)

SECRET = bytes(range(32))


@pytest.mark.parametrize(
    ("made", "message", "golden"),
    [
        (derive(SECRET, "order").hex(), b"order\0", "1fdf76142599ad883614c09a558dc7d01f345ab1f720298b74959a785a6e2e34"),
        (
            derive(SECRET, "key", "a/b.png").hex(),
            b"key\0a/b.png",
            "6c1a26de74cb634ab938a7b3b484982ba4116afb94aef2a91ecad472e7a3e687",
        ),
        (noise_key(SECRET, "train/7.png", 0).hex(), b"noise\x000\0train/7.png", "978c5c90e931cba21382b84dfe0062e3"),
        (noise_key(SECRET, "train/7.png", 1).hex(), b"noise\x001\0train/7.png", "7bef3a4b0e54765a5aa7a440d2440e31"),
        (noise_key(SECRET, "été", 0).hex(), "noise\x000\0été".encode(), "cdb767131e5b19f7959a8d1ecb703c59"),
        (noise_key(SECRET, "caf\udce9", 0).hex(), b"noise\x000\0caf\xe9", "07caf6199715310189dd0cb66d1a4a30"),
        (shared_noise_key(SECRET).hex(), b"noise shared\0", "338e2d62bf28b5b3041a89762a8a12e4"),
        (output_key(SECRET, "train/7.png", 0), b"key\x000\0train/7.png", "711d9de1c5d7e9798048ace0"),
        (output_key(SECRET, "train/7.png", 12), b"key\x0012\0train/7.png", "d6f5d6d0cf26ec8f653dc060"),
        (commitment(SECRET), b"commitment\0", "02a6634b15f248b4414aba0c1e23fe633abb6465f3027d0693c092290a0ca34f"),
    ],
    ids=itertools.count(),
)
def test_golden_values(made, message, golden):
    """Pinned, because another version that derives otherwise could not resume or verify a run; and it is HMAC-SHA256
    of the documented message, cut at the front."""
    assert made == golden
    assert hmac.new(SECRET, message, hashlib.sha256).hexdigest().startswith(made)


@pytest.mark.parametrize(
    ("seed", "golden"),
    [
        (0, "d84014aa0e47f817d74972751b6f5fc2f468371710a9f79a856ca96ca935668e"),
        (1, "74238f50f936afcdc2cb1ea621c61b892cbdb465c280170abf452a3f43f472c0"),
    ],
)
def test_secret_of_seed_is_pinned(seed, golden):
    assert secret_of_seed(seed).hex() == golden


def test_secret_of_seed_keeps_the_whole_seed():
    """torch's CPU generator takes 1 and 1 + 2**32 for the same seed; a run must not."""
    seeds = [0, 1, -1, 10, 1 + 2**32, 2**32, 2**63, 2**64, 1 + 2**64, 1 + 2**128]
    secrets = {secret_of_seed(seed) for seed in seeds}
    assert len(secrets) == len(seeds)
    assert {len(secret) for secret in secrets} == {32}


def test_every_input_counts():
    """Another secret, source, variant or purpose is another key, also where the texts run together."""
    sources = ["", "1", "11", "1/1", "a", "a ", "A", "ä", "a\u0308", "caf\udce9", "café"]
    variants = [0, 1, 11, 111]
    secrets = [SECRET, SECRET[::-1], secret_of_seed(0)]
    places = [(secret, source, variant) for secret in secrets for source in sources for variant in variants]
    made = {noise_key(*place).hex() for place in places} | {output_key(*place) for place in places}
    made |= {shared_noise_key(secret).hex() for secret in secrets} | {commitment(secret) for secret in secrets}
    assert len(made) == 2 * len(places) + 2 * len(secrets)


def test_keys_do_not_depend_on_each_other():
    """An output key is public. It is no prefix of the noise key, of which it would give 12 of 16 bytes away."""
    for variant in range(100):
        public, private = output_key(SECRET, "a", variant), noise_key(SECRET, "a", variant).hex()
        assert public[:8] != private[:8]


@pytest.mark.parametrize("source", ["a.b/c.png", "", "Ada Lovelace/0001.jpg", "caf\udce9"])
def test_output_key_is_a_safe_file_name(source):
    """24 hexadecimal digits: WebDataset cuts a name at its first dot, so a key has none."""
    assert re.fullmatch(r"[0-9a-f]{24}", output_key(SECRET, source, 3))


def test_new_secret():
    assert len(new_secret()) == 32
    assert new_secret() != new_secret()


def test_commitment_tells_the_secrets_apart():
    assert commitment(SECRET) == commitment(bytes(SECRET))
    assert commitment(SECRET) != commitment(SECRET[:-1] + b"\0")
    assert SECRET.hex()[:16] not in commitment(SECRET)


@pytest.mark.parametrize("text", [SECRET.hex(), SECRET.hex() + "\n", f"  {SECRET.hex().upper()}\r\n"])
def test_read_secret(tmp_path, text):
    """What `openssl rand -hex 32 > file` writes, on any system."""
    file = tmp_path / "secret"
    file.write_bytes(text.encode())
    assert read_secret(file) == SECRET


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", " holds 0 bytes, expected 32 as "),
        (b"ab" * 31, " holds 31 bytes, expected 32 as "),
        (b"ab" * 33, " holds 33 bytes, expected 32 as "),
        (b"a" * 63, ": .*; expected "),
        (b"not hexadecimal", ": non-hexadecimal number .*; expected "),
        (bytes(range(128, 160)), ": .*; expected "),
        (None, ": .*No such file.*; expected "),
    ],
)
def test_read_secret_errors(tmp_path, content, problem):
    """One line: the file, what was got, what was expected, what to do. It does not tell what the file holds."""
    file = tmp_path / "secret"
    if content is not None:
        file.write_bytes(content)
    hint = "64 hexadecimal digits (openssl rand -hex 32)"
    with pytest.raises(UsageError, match=f"^secret file {re.escape(str(file))}{problem}{re.escape(hint)}$") as caught:
        read_secret(file)
    assert "\n" not in str(caught.value)
    assert not content or content.decode("latin-1") not in str(caught.value)
