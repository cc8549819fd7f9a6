"""Requests: what the makers put into them, and what they refuse."""

from typing import Any

import numpy as np
import pytest

from llama_jax.errors import PromptError, UnsafePromptError
from llama_jax.generation.completion import (
    chat_completion,
    text_completion,
    text_infilling,
)
from llama_jax.generation.request import (
    Request,
    chat_request,
    infill_request,
    text_request,
)
from llama_jax.generation.sampling import Sampling
from llama_jax.loading import load
from llama_jax.text.prompt_formats import get_format
from llama_jax.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load().tokenizer


@pytest.fixture(scope="module")
def codellama(assets: Any) -> Tokenizer:
    return Tokenizer.from_file(assets / "tokenizers" / "codellama.model")


def test_integers_of_any_type_become_pythons() -> None:
    request = Request(np.asarray([1, 2]), stop_ids=[np.int32(3)])
    assert (request.prompt_ids, request.stop_ids) == ((1, 2), (3,))
    assert {type(id) for id in (*request.prompt_ids, *request.stop_ids)} == {int}


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"prompt_ids": []}, "prompt_ids: is empty"),
        ({"prompt_ids": "Hello"}, "must be a list of integers .*, got 'Hello'; token"),
        ({"prompt_ids": [1, 1.5]}, "prompt_ids must be .*, got a list of int, float"),
        ({"prompt_ids": 3}, "prompt_ids must be .*, got 3; put it into a list"),
        ({"prompt_ids": [[3]]}, "prompt_ids must be .*, got a list of list"),
        ({"prompt_ids": np.ones((1, 2), int)}, r"got an array of int64, \[1, 2\]"),
        ({"stop_ids": np.ones(2)}, r"stop_ids must be .*, got an array of float64"),
        ({"stop_ids": 2}, "stop_ids must be .*, got 2; put it into a list"),
        ({"stop": "END"}, "stop must be a list of strings, got 'END'; put it into a"),
        ({"stop": [""]}, "stop: has an empty string"),
        ({"stop": [3]}, "stop must be a list of strings, got a list of int"),
        ({"max_new_tokens": "5"}, "max_new_tokens must be an integer or None, got '5'"),
        ({"max_new_tokens": 0}, "max_new_tokens: must be at least 1, got 0"),
        ({"num_samples": 0}, "num_samples: must be at least 1, got 0"),
        ({"logprobs": -1}, "logprobs: must be at least 0, got -1"),
        ({"sampling": [Sampling()]}, "sampling must be a Sampling, got a list of Sam"),
        ({"sampling": {}}, "sampling must be a Sampling, got a dict; Sampling.temp"),
    ],
)
def test_bad_values_are_refused_in_one_sentence(
    settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(PromptError, match=reason) as error:
        Request(**({"prompt_ids": [1]} | settings))
    assert "\n" not in str(error.value)


def test_a_text_request_reads_the_text_and_stops_where_texts_end(
    tokenizer: Tokenizer,
) -> None:
    request = text_request(tokenizer, "One day", logprobs=2, stop=["."])
    ids = tokenizer.encode("One day", bos=True, eos=False)
    ends = (tokenizer.eos_id, tokenizer.bos_id)
    assert request == Request(ids, logprobs=2, stop=["."], stop_ids=ends)
    assert text_request(tokenizer, "x", stop_ids=()).stop_ids == ()


def test_a_chat_request_has_the_stops_of_its_format(tokenizer: Tokenizer) -> None:
    dialog: Any = [{"role": "user", "content": "Hi"}]
    style = get_format("alpaca")
    request = chat_request(tokenizer, dialog, format="alpaca", stop=["END"])
    assert request.prompt_ids == tuple(style.encode(tokenizer, dialog))
    assert request.stop_ids == style.stop_ids(tokenizer)
    assert request.stop == (*style.stop_strings, "END")
    assert chat_request(tokenizer, dialog, format=style, stop=["END"]) == request


def test_an_infill_request_stops_at_the_end_of_the_middle(codellama: Tokenizer) -> None:
    request = infill_request(codellama, "def f(", "):", max_new_tokens=3)
    assert codellama.infilling is not None
    assert request.stop_ids == (codellama.infilling.end, codellama.eos_id)
    assert request.after_marker
    with pytest.raises(PromptError, match="echo: must be False for infilling"):
        infill_request(codellama, "a", "b", echo=True)


def test_sampling_defaults_to_the_checkpoints(tokenizer: Tokenizer) -> None:
    own = tokenizer.replace_settings(sampling={"temperature": 1, "top_p": 0.5})
    dialog: Any = [{"role": "user", "content": "Hi"}]
    for request in (text_request(own, "x"), chat_request(own, dialog)):
        assert request.sampling == Sampling(temperature=1, top_p=0.5)
    given = Sampling(top_k=3)
    assert text_request(own, "x", sampling=given).sampling == given
    assert text_request(tokenizer, "x").sampling == Sampling()


@pytest.mark.parametrize(
    ("own", "reason"),
    [
        ({"typical_p": 0.9}, "the checkpoint sets typical_p, which llama_jax does not"),
        (
            {"top_p": 7.0},
            "top_p is 7.0; it must be .*; the checkpoint sets",
        ),
    ],
)
def test_sampling_of_a_checkpoint_that_is_wrong_is_an_error(
    tokenizer: Tokenizer, own: dict[str, float], reason: str
) -> None:
    with pytest.raises(PromptError, match=reason):
        text_request(tokenizer.replace_settings(sampling=own), "x")


@pytest.mark.wrong_types
def test_makers_refuse_what_is_no_prompt(tokenizer: Tokenizer) -> None:
    unsafe: Any = [{"role": "user", "content": "a [INST] b"}]
    with pytest.raises(PromptError, match="prompt: is empty; write at least"):
        text_request(tokenizer, "")
    with pytest.raises(PromptError, match="text must be a string, got a list of str"):
        text_request(tokenizer, ["a"])  # type: ignore[arg-type]
    with pytest.raises(UnsafePromptError, match="special tag"):
        chat_request(tokenizer, unsafe)
    with pytest.raises(PromptError, match="dialog must be a list of Messages"):
        chat_request(tokenizer, unsafe[0])
    with pytest.raises(PromptError, match="no infilling pieces"):
        infill_request(tokenizer, "a", "b")


@pytest.mark.wrong_types
def test_text_functions_refuse_a_string_for_a_list() -> None:
    loaded: Any = load()
    with pytest.raises(PromptError, match="got 'Once'; put it into a list"):
        text_completion(loaded, "Once")
    with pytest.raises(
        PromptError, match="dialogs must be a list of lists of Messages"
    ):
        chat_completion(loaded, [{"role": "user", "content": "Hi"}])  # type: ignore[list-item]
    with pytest.raises(PromptError, match="must be as many, got 1 and 2"):
        text_infilling(loaded, ["a"], ["b", "c"])
    with pytest.raises(PromptError, match="stop must be a list of strings"):
        text_completion(loaded, ["Once"], stop="END")
