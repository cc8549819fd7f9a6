"""Meshes of eight devices: what each device stores."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from support.models import TINY

from llama_jax.errors import MeshError
from llama_jax.model.cache import cache_shardings
from llama_jax.model.init import init_params
from llama_jax.model.transformer import Llama
from llama_jax.params import flatten
from llama_jax.runtime import Rules, Runtime
from llama_jax.sharding import (
    constrain,
    make_mesh,
    param_shardings,
    parse_mesh,
    partition_spec,
)

pytestmark = pytest.mark.skipif(
    len(jax.devices()) < 8, reason="needs eight devices (tests/conftest.py)"
)


def mesh_of(text: str, devices: int = 8) -> Any:
    return make_mesh(parse_mesh(text), jax.devices()[:devices])


def test_weights_are_initialized_sharded() -> None:
    config = TINY.replace(num_layers=1)
    runtime, key = Runtime(), jax.random.key(0)
    mesh = mesh_of("fsdp=4,tensor=2")
    params = init_params(Llama(config, runtime, mesh), key)
    shardings = flatten(param_shardings(config, runtime, mesh))
    whole, part = 0, 0
    for path, leaf in flatten(params).items():
        assert leaf.sharding.is_equivalent_to(shardings[path], leaf.ndim), path
        whole += leaf.nbytes
        part += leaf.addressable_shards[0].data.nbytes
    # Matrices are split in eight; the norms' scales, a hundredth of all, are not.
    assert part < whole / 7
    for path, leaf in flatten(init_params(Llama(config, runtime), key)).items():
        np.testing.assert_array_equal(flatten(params)[path], leaf, path)


def test_weights_are_split_by_their_letters() -> None:
    shardings = flatten(
        param_shardings(TINY, Runtime(), mesh_of("data=2,fsdp=2,tensor=2"))
    )
    layer = "transformer/layers/0/attention/"
    assert shardings[f"{layer}q_proj"].spec == PartitionSpec("fsdp", "tensor")
    assert shardings[f"{layer}o_proj"].spec == PartitionSpec("tensor", "fsdp")
    assert shardings["lm_head"].spec == PartitionSpec("fsdp", "tensor")
    stacked = Runtime(layer_layout="stacked")
    shardings = flatten(param_shardings(TINY, stacked, mesh_of("fsdp=4,tensor=2")))
    assert shardings["transformer/layers/mlp/down_proj"].spec == PartitionSpec(
        None, "tensor", "fsdp"
    )


def test_slots_are_split_if_there_are_fewer_kv_heads_than_devices() -> None:
    mesh = mesh_of("data=2,tensor=4")
    shardings = flatten(param_shardings(TINY, Runtime(), mesh))
    layer = "transformer/layers/1/attention/"
    assert shardings[f"{layer}k_proj"].spec == PartitionSpec("fsdp", "tensor")
    assert shardings[f"{layer}q_proj"].spec == PartitionSpec("fsdp", "tensor")
    cache = cache_shardings(TINY, Runtime(), mesh, batch=4, num_slots=32)
    shape = (4, TINY.num_kv_heads, 32, TINY.head_dim)
    assert cache.layers[0].k.shard_shape(shape) == (2, 2, 8, 8)
    odd = cache_shardings(TINY, Runtime(), mesh, batch=4, num_slots=33)
    assert odd.layers[0].k.shard_shape((4, 2, 33, 8)) == (2, 2, 33, 8)


def test_slots_are_split_over_the_sequence_axis() -> None:
    mesh = mesh_of("sequence=2,tensor=4")
    cache = cache_shardings(TINY, Runtime(), mesh, batch=1, num_slots=32)
    assert cache.layers[0].k.shard_shape((1, 2, 32, 8)) == (1, 2, 4, 8)


def test_vectors_are_replicated() -> None:
    shardings = flatten(param_shardings(TINY, Runtime(), mesh_of("fsdp=4,tensor=2")))
    assert shardings["transformer/final_norm/scale"].spec == PartitionSpec(None)


def test_a_cache_is_split_over_rows_and_heads() -> None:
    mesh = mesh_of("data=2,fsdp=2,tensor=2")
    cache = cache_shardings(TINY, Runtime(), mesh, batch=4, num_slots=32)
    assert len(cache.layers) == TINY.num_layers
    assert cache.layers[0].k == cache.layers[-1].v
    assert cache.layers[0].k.shard_shape((4, 2, 32, 8)) == (1, 1, 32, 8)
    single = cache_shardings(TINY, Runtime(), mesh, batch=1, num_slots=32)
    assert single.layers[0].k.shard_shape((1, 2, 32, 8)) == (1, 1, 32, 8)


@pytest.mark.parametrize(
    ("text", "changes", "parameter", "letter", "axis"),
    [
        ("fsdp=8", {"embed_dim": 36}, "transformer/embedding", "D of 36", "fsdp"),
        ("tensor=8", {}, ".*0/attention/q_proj", "NH of 4", "tensor"),
        (
            "data=2,tensor=4",
            {"num_heads": 12, "num_kv_heads": 6},
            ".*0/attention/k_proj",
            "KH of 6",
            "tensor",
        ),
        ("data=2,tensor=4", {"mlp_dim": 50}, ".*0/mlp/gate_proj", "F of 50", "tensor"),
    ],
)
def test_an_axis_that_does_not_divide_is_refused_by_name(
    text: str, changes: dict[str, Any], parameter: str, letter: str, axis: str
) -> None:
    config = TINY.replace(**changes)
    message = f"^{parameter}: axis {letter} is not divisible by mesh axis {axis} of"
    with pytest.raises(MeshError, match=message):
        param_shardings(config, Runtime(), mesh_of(text))


def test_a_vocabulary_that_does_not_divide_is_replicated() -> None:
    # 32,001 rows are common (Alpaca, Vicuna), and no mesh divides them.
    config = TINY.replace(vocab_size=97)
    shardings = flatten(param_shardings(config, Runtime(), mesh_of("data=4,tensor=2")))
    assert shardings["lm_head"].spec == PartitionSpec("fsdp", None)
    assert shardings["transformer/embedding"].spec == PartitionSpec(None, "fsdp")


def test_activations_that_do_not_divide_are_replicated() -> None:
    mesh = mesh_of("data=2,fsdp=2,tensor=2")
    x = jnp.ones((4, 1, 32))
    assert constrain(x, "B T D", Rules(), None) is x
    constrained = jax.jit(lambda x: constrain(x, "B T D", Rules(), mesh))
    assert constrained(x).addressable_shards[0].data.shape == (1, 1, 32)
    assert constrained(x[:3]).addressable_shards[0].data.shape == (3, 1, 32)


def test_a_partition_spec_maps_letters_by_the_rules() -> None:
    rules = Rules()
    assert partition_spec("D NH", rules.weights) == PartitionSpec("fsdp", "tensor")
    assert partition_spec("B T D", rules.activations) == PartitionSpec(
        ("data", "fsdp"), "sequence", None
    )


def test_a_mesh_is_parsed_into_sizes_by_axis() -> None:
    assert parse_mesh("tensor=4") == {"tensor": 4}
    assert parse_mesh("data=1, fsdp=-1,tensor=4") == {
        "data": 1,
        "fsdp": -1,
        "tensor": 4,
    }


def test_an_axis_of_minus_one_takes_the_remaining_devices() -> None:
    shape = dict(mesh_of("data=2,fsdp=-1").shape)
    assert shape == {"data": 2, "fsdp": 4, "sequence": 1, "tensor": 1}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "'' is not an axis"),
        ("model=4", "'model' is not an axis; choose from data, .* tensor=4$"),
        ("tensor=2,tensor=4", "'tensor' is there twice"),
        ("tensor", "tensor= is not a size; give a positive number"),
        ("tensor=two", "tensor=two is not a size"),
        ("tensor=0", "tensor=0 is not a size"),
        ("tensor=-2", "tensor=-2 is not a size"),
        ("data=-1,fsdp=-1", "two axes are -1"),
    ],
)
def test_an_invalid_mesh_text_is_refused(text: str, reason: str) -> None:
    with pytest.raises(MeshError, match=reason) as caught:
        parse_mesh(text)
    assert str(caught.value).startswith(f"mesh {text!r}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"tensor": 16}, "tensor=16: needs 16 devices, but there are 8;"),
        ({"tensor": 4}, "tensor=4: needs 4 devices, but there are 8;"),
        ({"data": 3, "fsdp": -1}, "needs 6 devices, but there are 8;"),
        ({"data": -1, "fsdp": -1}, "two axes are -1"),
        ({"data": 0, "fsdp": -1}, "data=0 is not a size"),
        ({"data": -2, "fsdp": -4}, "data=-2 is not a size"),
        ({"model": 8}, "'model' is not an axis"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(
    sizes: dict[str, int], reason: str
) -> None:
    with pytest.raises(MeshError, match=reason):
        make_mesh(sizes, jax.devices()[:8])
