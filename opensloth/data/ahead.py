"""The batches of the next step, made while this one trains."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from opensloth.data.batch import Batch


class Ahead:
    """Makes one step's batches ahead, in a thread. What fails there is raised where that step is asked for."""

    def __init__(self, make: Callable[[int], list[Batch]], total: int) -> None:
        """make: the batches of a step, by its number alone. total: steps there are."""
        self._make, self._total = make, total
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._coming: tuple[int, Future[list[Batch]]] | None = None

    def __enter__(self) -> Ahead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(cancel_futures=True)

    def batches(self, step: int) -> list[Batch]:
        """Those of `step`; the next step's are begun."""
        coming, self._coming = self._coming, None
        mine = coming[1].result() if coming and coming[0] == step else self._make(step)
        if step + 1 < self._total:
            self._coming = step + 1, self._thread.submit(self._make, step + 1)
        return mine
