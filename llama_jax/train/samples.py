"""Samples during training: greedy completions of a few prompts."""

from collections.abc import Sequence

from llama_jax.checkpoint.model_folder import Loaded
from llama_jax.data.encode import TEXT_FORMATS
from llama_jax.generation.generate import generate
from llama_jax.generation.request import (
    Request,
    chat_request,
    infilling_stop_ids,
    text_request,
    text_stop_ids,
)
from llama_jax.generation.sampling import Sampling
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.train.reporter import Sample


def sample_requests(
    tokenizer: Tokenizer, prompts: Sequence[str], format: str, max_new_tokens: int
) -> list[Request]:
    """Make the requests that complete prompts greedily.

    Args:
      tokenizer: of the model.
      prompts: texts, or user messages if the format is one of dialogs.
      format: format of the training data.
      max_new_tokens: most tokens of a completion.
    """
    greedy = Sampling(temperature=0)
    if format in TEXT_FORMATS:
        stop_ids = text_stop_ids(tokenizer)
        if format == "infilling":
            stop_ids = infilling_stop_ids(tokenizer)
        return [
            text_request(
                tokenizer,
                text,
                sampling=greedy,
                max_new_tokens=max_new_tokens,
                stop_ids=stop_ids,
            )
            for text in prompts
        ]
    return [
        chat_request(
            tokenizer,
            [{"role": "user", "content": text}],
            format=format,
            sampling=greedy,
            max_new_tokens=max_new_tokens,
        )
        for text in prompts
    ]


def complete_prompts(
    loaded: Loaded, prompts: Sequence[str], format: str, max_new_tokens: int
) -> list[Sample]:
    """Complete prompts greedily; arguments as of `sample_requests`."""
    requests = sample_requests(loaded.tokenizer, prompts, format, max_new_tokens)
    completions = generate(loaded, requests)
    return [
        Sample(prompt=prompt, text=completion.text)
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
