"""Adapters in folders of `peft`: round trips, by `peft` too, and what is refused."""

import json
import pathlib
import random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.foreign import TINY, tiny_tokenizer
from support.models import forward, random_params, random_tokens

from llama_jax.checkpoint.model_folder import save_params
from llama_jax.conversion import convert
from llama_jax.conversion.peft import read_peft, write_peft
from llama_jax.errors import CheckpointError, ConfigError, LlamaJaxError
from llama_jax.model.lora import Lora, adapt, init_lora
from llama_jax.model.transformer import Llama
from llama_jax.params import flatten, stack_layers
from llama_jax.runtime import Runtime

CONFIG = TINY.replace(num_heads=4, num_kv_heads=2, head_dim=8)
LORA = Lora(rank=4, alpha=6.0, targets=("q_proj", "v_proj", "down_proj"))
CLOSE = 1e-4  # absolute, of float32 logits, as for other folders


def some_adapters(lora: Lora = LORA, dtype: Any = "float32") -> Any:
    """Return unrolled adapters whose b is not zero."""
    initial = init_lora(CONFIG, jax.random.key(0), lora, runtime=Runtime(), dtype=dtype)
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype), initial
    )


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """Write a folder with adapters."""
    write_peft(tmp_path / "peft", some_adapters(), CONFIG, LORA)
    return tmp_path / "peft"


def change(folder: pathlib.Path, **fields: Any) -> None:
    """Change fields of its configuration."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | fields))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stabilized", [False, True])
def test_written_adapters_are_read_back(
    tmp_path: pathlib.Path, dtype: Any, stabilized: bool
) -> None:
    lora = Lora(
        rank=4, alpha=6.0, rank_stabilized=stabilized, targets=("k_proj", "up_proj")
    )
    adapters = some_adapters(lora, dtype)
    write_peft(tmp_path / "one", adapters, CONFIG, lora, base_model="some/model")
    actual, description = read_peft(tmp_path / "one", CONFIG)
    assert description == lora
    jax.tree.map(np.testing.assert_array_equal, actual, adapters)
    assert {leaf.dtype for leaf in jax.tree.leaves(actual)} == {jnp.dtype(dtype)}
    # The stacked layout gives the same bytes.
    write_peft(tmp_path / "two", stack_layers(adapters), CONFIG, lora)
    name = "adapter_model.safetensors"
    assert (tmp_path / "one" / name).read_bytes() == (
        tmp_path / "two" / name
    ).read_bytes()


def test_names_and_axes_are_those_of_peft(folder: pathlib.Path) -> None:
    content = (folder / "adapter_model.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    header.pop("__metadata__")
    layer = "base_model.model.model.layers.1."
    assert header[f"{layer}self_attn.v_proj.lora_A.weight"]["shape"] == [4, 32]
    assert header[f"{layer}self_attn.v_proj.lora_B.weight"]["shape"] == [16, 4]
    assert header[f"{layer}mlp.down_proj.lora_A.weight"]["shape"] == [4, 96]
    assert len(header) == 2 * 3 * CONFIG.num_layers


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA', but only LORA"),
        ({"use_dora": True}, "use_dora is True, which"),
        ({"bias": "lora_only"}, "bias is 'lora_only', which"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is "),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern is "),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern is "),
        ({"layers_to_transform": [0]}, "layers_to_transform is "),
        ({"something_new": 1}, "something_new is 1, which"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes"),
        ({"init_lora_weights": [1]}, "init_lora_weights is "),
        ({"r": 4.0}, "r is 4.0 and use_rslora False"),
        ({"r": 0}, "lora: rank must be a positive integer, got 0"),
        ({"use_rslora": "yes"}, "r is 4 and use_rslora 'yes'"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"lora_alpha": -1}, "lora: alpha must be a positive number, got -1"),
    ],
)
def test_unsupported_adapters_are_refused_by_name(
    folder: pathlib.Path, fields: dict[str, Any], reason: str
) -> None:
    change(folder, **fields)
    with pytest.raises(CheckpointError, match=f"adapter_config.json: {reason}"):
        read_peft(folder, CONFIG)


@pytest.mark.parametrize("init", [False, "gaussian", "eva", "orthogonal"])
def test_initialization_settings_are_ignored(folder: pathlib.Path, init: Any) -> None:
    change(folder, init_lora_weights=init, lora_dropout=0.1, revision="main")
    assert read_peft(folder, CONFIG)[1] == LORA


def test_adapters_of_another_model_are_refused(folder: pathlib.Path) -> None:
    with pytest.raises(CheckpointError, match=r"contains .*layers\.1\..*, which is no"):
        read_peft(folder, CONFIG.replace(num_layers=1))
    with pytest.raises(
        CheckpointError, match=r"lacks .*layers\.2\..* only some layers"
    ):
        read_peft(folder, CONFIG.replace(num_layers=3))
    with pytest.raises(CheckpointError, match=r"the shape \[4, 96\], .* \[4, 100\]"):
        read_peft(folder, CONFIG.replace(mlp_dim=100))
    change(folder, r=8)
    with pytest.raises(CheckpointError, match=r"the shape \[4, 32\], .* \[8, 32\]"):
        read_peft(folder, CONFIG)


def test_adapters_that_do_not_match_their_description_are_not_written(
    tmp_path: pathlib.Path,
) -> None:
    for lora, reason in (
        (Lora(rank=4, alpha=1, targets=("q_proj",)), "not expected"),
        (Lora(rank=4, alpha=1), "missing"),
        (Lora(rank=8, alpha=1, targets=LORA.targets), r"the shape \[.*4.*\], but"),
    ):
        with pytest.raises(ConfigError, match=f"^lora: .* {reason}"):
            write_peft(tmp_path / "x", some_adapters(), CONFIG, lora)
        assert not (tmp_path / "x").exists()


def test_an_existing_folder_is_not_overwritten(folder: pathlib.Path) -> None:
    with pytest.raises(CheckpointError, match="already exists"):
        write_peft(folder, some_adapters(), CONFIG, LORA)


def test_damaged_folders_are_refused_in_one_line(folder: pathlib.Path) -> None:
    rng = random.Random(0)
    files = [folder / "adapter_config.json", folder / "adapter_model.safetensors"]
    whole = {file: file.read_bytes() for file in files}
    reasons = []
    for number in range(150):
        file = files[number % 2]
        content = bytearray(whole[file])
        if number % 3:
            end = len(content) if number % 2 == 0 else 900
            for _ in range(rng.randint(1, 4)):
                content[rng.randrange(end)] = rng.randrange(256)
        else:
            del content[rng.randrange(len(content)) :]
        file.write_bytes(content)
        try:
            read_peft(folder, CONFIG)
        except LlamaJaxError as error:
            reasons.append(str(error))
        file.write_bytes(whole[file])
    assert len(reasons) > 75
    assert not any("\n" in reason for reason in reasons)
    files[1].unlink()
    with pytest.raises(CheckpointError, match="there is no such file"):
        read_peft(folder, CONFIG)


def their_logits(base: pathlib.Path, folder: pathlib.Path, tokens: Any) -> np.ndarray:
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    peft = pytest.importorskip("peft", reason="needs peft")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, folder)
    model.eval()
    with torch.no_grad():
        logits: np.ndarray = model(torch.tensor(np.asarray(tokens))).logits.numpy()
    return logits


def save_base(tmp_path: pathlib.Path, params: Any) -> pathlib.Path:
    """Write the model as a Hugging Face folder."""
    tokenizer = tiny_tokenizer(tmp_path)
    save_params(tmp_path / "ours", params, CONFIG, tokenizer=tokenizer)
    convert(tmp_path / "ours", tmp_path / "hf", target_format="hf")
    return tmp_path / "hf"


def our_logits(params: Any, folder: pathlib.Path, tokens: Any) -> np.ndarray:
    adapters, lora = read_peft(folder, CONFIG)
    adapted = adapt(params, adapters, lora.scaling)
    return np.asarray(forward(Llama(CONFIG, Runtime()), adapted, tokens)[0])


@pytest.mark.slow
@pytest.mark.parametrize("stabilized", [False, True])
def test_peft_reads_our_folder(tmp_path: pathlib.Path, stabilized: bool) -> None:
    pytest.importorskip("peft", reason="needs peft")
    params, tokens = random_params(CONFIG), random_tokens(CONFIG, 2, 24)
    base = save_base(tmp_path, params)
    lora = Lora(rank=4, alpha=6, rank_stabilized=stabilized)
    write_peft(tmp_path / "peft", some_adapters(lora), CONFIG, lora)
    expected = our_logits(params, tmp_path / "peft", tokens)
    plain, _ = forward(Llama(CONFIG, Runtime()), params, tokens)
    assert np.abs(expected - np.asarray(plain)).max() > 0.1
    actual = their_logits(base, tmp_path / "peft", tokens)
    np.testing.assert_allclose(actual, expected, atol=CLOSE, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("stabilized", [False, True])
def test_a_folder_that_peft_wrote_gives_its_logits(
    tmp_path: pathlib.Path, stabilized: bool
) -> None:
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    peft = pytest.importorskip("peft", reason="needs peft")
    params, tokens = random_params(CONFIG), random_tokens(CONFIG, 2, 24)
    base = save_base(tmp_path, params)
    torch.manual_seed(0)
    model = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        peft.LoraConfig(
            r=3,
            lora_alpha=7,
            use_rslora=stabilized,
            target_modules=["q_proj", "k_proj", "o_proj", "gate_proj"],
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        ),
    )
    model.save_pretrained(tmp_path / "peft")
    adapters, lora = read_peft(tmp_path / "peft", CONFIG)
    assert (lora.rank, lora.alpha, lora.rank_stabilized) == (3, 7, stabilized)
    assert lora.targets == ("q_proj", "k_proj", "o_proj", "gate_proj")
    assert len(flatten(adapters)) == 2 * 4 * CONFIG.num_layers
    actual = our_logits(params, tmp_path / "peft", tokens)
    expected = their_logits(base, tmp_path / "peft", tokens)
    np.testing.assert_allclose(actual, expected, atol=CLOSE, rtol=0)
