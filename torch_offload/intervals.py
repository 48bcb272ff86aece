"""Sets of moments in time, as sorted disjoint intervals ``(begin, end)``, half open."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from typing import TypeAlias

Intervals: TypeAlias = list[tuple[int, int]]


def union(intervals: Iterable[tuple[int, int]]) -> Intervals:
    """Joins whatever overlaps or touches; drops what is empty."""
    joined: Intervals = []
    for begin, end in sorted(intervals):
        if begin >= end:
            continue
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((begin, end))
    return joined


def total(intervals: Intervals) -> int:
    """How long they last together."""
    return sum(end - begin for begin, end in intervals)


def intersect(left: Intervals, right: Intervals) -> Intervals:
    """The moments in both."""
    both: Intervals = []
    i = j = 0
    while i < len(left) and j < len(right):
        begin, end = max(left[i][0], right[j][0]), min(left[i][1], right[j][1])
        if begin < end:
            both.append((begin, end))
        if left[i][1] < right[j][1]:
            i += 1
        else:
            j += 1
    return both


def subtract(left: Intervals, right: Intervals) -> Intervals:
    """The moments in `left` that are not in `right`."""
    rest: Intervals = []
    for begin, end in left:
        index = bisect_right(right, begin, key=_end_of)
        while index < len(right) and right[index][0] < end:
            taken_begin, taken_end = right[index]
            if begin < taken_begin:
                rest.append((begin, taken_begin))
            begin = taken_end
            index += 1
        if begin < end:
            rest.append((begin, end))
    return rest


def _end_of(interval: tuple[int, int]) -> int:
    return interval[1]


def most_at_once(sets: Iterable[Intervals]) -> int:
    """How many of the sets hold a moment in common, at most."""
    steps: list[tuple[int, int]] = []
    for intervals in sets:
        for begin, end in intervals:
            steps += [(begin, 1), (end, -1)]
    count = most = 0
    for _, step in sorted(steps):  # at one moment, ends come before begins
        count += step
        most = max(most, count)
    return most
