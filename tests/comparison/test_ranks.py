"""The exact signed-rank test against all choices of signs, and against scipy where that is exact."""

import itertools
import math

import pytest

from stn_fast.comparison.ranks import signed_rank_p


def exact_p(differences):
    """The definition: how many of all choices of signs give a rank sum as far from its mean."""
    sizes = sorted(map(abs, differences))
    places = [[place for place, size in enumerate(sizes, 1) if size == abs(each)] for each in differences]
    ranks = [sum(of_one) / len(of_one) for of_one in places]
    middle = sum(ranks) / 2
    seen = abs(sum(rank for rank, each in zip(ranks, differences, strict=True) if each > 0) - middle)
    sums = [sum(itertools.compress(ranks, signs)) for signs in itertools.product((0, 1), repeat=len(ranks))]
    return sum(abs(each - middle) >= seen for each in sums) / len(sums)


WITHOUT_TIES = [[-0.1, -0.2, -0.3], [0.5, -0.1, 0.2, -0.4, 1.0], [-3, -2, -1, -7, 0.5, -6, 4, -9], [2.0]]
WITH_TIES = [[1, 1, -1, 2], [-0.5, -0.5, -0.5, -0.5, 0.5], [3, -3, 2, 2, -1, 1, 1, 4], [1, 1]]
INFINITE = [
    [-1.0, 2.0, -3.0, -4.0, math.inf],
    [-math.inf, -math.inf, 1.0, 2.0, -3.0],
    [math.inf, -math.inf, -math.inf, -0.5, 0.5, -2],
]


@pytest.mark.parametrize("differences", [*WITHOUT_TIES, *WITH_TIES, *INFINITE])
def test_p_is_that_of_all_choices_of_signs(differences):
    assert signed_rank_p(differences) == exact_p(differences)


@pytest.mark.parametrize("differences", WITHOUT_TIES)
def test_p_is_that_of_scipy_without_ties(differences):
    stats = pytest.importorskip("scipy.stats")
    assert signed_rank_p(differences) == pytest.approx(stats.wilcoxon(differences, method="exact").pvalue)


@pytest.mark.parametrize("count", [1, 2, 5, 30, 60])
def test_the_smallest_p_is_that_of_as_many_wins(count):
    assert signed_rank_p([-1.0 - each for each in range(count)]) == 2.0 ** (1 - count)
    assert signed_rank_p([-math.inf] * count) == 2.0 ** (1 - count)


def test_nothing_is_tested_without_a_difference():
    assert signed_rank_p([]) == 1.0
