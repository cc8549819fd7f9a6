"""Prompts of records of every shape."""

import json
from typing import Any

import pytest

from llama_jax.data.files import Location, Raw
from llama_jax.data.prompts import Prompt, parse_prompt, read_prompts
from llama_jax.errors import DataError

HI = {"role": "user", "content": "Hi"}
HO = {"role": "assistant", "content": "Ho"}


def parse(record: Any) -> Prompt:
    data = json.dumps(record).encode()
    return parse_prompt(Raw(Location("a.jsonl", "line", 7), data, True, True), 6)


@pytest.mark.parametrize(
    ("record", "content", "answered"),
    [
        ({"text": "Once"}, "Once", False),
        ({"prompt": "Once", "response": None}, "Once", False),
        ({"prompt": "Once", "response": "upon"}, "Once", True),
        ({"prompt": "Once", "chosen": "upon", "rejected": "a"}, "Once", True),
        ({"prompt": [HI]}, [HI], False),
        ({"prompt": [HI], "completion": [HO]}, [HI], True),
        ({"messages": [HI]}, [HI], False),
        ({"messages": [HI, HO, HI], "prompt": "no"}, [HI, HO, HI], False),
        ({"messages": [HI, HO]}, [HI], True),
        ({"conversations": [{"from": "human", "value": "Hi"}]}, [HI], False),
        ({"instruction": "Hi"}, [HI], False),
        ({"instruction": "Hi", "input": "", "output": "Ho"}, [HI], True),
        ({"instruction": "Hi", "input": "x"}, [HI | {"input": "x"}], False),
    ],
)  # fmt: skip
def test_the_prompt_is_all_but_the_last_answer(
    record: Any, content: Any, answered: bool
) -> None:
    prompt = parse(record)
    assert (prompt.content, prompt.answered, prompt.number) == (content, answered, 6)


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ([], "line 7: is a list"),
        ({"title": "x"}, "line 7: has 'title', but neither"),
        ({"prompt": ""}, "line 7: has an empty prompt"),
        ({"messages": [HO]}, "line 7: has no user's message"),
        ({"messages": [HI, HO, HO]}, "line 7: has no user's message"),
        ({"prompt": 3, "response": "x"}, "line 7: has 3 as its 'prompt'"),
    ],
)
def test_a_record_without_a_prompt_is_named(record: Any, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        parse(record)


def test_documents_are_prompts_and_bad_records_can_be_dropped(tmp_path: Any) -> None:
    (tmp_path / "a.txt").write_text("One\n<|endoftext|>\nTwo\n")
    (tmp_path / "b.jsonl").write_text(
        '{"prompt": "Three"}\n{"prompt": 4}\n{"text": "5"}\n'
    )
    problems: list[DataError] = []
    files = [tmp_path / "a.txt", tmp_path / "b.jsonl"]
    prompts = read_prompts(files, on_bad="drop", on_problem=problems.append)
    assert [(p.number, p.content) for p in prompts] == [
        (0, "One"), (1, "Two"), (2, "Three"), (4, "5"),
    ]  # fmt: skip
    assert ["b.jsonl, line 2" in str(problem) for problem in problems] == [True]
    with pytest.raises(DataError, match="line 2"):
        read_prompts(files)
