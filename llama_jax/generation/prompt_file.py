"""Complete the prompts of files into a file of JSON lines, resumable after a kill."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from llama_jax.checkpoint.model_folder import Loaded
from llama_jax.data.line_file import LineFile
from llama_jax.data.prompts import Prompt
from llama_jax.errors import PromptError, UnsafePromptError
from llama_jax.generation.batching import MAX_ROWS, cut_batches
from llama_jax.generation.generate import Completion, check_request, generate
from llama_jax.generation.request import Request
from llama_jax.types import JsonObject, Path

MakeRequest = Callable[[Prompt], Request]
OnBatch = Callable[[int, int], None]
"""Called after a batch with the number of finished prompts, and its new tokens."""

T = TypeVar("T")


def prompt_seed(seed: int, number: int) -> int:
    """Return the seed of a prompt, so that equal prompts get different completions.

    Args:
      seed: of the run.
      number: of the prompt's record.

    >>> prompt_seed(1, 0), prompt_seed(1, 1)
    (1835504127, 1189033389)
    """
    return int(np.random.SeedSequence((seed, number)).generate_state(1)[0])


def make_requests(
    loaded: Loaded,
    prompts: Sequence[Prompt],
    make_request: MakeRequest,
    *,
    seed: int,
    on_problem: Callable[[PromptError], None] | None = None,
) -> list[tuple[Prompt, Request]]:
    """Make and check the request of every prompt, before anything is computed.

    Args:
      loaded: model, weights and tokenizer.
      prompts: from `read_prompts`.
      make_request: makes the request of a prompt; its seed is replaced.
      seed: of the run; see `prompt_seed`.
      on_problem: called with the error of each prompt that is dropped; None raises it.

    Raises:
      PromptError: a prompt that the model cannot read; names file and line.
    """
    pairs = []
    for prompt in prompts:
        name = str(prompt.location)
        try:
            try:
                request = make_request(prompt)
                check_request(request, loaded.model.config, name)
            except UnsafePromptError as error:
                raise UnsafePromptError(f"{name}: {error}") from error
            except PromptError as error:
                known = str(error).startswith(name)
                raise error if known else PromptError(f"{name}: {error}") from error
        except PromptError as error:
            if on_problem is None:
                raise
            on_problem(error)
            continue
        own = prompt_seed(seed, prompt.number)
        sampling = dataclasses.replace(request.sampling, seed=own)
        pairs.append((prompt, dataclasses.replace(request, sampling=sampling)))
    return pairs


def in_batches(
    loaded: Loaded,
    items: Sequence[T],
    requests_of: Callable[[T], Sequence[Request]],
    *,
    max_batch_bytes: int | None = None,
) -> Iterator[Sequence[T]]:
    """Cut items into groups, in order, whose requests fit memory as one batch.

    Args:
      loaded: model, weights and tokenizer.
      items: anything that has requests.
      requests_of: the requests of an item.
      max_batch_bytes: see `generate`.

    Yields:
      Consecutive items; at least one, even if its requests fit no batch together.
    """
    first = 0
    while first < len(items):
        rows: list[Request] = []
        counts = []
        for item in items[first:]:
            own = [r for r in requests_of(item) for _ in range(r.num_samples)]
            if rows and len(rows) + len(own) > MAX_ROWS:
                break
            rows += own
            counts.append(len(rows))
        model = loaded.language_model
        fitting = len(cut_batches(rows, model, max_bytes=max_batch_bytes)[0])
        taken = max(1, sum(count <= fitting for count in counts))
        yield items[first : first + taken]
        first += taken


def complete_prompts(
    loaded: Loaded,
    pairs: Sequence[tuple[Prompt, Request]],
    path: Path,
    *,
    settings: JsonObject,
    on_batch: OnBatch | None = None,
    max_batch_bytes: int | None = None,
) -> None:
    """Complete prompts, and append a JSON line for each completion to a file.

    A line has `record` (the prompt's number), `index` (among its completions), `prompt`
    (text or messages), `completion`, `finish_reason`, `prompt_tokens`,
    `completion_tokens`, `seed` and `settings`; training reads it as a prompt with its
    answer. Lines are in the order of the prompts. If the file has lines, the prompts
    after them are completed.

    Args:
      loaded: model, weights and tokenizer.
      pairs: prompts and requests, with the same `num_samples`; see `make_requests`.
      path: of the output.
      settings: what the completions depend on; a resumed run must have the same.
      on_batch: called after each batch, and once before the first.
      max_batch_bytes: see `generate`.

    Raises:
      DataError: the file has other lines, or those of other prompts or settings.
      CheckpointError: see `generate`.
    """
    samples = pairs[0][1].num_samples if pairs else 1
    output = LineFile(
        path,
        [(prompt.number, prompt.content) for prompt, _ in pairs],
        settings,
        lines_per_record=samples,
    )
    if on_batch is not None:
        on_batch(output.num_records, 0)
    for batch in in_batches(
        loaded,
        pairs[output.num_records :],
        lambda pair: [pair[1]],
        max_batch_bytes=max_batch_bytes,
    ):
        completions = generate(
            loaded, [request for _, request in batch], max_batch_bytes=max_batch_bytes
        )
        lines = [
            _line(*pair, index, completions[row * samples + index], settings)
            for row, pair in enumerate(batch)
            for index in range(samples)
        ]
        output.append(lines)
        if on_batch is not None:
            on_batch(
                output.num_records, sum(line["completion_tokens"] for line in lines)
            )


def _line(
    prompt: Prompt,
    request: Request,
    index: int,
    completion: Completion,
    settings: JsonObject,
) -> JsonObject:
    return {
        "record": prompt.number,
        "index": index,
        "prompt": prompt.content,
        "completion": completion.text,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": len(completion.prompt_ids),
        "completion_tokens": len(completion.token_ids),
        "seed": request.sampling.seed,
        "settings": settings,
    }
