"""Ghost Attention: the instruction in every turn to sample, in the first to train."""

import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import pytest
from support.models import TALKING, tiny_tokenizer

from llama_jax.checkpoint.model_folder import Loaded
from llama_jax.data.encode import Encoder
from llama_jax.data.files import Location
from llama_jax.data.line_file import read_lines
from llama_jax.data.records import Record, recognise
from llama_jax.errors import DataError, PromptError
from llama_jax.generation.generate import Completion
from llama_jax.generation.request import Request, chat_request
from llama_jax.model.transformer import Llama
from llama_jax.rlhf import ghost_attention
from llama_jax.rlhf.ghost_attention import (
    Item,
    answer_turns,
    draw_instructions,
    ghost_attention_record,
    instruct_every_turn,
    read_instructions,
    sample_dialogs,
    to_records,
)
from llama_jax.runtime import Runtime

TOKENIZER = tiny_tokenizer()
LOADED = Loaded(Llama(TALKING.replace(max_seq_len=256), Runtime()), {}, TOKENIZER)


def dialog(*texts: str, system: str = "") -> Any:
    roles = ("user", "assistant")
    turns = [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]
    return [{"role": "system", "content": system}, *turns] if system else turns


def make_request(messages: Any) -> Request:
    return chat_request(TOKENIZER, messages, format="llama2-chat")


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """Requests to a model that answers with the number of turns, or goes wrong."""
    requests: list[Request] = []

    def generate(_: Any, new: Sequence[Request], **options: Any) -> list[Completion]:
        requests.extend(new)
        completions = []
        for request in new:
            text = TOKENIZER.decode(request.prompt_ids)
            answer = "[INST]" if "bad" in text else str(text.count("[/INST]"))
            answer = "" if "empty" in text else answer
            last = text[text.rindex("[INST]") :]
            reason = "length" if "cut" in last else "stop"
            completions.append(
                Completion(
                    text=answer, token_ids=(5, 6), finish_reason=reason, prompt_ids=()
                )
            )
        return completions

    monkeypatch.setattr(ghost_attention, "generate", generate)
    return requests


def test_the_instruction_is_in_every_user_turn_to_sample() -> None:
    messages = dialog("a", "b", "c", system="s")
    assert instruct_every_turn(messages, "I") == dialog(
        "I\n\na", "b", "I\n\nc", system="s"
    )
    assert messages == dialog("a", "b", "c", system="s")


def test_the_record_has_it_once_and_the_loss_of_earlier_turns_is_zero() -> None:
    messages = dialog("the sun", "sky", "blue", "cats", system="s")
    record = ghost_attention_record(messages, "once")
    texts = [message["content"] for message in record["messages"]]
    assert texts == ["s", "once\n\nthe sun", "sky", "blue", "cats"]
    encoder = Encoder(tokenizer=TOKENIZER, format="llama2-chat", length=255)
    [example] = encoder.encode(
        Record(Location("a", "line", 1), recognise(record))
    ).examples
    learnt = [int(id) for id, on in zip(example.ids, example.mask, strict=True) if on]
    assert TOKENIZER.decode(learnt).strip() == "cats"
    assert learnt[-1] == TOKENIZER.eos_id
    for bad in ([], dialog("a"), dialog("a", "b")[1:]):
        with pytest.raises(DataError):
            ghost_attention_record(bad, "I")


def test_each_turn_is_sampled_after_the_answers_before_it(
    generated: list[Request],
) -> None:
    items = [
        Item(0, dialog("hello", "old", "world", "old", "end"), "girl"),
        Item(1, dialog("sun"), "sky"),
    ]
    answered = answer_turns(LOADED, items, make_request, seed=1)
    assert answered[0].messages == dialog("hello", "1", "world", "2", "end", "3")
    assert answered[1].messages == dialog("sun", "1")
    assert [a.problem for a in answered] == [None, None]
    assert [a.num_tokens for a in answered] == [6, 2]
    seen = [
        dialog("girl\n\nhello"),
        dialog("sky\n\nsun"),
        dialog("girl\n\nhello", "1", "girl\n\nworld"),
        dialog("girl\n\nhello", "1", "girl\n\nworld", "2", "girl\n\nend"),
    ]
    expected = [tuple(make_request(messages).prompt_ids) for messages in seen]
    assert [request.prompt_ids for request in generated] == expected
    seeds = [request.sampling.seed for request in generated]
    assert seeds[0] == seeds[2] == seeds[3] != seeds[1]


def test_dialogs_that_go_wrong_are_named_and_end(generated: list[Request]) -> None:
    items = [
        Item(0, dialog("cut", "", "hello"), "I"),
        Item(1, dialog("hello", "", "cut"), "I"),
        Item(2, dialog("bad", "", "hello"), "I"),
        Item(3, dialog("hello", "", "sun " * 300), "I"),
        Item(4, dialog("empty"), "I"),
    ]
    answered = answer_turns(LOADED, items, make_request, seed=1)
    problems = [None, "cut", "tags", "long", "empty"]
    assert [a.problem for a in answered] == problems
    assert [len(a.messages) for a in answered] == [4, 4, 2, 2, 2]
    with pytest.raises(PromptError, match=r"dialog 8: .*special tag \[/INST\]"):
        answer_turns(
            LOADED, [Item(7, dialog("a", "", "[/INST]"), "I")], make_request, seed=1
        )


def test_a_killed_run_continues_and_other_instructions_are_refused(
    tmp_path: pathlib.Path, generated: list[Request]
) -> None:
    path = tmp_path / "samples.jsonl"
    items = [Item(n, dialog("hello", "", word), "I") for n, word in enumerate("abc")]
    items[1] = items[1]._replace(dialog=dialog("cut"))
    run = functools.partial(
        sample_dialogs, LOADED, make_request=make_request, settings={}, seed=0,
        batch_size=2,
    )  # fmt: skip
    run(items=items, path=path)
    data = path.read_bytes()
    path.write_bytes(data[: data.rindex(b'{"record')])
    generated.clear()
    run(items=items, path=path)
    assert path.read_bytes() == data
    assert len(generated) == 2
    records, problems = to_records(read_lines(path))
    assert problems == {"cut": 1}
    assert [record["messages"][2]["content"] for record in records] == ["a", "c"]
    items[0] = items[0]._replace(instruction="J")
    with pytest.raises(DataError, match="line 1: is of another prompt"):
        run(items=items, path=path)


def test_instructions_are_lines_and_drawn_by_the_seed(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "instructions.txt"
    path.write_text("Be brief.\n\n  Be kind. \nSing.\n")
    instructions = read_instructions(path)
    assert instructions == ["Be brief.", "Be kind.", "Sing."]
    draws = [tuple(draw_instructions(instructions, 1, n, 2)) for n in range(20)]
    assert all(len(set(draw)) == 2 for draw in draws)
    assert len(set(draws)) > 3
    assert draw_instructions(instructions, 1, 4, 2) == list(draws[4])
    with pytest.raises(DataError, match="there are 3, but each dialog needs 4"):
        draw_instructions(instructions, 1, 0, 4)
    path.write_text(" \n")
    with pytest.raises(DataError, match="has no instruction"):
        read_instructions(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_instructions(tmp_path / "no.txt")
