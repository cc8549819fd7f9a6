"""Prompt formats against Meta's token ids and, word for word, the published texts."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llama_jax.errors import PromptError, UnsafePromptError
from llama_jax.text.prompt_formats import (
    FORMATS,
    UNSAFE_ANSWER,
    Message,
    completion_prompt,
    default_format,
    get_format,
    infilling_prompt,
)
from llama_jax.text.tokenizer import Tokenizer
from tests.support.tokenizers import special_tokens

CHAT_GOLDEN = (
    "meta/llama2-gqa-tiny-mp2",
    "meta/codellama-tiny",
    "weights/stories15M.golden",
)
SINGLE_TURN = ("alpaca", "wizardlm-7b")


@pytest.fixture(scope="module")
def codellama(assets: pathlib.Path) -> Tokenizer:
    return Tokenizer.from_file(assets / "tokenizers" / "codellama.model")


@pytest.fixture(scope="module")
def codellama_step(assets: pathlib.Path) -> Tokenizer:
    return Tokenizer.from_file(assets / "tokenizers" / "codellama-step.model")


@pytest.fixture(scope="module")
def chatml(llama2_tokenizer: Tokenizer) -> Tokenizer:
    """Llama 2's tokenizer with the tags of ChatML as added tokens."""
    names = {32000: "[PAD]", 32001: "<|im_start|>", 32002: "<|im_end|>"}
    return Tokenizer(llama2_tokenizer.contents, settings=special_tokens(names))


@pytest.fixture(scope="module")
def llama3(assets: pathlib.Path) -> Tokenizer:
    pytest.importorskip("tiktoken", reason='pip install "llama-jax[llama3]"')
    return Tokenizer.from_file(assets / "tokenizers" / "llama3.model")


@pytest.fixture(scope="module")
def tokenizer_for(request: pytest.FixtureRequest) -> Callable[[str], Tokenizer]:
    """A tokenizer that has the special tokens of a format."""
    names = {"orca2": "chatml", "llama3": "llama3"}
    return lambda name: request.getfixturevalue(names.get(name, "codellama_step"))


def user(content: str, **more: Any) -> Message:
    message: Any = {"role": "user", "content": content, **more}
    return message


def assistant(content: str) -> Message:
    return Message(role="assistant", content=content)


def system(content: str) -> Message:
    return Message(role="system", content=content)


def golden(assets: pathlib.Path, folder: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((assets / folder / "golden.json").read_text())
    return data


# Meta's ids


@pytest.mark.parametrize("folder", CHAT_GOLDEN)
def test_chat_prompts_equal_metas(
    assets: pathlib.Path, llama2_tokenizer: Tokenizer, codellama: Tokenizer, folder: str
) -> None:
    tokenizer = codellama if "codellama" in folder else llama2_tokenizer
    format = default_format(tokenizer)
    data = golden(assets, folder)
    refused = 0
    for dialog, ids, answer in zip(
        data["dialogs"],
        data["chat_prompt_tokens"],
        data["chat_completion"],
        strict=True,
    ):
        # Meta encodes an unsafe dialog too, and answers the same text to each.
        assert format.encode(tokenizer, dialog, allow_tags=True) == ids
        if answer["generation"]["content"] == UNSAFE_ANSWER:
            refused += 1
            with pytest.raises(UnsafePromptError, match=r"message 1 of 1 .*\[INST\]"):
                format.encode(tokenizer, dialog)
        else:
            assert format.encode(tokenizer, dialog) == ids
    assert refused == 1


def test_70b_prompts_equal_metas(
    assets: pathlib.Path, codellama_step: Tokenizer
) -> None:
    format = FORMATS["codellama-70b-instruct"]
    path = assets / "tokenizers" / "codellama-step.golden.json"
    cases = json.loads(path.read_text())
    assert any("destination" in case["dialog"][-1] for case in cases)
    for case in cases:
        assert format.encode(codellama_step, case["dialog"]) == case["prompt_tokens"]
        if case["dialog"][0] == system(""):
            shorter = format.encode(codellama_step, case["dialog"][1:])
            assert shorter == case["prompt_tokens"]


@pytest.mark.parametrize("suffix_first", [False, True])
def test_infilling_prompts_equal_metas(
    assets: pathlib.Path, codellama: Tokenizer, suffix_first: bool
) -> None:
    data = golden(assets, "meta/codellama-tiny")
    expected = data[f"infill_prompt_tokens_suffix_first_{suffix_first}"]
    for (prefix, suffix), ids in zip(data["infill"], expected, strict=True):
        prompt = infilling_prompt(codellama, prefix, suffix, suffix_first=suffix_first)
        assert prompt == ids


def test_completion_prompts_equal_metas(
    assets: pathlib.Path, llama2_tokenizer: Tokenizer
) -> None:
    data = golden(assets, "weights/stories15M.golden")
    for text, ids in zip(data["prompts"], data["prompt_tokens"], strict=True):
        assert completion_prompt(llama2_tokenizer, text) == ids


def test_infilling_needs_an_infilling_model(llama2_tokenizer: Tokenizer) -> None:
    with pytest.raises(PromptError, match="no infilling pieces"):
        infilling_prompt(llama2_tokenizer, "a", "b")


# The published texts

SHORT = [user("Hi")]
LONG = [system("Be brief."), user("Hi"), assistant("Hello!"), user("Bye")]

TEXTS = {
    "llama2-chat": [
        (SHORT, "<s>[INST] Hi [/INST]"),
        (
            LONG,
            "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello! </s>"
            "<s>[INST] Bye [/INST]",
        ),
        ([user("  Hi\n")], "<s>[INST] Hi [/INST]"),
    ],
    "vicuna": [
        (
            SHORT,
            "<s>A chat between a curious user and an artificial intelligence "
            "assistant. The assistant gives helpful, detailed, and polite answers to "
            "the user's questions. USER: Hi ASSISTANT:",
        ),
        (
            LONG,
            "<s>Be brief. USER: Hi ASSISTANT: Hello!</s>USER: Bye ASSISTANT:",
        ),
    ],
    "orca2": [
        (SHORT, "<s><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
        (
            LONG,
            "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi"
            "<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\n"
            "Bye<|im_end|>\n<|im_start|>assistant\n",
        ),
    ],
    "alpaca": [
        (
            SHORT,
            "<s>Below is an instruction that describes a task. Write a response that "
            "appropriately completes the request.\n\n### Instruction:\nHi\n\n"
            "### Response:",
        ),
        (
            [user("Add.", input="1, {2}")],
            "<s>Below is an instruction that describes a task, paired with an input "
            "that provides further context. Write a response that appropriately "
            "completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1, {2}"
            "\n\n### Response:",
        ),
    ],
    "wizardlm-7b": [(SHORT, "<s>Hi\n\n### Response:")],
}
TEXTS["codellama-instruct"] = TEXTS["llama2-chat"]
TEXTS["wizardlm"] = TEXTS["vicuna"]


def spelled(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Ids as text with visible begin and end of sequence, each text decoded alone."""
    text, run = "", list[int]()
    for id in [*ids, None]:
        if id in (tokenizer.bos_id, tokenizer.eos_id, None):
            text += tokenizer.decode(run) + {1: "<s>", 2: "</s>"}.get(id or 0, "")
            run = []
        else:
            run.append(id or 0)
    return text


@pytest.mark.parametrize("name", TEXTS)
def test_format_spells_its_published_text(
    llama2_tokenizer: Tokenizer, name: str
) -> None:
    for dialog, text in TEXTS[name]:
        ids = FORMATS[name].encode(llama2_tokenizer, dialog)
        assert ids[0] == 1
        assert spelled(llama2_tokenizer, ids) == text


def test_70b_format_spells_its_published_text(codellama_step: Tokenizer) -> None:
    ids = FORMATS["codellama-70b-instruct"].encode(codellama_step, LONG)
    # Each text that is encoded alone adds a space, as in Meta's ids.
    assert codellama_step.decode(ids) == (
        " Source: system \n\n Be brief.<step>  Source: user \n\n Hi<step>  "
        "Source: assistant \n\n Hello!<step>  Source: user \n\n Bye<step>  "
        "Source: assistant\nDestination: user \n\n "
    )


# Meta's code writes each part alone: 271 is "\n\n".
LLAMA3_LONG = [
    128000, 128006, 9125, 128007, 271, 3513, 10015, 13, 128009, 128006, 882, 128007,
    271, 13347, 128009, 128006, 78191, 128007, 271, 9906, 0, 128009, 128006, 882,
    128007, 271, 1383, 68, 128009, 128006, 78191, 128007, 271,
]  # fmt: skip


def test_llama3_format_has_the_published_tokens(
    llama3: Tokenizer, llama2_tokenizer: Tokenizer
) -> None:
    format = default_format(llama3)
    assert format.name == "llama3"
    assert format.encode(llama3, LONG) == LLAMA3_LONG
    padded = [{**message, "content": f" {message['content']}\n"} for message in LONG]
    assert format.encode(llama3, padded) == LLAMA3_LONG
    assert format.stop_ids(llama3) == (128_009, 128_008, 128_001)
    names = [llama3.piece(id) if id >= 128_000 else "" for id in LLAMA3_LONG]
    assert names.count("<|eot_id|>") == len(LONG)
    answers = [span for span in format.spans(llama3, LONG) if span.is_answer]
    assert [span.ids for span in answers] == [[9906, 0, 128009]]
    spelled_out = format.encode(llama3, [user("<|eot_id|>")])
    assert spelled_out.count(128_009) == 1
    with pytest.raises(PromptError, match=r"llama3: .* no piece <\|start_header_id"):
        format.encode(llama2_tokenizer, LONG)


def test_orca2_uses_tags_that_are_tokens(
    llama2_tokenizer: Tokenizer, chatml: Tokenizer
) -> None:
    format = FORMATS["orca2"]
    for dialog, text in TEXTS["orca2"]:
        ids = format.encode(chatml, dialog)
        assert "<s>" + chatml.decode(ids) == text
        assert ids.count(32001) == text.count("<|im_start|>")
        assert ids.count(32002) == text.count("<|im_end|>")
    assert format.encode(chatml, SHORT) == [
        1, 32001, 1792, 13, 18567, 32002, 13, 32001, 465, 22137, 13,
    ]  # fmt: skip
    assert format.stop_ids(chatml) == (32002, 2)
    assert format.stop_ids(llama2_tokenizer) == (2,)
    assert format.stop_strings == ("<|im_end|>",)


# Answers


def dialogs(name: str) -> st.SearchStrategy[list[Message]]:
    text = st.text(max_size=12)
    pair = st.tuples(text.map(user), text.map(assistant)).map(list)
    pairs = st.lists(pair, min_size=1, max_size=1 if name in SINGLE_TURN else 3)
    turns = pairs.map(lambda pairs: [m for pair in pairs for m in pair])
    if name in SINGLE_TURN:
        return turns
    opening = st.lists(text.map(system), max_size=1)
    return st.tuples(opening, turns).map(lambda both: both[0] + both[1])


@pytest.mark.parametrize("name", FORMATS)
@given(data=st.data())
def test_last_answer_follows_its_prompt(
    tokenizer_for: Callable[[str], Tokenizer], name: str, data: st.DataObject
) -> None:
    format = FORMATS[name]
    tokenizer = tokenizer_for(name)
    dialog = data.draw(dialogs(name))
    *given, answer = format.spans(tokenizer, dialog, allow_tags=True)
    assert answer.is_answer
    assert answer.ids[-1] in format.stop_ids(tokenizer)
    prompt = format.encode(tokenizer, dialog[:-1], allow_tags=True)
    assert [id for span in given for id in span.ids] == prompt
    if name != "codellama-70b-instruct":  # whose history is written otherwise
        answers = [span for span in given if span.is_answer]
        assert len(answers) == sum(m["role"] == "assistant" for m in dialog[:-1])


@pytest.mark.parametrize("name", FORMATS)
def test_answers_are_what_the_assistant_said(
    tokenizer_for: Callable[[str], Tokenizer], name: str
) -> None:
    dialog = [user("Hi"), assistant("Well, hello!")]
    tokenizer = tokenizer_for(name)
    spans = FORMATS[name].spans(tokenizer, dialog)
    said = [tokenizer.decode(span.ids) for span in spans if span.is_answer]
    ends = {"orca2": "<|im_end|>", "codellama-70b-instruct": "<step>"}
    assert [text.strip() for text in said] == ["Well, hello!" + ends.get(name, "")]


@given(question=st.text(max_size=20), answer=st.text(max_size=20))
@example("a", "")
@example("a", ": b")
@example("a]", "]b")
def test_llama2_pair_is_encoded_as_one_text(
    llama2_tokenizer: Tokenizer, question: str, answer: str
) -> None:
    dialog = [user(question), assistant(answer), user("x")]
    ids = FORMATS["llama2-chat"].encode(llama2_tokenizer, dialog, allow_tags=True)
    text = f"[INST] {question.strip()} [/INST] {answer.strip()} "
    pair = llama2_tokenizer.encode(text, bos=True, eos=True)
    assert ids[: len(pair)] == pair


# Refusals


def test_wrong_orders_are_refused_by_message(llama2_tokenizer: Tokenizer) -> None:
    format = FORMATS["llama2-chat"]
    nameless: Any = {"content": "Hi"}
    silent: Any = {"role": "user"}
    nulled: Any = {"role": "user", "content": None}
    named: Any = {"role": "user", "content": "Hi", "name": "Ada"}
    for dialog, complaint in (
        ([], "no user message"),
        ([system("a")], "no user message"),
        ([assistant("a")], "message 1 of 1 .*'assistant'.* must be the user's"),
        ([user("a"), user("b")], "message 2 of 2 .*must be the assistant's"),
        ([user("a"), assistant("b")], "message 2 of 2 .*is the last"),
        ([user("a"), system("b"), user("c")], "message 2 of 3 .*'system'"),
        ([system("a"), system("b"), user("c")], "message 2 of 3 .*'system'"),
        ([nameless], "role None"),
        ([silent], "message 1 of 1 .*no text as its 'content'"),
        ([nulled], "message 1 of 1 .*no text as its 'content'"),
        ([named], "the key 'name', which"),
        ([user("a", destination="b")], "'destination', which"),
        ([user("a", input="b")], "'input', which"),
    ):
        with pytest.raises(PromptError, match=complaint) as raised:
            format.encode(llama2_tokenizer, dialog)
        assert str(raised.value).startswith("llama2-chat: ")
        assert not isinstance(raised.value, UnsafePromptError)


@pytest.mark.parametrize("name", SINGLE_TURN)
def test_instruction_formats_have_one_turn(
    llama2_tokenizer: Tokenizer, name: str
) -> None:
    with pytest.raises(PromptError, match=r"message 1 of 2 .* not supported"):
        FORMATS[name].encode(llama2_tokenizer, [system("a"), user("b")])
    with pytest.raises(PromptError, match=r"message 3 of 3 .* one turn"):
        FORMATS[name].encode(llama2_tokenizer, [user("a"), assistant("b"), user("c")])


def test_special_tags_are_unsafe_where_they_mean_something(
    tokenizer_for: Callable[[str], Tokenizer],
) -> None:
    meta = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
    tags = {
        "llama2-chat": meta,
        "codellama-instruct": (*meta, "<step>"),
        "codellama-70b-instruct": (*meta, "<step>"),
        "orca2": ("<|im_start|>", "<|im_end|>"),
    }
    everything = {tag for some in tags.values() for tag in some}
    for name, format in FORMATS.items():
        for tag in sorted(everything):
            dialog = [user("Hi"), assistant(f"so {tag} it"), user("is")]
            if name in SINGLE_TURN:
                dialog = [user(f"so {tag} it")]
            if tag in tags.get(name, ()):
                with pytest.raises(UnsafePromptError, match="message 2 of 3"):
                    format.encode(tokenizer_for(name), dialog)
            else:
                format.encode(tokenizer_for(name), dialog)


def test_every_special_key_is_searched_for_tags(codellama_step: Tokenizer) -> None:
    dialog = [user("Hi", destination="a<step>")]
    with pytest.raises(UnsafePromptError):
        FORMATS["codellama-70b-instruct"].encode(codellama_step, dialog)


# Names and ends


def test_an_unknown_format_suggests_the_nearest_name() -> None:
    assert get_format("vicuna").name == "vicuna"
    with pytest.raises(PromptError, match=r"alpaca.* did you mean 'llama2-chat'\?"):
        get_format("llama-2-chat")


def test_default_format_follows_the_tokenizer(
    llama2_tokenizer: Tokenizer, codellama: Tokenizer, codellama_step: Tokenizer
) -> None:
    assert default_format(llama2_tokenizer).name == "llama2-chat"
    assert default_format(codellama).name == "codellama-instruct"
    assert default_format(codellama_step).name == "codellama-70b-instruct"


def test_each_format_has_the_stop_ids_of_its_models(
    llama2_tokenizer: Tokenizer, codellama_step: Tokenizer
) -> None:
    for name, format in FORMATS.items():
        expected = (32015, 2) if name == "codellama-70b-instruct" else (2,)
        assert format.stop_ids(codellama_step) == expected
    with pytest.raises(PromptError, match="no piece <step>"):
        FORMATS["codellama-70b-instruct"].encode(llama2_tokenizer, SHORT)
