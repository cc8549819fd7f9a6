"""The queue of an engine: clients take turns, and there is an end to waiting."""

import collections
import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from llama_jax.errors import QueueFull

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Items of several clients, first in, first out for each of them.

    All methods may be called from any thread; one thread takes items out.

    Args:
      limit: most items.

    >>> queue = FairQueue(4)
    >>> queue.put([1, 2, 3], "eager")
    >>> queue.put([4], "other")
    >>> [queue.pop() for _ in range(len(queue))]
    [1, 4, 2, 3]
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._clients: collections.OrderedDict[str, collections.deque[T]]
        self._clients = collections.OrderedDict()

    def __len__(self) -> int:
        with self._lock:
            return self._size()

    def _size(self) -> int:
        return sum(map(len, self._clients.values()))

    def put(self, items: Sequence[T], client: str) -> None:
        """Add items, all or none.

        Raises:
          QueueFull: they do not fit.
        """
        with self._lock:
            if (size := self._size()) + len(items) > self._limit:
                raise QueueFull(
                    f"the queue has {size} samples of at most {self._limit}, and the "
                    f"request adds {len(items)}; try again later"
                )
            self._clients.setdefault(client, collections.deque()).extend(items)

    def head(self) -> T | None:
        """The next item; None if there is none. It stays the next until `pop`."""
        with self._lock:
            return next((items[0] for items in self._clients.values()), None)

    def pop(self) -> T:
        """Take the next item; its client's others wait for the other clients."""
        with self._lock:
            client, items = self._clients.popitem(last=False)
            item = items.popleft()
            if items:
                self._clients[client] = items
            return item

    def remove(self, unwanted: Callable[[T], bool]) -> list[T]:
        """Take all items that a function is true of."""
        removed: list[T] = []
        with self._lock:
            for client, items in list(self._clients.items()):
                removed += filter(unwanted, items)
                items = collections.deque(i for i in items if not unwanted(i))
                if items:
                    self._clients[client] = items
                else:
                    del self._clients[client]
        return removed
