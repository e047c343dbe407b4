"""What a run derives from its one secret: output keys, row order, noise keys, and the commitment to the secret.

Everything is HMAC-SHA256(secret, purpose NUL text). Without the secret nobody can recompute the noise of a guessed
source, so nobody can confirm the guess by redoing the run. In augment runs, whose links are public, the secret is
derived from `--seed`.
"""

import hashlib
import hmac
import secrets
from pathlib import Path

from boomgen.errors import UsageError
from boomgen.noise import KEY_BYTES

SECRET_BYTES = 32


def new_secret() -> bytes:
    """A fresh secret from the operating system."""
    return secrets.token_bytes(SECRET_BYTES)


def secret_of_seed(seed: int) -> bytes:
    """What stands in for the secret in a run whose links are public."""
    return hashlib.sha256(f"boomgen seed {seed}".encode()).digest()


def read_secret(path: Path) -> bytes:
    """The secret in a file of 64 hexadecimal digits."""
    try:
        secret = bytes.fromhex(path.read_text(encoding="ascii").strip())
    except (OSError, ValueError) as err:
        raise UsageError(f"secret file {path}: {err}; expected 64 hexadecimal digits (openssl rand -hex 32)") from err
    if len(secret) != SECRET_BYTES:
        raise UsageError(
            f"secret file {path} holds {len(secret)} bytes, expected {SECRET_BYTES} as 64 hexadecimal digits "
            "(openssl rand -hex 32)"
        )
    return secret


def derive(secret: bytes, purpose: str, text: str = "") -> bytes:
    """32 bytes that nobody can compute without the secret."""
    return hmac.digest(secret, f"{purpose}\0{text}".encode("utf-8", "surrogateescape"), "sha256")


def commitment(secret: bytes) -> str:
    """Pins the secret in the plan without telling it."""
    return derive(secret, "commitment").hex()


def noise_key(secret: bytes, source_key: str, variant: int) -> bytes:
    """The Philox key of one planned row: it follows the source's key, so a longer or re-cut set leaves it as it is."""
    return derive(secret, "noise", f"{variant}\0{source_key}")[:KEY_BYTES]


def shared_noise_key(secret: bytes) -> bytes:
    """The one key of `--noise shared`: every row gets the same noise (Figures 4 and 16 of the paper)."""
    return derive(secret, "noise shared")[:KEY_BYTES]


def output_key(secret: bytes, source_key: str, variant: int) -> str:
    """The opaque name of an anonymized row: 24 hexadecimal digits, no dots."""
    return derive(secret, "key", f"{variant}\0{source_key}").hex()[:24]
