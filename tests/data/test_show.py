"""`show`: what is a prompt, what is learnt, and where segments end."""

import re

import numpy as np

from llama_jax.data.batch import Example, assemble
from llama_jax.data.show import show
from llama_jax.loading import bundled
from llama_jax.text.tokenizer import Tokenizer


def example(tokenizer: Tokenizer, prompt: str, answer: str) -> Example:
    given = tokenizer.encode(prompt, bos=True, eos=False)
    response = [*tokenizer.encode_infilling(answer), tokenizer.eos_id]
    mask = [False] * len(given) + [True] * len(response)
    return Example(np.array(given + response), np.array(mask))


def test_prompts_answers_and_segments_are_distinguishable() -> None:
    tokenizer = Tokenizer.from_file(bundled() / "tokenizer.model")
    rows = [
        [example(tokenizer, "Hi\nyou", " Hello ☃"), example(tokenizer, "a", "b\nc")],
        [example(tokenizer, "\x1b[31mred", "x")],
        [],
    ]
    batch = assemble(rows, 64)
    lines = show(batch, tokenizer, colour=False)
    sizes = [[e.size for e in row] for row in rows]
    learnt = [[int(e.mask.sum()) for e in row] for row in rows]
    assert lines[0] == (
        f"row 0: 2 segments in {sum(sizes[0])} of 64 slots, {sum(learnt[0])} learnt"
    )
    rule = f"── segment 1: positions 0 to {sizes[0][0] - 1}, {learnt[0][0]} learnt ─"
    assert lines[1].startswith(rule)
    assert lines[2:4] == ["<s>Hi", "you⟦ Hello ☃</s>⟧"]
    assert lines[4].startswith("── segment 2: positions 0 to ")
    assert lines[5:7] == ["<s>a⟦b", "c</s>⟧"]
    assert lines[9] == "<s>\\x1b[31mred⟦x</s>⟧"
    assert lines[10:] == ["row 2: 0 segments in 0 of 64 slots, 0 learnt"]
    assert show(batch, tokenizer, rows=1, colour=False) == lines[:7]


def test_colours_change_nothing_but_colours() -> None:
    tokenizer = Tokenizer.from_file(bundled() / "tokenizer.model")
    batch = assemble([[example(tokenizer, "Hi\nyou", " Hello\n\nthere")]], 64)
    coloured = show(batch, tokenizer)
    plain = show(batch, tokenizer, colour=False)
    stripped = [re.sub(r"\x1b\[[\d;]*m", "", line) for line in coloured]
    assert stripped == [re.sub("[⟦⟧]", "", line) for line in plain]
    assert coloured[3] == "\x1b[2myou\x1b[0m\x1b[1;32m Hello\x1b[0m"
    assert all(line.endswith("\x1b[0m") for line in coloured[1:] if line)
