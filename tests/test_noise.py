"""Noise is a pure function of its address; no two addresses share numbers."""

import hashlib
import itertools
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from boomgen.keys import noise_key, secret_of_seed
from boomgen.noise import KEY_BYTES, Stream, address, normal

KEY = bytes(range(16))
A, B, C = (noise_key(secret_of_seed(0), name, 0) for name in ("a", "b", "c"))
WORD = st.integers(0, 2**64 - 1)

# Addresses one apart in each coordinate, and keys one bit apart: where a wrong mapping would make streams meet.
NEIGHBOURS = [
    (key, draw, stream, step)
    for key in (KEY, bytes([KEY[0] ^ 1]) + KEY[1:], KEY[:15] + bytes([KEY[15] ^ 128]), A)
    for draw in (0, 1)
    for stream in Stream
    for step in (0, 1, 2, 3)
]


def reference(key: bytes, draw: int, stream: int, step: int) -> np.random.Generator:
    """numpy's own generator, new, at the documented address: counter words (block, step, stream, draw)."""
    counter = step << 64 | stream << 128 | draw << 192
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little"), counter=counter))


# ---------------------------------------------------------------------------------------------- golden values


@pytest.mark.parametrize(
    ("key", "stream", "step", "draw", "values"),
    [
        (KEY, Stream.FORWARD, 0, 0, [-0.187167898, -1.14455569, 1.04738605, -2.68264771]),
        (KEY, Stream.STEP, 0, 0, [1.05665791, 0.160348654, 0.297862321, -1.19566119]),
        (KEY, Stream.STEP, 39, 0, [-2.98859549, -0.523283124, -1.2689507, -0.0535103902]),
        (KEY, Stream.STEP, 39, 1, [-0.64329505, -1.06780279, -0.0365476198, -0.325055927]),
        (bytes(16), Stream.FORWARD, 0, 0, [0.059911035, 0.0155596342, -1.16443849, -0.132647127]),
        (b"\xff" * 16, Stream.STEP, 2**64 - 1, 2**64 - 1, [-1.57002711, 0.909145653, -0.351571113, -0.154349327]),
        (A, Stream.FORWARD, 0, 0, [0.0340650864, -1.26166427, -1.31382751, -1.51482522]),
    ],
    ids=itertools.count(),
)
def test_golden_values(key, stream, step, draw, values):
    """These numbers are frozen for ever: a run made today is remade bit for bit by any later version."""
    assert np.array_equal(normal([key], stream, step, (4,), draw)[0], np.array(values, np.float32))


@pytest.mark.parametrize(
    ("keys", "stream", "step", "shape", "draw", "digest"),
    [
        (
            [A, B, C],
            Stream.FORWARD,
            0,
            (3, 32, 32),
            0,
            "0da1fa184c91f8ae92f300529ee98872e1c177743518e2a1fa07c4b69967a09a",
        ),
        (
            [A, B, C],
            Stream.STEP,
            124,
            (3, 32, 32),
            0,
            "dfa03b45e70097a58843d7cad4faf3cd3242d4cedc39619af6643f2e2e92bc05",
        ),
        ([KEY], Stream.STEP, 1, (3, 256, 256), 3, "aa330cf93fb722bb8f8dc62b1c17654241949d4c1fc5668e92068854b65ff2b4"),
    ],
    ids=itertools.count(),
)
def test_golden_hash(keys, stream, step, shape, draw, digest):
    """The same for whole batches, long enough to meet the rare branches of the ziggurat."""
    noise = normal(keys, stream, step, shape, draw)
    assert (noise.dtype, noise.shape) == (np.float32, (len(keys), *shape))
    assert hashlib.sha256(noise.astype("<f4").tobytes()).hexdigest() == digest


# ------------------------------------------------------------------------------------ a function of the address


@settings(max_examples=200, deadline=None)
@given(st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES), st.sampled_from(Stream), WORD, WORD, st.integers(1, 33))
def test_equals_a_new_numpy_generator(key, stream, step, draw, size):
    """Re-addressing the one generator of a thread is a shortcut, never another result."""
    expected = reference(key, draw, stream, step).standard_normal(size, np.float32)
    assert np.array_equal(normal([key], stream, step, (size,), draw)[0], expected)


@pytest.mark.parametrize("batch", [[A], [A, B, C], [C, A, B], [B, A], [A] * 5, [B, C] * 8 + [A]])
@pytest.mark.parametrize("shape", [(3, 5, 7), (4, 8, 8)])
def test_row_does_not_depend_on_its_batch(batch, shape):
    """Alone, among others, moved, repeated: the row of key A has the same bits."""
    alone = reference(A, 0, Stream.STEP, 9).standard_normal(shape, np.float32)
    rows = normal(batch, Stream.STEP, 9, shape)
    for row, key in zip(rows, batch, strict=True):
        assert np.array_equal(row, alone) == (key == A)


@pytest.mark.parametrize("before", [1, 2, 3, 5, 7, 1001])
def test_row_does_not_depend_on_earlier_draws(before):
    """An odd number of floats leaves half a word behind in the generator; the next address must not see it."""
    expected = reference(A, 0, Stream.FORWARD, 0).standard_normal(9, np.float32)
    normal([B], Stream.STEP, 5, (before,))
    assert np.array_equal(normal([A], Stream.FORWARD, 0, (9,))[0], expected)


def test_threads_do_not_disturb_each_other():
    """Four threads at once, each in its own order, draw what one thread draws."""
    addresses = [(key, stream, step) for key in (A, B) for stream in Stream for step in range(50)]
    draw = lambda a: normal([a[0]], a[1], a[2], (5, 31, 31))[0].tobytes()  # noqa: E731
    serial = {a: draw(a) for a in addresses}

    def shuffled(seed):
        order = random.Random(seed).sample(addresses, len(addresses))
        return {a: draw(a) for a in order}

    with ThreadPoolExecutor(4) as pool:
        assert all(drawn == serial for drawn in pool.map(shuffled, range(4)))


@pytest.mark.parametrize("length", [0, 8, 15, 17, 32])
def test_wrong_key_length(length):
    with pytest.raises(ValueError, match=rf"^a noise key of {length} bytes, expected 16$"):
        normal([bytes(length)], Stream.STEP, 0, (1,))


@pytest.mark.parametrize("word", [-1, 2**64])
def test_address_out_of_range_is_an_error(word):
    """A step that does not fit its counter word must not wrap round to another address."""
    with pytest.raises(OverflowError):
        address(KEY, 0, Stream.STEP, word)


# ------------------------------------------------------------------------------- no two addresses share numbers


def records(keys: list[bytes], draws: np.ndarray, streams: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """address() for every key x every (draw, stream, step): uint64 of shape (keys, addresses, 6)."""
    out = np.zeros((len(keys), len(steps), 6), np.uint64)
    out[:, :, :2] = np.frombuffer(b"".join(keys), "<u8").reshape(-1, 1, 2)
    out[:, :, 3], out[:, :, 4], out[:, :, 5] = steps, streams, draws
    return out


def test_ten_million_addresses_are_ten_million_streams():
    """10^4 rows (2500 sources x 4 variants) x 4 draws x (1 forward + 249 steps) of one run: all different."""
    secret = secret_of_seed(0)
    keys = [noise_key(secret, f"image {source}", variant) for source in range(2500) for variant in range(4)]
    one_row = [(Stream.FORWARD, 0), *((Stream.STEP, step) for step in range(1, 250))]
    draws, streams, steps = np.array([(d, *a) for d in range(4) for a in one_row], np.uint64).T

    # A 64-bit digest of each 48-byte record: different digests prove different records, equal records give equal ones.
    odd = np.random.default_rng(1).integers(0, 2**63, 6, np.uint64) * 2 + 1
    digests = np.empty((len(keys), len(steps)), np.uint64)
    sample = random.Random(2)
    for first in range(0, len(keys), 500):
        block = records(keys[first : first + 500], draws, streams, steps)
        assert not block[:, :, 2].any(), "the lowest counter word is the room in which one draw counts its blocks"
        digests[first : first + 500] = block @ odd
        for _ in range(25):  # the vectorised mapping is address()
            row, column = sample.randrange(500), sample.randrange(len(steps))
            parts = address(keys[first + row], int(draws[column]), int(streams[column]), int(steps[column]))
            assert block[row, column].tobytes() == b"".join(part.tobytes() for part in parts)

    ordered = np.sort(digests, axis=None)
    assert ordered.size == 10**7
    assert not (ordered[1:] == ordered[:-1]).any()


def test_a_draw_never_reaches_the_next_address():
    """A draw of 3 x 1024 x 1024 moves only the lowest counter word, by 10^-13 of the way to the next address."""
    key, counter = address(KEY, draw=7, stream=Stream.STEP, step=2**64 - 1)
    bits = np.random.Philox(key=key, counter=counter)
    np.random.Generator(bits).standard_normal(3 * 1024 * 1024, np.float32)
    after = bits.state["state"]["counter"]
    assert np.array_equal(after[1:], counter[1:])
    assert counter[0] == 0
    assert 10**5 < after[0] < 10**6


def test_neighbouring_addresses_share_no_raw_word():
    """64 neighbouring addresses x 20 000 raw 64-bit words: no word twice, so no stretch of one stream in another."""
    raw = [
        np.random.Philox(key=key, counter=counter).random_raw(20_000)
        for key, counter in (address(*place) for place in NEIGHBOURS)
    ]
    assert len(np.unique(raw)) == len(NEIGHBOURS) * 20_000


# ------------------------------------------------------------------------------------------------- normality


def kolmogorov(sample: np.ndarray) -> float:
    """sqrt(n) sup |F_n - Phi|; above 2.7 once in a million samples that are really normal."""
    ordered = np.sort(sample.astype(np.float64).ravel())
    phi = torch.special.ndtr(torch.from_numpy(ordered)).numpy()
    n = len(ordered)
    rank = np.arange(n)
    return float(max((phi - rank / n).max(), ((rank + 1) / n - phi).max()) * np.sqrt(n))


@pytest.mark.parametrize("stream", Stream)
@pytest.mark.parametrize("draw", [0, 1])
def test_one_row_is_standard_normal(stream, draw):
    """One address, a million numbers: mean, variance, third and fourth moment, and the whole distribution."""
    x = normal([A], stream, 17, (1000, 1000), draw).astype(np.float64)
    error = 1 / np.sqrt(x.size)
    assert abs(x.mean()) < 4.5 * error
    assert abs(x.var() - 1) < 4.5 * np.sqrt(2) * error
    assert abs((x**3).mean()) < 4.5 * np.sqrt(15) * error
    assert abs((x**4).mean() - 3) < 4.5 * np.sqrt(96) * error
    assert kolmogorov(x) < 2.7


@pytest.mark.parametrize("position", [0, 1, 2])
def test_one_number_is_standard_normal_across_addresses(position):
    """The same place in 20 000 rows, and in 20 000 steps of one row: the addresses are a fair sample too."""
    across_rows = normal([noise_key(b"s" * 32, str(i), 0) for i in range(20_000)], Stream.STEP, 3, (3,))[:, position]
    across_steps = np.array([normal([KEY], Stream.STEP, step, (3,))[0, position] for step in range(20_000)])
    assert kolmogorov(across_rows) < 2.7
    assert kolmogorov(across_steps) < 2.7


def test_streams_are_uncorrelated():
    """All 2016 pairs of 64 neighbouring addresses, 2^16 numbers each; 5 standard errors."""
    noise = np.stack([normal([key], stream, step, (2**16,), draw)[0] for key, draw, stream, step in NEIGHBOURS])
    correlation = np.corrcoef(noise.astype(np.float64)) - np.eye(len(NEIGHBOURS))
    assert np.abs(correlation).max() < 5 / 2**8
