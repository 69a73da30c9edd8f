# SPDX-License-Identifier: Apache-2.0
"""Which layer the next trials go to: Ansor's rule, on histories whose answer can be worked out by hand."""

from __future__ import annotations

import math

import pytest

from tvmdcn.tuning.allocation import ROUND, Standing, best_so_far, expected_gain, next_layer


def standing(*best: float, flops: float = 1e9, weight: float = 1.0, kind: str = "a") -> Standing:
    """Return a layer whose best time after each round is given."""
    return Standing([time for time in best for _ in range(ROUND)], flops, weight, kind)


def test_best_times_never_rise() -> None:
    assert best_so_far([None, 3.0, 4.0, None, 2.0]) == [math.inf, 3.0, 3.0, 3.0, 2.0]
    assert best_so_far([]) == []


def test_a_layer_alone_is_expected_to_gain_as_the_inverse_of_its_rounds() -> None:
    # 0.8 of the forward hope, time / rounds; nothing was gained over three rounds yet.
    assert expected_gain(standing(6.0), []) == pytest.approx(0.8 * 6.0)
    assert expected_gain(standing(6.0, 6.0, 6.0), []) == pytest.approx(0.8 * 2.0)
    assert expected_gain(Standing([6.0] * (ROUND // 2), 1e9, 1.0, "a"), []) == pytest.approx(0.8 * 6.0)


def test_what_the_last_three_rounds_gained_counts_a_fifth() -> None:
    # Four rounds: 9, 6, 6, 6: three ms in three rounds; and 6 ms / 4 rounds are hoped for.
    assert expected_gain(standing(9.0, 6.0, 6.0, 6.0), []) == pytest.approx(0.2 * 1.0 + 0.8 * 1.5)
    # Of five rounds the first has left the window.
    assert expected_gain(standing(9.0, 6.0, 6.0, 6.0, 6.0), []) == pytest.approx(0.8 * 1.2)


def test_similar_layers_show_what_can_be_reached() -> None:
    slow, fast = standing(8.0, 8.0, 8.0, 8.0), standing(1.0, 1.0, 1.0, 1.0)
    # The fast one does the same work in 1 s; twice that is a hope of 8 - 2, larger than 8 / 4.
    assert expected_gain(slow, [slow, fast]) == pytest.approx(0.8 * 6.0)
    assert expected_gain(slow, [slow, standing(1.0, kind="other")]) == pytest.approx(0.8 * 2.0)
    # A similar layer that is slower yet says nothing against the other hope.
    assert expected_gain(slow, [slow, standing(20.0)]) == pytest.approx(0.8 * 2.0)
    # Four times the work of the fast one: 4 s would be as fast, and twice that is where it is.
    assert expected_gain(standing(8.0, 8.0, 8.0, 8.0, flops=4e9), [fast]) == pytest.approx(0.8 * 2.0)


def test_gains_are_weighted() -> None:
    assert expected_gain(standing(6.0, weight=3.0), []) == pytest.approx(3 * expected_gain(standing(6.0), []))


def test_layers_without_a_time_come_first() -> None:
    assert expected_gain(Standing([], 1e9, 1.0, "a"), []) == math.inf
    assert expected_gain(standing(math.inf), []) == math.inf


def test_the_next_round_goes_where_most_is_expected() -> None:
    layers = [standing(2.0, 2.0, kind="a"), standing(9.0, 9.0, kind="b"), standing(4.0, 4.0, weight=3.0, kind="c")]
    assert next_layer(layers, [0, 1, 2]) == 2
    assert next_layer(layers, [0, 1]) == 1
    assert next_layer(layers, [0]) == 0
    assert next_layer([standing(1.0), standing(1.0)], [0, 1]) == 0, "of equals the first"


def test_in_the_long_run_trials_follow_the_weighted_times() -> None:
    # Two layers that never improve, one nine times the other: the gains are equal when the rounds are as the times.
    rounds = [1, 1]
    for _ in range(200):
        layers = [standing(*[time] * count, kind=str(time)) for time, count in zip((1.0, 9.0), rounds, strict=True)]
        rounds[next_layer(layers, [0, 1])] += 1
    assert rounds[1] / rounds[0] == pytest.approx(9, rel=0.1)
