"""Meta's three text functions, with their meaning and defaults.

Each makes one request per prompt and gives them to `generate`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Unpack

from llama_jax.arguments import checked
from llama_jax.checkpoint.model_folder import Loaded
from llama_jax.errors import PromptError, UnsafePromptError
from llama_jax.generation.generate import Completion, generate
from llama_jax.generation.request import (
    Request,
    Settings,
    chat_request,
    infill_request,
    text_request,
)
from llama_jax.text.prompt_formats import UNSAFE_ANSWER, Dialog, PromptFormat


@checked(PromptError)
def text_completion(
    loaded: Loaded, prompts: Sequence[str], **settings: Unpack[Settings]
) -> list[Completion]:
    """Continue texts.

    Args:
      loaded: model, weights and tokenizer.
      prompts: texts, none of them empty.
      **settings: of every request; see `text_request`.

    Returns:
      `num_samples` completions per text, text by text.

    Raises:
      PromptError: see `text_request` and `generate`.

    >>> import llama_jax
    >>> loaded = llama_jax.load()
    >>> greedy = llama_jax.Sampling(temperature=0)
    >>> [story] = text_completion(
    ...     loaded, ["Once upon a time"], max_new_tokens=3, sampling=greedy
    ... )
    >>> story.text
    ', there was'
    """
    tokenizer = loaded.tokenizer
    return generate(
        loaded, [text_request(tokenizer, text, **settings) for text in prompts]
    )


@checked(PromptError)
def chat_completion(
    loaded: Loaded,
    dialogs: Sequence[Dialog],
    *,
    format: str | PromptFormat | None = None,
    **settings: Unpack[Settings],
) -> list[Completion]:
    """Answer dialogs.

    As in Meta's code, a dialog that contains special tags of the format gets a fixed
    answer (`finish_reason` `"unsafe"`) instead of the model's.

    Args:
      loaded: model, weights and tokenizer.
      dialogs: each a list of messages that ends with the user's.
      format: prompt format or its name; see `chat_request`.
      **settings: of every request; see `chat_request`.

    Returns:
      `num_samples` answers per dialog, dialog by dialog.

    Raises:
      PromptError: see `chat_request` and `generate`.

    >>> import llama_jax
    >>> loaded = llama_jax.load()
    >>> dialog = [{"role": "user", "content": "What does [INST] mean?"}]
    >>> [answer] = chat_completion(loaded, [dialog], max_new_tokens=8)
    >>> answer.finish_reason
    'unsafe'
    """
    requests: list[Request | None] = []
    for dialog in dialogs:
        try:
            request = chat_request(loaded.tokenizer, dialog, format=format, **settings)
        except UnsafePromptError:
            requests.append(None)
        else:
            requests.append(request)
    safe = [request for request in requests if request is not None]
    answers = iter(generate(loaded, safe))
    refused = Completion(
        text=UNSAFE_ANSWER, token_ids=(), finish_reason="unsafe", prompt_ids=()
    )
    return [
        refused if request is None else next(answers)
        for request in requests
        for _ in range(settings.get("num_samples", 1))
    ]


@checked(PromptError)
def text_infilling(
    loaded: Loaded,
    prefixes: Sequence[str],
    suffixes: Sequence[str],
    *,
    suffix_first: bool = False,
    **settings: Unpack[Settings],
) -> list[Completion]:
    """Fill the gaps between prefixes and suffixes (Code Llama paper, section 2.3).

    Args:
      loaded: model, weights and tokenizer.
      prefixes: texts before the gaps.
      suffixes: texts after them, as many.
      suffix_first: show the model the suffix before the prefix.
      **settings: of every request; see `infill_request`.

    Returns:
      `num_samples` completions per gap, gap by gap; `full_text` has prefix and suffix
      around the completion.

    Raises:
      PromptError: see `infill_request` and `generate`.

    >>> import llama_jax
    >>> text_infilling(llama_jax.load(), ["def f(x):"], [])
    Traceback (most recent call last):
    llama_jax.errors.PromptError: prefixes and suffixes: must be as many, got 1 and 0
    """
    if len(prefixes) != len(suffixes):
        raise PromptError(
            "prefixes and suffixes: must be as many, got "
            f"{len(prefixes)} and {len(suffixes)}"
        )
    gaps = list(zip(prefixes, suffixes, strict=True))
    middles = generate(
        loaded,
        [
            infill_request(
                loaded.tokenizer, *gap, suffix_first=suffix_first, **settings
            )
            for gap in gaps
        ],
    )
    around = [gap for gap in gaps for _ in range(settings.get("num_samples", 1))]
    return [
        dataclasses.replace(middle, full_text=prefix + middle.text + suffix)
        for middle, (prefix, suffix) in zip(middles, around, strict=True)
    ]
