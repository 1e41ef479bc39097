"""Order by arithmetic: permutations, windows, mixtures and draws are functions of their numbers alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from clipkit.data.order import EpochOrder, Mixture, number, permutation, random_bits, uniforms

FIRST = [
    24,
    6,
    15,
    7,
    22,
    20,
    14,
    19,
    9,
    28,
    8,
    21,
    10,
    11,
    16,
    23,
    17,
    12,
    13,
    18,
    29,
    30,
    1,
    3,
    2,
    0,
    4,
    5,
    27,
    26,
    25,
]
FIFTH = [131, 362, 152, 387, 1, 27, 33, 262, 313, 270, 289, 231, 201, 237, 62, 192, 182, 77]


def splitmix64(key: int, counter: int) -> int:
    """Steele, Lea and Flood's generator in Python integers."""
    mask = (1 << 64) - 1
    z = (key + (counter + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_random_bits_are_splitmix64():
    # The first outputs for seed 0 are published with the generator's reference code.
    assert [int(x) for x in random_bits(0, np.arange(3))] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]
    key = number("any", 7)
    assert [int(x) for x in random_bits(key, np.arange(50))] == [splitmix64(key, i) for i in range(50)]


def test_number_tells_apart_what_concatenation_would_join():
    assert len({number(1, 23), number(12, 3), number("1", 23), number("1", "23"), number("123")}) == 5


def test_permutation_is_the_sort_of_the_random_numbers():
    key = number("p")
    assert permutation(key, 100).tolist() == sorted(range(100), key=lambda i: splitmix64(key, i))


@pytest.mark.parametrize("window", [1, 3, 7, 100])
def test_an_epoch_holds_every_sample_once_and_epochs_differ(window):
    counts = [5, 0, 1, 12, 7, 3, 3]
    order = EpochOrder(counts, seed=3, window=window)
    epochs = [order.at(epoch, np.arange(31)).tolist() for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(31))
    assert len({tuple(epoch) for epoch in epochs}) == 3
    other = EpochOrder(counts, seed=4, window=window)
    assert other.at(0, np.arange(31)).tolist() != epochs[0]


def test_any_position_is_found_without_the_ones_before():
    order = EpochOrder([40] * 10, seed=1, window=2)
    whole = order.at(5, np.arange(400))
    for position in (399, 0, 123, 77, 250):
        fresh = EpochOrder([40] * 10, seed=1, window=2)
        assert fresh.at(5, np.array([position]))[0] == whole[position]


def test_a_window_mixes_its_own_shards_and_no_others():
    order = EpochOrder([10] * 8, seed=2, window=2)
    samples = order.at(0, np.arange(80))
    for w in range(4):
        shards = Counter(samples[20 * w : 20 * w + 20] // 10)
        assert sorted(shards.values()) == [10, 10]
    assert len(set(samples[:10] // 10)) == 2, "the two shards of the first window are not mixed"


def test_shards_are_permuted_anew_each_epoch():
    order = EpochOrder([10] * 8, seed=2, window=1)
    shards = [tuple(dict.fromkeys(order.at(epoch, np.arange(80)) // 10)) for epoch in range(4)]
    assert len(set(shards)) == 4 and all(sorted(one) == list(range(8)) for one in shards)


def test_file_order_when_not_shuffled():
    assert EpochOrder([3, 4], seed=0, shuffle=False).at(9, np.arange(7)).tolist() == list(range(7))


def test_resampling_repeats_and_is_reproducible():
    order = EpochOrder([50, 50], seed=0, resample=True)
    drawn = order.at(0, np.arange(1000))
    counts = Counter(drawn.tolist())
    assert max(counts.values()) > 1 and len(counts) > 90
    assert (EpochOrder([50, 50], seed=0, resample=True).at(0, np.array([500]))[0]) == drawn[500]


def test_the_first_epochs_are_those_of_earlier_versions():
    """Written down before the order was divided into parts: a run of then goes on as it would have."""
    order = EpochOrder([5, 0, 1, 12, 7, 3, 3], seed=3, window=3)
    assert order.at(0, np.arange(31)).tolist() == FIRST
    assert EpochOrder([40] * 10, seed=1, window=2).at(5, np.arange(0, 400, 23)).tolist() == FIFTH


def parts_by_hand(counts, seed, parts):
    """(shard, sample) of each part, as the text says: shards permuted, end to end, cut into equal pieces."""
    starts = [sum(counts[:s]) for s in range(len(counts))]
    line = [
        (s, starts[s] + i)
        for s in permutation(number(seed, "", "parts", parts), len(counts)).tolist()
        for i in range(counts[s])
    ]
    n = len(line)
    return [line[n * k // parts : n * (k + 1) // parts] for k in range(parts)]


@pytest.mark.parametrize("parts", [2, 3, 4, 8])
@pytest.mark.parametrize("counts", [[5, 0, 1, 12, 7, 3, 3], [40] * 12, [1] * 9, [100]])
def test_parts_are_equal_lines_of_their_own_samples_and_shards(counts, parts):
    n, expected = sum(counts), parts_by_hand(counts, 7, parts)
    order = EpochOrder(counts, seed=7, window=2 * parts, parts=parts)
    epochs, inside = order.epochs(np.arange(4 * n))
    seen = np.array([order.at(int(e), np.array([p]))[0] for e, p in zip(epochs, inside)])
    for part, own in enumerate(expected):
        mine, of = seen[part::parts], epochs[part::parts]
        for epoch in range(2):
            assert sorted(mine[of == epoch]) == sorted(sample for _, sample in own)
        # Window after window, two of its shards are read at a time, and it says which.
        upcoming, at = order.upcoming(0, part), 0
        for _ in range(4):
            shards = next(upcoming)
            assert len(shards) <= 2 and set(shards) <= {shard for shard, _ in own}
            length = sum(shard in shards for shard, _ in own)
            got = {int(np.searchsorted(np.cumsum(counts), s, side="right")) for s in mine[at : at + length]}
            assert got <= set(shards)
            at += length
    if n % parts == 0:
        assert sorted(seen[:n]) == list(range(n)) == sorted(seen[n : 2 * n]) and list(seen[:n]) != list(
            seen[n : 2 * n]
        )


def test_parts_depend_on_seed_and_shards_and_their_order_on_the_epoch_too():
    make = lambda **options: EpochOrder([6] * 8, **{"seed": 1, "parts": 2, "window": 4, **options})
    halves = lambda order, epoch: {int(s) for s in order.at(epoch, np.arange(0, 48, 2))}
    assert halves(make(), 0) == halves(make(), 5) and len(halves(make(), 0)) == 24
    assert halves(make(seed=2), 0) != halves(make(), 0) or halves(make(seed=3), 0) != halves(make(), 0)
    assert make().at(0, np.arange(48)).tolist() != make().at(1, np.arange(48)).tolist()
    assert make(shuffle=False).at(3, np.arange(6)).tolist() == [0, 24, 1, 25, 2, 26]


@pytest.mark.parametrize("parts", [1, 3])
def test_a_substitute_is_of_the_same_window(parts):
    counts = [10] * 12
    order = EpochOrder(counts, seed=2, window=6, parts=parts)
    for place in range(0, 120, 7):
        shards = next(order.upcoming(place // parts, place % parts))
        found = {order.substitute(0, place, attempt) // 10 for attempt in range(40)}
        assert found <= set(shards) and len(found) > 1
    assert order.substitute(0, 5, 3) == EpochOrder(counts, seed=2, window=6, parts=parts).substitute(0, 5, 3)


@pytest.mark.parametrize("parts", [1, 2])
def test_resampling_draws_from_a_window_of_shards_and_in_all_from_every_sample_alike(parts):
    counts = [10, 30, 0, 5, 15] * 10
    order = EpochOrder(counts, seed=4, window=4, resample=True, parts=parts)
    # The mean of so many shards; a part has no empty ones.
    upcoming, together = order.upcoming(0), {1: 48, 2: 31}[parts]
    shard_of = np.searchsorted(np.cumsum(counts), np.arange(600), side="right")
    drawn = order.at(0, np.arange(0, 20 * together * parts, parts))
    for w in range(5):
        assert set(shard_of[drawn[w * together : (w + 1) * together]]) <= set(next(upcoming))
    many = np.concatenate([order.at(epoch, np.arange(600)) for epoch in range(400)])
    often = np.bincount(many, minlength=600)
    # 240,000 draws of 600: 400 each; a window's shards come together, so that they spread wider than 20.
    assert often.min() > 200 and often.max() < 650
    if parts == 1:
        by_size = [often[[c == counts[s] for s in shard_of]].mean() for c in (5, 10, 15, 30)]
        assert max(by_size) < 1.1 * min(by_size)


@pytest.mark.parametrize("weights", [[1, 1], [3, 1], [0.7, 0.2, 0.1], [1, 5000]])
def test_a_mixture_gives_each_source_its_share_and_its_places_in_turn(weights):
    mixture = Mixture(weights, seed=5)
    n = 3 * Mixture.BLOCK
    which, places = mixture.at(np.arange(n))
    for source, weight in enumerate(weights):
        mine = places[which == source]
        assert abs(len(mine) / n - weight / sum(weights)) <= 1 / Mixture.BLOCK
        assert mine.tolist() == list(range(len(mine))), "a source's places come in order, none left out"
        for position in (0, 1, 777, 10_000, 25_001):
            assert mixture.before(position)[source] == (which[:position] == source).sum()
    again, _ = Mixture(weights, seed=5).at(np.array([12_345]))
    assert again[0] == which[12_345]


def test_a_weight_too_small_to_be_read_is_an_error():
    with pytest.raises(ValueError, match="never be read"):
        Mixture([1, 1e-6], seed=0)


def test_uniforms_are_uniform_and_independent_between_columns():
    draws = uniforms(number("u"), np.arange(20_000), 4)
    assert draws.min() >= 0 and draws.max() < 1
    # 20,000 uniforms: the mean's standard deviation is 0.002, a correlation's 0.007.
    assert np.abs(draws.mean(0) - 0.5).max() < 0.01
    assert np.abs(np.corrcoef(draws.T) - np.eye(4)).max() < 0.04
    assert np.array_equal(uniforms(number("u"), np.array([777]), 4)[0], draws[777])
