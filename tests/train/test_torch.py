"""Steps of training beside PyTorch's: the Llama of `transformers`, same weights."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.foreign import every_kind, write_llama2c_tokenizer
from support.models import random_params
from support.tolerances import TRAIN_GRADIENT, TRAIN_HUNDRED_STEPS, TRAIN_LOSS

from llama_jax.checkpoint.model_folder import save_params
from llama_jax.config import LlamaConfig
from llama_jax.conversion import convert
from llama_jax.conversion.llama2c_tokenizer import read_llama2c_tokenizer
from llama_jax.data.batch import Batch
from llama_jax.loading import load
from llama_jax.model.transformer import Llama
from llama_jax.params import flatten, stack_layers, unstack_layers
from llama_jax.runtime import Runtime
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.train.losses import next_token_loss
from llama_jax.train.optimizer import make_optimizer, make_schedule
from llama_jax.train.state import init_state
from llama_jax.train.step import make_train_step

torch = pytest.importorskip("torch", reason="needs PyTorch")
transformers = pytest.importorskip("transformers", reason="needs transformers")

pytestmark = pytest.mark.slow
STACKED = Runtime(layer_layout="stacked", remat="block")
STEPS = 100


def some_batch(
    config: LlamaConfig, seed: int, rows: int = 4, length: int = 32
) -> Batch:
    """Random tokens, of which a third are no targets."""
    draw = np.random.default_rng(seed)
    ids = draw.integers(config.vocab_size, size=(rows, length + 1)).astype(np.int32)
    mask = (draw.random((rows, length)) < 2 / 3).astype(np.float32)
    ones = np.ones((rows, length), np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    arrays: list[Any] = [ids[:, :-1], ids[:, 1:], mask, ones, positions]
    return Batch(*arrays)


def their_loss(model: Any, batch: Batch) -> Any:
    """The mean over the targets, with its graph."""
    tokens, targets, mask, _, _ = (np.array(array) for array in batch)
    logits = model(torch.tensor(tokens, dtype=torch.long), use_cache=False).logits
    labels = torch.tensor(np.where(mask > 0, targets, -100), dtype=torch.long)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def their_model(folder: pathlib.Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32
    )
    return model.train()


def our_tree(folder: pathlib.Path, tokenizer: Any) -> dict[str, Any]:
    """A folder of theirs as weights of ours, unrolled."""
    loaded = load(folder, runtime=Runtime(dtype="float32"), tokenizer=tokenizer)
    return dict(loaded.params)


def their_gradient(
    model: Any, batch: Batch, folder: pathlib.Path, tokenizer: Any
) -> tuple[float, dict[str, Any]]:
    """Loss and gradient in float64, the latter in our names and layouts.

    Their gradients in float32 lie up to 1.3e-5 from those in float64 themselves. One
    crosses as weights do, of which it is linear: by a folder, in float32.
    """
    model.double()
    model.zero_grad()
    loss = their_loss(model, batch)
    loss.backward()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.grad)
    model.float().save_pretrained(folder)
    return float(loss.detach()), our_tree(folder, tokenizer)


def our_gradient(
    config: LlamaConfig, params: Any, batch: Batch
) -> tuple[float, dict[str, Any]]:
    model = Llama(config, STACKED)
    shown = optax.trace(decay=0.0)
    step = make_train_step(
        lambda params, _, batch: next_token_loss(model, params, batch), shown
    )
    state = init_state(stack_layers(params), shown)
    state, metrics = step(state, {}, batch)
    return float(metrics.loss), unstack_layers(state.opt_state.trace)


def check_gradients(actual: dict[str, Any], wanted: dict[str, Any]) -> None:
    ours, theirs = flatten(actual), flatten(wanted)
    assert ours.keys() == theirs.keys()
    for path, leaf in theirs.items():
        exact = np.asarray(leaf, np.float64)
        difference = np.linalg.norm(np.asarray(ours[path], np.float64) - exact)
        assert difference <= TRAIN_GRADIENT * np.linalg.norm(exact), path


def exported(config: LlamaConfig, folder: pathlib.Path) -> tuple[Any, pathlib.Path]:
    """Random weights as a folder of theirs, and a tokenizer."""
    packed = write_llama2c_tokenizer(folder / "tokenizer.bin")
    tokenizer = Tokenizer(read_llama2c_tokenizer(packed))
    save_params(folder / "ours", random_params(config), config, tokenizer=tokenizer)
    convert(folder / "ours", folder / "hf", target_format="hf")
    return their_model(folder / "hf"), packed


@every_kind
def test_loss_and_gradient_are_those_of_pytorch(
    tmp_path: pathlib.Path, config: LlamaConfig
) -> None:
    theirs, tokenizer = exported(config, tmp_path)
    batch = some_batch(config, 0)
    wanted, exact = their_gradient(theirs, batch, tmp_path / "gradient", tokenizer)
    loss, gradient = our_gradient(config, random_params(config), batch)
    assert loss == pytest.approx(wanted, rel=TRAIN_LOSS)
    check_gradients(gradient, exact)


def test_a_trained_model_has_the_gradient_of_pytorch(
    tmp_path: pathlib.Path, assets: pathlib.Path
) -> None:
    source = assets / "weights" / "stories15M.bin"
    file = assets / "tokenizers" / "llama2.model"
    convert(source, tmp_path / "hf", target_format="hf", tokenizer=file)
    loaded = load(source, runtime=Runtime(dtype="float32"), tokenizer=file)
    text = (assets / "text" / "wikitext2-valid.txt").read_text("utf-8")
    ids = np.asarray(loaded.tokenizer.encode(text[:2000], bos=True, eos=False))
    ids = ids[: 4 * 64 + 1].astype(np.int32)
    batch = some_batch(loaded.model.config, 0, 4, 64)
    batch = batch._replace(
        tokens=ids[:-1].reshape(4, 64),  # type: ignore[arg-type]
        targets=ids[1:].reshape(4, 64),  # type: ignore[arg-type]
    )
    theirs = their_model(tmp_path / "hf")
    wanted, exact = their_gradient(theirs, batch, tmp_path / "gradient", file)
    loss, gradient = our_gradient(loaded.model.config, loaded.params, batch)
    assert loss == pytest.approx(wanted, rel=TRAIN_LOSS)
    check_gradients(gradient, exact)


@every_kind
def test_losses_agree_with_those_of_pytorch_for_a_hundred_steps(
    tmp_path: pathlib.Path, config: LlamaConfig
) -> None:
    theirs, _ = exported(config, tmp_path)
    batches = [some_batch(config, number) for number in range(4)]
    rate = make_schedule("cosine", 1e-3, steps=STEPS, warmup=10)
    optimizer = make_optimizer(rate)
    model = Llama(config, STACKED)
    step = make_train_step(
        lambda params, _, batch: next_token_loss(model, params, batch), optimizer
    )
    state = init_state(stack_layers(random_params(config)), optimizer)
    norms = [weight for name, weight in theirs.named_parameters() if "norm" in name]
    others = [
        weight for name, weight in theirs.named_parameters() if "norm" not in name
    ]
    peer = torch.optim.AdamW(
        [{"params": norms, "weight_decay": 0.0}, {"params": others}],
        betas=(0.9, 0.95),
        eps=1e-5,
        weight_decay=0.1,
    )
    losses, wanted = [], []
    for number in range(STEPS):
        batch = batches[number % len(batches)]
        for group in peer.param_groups:
            group["lr"] = float(rate(jnp.int32(number)))
        peer.zero_grad()
        loss = their_loss(theirs, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        peer.step()
        state, metrics = step(state, {}, jax.tree.map(jnp.asarray, batch))
        wanted.append(float(loss.detach()))
        losses.append(float(metrics.loss))
    assert wanted[-1] < 0.9 * wanted[0]
    np.testing.assert_allclose(losses, wanted, rtol=TRAIN_HUNDRED_STEPS)
