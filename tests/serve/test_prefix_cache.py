"""Pages: every one has one owner, and prefixes are found by their tokens."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
)

from llama_jax.serve.prefix_cache import LanePages, PrefixCache

SIZE, PAGES = 2, 7


def written(cache: PrefixCache, prompt: list[int], root: str = "") -> LanePages:
    """A lane whose prompt has been read."""
    lane = cache.reserve(prompt, len(prompt) + 1, root)
    assert lane is not None
    for start in range(cache.cached_tokens(lane), len(prompt) - SIZE + 1, SIZE):
        cache.share(lane, prompt[start : start + SIZE])
    return lane


def test_a_prefix_is_shared_while_its_tokens_are_the_same() -> None:
    cache = PrefixCache(20, SIZE)
    first = written(cache, [1, 2, 3, 4, 5])
    for prompt, tokens in (
        ([1, 2, 3, 4, 6], 4),
        ([1, 2, 3, 4], 2),  # the logits of its last token are needed
        ([1, 2, 4, 4, 5], 2),
        ([2, 2, 3, 4, 5], 0),
        ([3, 4, 3, 4, 5], 0),  # the same chunk at another position
    ):
        lane = cache.reserve(prompt, 6)
        assert lane is not None
        assert cache.cached_tokens(lane) == tokens
        assert lane.pages[: tokens // SIZE] == first.pages[: tokens // SIZE]
        cache.release(lane)


def test_another_adapter_shares_nothing() -> None:
    cache = PrefixCache(20, SIZE)
    written(cache, [1, 2, 3], "")
    lane = cache.reserve([1, 2, 3], 4, "an adapter")
    assert lane is not None
    assert cache.cached_tokens(lane) == 0


def test_the_least_recently_used_chunk_is_evicted_and_its_parents_after_it() -> None:
    cache = PrefixCache(4, SIZE)
    cache.release(written(cache, [1, 2, 3, 4, 5]))
    cache.release(written(cache, [7, 8, 9]))
    assert (cache.num_free, cache.num_cached) == (1, 3)
    assert cache.reserve([6], 4) is not None  # the free page, and that of [3, 4]
    lane = cache.reserve([1, 2, 3, 4, 5], 4)
    assert lane is not None
    assert cache.cached_tokens(lane) == 2


def test_pages_that_do_not_suffice_are_not_taken() -> None:
    cache = PrefixCache(4, SIZE)
    cache.release(written(cache, [1, 2, 3]))
    assert cache.reserve([1, 2, 3], 10) is None
    assert (cache.num_free, cache.num_cached) == (3, 1)


def test_a_dense_cache_has_no_pages() -> None:
    cache = PrefixCache(0, SIZE)
    lane = cache.reserve([1, 2, 3], 9)
    assert lane is not None
    assert not cache.advance(lane, [1, 2, 3])
    cache.share(lane, [1, 2])
    assert (lane.pages, cache.cached_tokens(lane)) == ([], 0)
    cache.release(lane)


class PagesMachine(RuleBasedStateMachine):
    """Lanes read prompts chunk by chunk, in any order."""

    lanes = Bundle("lanes")

    def __init__(self) -> None:
        super().__init__()
        self.cache = PrefixCache(PAGES, SIZE)
        self.live: list[LanePages] = []
        self.contents: dict[int, tuple[int, ...]] = {}

    @rule(target=lanes, prompt=st.lists(st.integers(0, 1), min_size=1, max_size=7))
    def reserve(self, prompt: list[int]) -> object:
        lane = self.cache.reserve(prompt, len(prompt) + 2)
        if lane is None:
            return multiple()
        self.live.append(lane)
        self.check(lane, prompt)
        return lane, prompt

    @rule(pair=lanes)
    def read(self, pair: tuple[LanePages, list[int]]) -> None:
        lane, prompt = pair
        while self.cache.advance(lane, prompt):
            self.check(lane, prompt)
        start = self.cache.cached_tokens(lane)
        if start + SIZE <= len(prompt):
            self.contents[lane.pages[start // SIZE]] = tuple(prompt[: start + SIZE])
            self.cache.share(lane, prompt[start : start + SIZE])

    @rule(pair=consumes(lanes))
    def release(self, pair: tuple[LanePages, list[int]]) -> None:
        self.live.remove(pair[0])
        self.cache.release(pair[0])

    def check(self, lane: LanePages, prompt: list[int]) -> None:
        """A shared page holds what the prompt begins with."""
        for number, page in enumerate(lane.pages[: len(lane.chunks)]):
            assert self.contents[page] == tuple(prompt[: (number + 1) * SIZE])

    @invariant()
    def every_page_has_one_owner(self) -> None:
        own = [p for lane in self.live for p in lane.pages[len(lane.chunks) :]]
        pages = [*self.cache.shared_pages(), *self.cache.free_pages(), *own]
        assert sorted(pages) == list(range(PAGES))
        used = {p for lane in self.live for p in lane.pages[: len(lane.chunks)]}
        assert len(self.cache.shared_pages()) == len(used) + self.cache.num_cached


TestPagesMachine = PagesMachine.TestCase
TestPagesMachine.settings = settings(max_examples=60, deadline=None)
