r"""Train the small story model that ships with the library, from nothing, on a CPU.

    python docs/recipes/bundled_model.py --stories stories.txt.gz \
        --validation tinystories-real.txt --output runs/stories

The text is a file of stories separated by `<|endoftext|>`. The first `HELD_OUT` of
them are never trained on, and the validation text is only looked at. All is seeded.

The weights in `llama_jax/assets/stories` did not come from one clean run. The first
died between steps 600 and 800; a second, with a new optimizer state, went on from the
weights that it had written at step 500:

    … --output runs/a --steps 2600 --decay 1300
    … --output runs/b --start runs/a/params.npz --steps 1100 --decay 800 --seed 1

That is 1,600 steps of 4,096 tokens, about 90 core-minutes. The defaults below, one
run of as many steps, have not been tried.
"""

import argparse
import gzip
import io
import pathlib
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import sentencepiece

from llama_jax.config import LlamaConfig
from llama_jax.init import init_params
from llama_jax.model import Llama, apply
from llama_jax.params import count_params, flatten, unflatten, unstack_layers
from llama_jax.runtime import Runtime
from llama_jax.tokenizer import Tokenizer

HELD_OUT = 1000
PIECES = 2048
CONFIG = LlamaConfig(
    vocab_size=PIECES,
    num_layers=5,
    embed_dim=192,
    num_heads=6,
    num_kv_heads=2,
    head_dim=32,
    mlp_dim=512,
    max_seq_len=512,
    rope_theta=1e4,
    rope_scaling=None,
    norm_eps=1e-5,
    tied_embeddings=True,
)


def read_stories(path: pathlib.Path) -> list[str]:
    """The stories of a text file, plain or gzipped."""
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    return [story.strip() for story in text.split("<|endoftext|>") if story.strip()]


def train_tokenizer(stories: list[str]) -> bytes:
    """A SentencePiece model with the family's settings: BPE, bytes, split digits."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for story in stories for line in story.split("\n")),
        model_writer=model,
        model_type="bpe",
        vocab_size=PIECES,
        byte_fallback=True,
        split_digits=True,
        character_coverage=0.99995,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


def batches(ids: np.ndarray, rows: int, length: int, seed: int) -> Iterator[np.ndarray]:
    """Endless batches of consecutive tokens; a new random offset in every epoch."""
    rng = np.random.default_rng(seed)
    while True:
        start = rng.integers(length)
        count = (len(ids) - start - 1) // length
        for chunk in rng.permutation(count)[: count // rows * rows].reshape(-1, rows):
            first = start + chunk[:, None] * length
            yield ids[first + np.arange(length + 1)]


def bits_per_byte(
    model: Llama, params: dict, tokenizer: Tokenizer, stories: list[str], length: int
) -> float:
    """Mean cost of the first `length` tokens of each story (BOS first, no EOS)."""

    @jax.jit
    def nats(params: dict, tokens: jax.Array) -> jax.Array:
        logits, _ = apply(model, params, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])

    total = size = 0.0
    for first in range(0, len(stories), 8):
        rows = [
            tokenizer.encode(story, bos=True, eos=False)[:length]
            for story in stories[first : first + 8]
        ]
        padded = np.zeros((8, length), np.int32)
        for index, row in enumerate(rows):
            padded[index, : len(row)] = row
        cost = np.asarray(nats(params, padded))
        for index, row in enumerate(rows):
            total += cost[index, : len(row) - 1].sum()
            size += len(tokenizer.decode(row).encode())
    return float(total / size / np.log(2))


def make_optimizer(steps: int, decay: int, peak: float) -> optax.GradientTransformation:
    """Muon for matrices, AdamW for the rest; warm-up, plateau, linear to zero."""

    def shape(height: float) -> optax.Schedule:
        return optax.join_schedules(
            [
                optax.linear_schedule(0.0, height, 100),
                optax.constant_schedule(height),
                optax.linear_schedule(height, 0.0, max(decay, 1)),
            ],
            [100, steps - decay],
        )

    def orthogonalised(params: dict) -> dict:
        layers = optax.contrib.MuonDimensionNumbers(1, 2)
        return jax.tree.map(lambda w: layers if w.ndim == 3 else None, params)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.contrib.muon(
            shape(peak),
            weight_decay=0.05,
            adam_b2=0.98,
            adam_learning_rate=shape(peak / 4),
            muon_weight_dimension_numbers=orthogonalised,
            consistent_rms=0.2,
        ),
    )


def main() -> None:
    """Tokenizer, training, evaluation, checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stories", type=pathlib.Path, required=True)
    parser.add_argument("--validation", type=pathlib.Path, required=True)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--start", type=pathlib.Path, help="params.npz to go on from")
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--decay", type=int, default=800, help="of them, at the end")
    parser.add_argument("--tokens", type=int, default=4096, help="in each step")
    parser.add_argument("--learning-rate", type=float, default=0.008)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    stories = read_stories(args.stories)
    held_out, stories = stories[:HELD_OUT], stories[HELD_OUT:]
    real = read_stories(args.validation)
    tokenizer = Tokenizer(train_tokenizer(stories[:20000]))
    ids = np.asarray(
        [i for s in stories for i in tokenizer.encode(s, bos=True, eos=True)], np.int32
    )
    model = Llama(CONFIG, Runtime(layer_layout="stacked"))
    params = init_params(model, jax.random.key(args.seed))
    if args.start:
        with np.load(args.start) as saved:
            params = unflatten({path: jnp.asarray(saved[path]) for path in saved})
    print(f"{count_params(params):,} parameters, {len(ids):,} tokens", flush=True)
    optimizer = make_optimizer(args.steps, args.decay, args.learning_rate)
    state = jax.jit(optimizer.init)(params)

    @jax.jit
    def step(params: dict, state: optax.OptState, tokens: jax.Array) -> tuple:
        def loss(params: dict) -> jax.Array:
            logits, _ = apply(model, params, tokens[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, tokens[:, 1:]
            ).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    # Short rows first, since attention costs less there; the last part teaches the
    # positions up to the full context.
    short = batches(ids, args.tokens // 256, 256, args.seed)
    long = batches(ids, args.tokens // 512, 512, args.seed + 1)
    began, losses = time.time(), []
    for index in range(args.steps):
        tokens = next(short if index < 0.85 * args.steps else long)
        params, state, value = step(params, state, tokens)
        losses.append(value)
        if (index + 1) % 200 == 0 or index in (0, 20):
            print(
                f"step {index + 1}: {np.mean(jax.device_get(losses[-100:])):.4f} nats, "
                f"{(index + 1) * args.tokens / (time.time() - began):,.0f} tokens/s",
                flush=True,
            )
        if (index + 1) % 500 == 0 or index + 1 == args.steps:
            args.output.mkdir(parents=True, exist_ok=True)
            (args.output / "tokenizer.model").write_bytes(tokenizer.contents)
            np.savez(args.output / "params.npz", **flatten(jax.device_get(params)))
            for name, text in (("held-out", held_out), ("real", real)):
                cost = bits_per_byte(model, params, tokenizer, text[:150], 256)
                print(f"  {name}: {cost:.4f} bits per byte", flush=True)

    from llama_jax.checkpoint import save_params

    half = jax.tree.map(lambda w: w.astype(jnp.float16), unstack_layers(params))
    save_params(args.output / "model", half, CONFIG, tokenizer=tokenizer)
    shipped = jax.tree.map(lambda w: w.astype(jnp.float32), half)
    model = Llama(CONFIG, Runtime())
    for name, text in (("held-out", held_out), ("real", real)):
        for length in (256, 512):
            cost = bits_per_byte(model, shipped, tokenizer, text, length)
            print(f"shipped, {name}, {length} tokens: {cost:.4f} bits per byte")


if __name__ == "__main__":
    main()
