"""The tables of all formats, and the axis patterns in them."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.foreign import TINY

from llama_jax.checkpoint.lazy_leaf import LazyLeaf, lazy_leaf, lazy_leaves
from llama_jax.config import LlamaConfig
from llama_jax.conversion.axis_patterns import axes_shape, rearrange, reverse
from llama_jax.conversion.tensor_mapping import (
    leaves_from_tensors,
    pattern_sizes,
    source_shapes,
    tensors_from_leaves,
)
from llama_jax.conversion.tensor_tables import (
    GGUF,
    HUGGING_FACE,
    LLAMA2C,
    META,
    ORBAX,
    Format,
)
from llama_jax.errors import CheckpointError
from llama_jax.params import AXES, axes_of, leaf_paths, weight_shape

ALL = (META, HUGGING_FACE, GGUF, LLAMA2C, ORBAX)
FORMATS = pytest.mark.parametrize("format", ALL, ids=lambda format: format.name)
DTYPES = [np.dtype(d) for d in (np.float32, np.float16, ml_dtypes.bfloat16)]
PATTERNS = sorted({rule.pattern for format in ALL for rule in format.rules})


def configs() -> st.SearchStrategy[LlamaConfig]:
    """Draw small models of every proportion."""

    def build(kv: int, group: int, half: int, layers: int, tied: bool) -> LlamaConfig:
        return TINY.replace(
            num_layers=layers,
            num_heads=kv * group,
            num_kv_heads=kv,
            head_dim=2 * half,
            embed_dim=kv * group * 2 * half,
            tied_embeddings=tied,
        )

    small = st.integers(1, 3)
    return st.builds(build, small, small, small, small, st.booleans())


def test_rotary_pairs_move_half_a_head_apart() -> None:
    # Two heads of width 6: each row holds its own number.
    rows = np.repeat(np.arange(12.0)[:, None], 2, axis=1)
    sizes = {"N": 2, "h": 3, "two": 2, "D": 2}
    moved = rearrange("(N h two) D -> D (N two h)", rows, sizes)
    assert moved.shape == (2, 12)
    assert moved[0].tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    assert moved[1].tolist() == moved[0].tolist()


@given(config=configs(), seed=st.integers(0, 99), data=st.data())
def test_every_pattern_equals_one_plain_transposition(
    config: LlamaConfig, seed: int, data: st.DataObject
) -> None:
    pattern = data.draw(st.sampled_from(PATTERNS))
    kind, cast = data.draw(st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)))
    sizes = pattern_sizes(config)
    left, right = (
        side.replace("(", "").replace(")", "") for side in pattern.split("->")
    )
    shape = axes_shape(pattern.split(" -> ")[0], sizes)
    array = np.random.default_rng(seed).standard_normal(shape).astype(kind)
    order = [left.split().index(name) for name in right.split()]
    plain = array.reshape([sizes[name] for name in left.split()]).transpose(order)
    moved = rearrange(pattern, array, sizes, cast)
    assert moved.dtype == cast
    assert moved.shape == axes_shape(pattern.split(" -> ")[1], sizes)
    assert moved.tobytes() == plain.astype(cast).tobytes()


@given(config=configs(), pattern=st.sampled_from(PATTERNS))
def test_a_pattern_read_backwards_is_its_inverse(
    config: LlamaConfig, pattern: str
) -> None:
    sizes = pattern_sizes(config)
    shape = axes_shape(pattern.split(" -> ")[0], sizes)
    array = np.random.default_rng(0).standard_normal(shape)
    there = rearrange(pattern, array, sizes)
    np.testing.assert_array_equal(rearrange(reverse(pattern), there, sizes), array)


def test_arrays_larger_than_one_copy_are_rearranged() -> None:
    array = np.arange(300 * 7.0).reshape(300, 7)
    moved = rearrange("F D -> D F", array, {"F": 300, "D": 7})
    np.testing.assert_array_equal(moved, array.T)
    sizes = {"N": 3, "h": 100, "two": 2, "D": 5}
    heads = np.arange(600 * 5.0).reshape(600, 5)
    moved = rearrange("(N h two) D -> D (N two h)", heads, sizes)
    plain = heads.reshape(3, 100, 2, 5).transpose(3, 0, 2, 1).reshape(5, 600)
    np.testing.assert_array_equal(moved, plain)


@FORMATS
@settings(max_examples=20)
@given(config=configs())
def test_rules_give_every_leaf_its_shape(format: Format, config: LlamaConfig) -> None:
    sizes = pattern_sizes(config)
    for rule in format.rules:
        shape = axes_shape(rule.pattern.split(" -> ")[1], sizes)
        assert shape == weight_shape(config, AXES[rule.row].removeprefix("L "))
    tensors = {
        name: LazyLeaf(shape, np.dtype(np.float32), lambda: pytest.fail("was read"))
        for name, shape in source_shapes(format, config).items()
    }
    leaves = leaves_from_tensors(format, tensors, config, where="x")
    assert list(leaves) == list(leaf_paths(config))
    for path, leaf in leaves.items():
        assert leaf.shape == weight_shape(config, axes_of(path))


@FORMATS
def test_rules_have_distinct_names_and_rows(format: Format) -> None:
    for column in ("foreign_name", "row"):
        names = [getattr(rule, column) for rule in format.rules]
        assert len(set(names)) == len(names)
    assert not {rule.foreign_name for rule in format.rules} & {
        name for name, _ in format.dropped
    }


@pytest.mark.parametrize("change", ["missing", "unknown", "shape", "dropped shape"])
def test_tensors_that_do_not_match_the_config_are_refused_by_name(change: str) -> None:
    shapes = source_shapes(META, TINY)
    victim = "layers.1.feed_forward.w2.weight"
    if change == "missing":
        del shapes[victim]
    elif change == "unknown":
        victim = "layers.0.attention.wq.bias"
        shapes[victim] = (3,)
    elif change == "shape":
        shapes[victim] = shapes[victim][::-1]
    else:
        victim = "rope.freqs"
        shapes[victim] = (3,)
    tensors = {
        name: LazyLeaf(shape, np.dtype(np.float32), lambda: pytest.fail("was read"))
        for name, shape in shapes.items()
    }
    with pytest.raises(CheckpointError, match=victim):
        leaves_from_tensors(META, tensors, TINY, where="x")


def test_rotary_tables_are_dropped() -> None:
    shapes = source_shapes(META, TINY) | {
        "rope.freqs": (2,),
        "layers.1.attention.inner_attention.rope.freqs": (2,),
    }
    tensors = {name: lazy_leaf(np.zeros(shape)) for name, shape in shapes.items()}
    assert list(leaves_from_tensors(META, tensors, TINY, where="x")) == list(
        leaf_paths(TINY)
    )


def test_a_configuration_of_absurd_depth_is_refused_at_once() -> None:
    with pytest.raises(CheckpointError, match="2147483647 layers"):
        leaves_from_tensors(META, {}, TINY.replace(num_layers=2**31 - 1), where="x")


def test_weights_too_large_for_float16_are_refused() -> None:
    tensors = {
        n: lazy_leaf(np.ones(s, np.float32))
        for n, s in source_shapes(META, TINY).items()
    }
    tensors["norm.weight"] = lazy_leaf(np.full(32, 1e6, np.float32))
    leaves = leaves_from_tensors(
        META, tensors, TINY, where="x", dtype=np.dtype(np.float16)
    )
    assert leaves["lm_head"].read().dtype == np.float16
    with pytest.raises(CheckpointError, match="65504"):
        leaves["transformer/final_norm/scale"].read()


@FORMATS
@settings(max_examples=20)
@given(config=configs(), seed=st.integers(0, 99))
def test_exported_tensors_convert_back_bit_for_bit(
    format: Format, config: LlamaConfig, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    kind = DTYPES[seed % 3]
    ours = {
        path: rng.standard_normal(weight_shape(config, axes_of(path))).astype(kind)
        for path in leaf_paths(config)
    }
    leaves = lazy_leaves(ours)
    tensors = tensors_from_leaves(format, leaves, config)
    if config.tied_embeddings and not format.can_tie:
        config = config.replace(tied_embeddings=False)
        ours["lm_head"] = ours["transformer/embedding"].T
    assert {name: t.shape for name, t in tensors.items()} == source_shapes(
        format, config
    )
    back = leaves_from_tensors(format, tensors, config, where="x")
    assert back.keys() == ours.keys()
    for path, array in ours.items():
        actual = back[path].read()
        assert actual.dtype == kind
        assert actual.tobytes() == array.tobytes(), path
