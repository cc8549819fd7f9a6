"""Attention workloads that kernels are compared on: sizes, arguments and costs.

q and the output are `[B, N, T, H]`, as the kernels want them. Ours begin and end with a
transposition that cancels one around the call, so that no kernel is charged for a copy
that depends on the model around it. Arguments whose values decide what a kernel
executes are arrays; the others are shapes.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.errors import ConfigError
from llama_jax.model.presets import PRESETS
from llama_jax.types import Array, PyTree

Kind = Literal["flash", "backward", "decode"]
KINDS: tuple[Kind, ...] = ("flash", "backward", "decode")

Argument = np.ndarray | jax.ShapeDtypeStruct

_LENGTHS = {"flash": (2048, 4096, 16384), "decode": (4096, 32768)}
_ROWS = (1, 8, 64)
_TILE = 512
_POOL_BYTES = 2**32  # of keys, and as many of values


class Heads(NamedTuple):
    """N query heads, K key/value heads, and H."""

    n: int
    k: int
    h: int


class Work(NamedTuple):
    """One computation, in bfloat16 unless the cache is int8.

    Attributes:
      kind: "flash" is causal attention of whole rows, "backward" its gradient, and
        "decode" attention of one query per row.
      heads: of the model.
      length: T, or S.
      rows: B.
      page: slots per page, for kernels that read pages.
      int8: keys and values are int8, with a scale per slot.
    """

    kind: Kind
    heads: Heads
    length: int
    rows: int = 1
    page: int = 128
    int8: bool = False

    @property
    def num_tiles(self) -> int:
        """512x512 tiles on and below the diagonal, of all heads and rows."""
        side = -(-self.length // _TILE)
        return self.rows * self.heads.n * side * (side + 1) // 2

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache that one query per row reads, scales included."""
        per_slot = self.heads.h + 4 if self.int8 else 2 * self.heads.h
        return 2 * self.rows * self.heads.k * self.length * per_slot

    def describe(self) -> dict[str, object]:
        """The work as an object for JSON."""
        return {**self._asdict(), "heads": self.heads._asdict()}


class Call(NamedTuple):
    """A function and its arguments, or their shapes."""

    function: Callable[..., PyTree]
    arguments: Sequence[Argument]


class Candidate(NamedTuple):
    """One kernel that can do a work.

    Attributes:
      name: of the kernel.
      tile: its tile sizes, for printing.
      build: makes the call; raises ImportError if this jax does not have the kernel.
    """

    name: str
    tile: str
    build: Callable[[], Call]


def parse_heads(name: str) -> Heads:
    """Parse a preset's name, or heads such as `N32K8H128`.

    Raises:
      ConfigError: it is neither.
    """
    if name in PRESETS:
        config = PRESETS[name]
        return Heads(config.num_heads, config.num_kv_heads, config.head_dim)
    if match := re.fullmatch(r"N(\d+)K(\d+)H(\d+)", name):
        return Heads(*map(int, match.groups()))
    raise ConfigError(
        f"--shapes {name}: not a preset; name one, or write heads as in N32K8H128"
    )


def make_works(
    kinds: Sequence[Kind],
    shapes: Sequence[str],
    lengths: Sequence[int] | None = None,
    *,
    page: int = 128,
    int8: bool = False,
) -> Iterator[tuple[str, Work]]:
    """All works, each with its shape's name; at usual lengths by default."""
    for kind in kinds:
        usual = _LENGTHS["decode" if kind == "decode" else "flash"]
        for name in shapes:
            for length in lengths or usual:
                for rows in _ROWS if kind == "decode" else (1,):
                    heads = parse_heads(name)
                    yield name, Work(kind, heads, length, rows, page, int8)


def causal_shapes(work: Work) -> list[jax.ShapeDtypeStruct]:
    """q, k, v of whole rows; for the backward pass also the output's gradient."""
    n, k, h = work.heads
    q = jax.ShapeDtypeStruct((work.rows, n, work.length, h), jnp.bfloat16)
    kv = jax.ShapeDtypeStruct((work.rows, k, work.length, h), jnp.bfloat16)
    return [q, kv, kv, q] if work.kind == "backward" else [q, kv, kv]


def with_gradient(work: Work, attend: Callable[..., Array]) -> Callable[..., PyTree]:
    """The function, or for the backward pass the function that gives its gradients."""

    def gradients(q: Array, k: Array, v: Array, d_out: Array) -> tuple[Array, ...]:
        return jax.vjp(attend, q, k, v)[1](d_out)

    return gradients if work.kind == "backward" else attend


def page_table(work: Work) -> tuple[int, np.ndarray]:
    """The number of pages, and each row's pages, one row after another.

    There are as many as a chip may have room for; further rows reuse the first ones.
    """
    per_row = work.length // work.page
    most = _POOL_BYTES // (2 * work.heads.k * work.page * work.heads.h)
    count = min(work.rows * per_row, most)
    table = np.arange(work.rows * per_row, dtype=np.int32) % count
    return count, table.reshape(work.rows, per_row)
