"""A cache in eight bits: near the full one, equal to the numbers that it holds."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.models import (
    TALKING,
    TINY,
    forward,
    random_params,
    random_tokens,
    talking_model,
)
from support.programs import (
    cache_layer_size,
    compile_decoding,
    needs_tpu_compiler,
    weight_sizes,
    whole_results,
)
from support.tolerances import DECODE_FLOAT32, EQUAL_FORWARD, INT8_CACHE_LOGITS

from llama_jax import kernels, plan, sample
from llama_jax.cli import command as cli
from llama_jax.config import LlamaConfig
from llama_jax.errors import ConfigError
from llama_jax.generation import decode as decoding
from llama_jax.generation import lanes
from llama_jax.generation.generate import generate
from llama_jax.generation.request import Request
from llama_jax.generation.sampling import Sampling
from llama_jax.kernels import QuantizedSlots, quantize_slots
from llama_jax.kernels.quantized_slots import dequantize_slots
from llama_jax.model.cache import KVCache, NewCache, cache_shardings, grow, init_cache
from llama_jax.model.layer_cache import DenseLayerCache, Int8LayerCache
from llama_jax.model.presets import preset
from llama_jax.model.transformer import Llama, apply
from llama_jax.planning import programs
from llama_jax.planning.memory import footprint
from llama_jax.planning.target_devices import tpu_devices
from llama_jax.planning.workload import Workload
from llama_jax.runtime import Runtime
from llama_jax.sharding import make_mesh, param_shardings, parse_mesh

B, T = 8, 16
EIGHT = Runtime(cache_dtype="int8")
MESHES = (
    "data=2,fsdp=2,tensor=2",
    "data=2,tensor=4",  # two key/value heads for four devices: slots are cut
    "fsdp=2,sequence=2,tensor=2",
)
eight_devices = pytest.mark.skipif(
    len(jax.devices()) < 8, reason="needs eight devices (tests/conftest.py)"
)
every_mesh = pytest.mark.parametrize("text", MESHES)


def numbers(cache: KVCache) -> list[Any]:
    return [slots.values for layer in cache.layers for slots in (layer.k, layer.v)]


def assert_same(
    actual: Any, expected: Any, cache: KVCache, other: KVCache, rows: int = B
) -> None:
    """Equal logits, but in a row of which a rounding fell the other way.

    Numbers that are computed in another shape differ in their last bits, and one in
    100,000 of them lies that near to the middle of a step.
    """
    turned = np.zeros(rows, bool)
    for one, two in zip(numbers(cache), numbers(other), strict=True):
        size = min(one.shape[2], two.shape[2])
        apart = np.abs(
            np.asarray(one[:, :, :size], int) - np.asarray(two[:, :, :size], int)
        )
        assert apart.max() <= 1
        turned |= apart.any(axis=(1, 2, 3))
    assert turned.sum() <= 1
    actual, expected = np.asarray(actual), np.asarray(expected)
    np.testing.assert_allclose(
        actual[~turned], expected[~turned], rtol=EQUAL_FORWARD, atol=EQUAL_FORWARD
    )
    assert_near(actual, expected)


def assert_near(actual: Any, expected: Any) -> None:
    spread = np.asarray(expected).std()
    apart = np.abs(np.asarray(actual) - np.asarray(expected)).max()
    assert apart < INT8_CACHE_LOGITS * spread


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    return random_params(TINY)


@pytest.fixture(scope="module")
def tokens() -> jax.Array:
    return random_tokens(TINY, B, T)


LENGTHS = (3, 16, 1, 8, 9, 15, 2, 4)


def decoded(
    runtime: Runtime, params: Any, tokens: Any, mesh: Any = None, steps: int = 3
) -> tuple[list[Any], list[KVCache]]:
    """Logits and caches of prompts that are read and a few steps after them."""
    model = Llama(TINY, runtime, mesh)
    lengths = jnp.asarray(LENGTHS, jnp.int32)
    logits, cache = decoding.prefill(model, params, tokens, lengths, 32)
    actual, stored = [logits], [jax.tree.map(jnp.copy, cache)]
    for step in range(steps):
        new = jnp.full((B,), 5 + step, jnp.int32)
        logits, cache = decoding.decode_step(model, params, cache, new)
        actual.append(logits)
        stored.append(jax.tree.map(jnp.copy, cache))
    return actual, stored


# Contents.


@pytest.mark.wrong_types
@pytest.mark.parametrize("name", ["int4", "bfloat16", ""])
def test_unknown_cache_dtypes_are_refused(name: Any) -> None:
    with pytest.raises(ConfigError, match=r"cache_dtype is .*; choose from int8, None"):
        Runtime(cache_dtype=name)


def test_slots_are_rounded_once_by_half_a_step_at_most(
    params: Any, tokens: Any
) -> None:
    _, full = decoded(Runtime(), params, tokens)
    _, eight = decoded(EIGHT, params, tokens)
    for whole, stored in (
        (full[-1].layers[0].k, eight[-1].layers[0].k),
        (full[-1].layers[0].v, eight[-1].layers[0].v),
    ):
        assert isinstance(stored, QuantizedSlots)
        assert (stored.values.dtype, stored.scales.dtype) == (jnp.int8, jnp.float32)
        apart = np.abs(np.asarray(dequantize_slots(stored, jnp.float32) - whole))
        step = np.asarray(stored.scales)[..., None]
        assert (apart <= step * (0.5 + 1e-4)).all()
        assert np.abs(np.asarray(stored.values)).max() == 127
    # What was written is not touched again: rounding twice would lose more.
    for before, after in zip(eight[0].layers, eight[-1].layers, strict=True):
        for row, length in enumerate(LENGTHS):
            for one, other in zip(before.k, after.k, strict=True):
                np.testing.assert_array_equal(
                    one[row, :, :length], other[row, :, :length]
                )


def test_an_empty_cache_is_int8_with_scales_and_grows() -> None:
    empty = init_cache(TINY, 2, 4, "int8")
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(empty))
    layer = 2 * TINY.num_kv_heads * 4
    assert size == 2 * TINY.num_layers * layer * (TINY.head_dim + 4) + 2 * 4
    full = jax.tree.map(lambda x: x + 1, empty)
    grown = grow(full, 7)
    assert grown.num_slots == 7
    for one, small in zip(grown.layers[0].k, full.layers[0].k, strict=True):
        assert one.dtype == small.dtype
        np.testing.assert_array_equal(one[:, :, :4], small)
        np.testing.assert_array_equal(one[:, :, 4:], 0)


# Attention.


def test_decoding_is_near_that_over_a_float_cache(params: Any, tokens: Any) -> None:
    expected, _ = decoded(Runtime(), params, tokens)
    actual, _ = decoded(EIGHT, params, tokens)
    # A prompt attends to its own keys and values before they are rounded.
    np.testing.assert_allclose(
        actual[0], expected[0], rtol=EQUAL_FORWARD, atol=EQUAL_FORWARD
    )
    for one, other in zip(actual[1:], expected[1:], strict=True):
        assert_near(one, other)
        assert not np.allclose(one, other, rtol=1e-4, atol=1e-4)


def test_decoding_equals_that_over_a_float_cache_of_rounded_numbers(
    params: Any, tokens: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = DenseLayerCache.append

    def append_rounded(cache: Any, k: Any, v: Any, *rest: Any, **options: Any) -> Any:
        k, v = (dequantize_slots(quantize_slots(x), x.dtype) for x in (k, v))
        return append(cache, k, v, *rest, **options)

    def run(runtime: Runtime) -> tuple[list[Any], KVCache]:
        model = Llama(TINY, runtime)
        # A new jitted function: the patched one must not stay in a cache of programs.
        step = jax.jit(lambda *a, **k: apply(model, *a, **k))
        cache = init_cache(TINY, B, 32, runtime.slot_dtype)
        actual = []
        for part in (tokens[:, :9], tokens[:, 9:10], tokens[:, 10:]):
            logits, cache = step(params, part, cache=cache)
            actual.append(logits)
        return actual, cache

    actual, cache = run(EIGHT)
    monkeypatch.setattr(DenseLayerCache, "append", append_rounded)
    expected, other = run(Runtime())
    layers = (Int8LayerCache(*map(quantize_slots, layer)) for layer in other.layers)
    again = other._replace(layers=tuple(layers))
    for one, two in zip(actual, expected, strict=True):
        assert_same(one, two, cache, again)


@pytest.mark.parametrize("queries", [1, 5, 40])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
def test_attention_over_int8_slots_equals_that_over_dequantized_slots(
    heads: int, kv_heads: int, queries: int
) -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (3, queries, heads, 8))
    k, v = (
        quantize_slots(jax.random.normal(key, (3, kv_heads, 48, 8))) for key in keys[1:]
    )
    start = jnp.asarray([0, 8, 3])
    wide = [dequantize_slots(x, jnp.float32) for x in (k, v)]
    attention = jax.jit(kernels.attention)
    actual = attention(q, k, v, q_start=start)
    expected = attention(q, *wide, q_start=start)
    np.testing.assert_allclose(
        actual, expected, rtol=DECODE_FLOAT32, atol=DECODE_FLOAT32
    )


@pytest.mark.parametrize("widths", [(16,), (1, 15), (7, 8, 1), (3,) * 5, (1,) * 16])
def test_any_split_of_ragged_rows_equals_one_call(
    params: Any, tokens: Any, widths: tuple[int, ...]
) -> None:
    model = Llama(TINY, EIGHT)
    lengths = np.asarray(LENGTHS)
    whole, expected = forward(
        model, params, tokens, cache=init_cache(TINY, B, 32, "int8"), lengths=lengths
    )
    cache, done = init_cache(TINY, B, 32, "int8"), 0
    actual = np.zeros_like(whole)
    for width in widths:
        real = np.clip(lengths - done, 0, width)
        part = tokens[:, done : done + width]
        logits, cache = forward(model, params, part, cache=cache, lengths=real)
        actual[:, done : done + width] = logits
        done += width
    np.testing.assert_array_equal(cache.length, np.minimum(lengths, done))
    seen = np.arange(T)[None] < np.minimum(lengths, done)[:, None]

    def only(cache: KVCache) -> KVCache:
        keep = np.arange(32)[None] < np.minimum(lengths, done)[:, None]

        def masked(x: Any) -> Any:
            return x * keep.reshape(B, 1, 32, *(1 for _ in x.shape[3:]))

        return jax.tree.map(lambda x: masked(x) if x.ndim > 1 else x, cache)

    actual, whole = (np.where(seen[..., None], x, 0) for x in (actual, whole))
    assert_same(actual, whole, only(cache), only(expected))


# Meshes.


@pytest.fixture(scope="module")
def eight(params: Any, tokens: Any) -> tuple[list[Any], list[KVCache]]:
    """Results of one device."""
    return decoded(EIGHT, params, tokens)


@eight_devices
@every_mesh
def test_meshes_equal_one_device(
    params: Any, tokens: Any, eight: tuple[list[Any], list[KVCache]], text: str
) -> None:
    mesh = make_mesh(parse_mesh(text), jax.devices()[:8])
    placed = jax.device_put(params, param_shardings(TINY, EIGHT, mesh))
    actual, stored = decoded(EIGHT, placed, tokens, mesh)
    expected, alone = eight
    shardings = cache_shardings(TINY, EIGHT, mesh, B, 32)
    for cache in stored:
        for part, sharding in zip(
            cache.layers[0].k, shardings.layers[0].k, strict=True
        ):
            assert part.addressable_shards[0].data.nbytes * 8 == part.nbytes
            assert part.sharding.is_equivalent_to(sharding, part.ndim)
    for one, other, cache, same in zip(actual, expected, stored, alone, strict=True):
        assert_same(one, other, cache, same)


@eight_devices
@pytest.mark.parametrize("text", ["data=2,tensor=4", "sequence=4,tensor=2"])
def test_several_tokens_are_written_into_cut_slots(
    params: Any, tokens: Any, text: str
) -> None:
    mesh = make_mesh(parse_mesh(text), jax.devices()[:8])
    placed = jax.device_put(params, param_shardings(TINY, EIGHT, mesh))
    actual = []
    for on, weights in ((mesh, placed), (None, params)):
        model = Llama(TINY, EIGHT, on)
        first = NewCache(32)
        _, cache = forward(model, weights, tokens[:, :5], cache=first)
        logits, cache = forward(model, weights, tokens[:, 5:], cache=cache)
        actual.append((logits, cache))
    (one, cache), (other, alone) = actual
    assert_same(one, other, cache, alone)


# Generation.


def test_generation_equals_single_steps_and_compiles_once() -> None:
    config = TALKING.replace(num_layers=1)
    loaded = talking_model(config, EIGHT)
    prompts = [[1, 50, 60], [1, 70]]

    def requests(prompts: list[list[int]]) -> list[Request]:
        greedy = Sampling(temperature=0)
        return [Request(ids, max_new_tokens=6, sampling=greedy) for ids in prompts]

    wrote = [c.token_ids for c in generate(loaded, requests(prompts))]
    for prompt, ids in zip(prompts, wrote, strict=True):
        tokens = jnp.asarray([prompt], jnp.int32)
        model, lengths = loaded.model, jnp.asarray([len(prompt)])
        logits, cache = decoding.prefill(model, loaded.params, tokens, lengths, 32)
        assert isinstance(cache.layers[0].k, QuantizedSlots)
        for token in ids:
            assert int(logits[0].argmax()) == token
            new = jnp.asarray([token], jnp.int32)
            logits, cache = decoding.decode_step(model, loaded.params, cache, new)
    sizes = lanes.start._cache_size(), lanes.advance._cache_size()
    generate(loaded, requests([[1, 90], [1, 50, 61, 3]]))
    assert sizes == (lanes.start._cache_size(), lanes.advance._cache_size())


def test_decoding_writes_into_the_cache_that_it_was_given(params: Any) -> None:
    cache = init_cache(TINY, 2, 16, "int8")

    def pointers(cache: KVCache) -> list[int]:
        leaves = jax.tree.leaves(cache.layers)
        return [leaf.unsafe_buffer_pointer() for leaf in leaves]

    before, token = pointers(cache), jnp.ones((2,), jnp.int32)
    _, after = decoding.decode_step(Llama(TINY, EIGHT), params, cache, token)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(cache.layers))
    assert pointers(after) == before


# Compiled programs.

SLOTS = 768
# No weight, cache layer or activation of the same size as another kind of them.
MEDIUM = TINY.replace(
    vocab_size=1100,
    embed_dim=256,
    num_heads=8,
    num_kv_heads=4,
    head_dim=32,
    mlp_dim=640,
    max_seq_len=1024,
)


def check_nothing_is_copied(
    compiled: Any, config: LlamaConfig, batch: int, slots: int
) -> None:
    layer = cache_layer_size(config, batch, slots)
    assert not whole_results(compiled.as_text(), {layer, *weight_sizes(config)})
    memory = compiled.memory_analysis()
    scales = 4 * layer // config.head_dim
    stored = 2 * config.num_layers * (layer + scales)
    assert memory.alias_size_in_bytes >= stored


@pytest.mark.parametrize("program", ["decode_step", "advance"])
@pytest.mark.parametrize("batch", [1, 16])
def test_decoding_copies_no_cache(batch: int, program: str) -> None:
    compiled = compile_decoding(
        program, MEDIUM, batch=batch, slots=SLOTS, cache_dtype="int8"
    )
    check_nothing_is_copied(compiled, MEDIUM, batch, SLOTS)
    # Of one head of one row keys and values are widened at a time, whatever there are.
    one = 2 * 4 * SLOTS * MEDIUM.head_dim
    rest = batch * (MEDIUM.mlp_dim + 6 * MEDIUM.vocab_size) * 4 + (64 << 10)
    assert compiled.memory_analysis().temp_size_in_bytes < one + rest


@needs_tpu_compiler
@pytest.mark.tpu_compile
@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("name", ["llama2-7b", "llama2-70b"])
@pytest.mark.parametrize("attention", ["xla", "mosaic_tpu"])
def test_decoding_on_a_tpu_copies_no_cache(
    name: str, batch: int, attention: kernels.Implementation
) -> None:
    config = preset(name).replace(num_layers=2)
    compiled = compile_decoding(
        "advance",
        config,
        batch=batch,
        slots=2048,
        dtype="bfloat16",
        device=tpu_devices("v5e:2x2")[0],
        attention=attention,
        cache_dtype="int8",
    )
    check_nothing_is_copied(compiled, config, batch, 2048)
    memory = compiled.memory_analysis()
    # A copy in bfloat16 of a layer's keys is 4 MiB where it is smallest, for one row of
    # 70B, and 64 MiB or more for 16 rows, whose logits are there three times at most.
    most = 4 << 20 if batch == 1 else 3 * 4 * batch * config.vocab_size
    assert memory.temp_size_in_bytes < most
    calls = compiled.as_text().count("tpu_custom_call")
    assert (calls > 0) == (attention == "mosaic_tpu")


# Plans.


def work(task: Any = "decode", **fields: Any) -> Workload:
    return Workload(
        config=TINY,
        task=task,
        batch=8,
        seq=32,
        dtype="float32",
        cache_dtype="int8",
        **fields,
    )


@eight_devices
@every_mesh
def test_plans_count_the_cache_as_it_is_sharded(text: str) -> None:
    mesh = make_mesh(parse_mesh(text), jax.devices()[:8])
    cache = init_cache(TINY, 8, 32, "int8")
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    assert footprint(work(), {"data": 1}).cache == whole
    placed = jax.device_put(cache, cache_shardings(TINY, EIGHT, mesh, 8, 32))
    part = sum(
        leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(placed)
    )
    stored = footprint(work(), dict(mesh.shape))
    assert stored.cache == part
    built = programs.make_program(work(), mesh)
    assert programs.shard_bytes(built.kinds["cache"]) == part
    assert footprint(work("prefill"), dict(mesh.shape)).cache == part


def test_a_plan_of_training_has_no_cache(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.run(plan.main, ["--task", "lora", "--cache-dtype", "int8"])
    assert exit.value.code == 2
    assert (
        "--cache-dtype: has no effect without --task prefill or decode"
        in capsys.readouterr().err
    )


def test_a_plan_suggests_an_int8_cache(
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--topology", "v5e:1x1", "--batch", "8", "--seq", "4096"]
    assert plan.main([*flags, "--quantize", "int8"]) == 0
    assert "What would fit: --cache-dtype int8; or" in capsys.readouterr().out
    assert plan.main([*flags, "--quantize", "int8", "--cache-dtype", "int8"]) == 0
    out = capsys.readouterr().out
    assert "int8 weights, int8 cache" in out
    assert "  fits: 15.87 of 16.91 GB" in out


@pytest.mark.wrong_types  # `load` gives None
def test_sample_takes_cache_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Runtime] = []

    def load(*_: Any, runtime: Runtime, **__: Any) -> None:
        calls.append(runtime)

    monkeypatch.setattr(cli, "load", load)
    cli.load_model(sample.parse(["--cache-dtype", "int8"]))
    cli.load_model(sample.parse([]))
    assert [runtime.cache_dtype for runtime in calls] == ["int8", None]
