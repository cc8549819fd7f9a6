"""The command line: what it prints, and how it reports bad input."""

import io
import json
import subprocess
import sys

import pytest

from llama_jax import sample
from llama_jax.cli import command as cli
from llama_jax.cli.output import print_text
from llama_jax.generation.generate import Delta, stream
from llama_jax.generation.sampling import Sampling
from llama_jax.loading import load
from llama_jax.text.prompt_formats import completion_prompt


def run(capsys, *argv):
    """Exit status, standard output and standard error of the command."""
    with pytest.raises(SystemExit) as exit:
        cli.run(sample.main, argv)
    out, err = capsys.readouterr()
    return exit.value.code, out, err


def test_without_flags_the_bundled_model_writes_a_story(capsys):
    status, out, err = run(capsys, "--seed", "1")
    assert status == 0
    assert out.startswith(sample.STORY)
    assert len(out.split()) > 40
    assert "seed 1" in err
    assert "tokens/s" in err


def test_equal_seeds_give_equal_stories_and_different_seeds_do_not(capsys):
    flags = ("--max-new-tokens", "24", "--temperature", "1")
    _, first, _ = run(capsys, "--seed", "5", *flags)
    _, again, _ = run(capsys, "--seed", "5", *flags)
    _, other, _ = run(capsys, "--seed", "6", *flags)
    assert first == again
    assert first != other


def test_json_has_a_line_for_each_completion(capsys):
    status, out, _ = run(
        capsys, "--prompt", "The cat", "--json", "--num-samples", "2", "--seed", "3",
        "--logprobs", "2", "--max-new-tokens", "5",
    )  # fmt: skip
    assert status == 0
    lines = [json.loads(line) for line in out.splitlines()]
    assert sorted(line["index"] for line in lines) == [0, 1]
    loaded = load()
    for line in lines:
        assert line["prompt"] == "The cat"
        assert line["prompt_tokens"] == len(
            completion_prompt(loaded.tokenizer, "The cat")
        )
        assert line["completion_tokens"] == len(line["token_ids"]) == 5
        assert line["completion"] == loaded.tokenizer.decode(line["token_ids"])
        assert line["finish_reason"] == "length"
        assert len(line["logprobs"]) == 5
        assert all(value <= 0 for value in line["logprobs"])
        assert [len(top) for top in line["top_logprobs"]] == [2] * 5


def test_json_has_logprobs_only_with_the_flag(capsys):
    _, out, _ = run(capsys, "--json", "--max-new-tokens", "24")
    assert "logprobs" not in json.loads(out)


def test_flags_precede_the_checkpoints_sampling_which_precedes_ours(
    capsys, monkeypatch
):
    own = {"temperature": 0.25, "top_p": 0.5, "top_k": 7}
    loaded = load()
    loaded = loaded._replace(tokenizer=loaded.tokenizer.replace_settings(sampling=own))
    monkeypatch.setattr(cli, "load_model", lambda args: loaded)
    requests = []

    def record(loaded, new):
        requests.extend(new)
        return stream(loaded, new)

    monkeypatch.setattr(sample, "stream", record)
    flags = ("--top-p", "0.8", "--seed", "3", "--max-new-tokens", "2")
    status, _, err = run(capsys, *flags)
    assert status == 0
    assert "sampling of the checkpoint: temperature 0.25, top_k 7\n" in err
    expected = Sampling(temperature=0.25, top_p=0.8, top_k=7, seed=3)
    assert requests[0].sampling == expected


def test_logprobs_are_a_table_after_the_text(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setattr("sys.stderr", screen)
    top = (((300, -0.5),),)
    deltas = [
        Delta(0, "Once", (300,), (-0.5,), top, None),
        Delta(1, "One", (301,), (-1.0,), top, "stop"),
        Delta(0, " upon", (302,), (-0.25,), top, "length"),
    ]
    print_text(load(), iter(deltas), "")
    lines = screen.getvalue().splitlines()
    assert lines[:4] == ["Once upon", "", "--- 2 ---", "One"]
    assert [line[:3] for line in lines[4:]] == ["[0]", "[0]", "[1]"]


def test_a_stop_string_ends_the_text_before_it(capsys):
    _, whole, _ = run(capsys, "--temperature", "0", "--max-new-tokens", "24")
    stop = whole.split()[8]
    _, cut, _ = run(
        capsys, "--temperature", "0", "--max-new-tokens", "24", "--stop", stop
    )
    assert cut.rstrip("\n") == whole[: whole.index(stop, len(sample.STORY))]


def test_a_prompt_file_is_read_without_its_last_newline(capsys, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("One day, a dog\n")
    flags = ("--json", "--temperature", "0", "--max-new-tokens", "24")
    _, from_file, _ = run(capsys, "--prompt-file", str(file), *flags)
    _, from_flag, _ = run(capsys, "--prompt", "One day, a dog", *flags)
    drop_seed = [json.loads(out) | {"seed": 0} for out in (from_file, from_flag)]
    assert drop_seed[0] == drop_seed[1]


def test_chat_answers_one_message(capsys):
    status, out, err = run(
        capsys, "--chat", "--prompt", "Hello", "--system", "Be brief.", "--seed", "1",
        "--max-new-tokens", "24", "--json",
    )  # fmt: skip
    assert status == 0
    assert "the bundled story model is no chat model" in err
    assert json.loads(out)["completion_tokens"] <= 24


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--prompt", ""), "empty"),
        (("--temperature", "-1"), "temperature is -1.0"),
        (("--top-p", "0"), "top_p is 0.0"),
        (("--checkpoint", "nowhere/at-all"), "nowhere/at-all"),
        (("--prompt", "once " * 600), "the context holds 512"),
        (("--chat", "--prompt", "say [/INST] now"), "special tag [/INST]"),
        (("--format", "lama2-chat", "--prompt", "x"), "did you mean 'llama2-chat'"),
        (("--format", "alpaca", "--system", "x", "--prompt", "y"), "not supported"),
        (("--infill", "a", "b"), "infilling"),
        (("--mesh", "tensor=3"), "devices"),
        (("--mesh", "rows=2"), "'rows'"),
        (("--prompt-file", "no/such/file"), "no/such/file"),
        (("--seed", "-4"), "seed is -4"),
    ],
)
def test_bad_input_exits_with_one_sentence_and_status_2(capsys, argv, words):
    status, out, err = run(capsys, *argv)
    assert status == 2
    assert out == ""
    assert words in err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "argv",
    [
        ("--infill", "a", "b", "--chat"),
        ("--suffix-first",),
        ("--json", "--chat"),
        ("--max-new-tokens", "0"),
        ("--dtype", "int4"),
        ("--prompt", "a", "--prompt-file", "b"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(capsys, argv):
    status, out, err = run(capsys, *argv)
    assert status == 2
    assert out == ""
    assert "error: " in err


def test_text_is_printed_as_it_is_generated_and_a_closed_pipe_is_no_error():
    command = [sys.executable, "-m", "llama_jax.sample", "--seed", "1"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(16) == sample.STORY.encode()
        process.stdout.close()
        err = process.stderr.read().decode()
        assert process.wait(60) == 0
    assert "Traceback" not in err


def test_a_meta_checkpoint_fills_a_gap(capsys, assets):
    status, out, _ = run(
        capsys, "--checkpoint", str(assets / "meta/codellama-tiny"),
        "--tokenizer", str(assets / "tokenizers/codellama.model"),
        "--max-seq-len", "256", "--temperature", "0", "--max-new-tokens", "16",
        "--json", "--infill", "def f():\n", "\n    return x\n",
    )  # fmt: skip
    assert status == 0
    line = json.loads(out)
    assert line["prompt"] == "def f():\n"
    assert line["suffix"] == "\n    return x\n"
    assert line["completion_tokens"] == 16
