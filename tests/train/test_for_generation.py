"""Sampling during training: the parameters are those that `load` gives."""

import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from support.models import TALKING, random_params, tiny_tokenizer

import llama_jax
from llama_jax.checkpoint.model_folder import Loaded, save_params
from llama_jax.params import flatten
from llama_jax.runtime import TRAINING_RULES, Rules, Runtime
from llama_jax.sharding import make_mesh, weight_shardings
from llama_jax.train.methods import Method, train_adapters, train_weights
from llama_jax.train.samples import complete_prompts

PROMPTS = ["once upon", "the sun"]
LORA = llama_jax.Lora(rank=2, alpha=4.0, targets=("q_proj", "down_proj"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    save_params(folder, random_params(TALKING), TALKING, tokenizer=tiny_tokenizer())
    return folder


def check_equals_load(loaded: Loaded, wanted: Loaded) -> None:
    """The same runtime, leaves and greedy tokens."""
    assert loaded.model.runtime == wanted.model.runtime
    assert loaded.model.runtime.rules == Rules()
    leaves, wanted_leaves = flatten(loaded.params), flatten(wanted.params)
    assert leaves.keys() == wanted_leaves.keys()
    for path, leaf in leaves.items():
        for one, other in zip(
            jax.tree.leaves(leaf), jax.tree.leaves(wanted_leaves[path]), strict=True
        ):
            assert one.dtype == other.dtype, path
            np.testing.assert_array_equal(one, other, err_msg=path)
    assert texts(loaded) == texts(wanted)


def texts(loaded: Loaded) -> Any:
    return complete_prompts(loaded, PROMPTS, "text", 8)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_cast_and_unstacked(
    base: pathlib.Path, dtype: Any, tmp_path: pathlib.Path
) -> None:
    opened = llama_jax.open_model(base)
    runtime = Runtime(
        dtype=dtype, param_dtype="float32", remat="block", rules=TRAINING_RULES
    )
    method = train_weights(opened.config, runtime, opened=opened)
    trained = method.init()
    method.save(tmp_path / "model", trained, tokenizer=opened.tokenizer)
    loaded = method.for_generation(trained, opened.tokenizer)
    check_equals_load(
        loaded, llama_jax.load(tmp_path / "model", runtime=Runtime(dtype=dtype))
    )
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(loaded.params))
    assert all(leaf.dtype == "float32" for leaf in jax.tree.leaves(trained))


def test_weights_are_sharded_by_the_rules_of_inference(base: pathlib.Path) -> None:
    mesh = make_mesh({"fsdp": 2, "sequence": 2}, jax.devices()[:4])
    opened = llama_jax.open_model(base)
    runtime = Runtime(dtype="bfloat16", param_dtype="float32", rules=TRAINING_RULES)
    method = train_weights(opened.config, runtime, opened=opened, mesh=mesh)
    trained = method.init()
    loaded = method.for_generation(trained, opened.tokenizer)
    wanted = llama_jax.load(base, runtime=Runtime(dtype="bfloat16"), mesh=mesh)
    check_equals_load(loaded, wanted)
    shardings = weight_shardings(
        loaded.params, loaded.model.config, loaded.model.runtime, mesh
    )
    for path, leaf in flatten(loaded.params).items():
        wanted_sharding = flatten(shardings)[path]
        assert leaf.sharding.is_equivalent_to(wanted_sharding, leaf.ndim), path


@pytest.mark.parametrize("quantize", [None, "int8", "nf4"])
def test_adapters_are_applied_beside_their_weights(
    base: pathlib.Path, quantize: Any, tmp_path: pathlib.Path
) -> None:
    opened = llama_jax.open_model(base)
    method = train_adapters(opened, Runtime(), LORA, quantize=quantize)
    trained = jax.tree.map(lambda leaf: leaf + 0.1, method.init())
    method.save(tmp_path / "adapter", trained)
    loaded = method.for_generation(trained, opened.tokenizer)
    wanted = llama_jax.load(base, quantize=quantize, adapter=tmp_path / "adapter")
    check_equals_load(loaded, wanted)


def test_a_second_conversion_compiles_nothing(base: pathlib.Path) -> None:
    opened = llama_jax.open_model(base)
    method: Method = train_weights(opened.config, Runtime(), opened=opened)
    trained = method.init()
    method.for_generation(trained, opened.tokenizer)
    with jax.log_compiles(False), count_compiles() as compiles:
        method.for_generation(trained, opened.tokenizer)
    assert not compiles


class count_compiles(list[str]):
    """A list of the programs that are compiled within its context."""

    def __enter__(self) -> "count_compiles":
        def listen(name: str, *_: Any, **__: Any) -> None:
            if name.endswith("backend_compile_duration"):
                self.append(name)

        jax.monitoring.register_event_duration_secs_listener(listen)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.clear_event_listeners()
