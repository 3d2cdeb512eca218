"""Samples into rows of at most `max_length` tokens, with little room left over."""

import bisect
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

WINDOW = 65536
"""Samples packed together; more would take longer and fill no better."""


def pack(lengths: Sequence[int] | NDArray[np.int64], capacity: int, seed: Sequence[int]) -> list[list[int]]:
    """Groups of places in `lengths` whose lengths add up to at most `capacity`; every place is in one group.

    Best fit, longest first, in windows of a seeded order, and the groups in a seeded order: nothing but lengths,
    capacity and seed decides. Lengths above `capacity` are errors of the caller.
    """
    draw = np.random.default_rng(list(seed))
    order = draw.permutation(len(lengths))
    groups: list[list[int]] = []
    for begin in range(0, len(order), WINDOW):
        window = order[begin : begin + WINDOW]
        taken = np.asarray(lengths)[window]
        groups += [window[group].tolist() for group in _best_fit(taken, capacity)]
    return [groups[number] for number in draw.permutation(len(groups))]


def _best_fit(lengths: NDArray[np.int64], capacity: int) -> list[list[int]]:
    groups: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # groups by the room they have left
    rooms: list[int] = []  # the rooms above that some group has, ascending
    for place in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[place])
        at = bisect.bisect_left(rooms, length)
        if at == len(rooms):
            group, room = len(groups), capacity
            groups.append([])
        else:
            room = rooms[at]
            group = with_room[room].pop()
            if not with_room[room]:
                del rooms[at]
        groups[group].append(place)
        left = room - length
        if not with_room[left]:
            bisect.insort(rooms, left)
        with_room[left].append(group)
    return groups
