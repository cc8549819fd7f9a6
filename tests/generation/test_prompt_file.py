"""Completing prompts into a file, and continuing it."""

import json
import pathlib
from typing import Any

import pytest
from support.models import TALKING, talking_model

from llama_jax.data.files import Location
from llama_jax.data.prompts import Prompt
from llama_jax.data.records import read_records
from llama_jax.errors import DataError, PromptError
from llama_jax.generation import prompt_file
from llama_jax.generation.batching import batch_bytes
from llama_jax.generation.generate import generate
from llama_jax.generation.prompt_file import complete_prompts, make_requests
from llama_jax.generation.request import Request, text_request
from llama_jax.generation.sampling import Sampling

TEXTS = ["the sun", "a", "the sun", "she loved", "lily", "blue"]
PROMPTS = [
    Prompt(Location("in.jsonl", "line", n + 1), n, text) for n, text in enumerate(TEXTS)
]
SETTINGS = {"seed": 3}
LOADED = talking_model()
TWO_ROWS = batch_bytes(LOADED.language_model, 4, 16)


def make(prompt: Prompt) -> Request:
    assert isinstance(prompt.content, str)
    return text_request(
        LOADED.tokenizer,
        prompt.content,
        max_new_tokens=4,
        num_samples=2,
        sampling=Sampling(temperature=1.0, top_p=1.0),
    )


PAIRS = make_requests(LOADED, PROMPTS, make, seed=3)


def complete(path: pathlib.Path, **options: Any) -> None:
    options = {"settings": SETTINGS, "max_batch_bytes": TWO_ROWS, **options}
    complete_prompts(LOADED, PAIRS, path, **options)


def test_lines_are_what_generate_gives_and_what_training_reads(
    tmp_path: pathlib.Path,
) -> None:
    path, calls = tmp_path / "new" / "out.jsonl", []
    complete(path, on_batch=lambda done, tokens: calls.append((done, tokens)))
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    alone = generate(LOADED, [request for _, request in PAIRS])
    assert [line["completion"] for line in lines] == [c.text for c in alone]
    assert [(line["record"], line["index"]) for line in lines] == [
        (record, index) for record in range(6) for index in range(2)
    ]
    assert [line["finish_reason"] for line in lines] == [c.finish_reason for c in alone]
    assert [done for done, _ in calls] == [0, 2, 4, 6]
    assert sum(tokens for _, tokens in calls) == sum(len(c.token_ids) for c in alone)
    pairs = [record.content for record in read_records([path])]
    expected = [(text, alone[2 * n].text) for n, text in enumerate(TEXTS)]
    assert pairs[::2] == expected


def test_equal_prompts_get_different_completions_that_their_seeds_repeat() -> None:
    completions = generate(LOADED, [request for _, request in PAIRS])
    assert completions[0].token_ids != completions[4].token_ids
    assert PAIRS[0][1].sampling.seed != PAIRS[2][1].sampling.seed


@pytest.mark.parametrize("size", ["nothing", "half a line", "half a record", "all"])
def test_a_killed_run_continues_where_it_was(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, size: str
) -> None:
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    complete(whole)
    data = whole.read_bytes()
    lines = data.splitlines(keepends=True)
    left = {
        "nothing": b"",
        "half a line": b"".join(lines[:4]) + lines[4][:30],
        "half a record": b"".join(lines[:5]),
        "all": data,
    }[size]
    part.write_bytes(left)
    generated = []

    def counted(loaded: Any, requests: Any, **options: Any) -> Any:
        generated.extend(requests)
        return generate(loaded, requests, **options)

    monkeypatch.setattr(prompt_file, "generate", counted)
    complete(part)
    assert part.read_bytes() == data
    assert len(generated) == {"nothing": 6, "all": 0}.get(size, 4)


def test_other_files_are_refused_and_stay_as_they_are(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "out.jsonl"
    complete(path)
    data = path.read_bytes()
    with pytest.raises(DataError, match="written with seed 3, not 4"):
        complete(path, settings={"seed": 4})
    with pytest.raises(DataError, match="line 3: is of another prompt"):
        complete_prompts(LOADED, PAIRS[:1] + PAIRS[2:], path, settings=SETTINGS)
    with pytest.raises(DataError, match="line 3: is of another prompt"):
        complete_prompts(LOADED, PAIRS[:1], path, settings=SETTINGS)
    assert path.read_bytes() == data
    for foreign in (b'{"text": "a"}\n', b"hello", b"\xff\n", b'{"record": 0, oh}\n'):
        path.write_bytes(foreign)
        with pytest.raises(DataError, match="line 1: is not a line that this command"):
            complete(path)
        assert path.read_bytes() == foreign


def test_a_prompt_that_the_model_cannot_read_is_named_first() -> None:
    long = PROMPTS[1]._replace(content="the sun " * TALKING.max_seq_len)
    with pytest.raises(PromptError, match=r"in\.jsonl, line 2: the prompt has \d+ tok"):
        make_requests(LOADED, [PROMPTS[0], long], make, seed=0)
    problems: list[PromptError] = []
    prompts = [PROMPTS[0], long, PROMPTS[2]]
    pairs = make_requests(LOADED, prompts, make, seed=0, on_problem=problems.append)
    assert ([p.number for p, _ in pairs], len(problems)) == ([0, 2], 1)
