"""Meta's published code, run on real and random weights: the same numbers and texts.

The golden files were written by Meta's LLaMA 1, Llama 2 and Code Llama code in float32.
A greedy step whose two best logits lie within the tolerance of each other could differ
rightfully; none of these does.
"""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracle
from support.models import forward, padded
from support.tolerances import GOLDEN_LOGITS, GOLDEN_LOGPROBS

from llama_jax.checkpoint.model_folder import Loaded
from llama_jax.generation.completion import chat_completion, text_infilling
from llama_jax.generation.generate import Completion, generate
from llama_jax.generation.request import Request
from llama_jax.generation.sampling import Sampling, filter_logits, sampling_rows
from llama_jax.loading import load
from llama_jax.text.prompt_formats import (
    completion_prompt,
    default_format,
    infilling_prompt,
)

GREEDY = Sampling(temperature=0)


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, and what Meta's code made of it."""

    loaded: Loaded
    arrays: dict[str, np.ndarray]
    texts: dict[str, Any]

    @property
    def prompts(self) -> list[list[int]]:
        """Token ids."""
        actual: list[list[int]] = self.texts["prompt_tokens"]
        return actual

    @property
    def rows(self) -> list[list[int]]:
        """Every prompt with its greedy continuation."""
        rows: list[list[int]] = self.texts["generate_greedy_tokens"]
        if self.texts["ref"] != "llama_v1":  # whose tokens include the prompt
            rows = [p + new for p, new in zip(self.prompts, rows, strict=True)]
            assert rows == self.texts["generate_echo_tokens"]
        return rows

    @functools.cached_property
    def logits(self) -> list[np.ndarray]:
        """Of one full forward over the rows: what each row's tokens 1, 2, … face."""
        actual = full_forward(self.loaded, self.rows)
        return [actual[i, : len(row) - 1] for i, row in enumerate(self.rows)]

    @functools.cached_property
    def generated(self) -> list[Completion]:
        """Ours, with the prompt in front."""
        count = len(self.rows[0]) - len(self.prompts[0])
        requests = [
            Request(
                ids,
                max_new_tokens=count,
                sampling=GREEDY,
                stop_ids=(self.loaded.tokenizer.eos_id,),
                logprobs=1,
                echo=True,
            )
            for ids in self.prompts
        ]
        return generate(self.loaded, requests)


def full_forward(loaded: Loaded, rows: list[list[int]]) -> np.ndarray:
    """Logits of rows of one length or another, padded."""
    logits, _ = forward(loaded.model, loaded.params, padded(rows, max(map(len, rows))))
    return np.asarray(logits)


def read(assets: pathlib.Path, source: str, tokenizer: str, golden: str) -> Case:
    loaded = load(
        assets / source,
        tokenizer=assets / "tokenizers" / tokenizer,
        max_seq_len=256,  # the context of Meta's run; it limits nothing here
    )
    folder = assets / golden
    texts = json.loads((folder / "golden.json").read_text("utf-8"))
    return Case(loaded, dict(np.load(folder / "golden.npz")), texts)


@pytest.fixture(scope="module")
def llama1(assets: pathlib.Path) -> Case:
    source = "meta/llama1-mha-tiny"
    return read(assets, source, "llama2.model", source)


@pytest.fixture(scope="module")
def llama2(assets: pathlib.Path) -> Case:
    source = "meta/llama2-gqa-tiny-mp2"
    return read(assets, source, "llama2.model", source)


@pytest.fixture(scope="module")
def codellama(assets: pathlib.Path) -> Case:
    source = "meta/codellama-tiny"
    return read(assets, source, "codellama.model", source)


@pytest.fixture(scope="module")
def stories(assets: pathlib.Path) -> Case:
    source, golden = "weights/stories15M.bin", "weights/stories15M.golden"
    return read(assets, source, "llama2.model", golden)


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Case:
    actual: Case = request.getfixturevalue(request.param)
    return actual


def cases(*names: Any) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", names, indirect=True)


def slow(name: str) -> Any:
    """A case that is worth its time only now and then: others show the same."""
    return pytest.param(name, marks=pytest.mark.slow)


@cases("llama1", "llama2", "codellama", "stories")
def test_logits_equal_metas(case: Case) -> None:
    tokens, positions = case.arrays["tokens"], case.arrays["positions"]
    at = np.tile(positions, (len(tokens), 1))
    model, params, _ = case.loaded
    actual, _ = forward(model, params, jnp.asarray(tokens), logits_at=jnp.asarray(at))
    expected = case.arrays["logits"]
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(actual, expected, rtol=0, atol=GOLDEN_LOGITS)


@cases("llama1", "llama2", "codellama", "stories")
def test_metas_greedy_tokens_are_the_likeliest(case: Case) -> None:
    for row, prompt, logits in zip(case.rows, case.prompts, case.logits, strict=True):
        assert row[: len(prompt)] == prompt
        likeliest = logits.argmax(axis=-1).tolist()
        assert likeliest[len(prompt) - 1 :] == row[len(prompt) :]


@cases(slow("llama1"), "llama2", slow("codellama"), slow("stories"))
def test_generated_greedy_tokens_equal_metas(case: Case) -> None:
    assert [list(actual.token_ids) for actual in case.generated] == case.rows


@cases("llama1", "llama2", "codellama", "stories")
def test_prompts_and_texts_equal_metas(case: Case) -> None:
    tokenizer, texts = case.loaded.tokenizer, case.texts
    prompts = [completion_prompt(tokenizer, text) for text in texts["prompts"]]
    assert prompts == case.prompts
    if texts["ref"] == "llama_v1":  # whose texts include the prompt
        assert list(map(tokenizer.decode, case.rows)) == texts["generate_greedy"]
        return
    new = [row[len(p) :] for row, p in zip(case.rows, prompts, strict=True)]
    expected = [answer["generation"] for answer in texts["text_completion"]]
    assert list(map(tokenizer.decode, new)) == expected


@cases("llama2", "codellama", "stories")
def test_prompts_of_dialogs_equal_metas(case: Case) -> None:
    tokenizer, dialogs = case.loaded.tokenizer, case.texts["dialogs"]
    style, prompts = default_format(tokenizer), case.texts["chat_prompt_tokens"]
    for dialog, expected in zip(dialogs, prompts, strict=True):
        assert style.encode(tokenizer, dialog, allow_tags=True) == expected


@cases(slow("llama2"), "codellama", slow("stories"))
def test_answers_to_dialogs_equal_metas(case: Case) -> None:
    dialogs = case.texts["dialogs"]
    actual = chat_completion(case.loaded, dialogs, sampling=GREEDY, max_new_tokens=16)
    expected = [answer["generation"] for answer in case.texts["chat_completion"]]
    assert {answer["role"] for answer in expected} == {"assistant"}
    assert [c.text for c in actual] == [answer["content"] for answer in expected]
    assert "unsafe" in {c.finish_reason for c in actual}


@pytest.mark.parametrize("suffix_first", [False, True])
def test_infillings_equal_metas(codellama: Case, suffix_first: bool) -> None:
    pairs = codellama.texts["infill"]
    prompts = codellama.texts[f"infill_prompt_tokens_suffix_first_{suffix_first}"]
    tokenizer = codellama.loaded.tokenizer
    for pair, expected in zip(pairs, prompts, strict=True):
        actual = infilling_prompt(tokenizer, *pair, suffix_first=suffix_first)
        assert actual == expected
    prefixes, suffixes = zip(*pairs, strict=True)
    middles = text_infilling(
        codellama.loaded,
        prefixes,
        suffixes,
        suffix_first=suffix_first,
        sampling=GREEDY,
        max_new_tokens=16,
    )
    assert [
        {"generation": middle.text, "full_text": middle.full_text} for middle in middles
    ] == codellama.texts[f"infill_suffix_first_{suffix_first}"]


# Log-probabilities. Meta's are compared in two ways, because Meta's own are not exact:
# its log-softmax adds 32,000 float32 exponentials one after another. On a trained,
# peaked model most of them are smaller than half a unit in the last place of the sum so
# far, and vanish: that alone puts it off by up to 7e-4. On random weights it does not.


@cases(slow("llama1"), "llama2", slow("codellama"), slow("stories"))
def test_logprobs_equal_those_of_a_full_forward(case: Case) -> None:
    for row, logits, actual in zip(case.rows, case.logits, case.generated, strict=True):
        expected = oracle.log_softmax(logits)[np.arange(len(row) - 1), row[1:]]
        assert actual.logprobs is not None
        np.testing.assert_allclose(
            actual.logprobs, [0, *expected], rtol=0, atol=GOLDEN_LOGPROBS
        )


@cases("llama2")
def test_logprobs_equal_metas(case: Case) -> None:
    golden = case.texts["generate_echo_logprobs"]
    for actual, expected in zip(case.generated, golden, strict=True):
        np.testing.assert_allclose(
            actual.logprobs, expected, rtol=0, atol=GOLDEN_LOGPROBS
        )


@cases("codellama")
def test_logprobs_of_prompts_equal_metas(case: Case) -> None:
    # Code Llama's code scores a new token before it writes it: those are all 0.
    golden = case.texts["generate_echo_logprobs"]
    for prompt, logits, expected in zip(case.prompts, case.logits, golden, strict=True):
        actual = oracle.log_softmax(logits)[np.arange(len(prompt) - 1), prompt[1:]]
        np.testing.assert_allclose(
            [0, *actual], expected[: len(prompt)], rtol=0, atol=GOLDEN_LOGPROBS
        )
        assert not any(expected[len(prompt) :])


@cases("stories")
def test_metas_logprobs_equal_ours_with_its_summation(case: Case) -> None:
    golden = case.texts["generate_echo_logprobs"]
    exact, sequential = 0.0, 0.0
    for row, logits, expected in zip(case.rows, case.logits, golden, strict=True):
        chosen = np.arange(len(row) - 1), row[1:]
        shifted = logits - logits.max(axis=-1, keepdims=True)
        total = np.cumsum(np.exp(shifted), axis=-1, dtype=np.float32)[:, -1]
        actual = shifted[chosen] - np.log(total)
        sequential = max(sequential, np.abs(actual - expected[1:]).max())
        true = oracle.log_softmax(logits)[chosen]
        exact = max(exact, np.abs(true - expected[1:]).max())
    assert sequential < GOLDEN_LOGPROBS
    assert exact > GOLDEN_LOGPROBS  # else the comment above is out of date


@cases(slow("llama2"), slow("codellama"), "stories")
def test_every_token_sampled_by_metas_code_is_in_our_top_p_set(case: Case) -> None:
    prompts, drawn = case.prompts, case.texts["sampled_t0.6_p0.9_seed7"]
    rows = [prompt + new for prompt, new in zip(prompts, drawn, strict=True)]
    logits = full_forward(case.loaded, rows)
    checked, sizes = 0, []
    for row, (prompt, text) in enumerate(zip(prompts, rows, strict=True)):
        # What token t was drawn from stands at t - 1.
        scaled = logits[row, len(prompt) - 1 : len(text) - 1] / 0.6
        setting = [Sampling(temperature=0.6, top_p=0.9)] * len(scaled)
        settings = sampling_rows(setting, scaled.shape[-1])
        passed = np.isfinite(jax.jit(filter_logits)(scaled, settings))
        for at, token in enumerate(text[len(prompt) :]):
            assert passed[at, token], (row, at)
            checked += 1
        sizes.append(passed.mean())
    assert checked == sum(map(len, drawn))
    assert np.mean(sizes) < 0.1  # small sets: being in one means something
