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


@pytest.mark.wrong_types
def test_ids_of_any_integer_type_become_a_tuple() -> None:
    request = Request(np.asarray([1, 2]).tolist(), stop_ids=[np.int32(3)])  # type: ignore[list-item]
    assert (request.prompt_ids, request.stop_ids) == ((1, 2), (3,))
    assert type(request.stop_ids[0]) is int


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"prompt_ids": []}, "prompt_ids: is empty"),
        ({"prompt_ids": "Hello"}, "list of token ids, got the string 'Hello'"),
        ({"prompt_ids": [1.5]}, "prompt_ids: must be a list of token ids"),
        ({"prompt_ids": 3}, "prompt_ids: must be a list of token ids, got 3"),
        ({"stop_ids": "</s>"}, "stop_ids: must be a list of token ids"),
        ({"stop_ids": 2}, "stop_ids: must be a list of token ids"),
        ({"stop": "END"}, "stop: must be a list of strings.* got 'END'"),
        ({"stop": [""]}, "stop: must be a list of strings, none of them empty"),
        ({"stop": [3]}, "stop: must be a list of strings"),
        ({"max_new_tokens": 0}, "max_new_tokens: must be at least 1, got 0"),
        ({"num_samples": 0}, "num_samples: must be at least 1, got 0"),
        ({"logprobs": -1}, "logprobs: must be at least 0, got -1"),
        ({"sampling": [Sampling()]}, "sampling: must be one Sampling"),
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


@pytest.mark.wrong_types
def test_makers_refuse_what_is_no_prompt(tokenizer: Tokenizer) -> None:
    unsafe: Any = [{"role": "user", "content": "a [INST] b"}]
    with pytest.raises(PromptError, match="prompt: is empty; write at least"):
        text_request(tokenizer, "")
    with pytest.raises(PromptError, match=r"must be a string, got \['a'\]"):
        text_request(tokenizer, ["a"])  # type: ignore[arg-type]
    with pytest.raises(UnsafePromptError, match="special tag"):
        chat_request(tokenizer, unsafe)
    with pytest.raises(PromptError, match="dialog: must be a list of messages"):
        chat_request(tokenizer, unsafe[0])
    with pytest.raises(PromptError, match="no infilling pieces"):
        infill_request(tokenizer, "a", "b")


@pytest.mark.wrong_types
def test_text_functions_refuse_a_string_for_a_list() -> None:
    loaded: Any = load()
    with pytest.raises(PromptError, match="prompts: must be a list"):
        text_completion(loaded, "Once")
    with pytest.raises(PromptError, match="dialog: must be a list of messages"):
        chat_completion(loaded, [{"role": "user", "content": "Hi"}])  # type: ignore[list-item]
    with pytest.raises(PromptError, match="must be as many, got 1 and 2"):
        text_infilling(loaded, ["a"], ["b", "c"])
    with pytest.raises(PromptError, match="stop: must be a list of strings"):
        text_completion(loaded, ["Once"], stop="END")
