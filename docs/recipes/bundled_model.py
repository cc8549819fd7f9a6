r"""The recipe of the small story model of the package, and its evaluation.

The text is a file of stories separated by `<|endoftext|>`; the first `HELD_OUT` are
held out.

    python docs/recipes/bundled_model.py split stories.txt.gz --output stories
    python -m llama_jax.finetune tokenizer --data stories/train.txt \
        --vocab-size 2048 --output stories/tokenizer
    python -m llama_jax.finetune --from-scratch \
        --preset L5,D192,N6,K2,F512,V2048,tied --tokenizer stories/tokenizer \
        --data stories/train.txt --eval-data stories/held.txt --format text \
        --packing split --seq-length 512 --batch-size 8 --epochs 1 \
        --optimizer muon --learning-rate 0.004 --schedule linear --final 0 \
        --warmup 100 --remat dots --save-dtype float16 --output stories/run
    python docs/recipes/bundled_model.py measure \
        stories/held.txt tinystories-real.txt --checkpoint stories/run/model

The results are in `README.md`; `llama_jax/assets/stories` is the `stories/run/model`.
An earlier script with 1,600 steps reached 0.62 and 1.12 bits per byte.
"""

import argparse
import gzip
import pathlib

import jax
import numpy as np

import llama_jax

HELD_OUT = 1000
SEPARATOR = "<|endoftext|>"


def read_stories(path: pathlib.Path) -> list[str]:
    """The stories of a text file, plain or gzipped."""
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    return [story.strip() for story in text.split(SEPARATOR) if story.strip()]


def split(path: pathlib.Path, output: pathlib.Path) -> None:
    """Write the training and the held-out stories."""
    stories = read_stories(path)
    output.mkdir(parents=True, exist_ok=True)
    parts = {"held.txt": stories[:HELD_OUT], "train.txt": stories[HELD_OUT:]}
    for name, part in parts.items():
        (output / name).write_text(SEPARATOR.join(part))


def bits_per_byte(
    checkpoint: pathlib.Path | None, stories: list[str], length: int, rows: int = 8
) -> float:
    """Mean loss of the first `length` tokens of each story (with BOS, without EOS)."""
    loaded = llama_jax.load(checkpoint)

    @jax.jit
    def nats(params: dict, tokens: jax.Array) -> jax.Array:
        ids, targets = tokens[:, :-1], tokens[:, 1:]
        return llama_jax.apply(loaded.model, params, ids, targets, method="losses")

    total = size = 0.0
    for first in range(0, len(stories), rows):
        batch = np.zeros((rows, length), np.int32)
        is_target = np.zeros((rows, length - 1), bool)
        for row, story in enumerate(stories[first : first + rows]):
            ids = loaded.tokenizer.encode(story, bos=True, eos=False)[:length]
            batch[row, : len(ids)] = ids
            is_target[row, : len(ids) - 1] = True
            size += len(loaded.tokenizer.decode(ids).encode())
        total += float(np.asarray(nats(loaded.params, batch))[is_target].sum())
    return total / size / float(np.log(2))


def main() -> None:
    """Split the text, or measure a model on texts."""
    parser = argparse.ArgumentParser(description="The recipe of the bundled model.")
    commands = parser.add_subparsers(dest="command", required=True)
    splitting = commands.add_parser("split", help="write train.txt and held.txt")
    splitting.add_argument("stories", type=pathlib.Path)
    splitting.add_argument("--output", type=pathlib.Path, required=True)
    measuring = commands.add_parser("measure", help="print bits per byte of texts")
    measuring.add_argument("texts", type=pathlib.Path, nargs="+")
    measuring.add_argument("--checkpoint", type=pathlib.Path, help="default: bundled")
    measuring.add_argument("--tokens", type=int, default=256, help="of each story")
    args = parser.parse_args()
    if args.command == "split":
        split(args.stories, args.output)
        return
    for text in args.texts:
        cost = bits_per_byte(args.checkpoint, read_stories(text), args.tokens)
        print(f"{text}: {cost:.4f} bits per byte")


if __name__ == "__main__":
    main()
