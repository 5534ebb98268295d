"""Best-fit-decreasing packing, from lengths alone.

The plan is computed once for the whole dataset, independent of workers and world size, so that every rank
and every resumed run sees the same global list of rows.

Best fit decreasing puts the documents, longest first, each into the fullest row that still has room. A
textbook loop asks for that row once a document. Lengths are small integers, though, so all documents of one
length, and all rows with one amount of room left, are the same to the algorithm; both are handled as groups:
`room_count[s]` rows have s tokens of room. One length costs at most one pass over the rooms that it fits in,
and the number of groups is bounded by the capacity, not by the documents: a million documents take well
under a second.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PackPlan:
    """Rows of whole documents: row r holds documents[starts[r]:starts[r + 1]].

    starts: int64[rows + 1]; documents: int64[n], positions in the `lengths` that were packed.
    """

    starts: Int64Array
    documents: Int64Array

    def __len__(self) -> int:
        return len(self.starts) - 1

    def row(self, index: int) -> Int64Array:
        """The documents of one row."""
        return self.documents[self.starts[index] : self.starts[index + 1]]


def one_document_a_row(count: int) -> PackPlan:
    """The plan without packing."""
    return PackPlan(np.arange(count + 1, dtype=np.int64), np.arange(count, dtype=np.int64))


def best_fit_decreasing(lengths: npt.NDArray[np.integer], capacity: int) -> PackPlan:
    """Pack documents into rows of at most `capacity` tokens; deterministic.

    lengths: int[n], each 1 to `capacity`.
    Raises ValueError when a length is outside that.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if sizes.size == 0:
        return PackPlan(np.zeros(1, dtype=np.int64), np.zeros(0, dtype=np.int64))
    if sizes.min() < 1 or sizes.max() > capacity:
        raise ValueError(f"lengths must be 1 to {capacity}, got {sizes.min()} to {sizes.max()}")
    order = np.argsort(-sizes, kind="stable")
    row_of_sorted = _assign(sizes[order], capacity)
    by_row = np.argsort(row_of_sorted, kind="stable")
    counts = np.bincount(row_of_sorted)
    starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int64)
    return PackPlan(starts, order[by_row].astype(np.int64))


def _assign(descending: Int64Array, capacity: int) -> Int64Array:
    """The row of each document, documents given longest first."""
    rows = np.empty(len(descending), dtype=np.int64)
    open_rows = _OpenRows(capacity)
    sizes, first, counts = np.unique(-descending, return_index=True, return_counts=True)
    for size, begin, count in zip(-sizes, first, counts, strict=True):
        placed = 0
        while placed < count:
            taken = open_rows.take_fullest(int(size), int(count) - placed)
            rows[begin + placed : begin + placed + len(taken)] = taken
            placed += len(taken)
    return rows


class _OpenRows:
    """Rows grouped by the tokens of room they have left."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._groups: list[list[Int64Array]] = [[] for _ in range(capacity + 1)]
        self._has_rows = np.zeros(capacity + 1, dtype=bool)
        self._rows_made = 0

    def take_fullest(self, size: int, wanted: int) -> Int64Array:
        """Put one document of `size` into each of up to `wanted` of the fullest rows that have room.

        A row that could take several of them gets the next one in a later call, when it is fullest again.
        Returns the rows' numbers.
        """
        room = self._least_room(size)
        if room is None:
            return self._open(size, wanted)
        group = np.concatenate(self._groups[room])
        taken, left = group[:wanted], group[wanted:]
        self._groups[room] = [left] if len(left) else []
        self._has_rows[room] = bool(len(left))
        return self._fill(taken, room, size, wanted)

    def _least_room(self, size: int) -> int | None:
        room = int(np.argmax(self._has_rows[size:])) + size
        return room if self._has_rows[room] else None

    def _open(self, size: int, wanted: int) -> Int64Array:
        """New rows, each filled with as many documents of `size` as fit, since no other row has room."""
        each = self._capacity // size
        made = -(-wanted // each)
        numbers = np.arange(self._rows_made, self._rows_made + made, dtype=np.int64)
        self._rows_made += made
        taken = np.repeat(numbers, each)[:wanted]
        whole, rest = divmod(wanted, each)
        self._put(numbers[:whole], self._capacity - each * size)
        self._put(numbers[whole:], self._capacity - rest * size)
        return taken

    def _fill(self, group: Int64Array, room: int, size: int, wanted: int) -> Int64Array:
        """Fill each row of `group` with documents of `size`: after one it is the fullest that has room."""
        each = room // size
        used = min(len(group), -(-wanted // each))
        whole, rest = divmod(min(wanted, used * each), each)
        self._put(group[:whole], room - each * size)
        self._put(group[whole : whole + bool(rest)], room - rest * size)
        self._put(group[used:], room)
        return np.repeat(group[:used], each)[:wanted]

    def _put(self, numbers: Int64Array, room: int) -> None:
        if len(numbers):
            self._groups[room].append(numbers)
            self._has_rows[room] = True
