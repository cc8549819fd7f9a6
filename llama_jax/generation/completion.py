"""Text, dialogs and infilling: the prompt formats around `generate`.

The functions have the meaning and the defaults of Meta's of the same names.
"""

import dataclasses
from collections.abc import Sequence
from typing import Unpack

from llama_jax.checkpoint.model_folder import Loaded
from llama_jax.errors import PromptError, UnsafePromptError
from llama_jax.generation.generate import Completion, Options, generate
from llama_jax.generation.sampling import Sampling
from llama_jax.text.prompt_formats import (
    UNSAFE_ANSWER,
    Dialog,
    PromptFormat,
    completion_prompt,
    default_format,
    get_format,
    infilling_prompt,
)
from llama_jax.text.tokenizer import Tokenizer


def text_completion(
    loaded: Loaded, prompts: Sequence[str], **options: Unpack[Options]
) -> list[Completion]:
    """Continue texts.

    Raises:
      PromptError: an empty text, and what `stream` raises.
    """
    for number, text in enumerate(prompts):
        if not text:
            raise PromptError(
                f"prompt {number + 1} is empty; write at least a character"
            )
    ids = [completion_prompt(loaded.tokenizer, text) for text in prompts]
    return generate(loaded, ids, **options)


def chat_completion(
    loaded: Loaded,
    dialogs: Sequence[Dialog],
    *,
    format: str | PromptFormat | None = None,
    **options: Unpack[Options],
) -> list[Completion]:
    """Answer dialogs, each of which ends with the user's message.

    As in Meta's code, a dialog that contains the format's special tags is answered by a
    fixed sentence (`finish_reason` `"unsafe"`) instead of the model.

    Args:
      loaded: model, weights and tokenizer.
      dialogs: messages with `role` and `content`.
      format: name of a prompt format; by default the one that Meta's chat models of
        this tokenizer speak.
      **options: see `Options`.

    Raises:
      PromptError: roles in an order that the format does not know, and what `stream`
        raises.
    """
    tokenizer = loaded.tokenizer
    style = get_format(format) if isinstance(format, str) else format
    style = style or default_format(tokenizer)
    options.setdefault("stop_ids", style.stop_ids(tokenizer))
    stop = options.get("stop", ())
    if isinstance(stop, str):
        raise PromptError(f"stop: {stop!r} must be a list of strings")
    options["stop"] = (*style.stop_strings, *stop)
    prompts: list[list[int] | None] = []
    for dialog in dialogs:
        try:
            prompts.append(style.encode(tokenizer, dialog))
        except UnsafePromptError:
            prompts.append(None)
    num_samples = options.get("num_samples", 1)
    sampling = options.get("sampling", Sampling())
    if not isinstance(sampling, Sampling):
        if len(sampling) != len(dialogs):
            raise PromptError(
                f"{len(sampling)} sampling settings, {len(dialogs)} dialogs"
            )
        pairs = zip(sampling, prompts, strict=True)
        options["sampling"] = [setting for setting, ids in pairs if ids is not None]
    safe = iter(
        generate(loaded, [ids for ids in prompts if ids is not None], **options)
    )
    refused = Completion(
        text=UNSAFE_ANSWER, token_ids=(), finish_reason="unsafe", prompt_ids=()
    )
    return [
        refused if ids is None else next(safe)
        for ids in prompts
        for _ in range(num_samples)
    ]


def text_infilling(
    loaded: Loaded,
    prefixes: Sequence[str],
    suffixes: Sequence[str],
    *,
    suffix_first: bool = False,
    **options: Unpack[Options],
) -> list[Completion]:
    """Write what belongs between prefixes and suffixes (Code Llama paper, 2.3).

    Ends at the end-of-middle piece, or at the end of sequence, should a model write
    that. `full_text` of a completion has prefix and suffix around it.

    Raises:
      PromptError: not an infilling model, and what `stream` raises.
    """
    if len(prefixes) != len(suffixes):
        raise PromptError(f"{len(prefixes)} prefixes, but {len(suffixes)} suffixes")
    if options.pop("echo", False):
        raise PromptError("infilling: echo has no meaning here; see full_text")
    tokenizer = loaded.tokenizer
    pairs = list(zip(prefixes, suffixes, strict=True))
    ids = [infilling_prompt(tokenizer, *p, suffix_first=suffix_first) for p in pairs]
    options.setdefault("stop_ids", infilling_stop_ids(tokenizer))
    middles = generate(loaded, ids, after_marker=True, **options)
    num_samples = options.get("num_samples", 1)
    owners = [pair for pair in pairs for _ in range(num_samples)]
    return [
        dataclasses.replace(middle, full_text=prefix + middle.text + suffix)
        for middle, (prefix, suffix) in zip(middles, owners, strict=True)
    ]


def infilling_stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """What ends a middle."""
    pieces, eos = tokenizer.infilling, tokenizer.eos_id
    return (eos,) if pieces is None else (pieces.end, eos)
