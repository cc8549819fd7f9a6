"""Rejection sampling: the best of K answers to each prompt, for fine-tuning.

Llama 2 paper (arXiv:2307.09288), section 3.2.3: K answers are sampled for each prompt,
a reward scores them, and the best becomes the target of supervised fine-tuning; it may
come from any round.
"""

import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from llama_jax.checkpoint.atomic_write import write_file
from llama_jax.checkpoint.model_folder import Loaded
from llama_jax.data.line_file import LineFile
from llama_jax.data.prompts import Prompt
from llama_jax.errors import DataError
from llama_jax.generation.generate import Completion, generate
from llama_jax.generation.prompt_file import in_batches
from llama_jax.generation.request import Request
from llama_jax.rlhf.rewards import Answer, Reward
from llama_jax.rlhf.rollout import sampled_ids
from llama_jax.types import JsonObject, Path

SAMPLES, RECORDS = "samples.jsonl", "records.jsonl"
"""Files of a round: all answers with their rewards, and the best of each prompt."""


class Candidate(NamedTuple):
    """An answer to a prompt, before it is scored.

    Attributes:
      answer: with the prompt as the record has it.
      temperature: at which it was sampled.
      source: file of the earlier round that it was the best of; None if it is new.
    """

    answer: Answer
    temperature: float
    source: str | None = None


class Work(NamedTuple):
    """What is sampled for a prompt.

    Attributes:
      prompt: as the record has it.
      prompt_ids: tokens of that prompt.
      requests: with K samples each, one for each temperature; their prompt may have a
        system message that the record lacks (context distillation).
      earlier: the best answers of earlier rounds.
    """

    prompt: Prompt
    prompt_ids: Sequence[int]
    requests: Sequence[Request]
    earlier: Sequence[Candidate] = ()


class Selection(NamedTuple):
    """The best answers.

    Attributes:
      records: for fine-tuning, one for each prompt with an answer that may be selected.
      earlier: number of records whose answer is from an earlier round.
      without_answer: number of prompts without a record, since all answers were cut or
        empty.
    """

    records: list[JsonObject]
    earlier: int
    without_answer: int


def sample_and_score(
    loaded: Loaded,
    works: Sequence[Work],
    reward: Reward,
    path: Path,
    *,
    settings: JsonObject,
    on_batch: Callable[[int, int], None] | None = None,
    max_batch_bytes: int | None = None,
) -> None:
    """Sample and score answers, and append a JSON line for each prompt to a file.

    A line has `record`, `prompt`, `answers` (each with `text`, `token_ids`, `ended`,
    `temperature`, `reward`, and `source` if it is from an earlier round) and
    `settings`. If the file has lines, the prompts after them are sampled.

    Args:
      loaded: the policy.
      works: of each prompt.
      reward: scores the answers to the prompts as the records have them; earlier
        answers are scored again, so that rewards are of one scale.
      path: of the file.
      settings: what the lines depend on; a resumed run must have the same.
      on_batch: called with the number of finished prompts and new tokens, after each
        batch and once before the first.
      max_batch_bytes: see `generate`.

    Raises:
      DataError: the file has lines of something else.
      RewardError: the reward fails, or is no finite number.
    """
    prompts = [(work.prompt.number, work.prompt.content) for work in works]
    output = LineFile(path, prompts, settings)
    if on_batch is not None:
        on_batch(output.num_records, 0)
    for batch in in_batches(
        loaded,
        works[output.num_records :],
        lambda work: work.requests,
        max_batch_bytes=max_batch_bytes,
    ):
        requests = [request for work in batch for request in work.requests]
        completions = iter(generate(loaded, requests, max_batch_bytes=max_batch_bytes))
        groups = [[*_new(work, completions), *work.earlier] for work in batch]
        answers = [candidate.answer for group in groups for candidate in group]
        rewards = iter(reward(answers).tolist())
        output.append(
            [
                {
                    "record": work.prompt.number,
                    "prompt": work.prompt.content,
                    "answers": [_line(one, next(rewards)) for one in group],
                    "settings": settings,
                }
                for work, group in zip(batch, groups, strict=True)
            ]
        )
        if on_batch is not None:
            new = [one for group in groups for one in group if one.source is None]
            tokens = sum(len(candidate.answer.token_ids) for candidate in new)
            on_batch(output.num_records, tokens)


def select(lines: Iterable[JsonObject], *, allow_cut: bool = False) -> Selection:
    """Select the answer with the highest reward for each prompt; the first of equals.

    Empty answers are not selected, since training learns nothing from them.

    A record has `prompt` and `completion`, as training reads them, and `reward`,
    `rewards` (of all answers), `token_ids`, `ended`, `temperature` and `source`.

    Args:
      lines: of the file that `sample_and_score` wrote.
      allow_cut: select answers too that the limit of tokens cut. Training would teach
        the model to end where they do.
    """
    records: list[JsonObject] = []
    prompts = earlier = 0
    for line in lines:
        prompts += 1
        allowed = [
            answer
            for answer in line["answers"]
            if (answer["ended"] or allow_cut) and answer["text"].strip()
        ]
        if not allowed:
            continue
        best = max(allowed, key=lambda answer: answer["reward"])
        earlier += best["source"] is not None
        facts = {key: value for key, value in best.items() if key != "text"}
        record = {"prompt": line["prompt"], "completion": best["text"], **facts}
        record["rewards"] = [answer["reward"] for answer in line["answers"]]
        records.append(record)
    return Selection(records, earlier, prompts - len(records))


def write_records(path: Path, records: Sequence[JsonObject]) -> None:
    """Write records as JSON lines, or replace the file."""
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    write_file(path, "".join(lines))


def read_earlier(path: Path) -> dict[str, Candidate]:
    """Read the records of an earlier round.

    Args:
      path: `records.jsonl`, or the folder that has it.

    Returns:
      The best answer to each prompt, by `prompt_key`. It has no prompt ids yet.

    Raises:
      DataError: the file cannot be read, or has other records.
    """
    file = pathlib.Path(path)
    file = file / RECORDS if file.is_dir() else file
    earlier = {}
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{file}: cannot be read; name the output of an earlier round"
        ) from error
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            answer = Answer(
                record["prompt"],
                record["completion"],
                (),
                tuple(record["token_ids"]),
                record["ended"],
            )
            candidate = Candidate(answer, record["temperature"], os.fspath(path))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{file}, line {number}: is not a record of rejection sampling; name "
                "the output of an earlier round"
            ) from error
        earlier[prompt_key(record["prompt"])] = candidate
    return earlier


def prompt_key(content: object) -> str:
    """Return a text that is equal for equal prompts."""
    return json.dumps(content, sort_keys=True)


def _new(work: Work, completions: Iterator[Completion]) -> list[Candidate]:
    return [
        Candidate(
            Answer(
                work.prompt.content,
                completion.text,
                work.prompt_ids,
                sampled_ids(completion),
                ended=completion.finish_reason == "stop",
            ),
            request.sampling.temperature,
        )
        for request in work.requests
        for completion in itertools.islice(completions, request.num_samples)
    ]


def _line(candidate: Candidate, reward: float) -> JsonObject:
    answer = candidate.answer
    return {
        "text": answer.text,
        "reward": reward,
        "ended": answer.ended,
        "temperature": candidate.temperature,
        "source": candidate.source,
        "token_ids": list(answer.token_ids),
    }
