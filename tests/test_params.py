"""The table of axes against the model's own tree, and the two layouts of a tree."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.models import TINY, configs, random_params

from llama_jax.config import Head, LlamaConfig
from llama_jax.model.transformer import model_for
from llama_jax.params import (
    AXES,
    axes_of,
    axis_sizes,
    count_params,
    flatten,
    leaf_paths,
    param_shapes,
    stack_layers,
    unflatten,
    unstack_layers,
    weight_shape,
)
from llama_jax.runtime import LayerLayout, Runtime

ODD = TINY.replace(  # no two axes of one length, heads that do not add up to D
    vocab_size=97,
    num_layers=3,
    embed_dim=20,
    num_heads=6,
    num_kv_heads=3,
    head_dim=4,
    mlp_dim=17,
)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", ["unrolled", "stacked"])
@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_table_of_axes_describes_the_models_own_tree(
    tied: bool, layout: LayerLayout, head: Head
) -> None:
    config = ODD.replace(tied_embeddings=tied, head=head)
    model = model_for(config, Runtime(layer_layout=layout, param_dtype="bfloat16"))
    tokens = jnp.zeros((1, 1), jnp.int32)
    own = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    table = param_shapes(config, layout, dtype=jnp.bfloat16)
    assert flatten(table) == flatten(own)
    assert list(leaf_paths(config, layout)) == list(flatten(table))


def test_every_row_of_the_table_is_used_by_a_model() -> None:
    scalar = TINY.replace(head="scalar")
    assert {*leaf_paths(TINY, "stacked"), *leaf_paths(scalar, "stacked")} == set(AXES)


def test_axes_of_a_layer_lack_its_number() -> None:
    stacked = "transformer/layers/attention/q_proj"
    assert axes_of(stacked) == "L D NH"
    assert axes_of("transformer/layers/11/attention/q_proj") == "D NH"
    with pytest.raises(KeyError):
        axes_of("transformer/layers/11/attention/qkv_proj")


def test_shapes_come_from_the_letters() -> None:
    assert axis_sizes(ODD) == {"V": 97, "D": 20, "L": 3, "NH": 24, "KH": 12, "F": 17}
    assert weight_shape(ODD, "L NH D") == (3, 24, 20)


def test_count_of_parameters_is_the_sum_of_sizes() -> None:
    params = random_params(ODD)
    assert count_params(params) == sum(leaf.size for leaf in flatten(params).values())


names = st.text("abc/0", min_size=1, max_size=3).filter(lambda name: "/" not in name)
trees = st.dictionaries(
    names,
    st.recursive(
        st.integers(),
        lambda inner: st.dictionaries(names, inner, min_size=1, max_size=3),
        max_leaves=8,
    ),
)


@given(trees)
def test_unflatten_is_the_inverse_of_flatten(tree: dict[str, Any]) -> None:
    flat = flatten(tree)
    assert unflatten(flat) == tree
    assert all(isinstance(leaf, int) for leaf in flat.values())


@given(configs(), st.sampled_from(["lm", "scalar"]))
def test_stacking_and_unstacking_are_inverses(config: LlamaConfig, head: Head) -> None:
    config = config.replace(head=head)
    shapes = flatten(param_shapes(config))
    unrolled = unflatten(
        {
            path: np.random.default_rng(index).normal(size=shape.shape)
            for index, (path, shape) in enumerate(shapes.items())
        }
    )
    stacked = stack_layers(unrolled, np.stack)
    table = flatten(param_shapes(config, "stacked"))
    actual = flatten(stacked)
    assert list(actual) == list(table)
    assert all(actual[path].shape == table[path].shape for path in table)
    again = flatten(unstack_layers(stacked))
    assert list(again) == list(shapes)
    for path, leaf in flatten(unrolled).items():
        np.testing.assert_array_equal(again[path], leaf, err_msg=path)
    restacked = flatten(stack_layers(unstack_layers(stacked), np.stack))
    for path, leaf in actual.items():
        np.testing.assert_array_equal(restacked[path], leaf, err_msg=path)
