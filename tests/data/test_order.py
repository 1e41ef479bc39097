"""Order by arithmetic: permutations, windows, mixtures and draws are functions of their numbers alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from clipkit.data.order import EpochOrder, Mixture, number, permutation, random_bits, uniforms


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


@pytest.mark.parametrize("weights", [[1, 1], [3, 1], [0.7, 0.2, 0.1], [1, 5000]])
def test_a_mixture_gives_each_source_its_share_and_its_places_in_turn(weights):
    mixture = Mixture(weights, seed=5)
    n = 3 * Mixture.BLOCK
    which, places = mixture.at(np.arange(n))
    for source, weight in enumerate(weights):
        mine = places[which == source]
        assert abs(len(mine) / n - weight / sum(weights)) <= 1 / Mixture.BLOCK
        assert mine.tolist() == list(range(len(mine))), "a source's places come in order, none left out"
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
