"""Placement: the additive front is that of trying everything, and a search on it finds what a budget allows."""

from __future__ import annotations

import math
from itertools import pairwise, product

import numpy as np
import pytest

from attnc.tuning.front import CHECKS, FrontSearch
from attnc.tuning.placement import additive_front, totals, undominated


def menus(regions: int, options: int, seed: int = 0) -> list[list[tuple[float, float]]]:
    """Options that err more the faster they are, in regions that differ."""
    rng = np.random.default_rng(seed)
    return [
        [(1.0, 0.0)] + [(float(t), float(weight * (1 - t) ** 1.5)) for t in rng.uniform(0.1, 0.9, options)]
        for weight in rng.uniform(0.005, 0.05, regions)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_the_additive_front_is_that_of_all_assignments(seed: int) -> None:
    given, limit = menus(4, 3, seed), 0.05
    every = [totals(given, chosen) for chosen in product(range(4), repeat=4)]
    least = min(seconds for seconds, error in every if error <= limit * 0.999)
    found = [totals(given, chosen) for chosen in additive_front(given, limit)]
    assert found[0] == (4.0, 0.0) and found[-1][0] <= least and found[-1][1] <= limit
    assert undominated(found) == list(range(len(found)))


def test_of_equal_points_one_is_kept_and_the_slowest_comes_first() -> None:
    assert undominated([(1.0, 0.3), (2.0, 0.1), (2.0, 0.1), (3.0, 0.2), (1.5, 0.3)]) == [1, 0]


def search(given, power: float, **more) -> FrontSearch:
    """A model whose errors add up in a power, a little off on each batch."""

    def run(chosen):
        total = sum(menu[at][1] ** power for menu, at in zip(given, chosen, strict=True)) ** (1 / power)
        return [total * off for off in (1.0, 0.97, 1.03)]

    return FrontSearch(given, run, **more)


@pytest.mark.parametrize("power", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("limit", [0.01, 0.1])
def test_a_search_is_near_the_best_within_the_limit(power: float, limit: float) -> None:
    given = menus(12, 3)
    found = search(given, power)
    best = found.search(limit)[0]
    raised = [[(s, e**power) for s, e in menu] for menu in given]
    least = totals(given, additive_front(raised, (limit / 1.07) ** power)[-1])[0]
    assert best.error <= best.bound <= limit and best.seconds <= 1.1 * least
    assert len(found.tried) <= CHECKS + 1


def test_the_front_is_not_dominated_and_begins_with_what_is_exact() -> None:
    found = search(menus(8, 3), 1.5, constant=1.0)
    found.search(0.03)
    points = [(t.seconds, t.error) for t in found.front()]
    assert points[0] == (9.0, 0.0) and len(points) > 3
    assert all(a[0] > b[0] and a[1] < b[1] for a, b in pairwise(points))


def test_what_is_found_is_not_slower_than_one_setting_everywhere() -> None:
    regions, near = 10, (1,) * 10
    given = [[(1.0, 0.0), (0.5, 0.05), (0.6, 0.04)] for _ in range(regions)]

    def run(chosen):  # errors that cancel only where every region has the first setting
        return [0.001 if chosen == near else sum(at > 0 for at in chosen)]

    assert FrontSearch(given, run, uniform=[near]).search(0.02)[0].chosen == near


def test_few_assignments_are_all_tried_and_a_seed_gives_the_same() -> None:
    few = search(menus(2, 3), 1.0)
    few.search(0.01)
    assert len(few.tried) == 16
    runs = [search(menus(10, 3), 2.0, seed=3) for _ in range(2)]
    assert runs[0].search(0.01) == runs[1].search(0.01) and list(runs[0].tried) == list(runs[1].tried)


def test_a_model_that_no_option_serves_stays_exact() -> None:
    given = menus(10, 3)
    found = FrontSearch(given, lambda chosen: [math.inf])
    assert [t.chosen for t in found.search(0.5)] == [found.exact] and [t.error for t in found.front()] == [0.0]
