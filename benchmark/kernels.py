"""Loops over scores, compiled by numba: numbers in, numbers out. Importing this takes a second, so its users do it late."""

import numba
import numpy as np

TILE = 256  # scores at a time, so that their bins are found in vectors


def compiled(loop):
    try:
        return numba.njit(nogil=True, cache=True)(loop)
    except RuntimeError:  # no folder for the cache can be written
        return numba.njit(nogil=True)(loop)


@compiled
def table(rising, n):
    """Bins of some thresholds, for `place`: (below, low, scale, last).

    32 bins a threshold cut their range; below[i] is the number of thresholds under bin i. Most bins hold none, which ends a
    search at once. `(x - low) * scale` never falls where x rises, so the bins are exact.
    """
    p, one = len(rising), np.uint32(1)
    low, span = rising[0], rising[p - 1] - rising[0]
    last = np.float32(min(32 * p, n))
    scale = last / span if span > np.float32(1e-30) else np.float32(1e30)
    below = np.zeros(np.int32(last) + 3, np.uint32)
    for t in rising:  # bins of thresholds: 1 to last + 1; bin 0 is for scores far under them
        below[np.int32(min((t - low) * scale, last)) + 2] += one
    for i in range(1, len(below)):
        below[i] += below[i - 1]
    return below, low, scale, last


@compiled
def place(part, rising, below, low, scale, last, bins, found):
    """found[i] = number of thresholds at or under part[i]; O(1) each. `bins` is room to work in."""
    one = np.uint32(1)
    for i in range(len(part)):  # apart from the search, so that this loop runs in vectors
        bins[i] = np.int32(max(min((part[i] - low) * scale, last), np.float32(-1))) + 1
    for i in range(len(part)):
        left, right = below[bins[i]], below[bins[i] + one]
        while left < right:
            middle = (left + right) >> one
            if rising[middle] <= part[i]:
                left = middle + one
            else:
                right = middle
        found[i] = left


@compiled
def count(scores, top, above):
    """above[q, j] = number of scores[q] >= top[q, j]: each score is tallied at its place among the thresholds.

    scores (B, N) and top (B, P) float32, top descending and filled up with -inf; above (B, P) int64, zeros.
    """
    bins, found = np.empty(TILE, np.uint32), np.empty(TILE, np.uint32)
    tally = np.empty(top.shape[1] + 1, np.int64)  # tally[i]: scores with i thresholds at or under them
    for row in range(len(top)):
        p = 0
        while p < top.shape[1] and top[row, p] > -np.inf:
            p += 1
        if p == 0:
            continue
        rising = top[row, :p][::-1].copy()
        below, low, scale, last = table(rising, scores.shape[1])
        tally[:] = 0
        for at in range(0, scores.shape[1], TILE):
            part = scores[row, at : at + TILE]
            place(part, rising, below, low, scale, last, bins, found)
            for i in range(len(part)):
                tally[found[i]] += 1
        total = 0
        for j in range(p):
            total += tally[p - j]
            above[row, j] = total


@compiled
def mixtures(before, after, columns, own, turns, stages, ap, first, positives):
    """Rank galleries whose items pass from one score to another, one by one: `benchmark.mixtures` says what comes out.

    Every score finds its place once among all scores that the query's positives ever have. An order of re-embedding then is
    a table of tallies by stage and place, whose running sum is that of the whole gallery at each stage.

    Args:
        before, after: (B, N) float32 scores of each item until its turn and from then on; overwritten.
        columns: (B, P) int64 positives of each query, filled up with N or more.
        own: (B,) int64 the query's own item, which is no candidate; N = none.
        turns: (K, N) int32 stage from which on an item has its later score, in each of K orders; `stages` = never.
        ap, first: (K, S, B) float64 and int64, out.
        positives: (B,) int64, out.
    """
    n = before.shape[1]
    bins, tile = np.empty(TILE, np.uint32), np.empty(TILE, np.uint32)
    places = np.empty((2, n), np.uint32)
    for row in range(len(before)):
        kept = 0
        items = np.empty(2 * columns.shape[1], np.int64)  # of each threshold
        values = np.empty(2 * columns.shape[1], np.float32)
        for c in columns[row]:
            if c < n and c != own[row]:
                values[kept], values[kept + 1] = before[row, c], after[row, c]
                items[kept] = items[kept + 1] = c
                before[row, c] = after[row, c] = -np.inf  # only negatives are counted
                kept += 2
        if own[row] < n:
            before[row, own[row]] = after[row, own[row]] = -np.inf
        positives[row] = kept // 2
        if kept == 0:
            ap[:, :, row], first[:, :, row] = np.nan, 0
            continue
        order = np.argsort(values[:kept], kind="mergesort")
        rising = values[:kept][order]
        below, low, scale, last = table(rising, n)
        for side in range(2):
            scores = before[row] if side == 0 else after[row]
            for at in range(0, n, TILE):
                part = scores[at : at + TILE]
                place(part, rising, below, low, scale, last, bins, tile)
                places[side, at : at + len(part)] = tile[: len(part)]
        start = np.zeros(kept + 1, np.int64)
        for i in range(n):
            start[places[0, i]] += 1
        for k in range(len(turns)):
            change = np.zeros((stages, kept + 1), np.int64)
            change[0] = start
            for i in range(n):
                turn = turns[k, i]
                if turn < stages and places[0, i] != places[1, i]:
                    change[turn, places[0, i]] -= 1
                    change[turn, places[1, i]] += 1
            tally = np.zeros(kept + 1, np.int64)
            for stage in range(stages):
                tally += change[stage]
                total, seen, above, i = 0.0, 0, 0, kept - 1
                while i >= 0:  # thresholds from the highest down, equal ones together
                    above, level, active = above + tally[i + 1], rising[i], 0
                    while i >= 0 and rising[i] == level:
                        late = order[i] % 2 == 1
                        active += late == (turns[k, items[order[i]]] <= stage)
                        i -= 1
                    if active:
                        if seen == 0:
                            first[k, stage, row] = above + 1
                        seen += active
                        for _ in range(active):
                            total += seen / (seen + above)
                ap[k, stage, row] = total / seen
