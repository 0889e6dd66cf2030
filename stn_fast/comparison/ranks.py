"""Wilcoxon's exact signed-rank test, also with ties."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence


def signed_rank_p(differences: Sequence[float]) -> float:
    """The two-sided p-value of Wilcoxon's signed-rank test of ``differences``, none of which is 0; 1 for none.

    It is the share of all 2^n choices of signs whose sum of positive ranks is at least as far from its mean as the
    actual one. Equal sizes share the mean of their ranks; infinite differences, of runs that became non-finite, have
    the highest ranks. (The "exact" p of scipy.stats.wilcoxon is wrong with ties.)
    """
    sizes = sorted(map(abs, differences))
    # Mean ranks doubled, which are whole numbers.
    ranks = [bisect_left(sizes, abs(each)) + bisect_right(sizes, abs(each)) + 1 for each in differences]
    ways = Counter({0: 1})  # numbers of choices of signs by their sum of positive ranks
    for rank in ranks:
        ways += Counter({positive + rank: count for positive, count in ways.items()})
    actual = sum(rank for rank, each in zip(ranks, differences, strict=True) if each > 0)
    distance = abs(2 * actual - sum(ranks))
    as_far = sum(count for positive, count in ways.items() if abs(2 * positive - sum(ranks)) >= distance)
    return as_far / 2 ** len(ranks)
