"""Pages of an engine: which lane uses which, and which hold a prefix worth keeping.

A page holds a chunk of C tokens. Once prefill has written a whole chunk, its page is
shared with all prompts that begin with the same tokens up to its end. A chunk that no
lane uses stays until its page is needed; the least recently used goes first.
"""

import collections
import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(eq=False)
class _Chunk:
    """A written chunk: its page, and how many lanes use it."""

    page: int
    key: tuple["_Chunk | str", tuple[int, ...]]
    users: int = 0


class LanePages:
    """The pages of a lane, in the order of its slots.

    Attributes:
      pages: ids; the first of them belong to `chunks`.
      root: key of what the tokens depend on besides themselves: an adapter's content.
      chunks: shared chunks at the beginning of the lane.
    """

    def __init__(self, root: str) -> None:
        self.pages: list[int] = []
        self.root = root
        self.chunks: list[_Chunk] = []


class PrefixCache:
    """Pages, free or in use, and the chunks that are shared.

    Args:
      num_pages: of the cache; 0 for a dense cache, whose lanes need none.
      page_size: C.

    >>> cache = PrefixCache(num_pages=4, page_size=2)
    >>> lane = cache.reserve([5, 6, 7], num_slots=6)
    >>> cache.share(lane, [5, 6])
    >>> cache.release(lane)
    >>> other = cache.reserve([5, 6, 8], num_slots=4)
    >>> cache.cached_tokens(other), other.pages[0] == lane.pages[0]
    (2, True)
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages, self._size = num_pages, page_size
        self._free = list(range(num_pages))[::-1]
        self._chunks: dict[tuple[_Chunk | str, tuple[int, ...]], _Chunk] = {}
        self._unused: collections.OrderedDict[_Chunk, None] = collections.OrderedDict()

    @property
    def num_free(self) -> int:
        """Pages with nothing in them."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Pages of chunks that no lane uses."""
        return len(self._unused)

    def free_pages(self) -> tuple[int, ...]:
        """Ids of the pages with nothing in them."""
        return tuple(self._free)

    def shared_pages(self) -> list[int]:
        """Ids of the pages that hold shared chunks, used or not."""
        return [chunk.page for chunk in self._chunks.values()]

    def cached_tokens(self, lane: LanePages) -> int:
        """Tokens at the beginning of a lane that are in shared chunks."""
        return len(lane.chunks) * self._size

    def reserve(
        self, prompt: Sequence[int], num_slots: int, root: str = ""
    ) -> LanePages | None:
        """Take the pages of a new lane; the chunks it can share are among them.

        At least the last token of the prompt is in no shared chunk, because its logits
        have to be computed.

        Args:
          prompt: its tokens.
          num_slots: slots of the prompt and the longest answer.
          root: key of what keys and values depend on besides the tokens.

        Returns:
          The pages; None if there are too few now.
        """
        lane = LanePages(root)
        if not self.num_pages:
            return lane
        while (chunk := self._next_chunk(lane, prompt)) is not None:
            self._use(lane, chunk)
        needed = -(-num_slots // self._size) - len(lane.pages)
        if needed > len(self._free) + len(self._unused):
            self.release(lane)
            return None
        lane.pages += [self._take() for _ in range(needed)]
        return lane

    def advance(self, lane: LanePages, prompt: Sequence[int]) -> bool:
        """Share the next chunk of a lane if another lane has written it since.

        The lane must not have written it itself.

        Returns:
          Whether it was shared; the lane need not read it.
        """
        chunk = self._next_chunk(lane, prompt) if self.num_pages else None
        if chunk is None:
            return False
        own = lane.pages[len(lane.chunks)]
        self._use(lane, chunk)
        self._free.append(own)
        return True

    def share(self, lane: LanePages, tokens: Sequence[int]) -> None:
        """Say that prefill has written the next chunk of a lane.

        Args:
          lane: all of whose earlier chunks are shared.
          tokens: C tokens.
        """
        if not self.num_pages:
            return
        key = (self._last(lane), tuple(tokens))
        assert len(tokens) == self._size, "only whole chunks are shared"
        if key in self._chunks:
            return  # the end of a prompt, which is read again for its logits
        chunk = _Chunk(lane.pages[len(lane.chunks)], key, users=1)
        self._chunks[key] = chunk
        lane.chunks.append(chunk)

    def release(self, lane: LanePages) -> None:
        """Give the pages of a lane back; chunks stay for later prompts."""
        # A chunk is needed by those after it: it must not be evicted before them.
        for chunk in reversed(lane.chunks):
            chunk.users -= 1
            if not chunk.users:
                self._unused[chunk] = None
        self._free += lane.pages[len(lane.chunks) :]

    def _last(self, lane: LanePages) -> _Chunk | str:
        return lane.chunks[-1] if lane.chunks else lane.root

    def _next_chunk(self, lane: LanePages, prompt: Sequence[int]) -> _Chunk | None:
        """The written chunk that a lane's shared ones go on with in a prompt."""
        start = self.cached_tokens(lane)
        if start + self._size >= len(prompt):
            return None
        tokens = tuple(prompt[start : start + self._size])
        return self._chunks.get((self._last(lane), tokens))

    def _use(self, lane: LanePages, chunk: _Chunk) -> None:
        lane.pages[len(lane.chunks) : len(lane.chunks) + 1] = [chunk.page]
        lane.chunks.append(chunk)
        chunk.users += 1
        self._unused.pop(chunk, None)

    def _take(self) -> int:
        if not self._free:
            chunk, _ = self._unused.popitem(last=False)
            del self._chunks[chunk.key]
            return chunk.page
        return self._free.pop()
