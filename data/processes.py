"""The same work on many things, in several processes."""

import multiprocessing
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from vlmoe.errors import UserError

Work = TypeVar("Work")
Done = TypeVar("Done")


def in_processes(
    function: Callable[[Work], Done],
    work: Sequence[Work],
    workers: int,
    *,
    initializer: Callable[..., None] | None = None,
    initargs: tuple[Any, ...] = (),
    start_method: str | None = None,
    chunksize: int = 1,
) -> Generator[Done, None, None]:
    """The results in order; one worker is this process itself. Closing the iterator drops what has not begun.

    UserError: a process was ended from outside.
    """
    if workers == 1:
        if initializer is not None:
            initializer(*initargs)
        yield from map(function, work)
        return
    context = multiprocessing.get_context(start_method)
    pool = ProcessPoolExecutor(workers, context, initializer=initializer, initargs=initargs)
    try:
        yield from pool.map(function, work, chunksize=chunksize)
    except BrokenProcessPool:
        raise UserError("a process was ended, as happens where memory is short: use fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)
