"""The recipe of the bundled model: its text, its commands, its measure."""

import gzip
import importlib.util
import pathlib
import re
import shlex
from types import ModuleType

import numpy as np
import pytest
from support.paths import DOCS

import llama_jax
from llama_jax.cli import finetune_flags as flags
from llama_jax.model.presets import parse_model

FILE = DOCS / "recipes" / "bundled_model.py"

pytestmark = pytest.mark.skipif(
    not FILE.is_file(), reason="the documentation is not where the tests are"
)


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    found = importlib.util.spec_from_file_location("recipe", FILE)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_the_first_stories_are_held_out(
    recipe: ModuleType, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "HELD_OUT", 2)
    stories = tmp_path / "stories.txt.gz"
    text = "One.\n<|endoftext|>\nTwo.<|endoftext|> Three. <|endoftext|>Four."
    stories.write_bytes(gzip.compress(text.encode()))
    recipe.split(stories, tmp_path / "parts")
    assert recipe.read_stories(tmp_path / "parts" / "held.txt") == ["One.", "Two."]
    assert recipe.read_stories(tmp_path / "parts" / "train.txt") == ["Three.", "Four."]


def test_the_commands_have_flags_that_exist_and_train_the_bundled_shape(
    recipe: ModuleType,
) -> None:
    text = (recipe.__doc__ or "").replace("\\\n", " ")
    commands = [shlex.split(line) for line in re.findall(r"^ +(python .*)", text, re.M)]
    modules = [words[1] if words[1] != "-m" else words[2] for words in commands]
    script = "docs/recipes/bundled_model.py"
    assert modules == [script, *["llama_jax.finetune"] * 2, script]
    asked = flags.parse(commands[2][3:])
    config = llama_jax.open_model().config
    assert parse_model(asked.preset, asked.seq_length) == config


def test_bits_per_byte_are_those_of_the_log_probabilities(recipe: ModuleType) -> None:
    loaded = llama_jax.load()
    story = "Once upon a time, there was a little girl."
    request = llama_jax.text_request(
        loaded.tokenizer, story, max_new_tokens=1, logprobs=0, echo=True
    )
    [echoed] = llama_jax.generate(loaded, [request])
    assert echoed.logprobs is not None
    bits = -np.sum(echoed.logprobs[: len(request.prompt_ids)]) / np.log(2)
    found = recipe.bits_per_byte(None, [story], 64)
    assert found == pytest.approx(bits / len(story), rel=1e-5)


def test_the_readme_says_what_the_bundled_model_costs(
    recipe: ModuleType, assets: pathlib.Path
) -> None:
    text = " ".join((DOCS.parent / "README.md").read_text("utf-8").split())
    said = re.search(r"and ([\d.]+) on original TinyStories", text)
    assert said is not None
    real = recipe.read_stories(assets / "text" / "tinystories-real.txt")
    assert f"{recipe.bits_per_byte(None, real, 256):.2f}" == said[1]
