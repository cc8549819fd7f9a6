"""Caches: dense, int8 and paged ones give the same logits; rows are inserted alone."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from support.models import TINY, forward, random_params, random_tokens
from support.programs import needs_tpu_compiler, whole_results
from support.tolerances import EQUAL_FORWARD

from llama_jax.config import LlamaConfig
from llama_jax.errors import ConfigError
from llama_jax.generation import decode as decoding
from llama_jax.model.cache import (
    KVCache,
    NewCache,
    cache_shardings,
    grow,
    init_cache,
    init_paged_cache,
    insert,
)
from llama_jax.model.layer_cache import LayerCache
from llama_jax.model.pages import NO_PAGE
from llama_jax.model.presets import preset
from llama_jax.model.transformer import Llama, ScalarModel, apply
from llama_jax.params import param_shapes
from llama_jax.planning.target_devices import tpu_devices
from llama_jax.runtime import Runtime
from llama_jax.sharding import make_mesh, param_shardings, parse_mesh

SCALAR = TINY.replace(head="scalar")
B, S, SIZE, PER_ROW, PAGES = 3, 24, 4, 6, 20
dtypes = pytest.mark.parametrize("dtype", ["float32", "int8"])


def runtime_of(dtype: str) -> Runtime:
    return Runtime(cache_dtype="int8" if dtype == "int8" else None)


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    return random_params(TINY)


@pytest.fixture(scope="module")
def tokens() -> jax.Array:
    return random_tokens(TINY, B, S)


def paged(dtype: str, *, order: int = 0) -> KVCache:
    """An empty paged cache whose rows have all their pages, in a random order."""
    cache = init_paged_cache(
        TINY, B, num_pages=PAGES, page_size=SIZE, pages_per_row=PER_ROW, dtype=dtype
    )
    ids = np.random.default_rng(order).permutation(PAGES)[: B * PER_ROW]
    return cache._replace(page_table=jnp.asarray(ids.reshape(B, PER_ROW), jnp.int32))


def contents(cache: KVCache, row: int) -> list[np.ndarray]:
    """Slots in use of a row, of every layer's keys, values and scales."""
    length = int(cache.length[row])
    actual = []
    for leaf in map(np.asarray, jax.tree.leaves(cache.layers)):
        if cache.page_table is None:
            slots = leaf[row]
        else:
            pages = leaf[np.asarray(cache.page_table[row])]
            slots = np.moveaxis(pages, 0, 1).reshape(leaf.shape[1], -1, *leaf.shape[3:])
        actual.append(slots[:, :length])
    return actual


def test_every_layer_cache_follows_the_protocol() -> None:
    for cache in (init_cache(TINY, 1, 4, "int8"), paged("float32")):
        assert isinstance(cache.layer(0), LayerCache)


# Pages.


@dtypes
@pytest.mark.parametrize("widths", [(1,) * 6, (9, 1, 1), (3, 8, 5, 1), (17, 4)])
def test_a_paged_cache_gives_the_logits_of_a_dense_one(
    params: Any, tokens: Any, dtype: str, widths: tuple[int, ...]
) -> None:
    model = Llama(TINY, runtime_of(dtype))
    caches = [init_cache(TINY, B, S, dtype), paged(dtype)]
    done = 0
    for width in widths:
        real = jnp.asarray([width, max(width - 2, 1), 1], jnp.int32)
        logits = []
        for index, cache in enumerate(caches):
            new = tokens[:, done : done + width]
            actual, caches[index] = forward(
                model, params, new, cache=cache, lengths=real
            )
            logits.append(np.asarray(actual))
        for row, count in enumerate(real):
            np.testing.assert_array_equal(
                logits[0][row, :count], logits[1][row, :count]
            )
        done += width
    dense, by_page = caches
    assert dense.length.tolist() == by_page.length.tolist()
    assert dense.num_slots == by_page.num_slots == S
    for row in range(B):
        for one, other in zip(
            contents(dense, row), contents(by_page, row), strict=True
        ):
            np.testing.assert_array_equal(one, other)


@dtypes
@pytest.mark.parametrize("width", [1, 6])
def test_a_row_without_a_page_writes_nothing(
    params: Any, tokens: Any, dtype: str, width: int
) -> None:
    model, cache = Llama(TINY, runtime_of(dtype)), paged(dtype)
    cache = jax.tree.map(lambda x: x + 1, cache)._replace(page_table=cache.page_table)
    table = cache.page_table.at[0].set(NO_PAGE).at[2, 2:].set(NO_PAGE)
    # Row 0 has no pages, row 1 is full, row 2 may write the slots before its ninth.
    length = jnp.asarray([0, S, 7], jnp.int32)
    cache = cache._replace(page_table=table, length=length)
    _, after = forward(model, params, tokens[:, :width], cache=cache)
    own = {int(table[2, 1])}
    for before, written in zip(
        jax.tree.leaves(cache.layers), jax.tree.leaves(after.layers), strict=True
    ):
        changed = np.asarray(before != written).reshape(*before.shape[:3], -1)
        assert set(np.flatnonzero(changed.any(axis=(1, 2, 3)))) == own
        assert set(np.flatnonzero(changed.any(axis=(0, 1, 3)))) == {3}


def test_decoding_over_pages_writes_into_the_cache_that_it_was_given(
    params: Any, tokens: Any
) -> None:
    model, cache = Llama(TINY, Runtime()), paged("float32")
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(cache)]
    _, after = decoding.decode_step(model, params, cache, tokens[:, 0])
    assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(after)] == pointers


def compile_paged_decoding(
    config: LlamaConfig, dtype: Any, size: int, device: Any = None, **choices: Any
) -> Any:
    """A decoding step of four rows of eight pages, compiled from shapes."""
    sharding = None if device is None else SingleDeviceSharding(device)

    def shapes(tree: Any) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )

    model = Llama(config, Runtime(dtype=dtype, **choices))
    create = functools.partial(
        init_paged_cache,
        config,
        4,
        num_pages=50,
        page_size=size,
        pages_per_row=8,
        dtype=model.runtime.slot_dtype,
    )
    cache = shapes(jax.eval_shape(create))
    params = shapes(param_shapes(config, dtype=jnp.dtype(dtype)))
    tokens = jax.ShapeDtypeStruct((4,), jnp.int32, sharding=sharding)
    return decoding.decode_step.lower(model, params, cache, tokens).compile()


def check_no_page_is_copied(compiled: Any, config: LlamaConfig, size: int) -> None:
    elements = 50 * config.num_kv_heads * size * config.head_dim
    assert not whole_results(compiled.as_text(), {elements})
    itemsize = 1  # at least
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= 2 * config.num_layers * elements * itemsize


@pytest.mark.parametrize("cache_dtype", [None, "int8"])
def test_decoding_over_pages_copies_no_page(cache_dtype: Any) -> None:
    compiled = compile_paged_decoding(TINY, "float32", 16, cache_dtype=cache_dtype)
    check_no_page_is_copied(compiled, TINY, 16)


@needs_tpu_compiler
@pytest.mark.tpu_compile
@pytest.mark.slow
@pytest.mark.parametrize("cache_dtype", [None, "int8"])
@pytest.mark.parametrize("attention", ["xla", "mosaic_tpu"])
def test_decoding_over_pages_on_a_tpu_copies_no_page(
    attention: Any, cache_dtype: Any
) -> None:
    config, device = preset("llama2-70b").replace(num_layers=2), tpu_devices("v5e:2x2")
    compiled = compile_paged_decoding(
        config,
        "bfloat16",
        128,
        device[0],
        attention=attention,
        cache_dtype=cache_dtype,
    )
    check_no_page_is_copied(compiled, config, 128)
    kernels = compiled.as_text().count("tpu_custom_call")
    assert (kernels > 0) == (attention == "mosaic_tpu")
    if attention == "mosaic_tpu":  # plain XLA copies the pages of each row
        assert compiled.memory_analysis().temp_size_in_bytes < 4 << 20


def test_pages_are_refused_on_a_mesh(params: Any, tokens: Any) -> None:
    mesh = make_mesh({"tensor": 2}, jax.devices()[:2])
    placed = jax.device_put(params, param_shardings(TINY, Runtime(), mesh))
    with pytest.raises(ConfigError, match="pages cannot be cut over a mesh of 2"):
        apply(Llama(TINY, Runtime(), mesh), placed, tokens, cache=paged("float32"))


# Rows.


def prefix_of(params: Any, tokens: Any, dtype: str, slots: int) -> KVCache:
    model, lengths = Llama(TINY, runtime_of(dtype)), jnp.asarray([7])
    return decoding.prefill(model, params, tokens[:1, :8], lengths, slots)[1]


@dtypes
@pytest.mark.parametrize("slots", [9, 16, S])
@pytest.mark.parametrize("pages", [False, True], ids=["dense", "paged"])
def test_an_inserted_row_decodes_as_alone_and_others_stay(
    params: Any, tokens: Any, dtype: str, slots: int, pages: bool
) -> None:
    model = Llama(TINY, runtime_of(dtype))
    cache = paged(dtype) if pages else init_cache(TINY, B, S, dtype)
    _, cache = forward(model, params, tokens[:, :5], cache=cache)
    before = [contents(cache, row) for row in range(B)]
    prefix = prefix_of(params, tokens, dtype, slots)
    ids = None
    if pages:
        ids = [*cache.page_table[1, :3].tolist(), *[NO_PAGE] * (PER_ROW - 3)]
        ids = jnp.asarray(ids, jnp.int32)
    put = jax.jit(insert, donate_argnums=0)
    cache = put(cache, jnp.asarray(1), prefix, ids)
    assert cache.length.tolist() == [5, 7, 5]
    for row in (0, 2):
        for one, other in zip(before[row], contents(cache, row), strict=True):
            np.testing.assert_array_equal(one, other)
    for one, other in zip(contents(cache, 1), contents(prefix, 0), strict=True):
        np.testing.assert_array_equal(one, other)
    alone = grow(prefix, S)
    for step in range(3):
        new = tokens[:, 10 + step].at[1].set(step)
        actual, cache = decoding.decode_step(model, params, cache, new)
        expected, alone = decoding.decode_step(model, params, alone, new[1:2])
        np.testing.assert_allclose(
            actual[1], expected[0], rtol=EQUAL_FORWARD, atol=EQUAL_FORWARD
        )


def test_inserting_writes_into_the_cache_that_it_was_given(
    params: Any, tokens: Any
) -> None:
    cache, prefix = paged("float32"), prefix_of(params, tokens, "float32", 8)
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(cache.layers)]
    put = jax.jit(insert, donate_argnums=0)
    after = put(cache, jnp.asarray(2), prefix, cache.page_table[2])
    leaves = jax.tree.leaves(after.layers)
    assert [x.unsafe_buffer_pointer() for x in leaves] == pointers


@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs eight devices")
@pytest.mark.parametrize("text", ["data=2,fsdp=2,tensor=2", "data=2,tensor=4"])
@dtypes
def test_a_row_is_inserted_on_a_mesh(
    params: Any, tokens: Any, text: str, dtype: str
) -> None:
    mesh = make_mesh(parse_mesh(text), jax.devices()[:8])
    runtime = runtime_of(dtype)
    cache = init_cache(TINY, 4, S, dtype)
    shardings = cache_shardings(TINY, runtime, mesh, 4, S)
    prefix = prefix_of(params, tokens, dtype, 9)
    on_mesh = jax.device_put(cache, shardings)
    placed = jax.device_put(prefix, cache_shardings(TINY, runtime, mesh, 1, 9))
    put = jax.jit(insert, static_argnames=("runtime", "mesh"))
    actual = put(on_mesh, jnp.asarray(2), placed, runtime=runtime, mesh=mesh)
    expected = insert(cache, 2, prefix)
    for one, other, sharding in zip(
        *map(jax.tree.leaves, (actual, expected, shardings)), strict=True
    ):
        np.testing.assert_array_equal(one, other)
        if one.ndim > 1:
            assert one.sharding.is_equivalent_to(sharding, one.ndim)


@pytest.mark.parametrize(
    ("prefix", "pages", "message"),
    [
        (init_cache(TINY, 1, 5, "float32"), None, "1 rows of 5 slots in float32 into"),
        (init_cache(TINY, 1, 4, "int8"), None, "in int8 into one of 4 in float32"),
        (init_cache(TINY, 2, 4, "float32"), None, "insert 2 rows"),
        (init_cache(TINY, 1, 4, "float32"), jnp.zeros((3,), int), "needs pages"),
    ],
)
def test_what_does_not_fit_is_not_inserted(
    prefix: KVCache, pages: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        insert(init_cache(TINY, 2, 4, "float32"), 0, prefix, pages)


def test_a_paged_cache_grows_by_whole_pages() -> None:
    cache = paged("float32")
    grown = grow(cache, S + 2 * SIZE)
    assert grown.num_slots == S + 2 * SIZE
    assert (np.asarray(grown.page_table[:, PER_ROW:]) == NO_PAGE).all()
    with pytest.raises(ValueError, match="25 slots are no multiple of a page of 4"):
        grow(cache, S + 1)


# Scalars.


@pytest.mark.parametrize("split", [1, 7, 15])
def test_scalars_after_a_cached_prefix_equal_one_call(tokens: Any, split: int) -> None:
    params = random_params(SCALAR)
    model = ScalarModel(SCALAR, Runtime())
    whole, none = forward(model, params, tokens[:, :16])
    assert none is None
    first, cache = forward(model, params, tokens[:, :split], cache=NewCache(S))
    lengths = jnp.asarray([16 - split, 1, 0])
    rest, cache = forward(
        model, params, tokens[:, split:16], cache=cache, lengths=lengths
    )
    assert cache.length.tolist() == (lengths + split).tolist()
    joined = np.concatenate([first, rest], axis=1)
    np.testing.assert_allclose(joined, whole, rtol=EQUAL_FORWARD, atol=EQUAL_FORWARD)


def test_continuations_of_one_prefix_are_scored_in_a_batch(tokens: Any) -> None:
    params = random_params(SCALAR)
    model = ScalarModel(SCALAR, Runtime())
    prompts = jnp.repeat(tokens[:1, :6], B, axis=0)
    whole, _ = forward(
        model, params, jnp.concatenate([prompts, tokens[:, 6:12]], axis=1)
    )
    _, prefix = forward(model, params, tokens[:1, :6], cache=NewCache(S))
    cache = jax.tree.map(lambda x: jnp.repeat(x, B, axis=0), prefix)
    actual, _ = forward(model, params, tokens[:, 6:12], cache=cache)
    np.testing.assert_allclose(
        actual, whole[:, 6:], rtol=EQUAL_FORWARD, atol=EQUAL_FORWARD
    )
