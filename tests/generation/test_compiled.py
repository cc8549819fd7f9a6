"""Compiled decoding: no copies of caches or weights, no second compilation."""

import functools
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from support.models import TALKING, TINY, random_params, talking_model
from support.programs import (
    cache_layer_size,
    compile_decoding,
    needs_tpu_compiler,
    weight_sizes,
    whole_results,
)

from llama_jax.checkpoint.model_folder import Loaded
from llama_jax.config import LlamaConfig
from llama_jax.errors import MeshError
from llama_jax.generation import lanes as lanes_module
from llama_jax.generation.batching import start_inputs
from llama_jax.generation.completion import text_completion
from llama_jax.generation.decode import decode_step
from llama_jax.generation.generate import generate, stream
from llama_jax.generation.request import Request
from llama_jax.generation.sampling import Sampling
from llama_jax.kernels import Implementation
from llama_jax.model.cache import KVCache, init_cache
from llama_jax.model.presets import preset
from llama_jax.model.transformer import Llama
from llama_jax.planning.target_devices import tpu_devices
from llama_jax.runtime import Runtime

SLOTS = 768
# No weight, cache layer or activation of the same size as another kind of them.
GROUPED = TINY.replace(
    vocab_size=1100,
    embed_dim=256,
    num_heads=8,
    num_kv_heads=4,
    head_dim=32,
    mlp_dim=640,
    max_seq_len=1024,
)
UNGROUPED = GROUPED.replace(num_kv_heads=8)

programs = pytest.mark.parametrize("program", ["decode_step", "advance"])
batches = pytest.mark.parametrize("batch", [1, 16])


def check_nothing_is_copied(
    compiled: Any, config: LlamaConfig, batch: int, slots: int, itemsize: int
) -> None:
    """No weight and no layer of the cache is copied, in or around the loop."""
    layer = cache_layer_size(config, batch, slots)
    weights = weight_sizes(config)
    assert not whole_results(compiled.as_text(), {layer, *weights})
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= 2 * config.num_layers * layer * itemsize
    # With one row there is no room even for the smallest of them. Sixteen rows have
    # activations of the size of a small model's weights.
    room = min(layer, *weights) if batch == 1 else layer // 2
    assert memory.temp_size_in_bytes < room * itemsize


@programs
@batches
@pytest.mark.parametrize("config", [GROUPED, UNGROUPED], ids=["grouped", "ungrouped"])
def test_decoding_copies_no_weight_and_no_cache(
    config: LlamaConfig, batch: int, program: str
) -> None:
    compiled = compile_decoding(program, config, batch=batch, slots=SLOTS)
    check_nothing_is_copied(compiled, config, batch, SLOTS, itemsize=4)


def test_a_copied_cache_is_detected() -> None:
    cache = jax.ShapeDtypeStruct((4, SLOTS, 32), jnp.float32)
    turned = jax.jit(lambda cache: jnp.sin(cache.swapaxes(0, 1)))
    copies = whole_results(turned.lower(cache).compile().as_text(), {4 * SLOTS * 32})
    assert copies.total() == 1


def test_decoding_writes_into_the_donated_cache() -> None:
    model = Llama(TINY, Runtime())
    params = random_params(TINY)
    cache = init_cache(TINY, batch=2, num_slots=16, dtype="float32")

    def pointers(cache: KVCache) -> list[int]:
        return [x.unsafe_buffer_pointer() for x in jax.tree.leaves(cache.layers)]

    before = pointers(cache)
    tokens = jnp.ones((2,), jnp.int32)
    _, after = decode_step(model, params, cache, tokens)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(cache.layers))
    assert pointers(after) == before


def test_a_request_is_inserted_without_a_copy_of_the_lanes() -> None:
    lanes, prefix = (
        jax.eval_shape(
            lambda rows=rows, slots=slots: lanes_module.empty_lanes(
                init_cache(GROUPED, rows, slots, "float32"), GROUPED.vocab_size
            )
        )
        for rows, slots in ((16, SLOTS), (1, 64))
    )
    lane = jax.ShapeDtypeStruct((), jnp.int32)
    compiled = lanes_module.insert.lower(lanes, lane, prefix).compile()
    layer = cache_layer_size(GROUPED, 16, SLOTS)
    assert not whole_results(compiled.as_text(), {layer})
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= 2 * GROUPED.num_layers * layer * 4
    assert memory.temp_size_in_bytes < layer


_compilations: list[str] = []


@functools.cache
def _listen() -> None:
    def record(event: str, _: float, **__: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            _compilations.append(event)

    jax.monitoring.register_event_duration_secs_listener(record)


@pytest.fixture
def compilations() -> list[str]:
    """One entry for each program that is compiled during the test."""
    _listen()
    _compilations.clear()
    return _compilations


def requests(*prompts: list[int], **settings: Any) -> list[Request]:
    defaults: Any = {"max_new_tokens": 18, "sampling": Sampling(seed=1)}
    return [Request(ids, **(defaults | settings)) for ids in prompts]


@pytest.fixture(scope="module")
def warm() -> Loaded:
    """A model that has run once: two rows, buckets of 16 tokens and 32 slots."""
    _listen()
    _compilations.clear()
    loaded = talking_model(TALKING.replace(max_seq_len=128))
    generate(loaded, requests([1, 7, 8], [1, 9]))
    assert _compilations, "the first call compiles, or nothing is counted"
    return loaded


@pytest.mark.parametrize(
    "other",
    [
        {"sampling": Sampling(temperature=0)},
        {"sampling": Sampling(temperature=1.3, top_p=0.5, top_k=7, min_p=0.01)},
        {"sampling": Sampling(seed=77)},
        {"sampling": Sampling(repetition_penalty=1.2, logit_bias={5: 2.0})},
        {"max_new_tokens": 17},
        {"max_new_tokens": 3},
        {"stop": ("the end",)},
        {"stop_ids": (3, 4, 5)},
    ],
    ids=str,
)
def test_another_request_of_the_same_buckets_compiles_nothing(
    warm: Loaded, compilations: list[str], other: dict[str, Any]
) -> None:
    programs = lanes_module.start._cache_size(), lanes_module.advance._cache_size()
    generate(warm, requests([1, *range(20, 33)], [1, 30], **other))
    assert compilations == []
    assert programs == (
        lanes_module.start._cache_size(),
        lanes_module.advance._cache_size(),
    )


def test_another_text_compiles_nothing(warm: Loaded, compilations: list[str]) -> None:
    text_completion(warm, ["once upon"], max_new_tokens=20)
    compilations.clear()
    text_completion(warm, ["the sun"], max_new_tokens=19)
    assert compilations == []


def test_chunks_of_any_size_run_one_program(
    warm: Loaded, compilations: list[str]
) -> None:
    list(stream(warm, requests([1, 7, 8]), chunk=8))
    compilations.clear()
    for chunk in (1, 5, 32, 100):
        list(stream(warm, requests([1, 7, 8]), chunk=chunk))
    assert compilations == []


def test_a_request_in_a_larger_bucket_compiles_again(
    warm: Loaded, compilations: list[str]
) -> None:
    generate(warm, requests([1, 7, 8]))
    compilations.clear()
    generate(warm, requests([1, 7, 8], max_new_tokens=100))
    assert compilations


def test_lanes_compile_each_program_once(warm: Loaded, compilations: list[str]) -> None:
    """A second request of the same bucket, in another lane, compiles nothing."""
    model, params, tokenizer = warm.language_model, warm.params, warm.tokenizer

    def run(
        lanes: lanes_module.Lanes, lane: int, request: Request
    ) -> lanes_module.Lanes:
        inputs = start_inputs([request], model.config, tokenizer)
        prefix, _, _ = lanes_module.start(model, params, *inputs, num_slots=32)
        lanes, _ = lanes_module.advance(
            model,
            params,
            lanes_module.insert(lanes, jnp.int32(lane), prefix),
            jnp.int32(3),
        )
        return lanes

    cache = init_cache(model.config, 4, 64, "float32")
    lanes = lanes_module.empty_lanes(cache, model.config.vocab_size)
    lanes = run(lanes, 0, Request([1, 5, 6], 4))
    compilations.clear()
    run(lanes, 3, Request([1, 9], 9, Sampling(top_k=3), stop_ids=[2]))
    assert compilations == []


@needs_tpu_compiler
@pytest.mark.tpu_compile
@pytest.mark.slow
@programs
@batches
@pytest.mark.parametrize("name", ["llama2-7b", "llama2-70b"])
@pytest.mark.parametrize("attention", ["xla", "mosaic_tpu"])
def test_decoding_on_a_tpu_copies_no_weight_and_no_cache(
    name: str, batch: int, program: str, attention: Implementation
) -> None:
    config = preset(name).replace(num_layers=2)
    device = tpu_devices("v5e:2x2")[0]
    compiled = compile_decoding(
        program,
        config,
        batch=batch,
        slots=2048,
        dtype="bfloat16",
        device=device,
        attention=attention,
    )
    check_nothing_is_copied(compiled, config, batch, 2048, itemsize=2)
    assert compiled.memory_analysis().temp_size_in_bytes < 4 << 20
    kernels = compiled.as_text().count("tpu_custom_call")
    assert (kernels > 0) == (attention == "mosaic_tpu")


@needs_tpu_compiler
@pytest.mark.tpu_compile
@pytest.mark.slow
def test_llama2_7b_decodes_on_one_v5e_chip() -> None:
    config = preset("llama2-7b")
    device = tpu_devices("v5e:2x2")[0]
    compiled = compile_decoding(
        "advance", config, batch=1, slots=2048, dtype="bfloat16", device=device
    )
    check_nothing_is_copied(compiled, config, 1, 2048, itemsize=2)
    memory = compiled.memory_analysis()
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < 16e9


@needs_tpu_compiler
@pytest.mark.tpu_compile
@pytest.mark.slow
def test_a_slice_that_does_not_exist_is_refused_by_name() -> None:
    with pytest.raises(MeshError, match="v5e:1000x3"):
        tpu_devices("v5e:1000x3")


def test_a_missing_tpu_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install libtpu"):
        tpu_devices("v5e:2x2")
