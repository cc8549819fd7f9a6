"""The loss of a packed batch is that of its records alone, weighted by their tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.models import TINY, random_params
from support.tolerances import EQUAL_FORWARD, EQUAL_GRADIENT

from llama_jax.data.batch import Batch, Example, assemble, pack, pad
from llama_jax.model.transformer import Llama
from llama_jax.runtime import Runtime
from llama_jax.train.losses import next_token_loss

LENGTH = 40


def some_examples(split: bool) -> list[Example]:
    draw = np.random.default_rng(0)
    found = []
    for _ in range(9):
        ids = draw.integers(3, TINY.vocab_size, draw.integers(3, 18)).astype(np.int32)
        mask = draw.random(len(ids)) < 0.6
        mask[-1] = True
        if split:  # only what is learnt whole is split
            mask[:] = True
        found.append(Example(ids, mask))
    return found


@pytest.mark.parametrize("split", [False, True])
def test_packed_loss_and_gradient_are_those_of_the_records_alone(split: bool) -> None:
    model = Llama(TINY, Runtime())
    params = random_params(TINY)

    @jax.jit
    @jax.value_and_grad
    def measured(params: object, batch: Batch) -> jax.Array:
        return next_token_loss(model, params, batch).total  # type: ignore[arg-type]

    examples = some_examples(split)
    rows = list(pack(examples, LENGTH, look_ahead=4, split=split))
    if split:  # then each part is a record of its own
        examples = [example for row in rows for example in row]
    assert len(rows) < len(examples) / 2
    empty: list[list[Example]] = [[]] * (len(examples) - len(rows))
    packed = assemble(rows + empty, LENGTH)
    alone = pad(examples, LENGTH)
    weight = sum(int(example.mask[1:].sum()) for example in examples)
    assert np.sum(packed.loss_mask) == np.sum(alone.loss_mask) == weight
    loss, gradient = measured(params, packed)
    expected, wanted = measured(params, alone)
    assert float(loss) == pytest.approx(float(expected), rel=EQUAL_FORWARD)
    for found, leaf in zip(
        jax.tree.leaves(gradient), jax.tree.leaves(wanted), strict=True
    ):
        atol = EQUAL_GRADIENT * float(jnp.abs(leaf).max())
        np.testing.assert_allclose(found, leaf, rtol=0, atol=atol)
