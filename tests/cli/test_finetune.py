"""The command that trains: what it writes, says and refuses."""

import json
import os
import pathlib
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from support.models import TALKING, random_params, tiny_tokenizer
from support.tolerances import EQUAL_FORWARD

from llama_jax import finetune, sample
from llama_jax.checkpoint.model_folder import save_params
from llama_jax.cli import command as cli
from llama_jax.cli.finetune_flags import parse
from llama_jax.data.loader import Loader
from llama_jax.loading import load
from llama_jax.model.extended_context import parse_rope_scaling
from llama_jax.model.presets import preset
from llama_jax.model.transformer import apply
from llama_jax.params import count_params, flatten
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.train import loop
from llama_jax.train.finetune_config import FinetuneConfig
from llama_jax.train.metrics import read_metrics
from llama_jax.weights import Adapted

TEXTS = ["the sun was warm", "once upon a time", "12 cats all day", "hello world!"]


# The runs are of the same few programs, which need not be compiled for each of them.
@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in names]
    for name, value in zip(
        names, (str(tmp_path_factory.mktemp("c")), 0.0), strict=True
    ):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()


CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SMALL = ("--batch-size", "4", "--packing", "pad", "--learning-rate", "1e-2")


def run(capsys: Any, *argv: str, main: Callable[..., int] = finetune.main) -> Any:
    """Exit status, standard output and standard error of the command."""
    with pytest.raises(SystemExit) as exit:
        cli.run(main, argv)
    out, err = capsys.readouterr()
    return exit.value.code, out, err


def succeed(capsys: Any, *argv: str) -> str:
    """What a run that goes well says."""
    status, out, err = run(capsys, *argv)
    assert status == 0, err
    assert out == ""
    return err


def refused(capsys: Any, *argv: str) -> str:
    """The one sentence with which a run is refused."""
    status, out, err = run(capsys, *argv)
    assert status == 2
    assert out == ""
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    return err


def records(folder: pathlib.Path) -> list[dict[str, Any]]:
    return read_metrics(folder / "metrics.jsonl")


def write(path: pathlib.Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random model on disk."""
    folder = tmp_path_factory.mktemp("base") / "model"
    save_params(folder, random_params(TALKING), TALKING, tokenizer=tiny_tokenizer())
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("data") / "texts.jsonl", TEXTS * 4)


@pytest.fixture(scope="module")
def done(base: str, data: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a run with everything, for tests that only look at it."""
    folder = tmp_path_factory.mktemp("done") / "run"
    flags = [
        "--checkpoint", base, "--data", data, "--output", str(folder), *SMALL,
        "--epochs", "3", "--eval-data", data, "--eval-every", "4", "--save-every", "5",
        "--sample-prompt", "once upon", "--sample-every", "6", "--sample-tokens", "4",
    ]  # fmt: skip
    assert finetune.main(flags) == 0
    return folder


def test_metrics_have_every_step_once_and_all_numbers(done: pathlib.Path) -> None:
    lines = (done / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert [record["step"] for record in found] == list(range(1, 13))
    for record in found:
        for name in ("loss", "learning_rate", "tokens_per_second", "grad_norm"):
            assert record[name] > 0
        assert record["targets"] == record["tokens"]
        assert record["data_seconds"] >= 0
        assert record["skipped"] is False
    evaluated = [record["step"] for record in found if "eval_loss" in record]
    assert evaluated == [4, 8, 12]
    assert found[-1]["eval_loss"] < found[0]["eval_loss_before"]
    assert found[0]["eval_loss_before"] == pytest.approx(found[0]["loss"], rel=0.2)
    assert 2.9 < found[-1]["epoch"] <= 3
    assert found[-1]["records"] == 48


def test_the_trained_model_can_be_loaded_and_sampled(
    done: pathlib.Path, capsys: Any
) -> None:
    loaded = load(done / "model")
    assert loaded.model.config == TALKING
    assert loaded.tokenizer.contents == tiny_tokenizer().contents
    before = flatten(random_params(TALKING))
    after = flatten(loaded.params)
    assert after.keys() == before.keys()
    assert all(np.any(after[path] != before[path]) for path in before)
    flags = ("--checkpoint", str(done / "model"), "--prompt", "once", "--json")
    status, out, _ = run(capsys, *flags, "--max-new-tokens", "3", main=sample.main)
    assert status == 0
    assert json.loads(out)["completion_tokens"] <= 3


def test_a_run_writes_a_report_samples_and_settings(done: pathlib.Path) -> None:
    assert "held-out loss" in (done / "report.html").read_text()
    assert "## Samples" in (done / "report.md").read_text()
    found = read_metrics(done / "samples.jsonl")
    assert [one["step"] for one in found] == [6, 12]
    assert found[0]["samples"][0]["prompt"] == "once upon"
    settings = json.loads((done / "run.json").read_text())
    assert settings["steps"] == 12
    assert settings["arguments"]["seq_length"] == TALKING.max_seq_len
    assert settings["arguments"]["weight_decay"] == 0.1
    assert sorted(int(path.name) for path in (done / "checkpoints").iterdir()) == [
        10,
        12,
    ]


def test_resuming_a_finished_run_changes_nothing(
    done: pathlib.Path, capsys: Any
) -> None:
    before = (done / "metrics.jsonl").read_bytes()
    assert "this run is finished" in succeed(capsys, "--output", str(done), "--resume")
    assert (done / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--learning-rate", "1e-3"), "learning_rate: is 0.001, but the run was"),
        (("--batch-size", "8"), "batch_size: is 8, but the run was started with 4"),
        (("--method", "lora"), "method: is lora, but the run was started with full"),
        (("--seed", "3"), "seed: is 3"),
        (("--format", "alpaca"), "format: is alpaca"),
        (("--max-seq-len", "64"), "max_seq_len: is 64"),
        (("--rope-scaling", "yarn,factor=2"), "rope_scaling: is yarn,factor=2"),
        (("--dtype", "bfloat16"), "dtype: is bfloat16"),
    ],
)
def test_a_changed_setting_is_refused_by_name(
    done: pathlib.Path, capsys: Any, flags: tuple[str, ...], words: str
) -> None:
    assert words in refused(capsys, "--output", str(done), "--resume", *flags)


def test_a_run_is_not_resumed_with_another_model_or_other_data(
    done: pathlib.Path, tmp_path: pathlib.Path, capsys: Any
) -> None:
    other, run = tmp_path / "other", tmp_path / "run"
    params = random_params(TALKING, 5)
    save_params(other, params, TALKING, tokenizer=tiny_tokenizer())
    shutil.copytree(done, run)
    output = ("--output", str(run), "--resume")
    said = refused(capsys, *output, "--checkpoint", str(other))
    assert "the run was started from another model" in said
    records = write(tmp_path / "more.jsonl", TEXTS * 5)
    assert "data: the data was" in refused(capsys, *output, "--data", records)


def test_an_output_that_is_in_use_is_refused(
    data: str, done: pathlib.Path, tmp_path: pathlib.Path, capsys: Any
) -> None:
    said = refused(capsys, "--data", data, "--output", str(done))
    assert "is not empty; name a new folder, or resume" in said
    (tmp_path / "file").write_text("x")
    said = refused(capsys, "--data", data, "--output", str(tmp_path), "--resume")
    assert "has no run.json" in said
    said = refused(capsys, "--output", str(tmp_path / "new"), "--resume")
    assert "there is no run to resume" in said


def adapted(base: str, data: str, output: pathlib.Path, method: str) -> None:
    flags = [
        "--checkpoint", base, "--data", data, "--output", str(output), *SMALL,
        "--method", method, "--lora-rank", "3", "--lora-targets", "q_proj", "up_proj",
        "--steps", "3", "--learning-rate", "1e-1",
    ]  # fmt: skip
    assert finetune.main(flags) == 0


@pytest.fixture(scope="module")
def lora(base: str, data: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a run that trained adapters."""
    folder = tmp_path_factory.mktemp("lora") / "run"
    adapted(base, data, folder, "lora")
    return folder


def check_adapters(output: pathlib.Path, base: str, quantize: Any) -> None:
    """Only adapters were trained and saved, and with them the model is better."""
    d, f, nh = TALKING.embed_dim, TALKING.mlp_dim, TALKING.num_heads * TALKING.head_dim
    count = TALKING.num_layers * 3 * (d + nh + d + f)
    state = output / "checkpoints" / "3" / "state" / "_METADATA"
    saved = json.loads(state.read_text())["tree_metadata"]
    paths = {
        tuple(part["key"] for part in one["key_metadata"]) for one in saved.values()
    }
    trained = {"/".join(path[1:]) for path in paths if path[0] == "params"}
    block = "transformer/layers"
    assert trained == {
        f"{block}/{weight}/{part}"
        for weight in ("attention/q_proj", "mlp/up_proj")
        for part in "ab"
    }
    loaded = load(base, adapter=output / "adapter", quantize=quantize)
    found = [x for x in flatten(loaded.params).values() if isinstance(x, Adapted)]
    assert len(found) == 2 * TALKING.num_layers
    assert sum(count_params({"a": leaf.a, "b": leaf.b}) for leaf in found) == count
    assert all(np.any(np.asarray(leaf.b)) for leaf in found)
    ids = jnp.asarray([tiny_tokenizer().encode(TEXTS[0], bos=True, eos=True)])
    plain = load(base, quantize=quantize)
    after, before = (
        apply(one.model, one.params, ids[:, :-1], ids[:, 1:], method="losses")
        for one in (loaded, plain)
    )
    assert float(jnp.mean(after)) < float(jnp.mean(before))


def test_only_adapters_are_trained_and_saved(
    lora: pathlib.Path, base: str, capsys: Any
) -> None:
    check_adapters(lora, base, None)
    flags = ("--checkpoint", base, "--adapter", str(lora / "adapter"), "--json")
    more = ("--prompt", "once", "--max-new-tokens", "3")
    status, out, _ = run(capsys, *flags, *more, main=sample.main)
    assert status == 0
    assert json.loads(out)["prompt"] == "once"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--save-dtype", "float16"), "without --method full"),
        (("--sample-tokens", "3"), "without --sample-prompt"),
    ],
)
def test_a_resumed_run_refuses_flags_that_it_does_not_use(
    lora: pathlib.Path, capsys: Any, flags: tuple[str, ...], words: str
) -> None:
    message = refused(capsys, "--output", str(lora), "--resume", *flags)
    assert message.startswith(f"error: {flags[0]}: has no effect {words}")


@pytest.mark.slow
def test_adapters_are_trained_on_four_bit_weights(
    base: str, data: str, tmp_path: pathlib.Path
) -> None:
    adapted(base, data, tmp_path / "run", "qlora")
    check_adapters(tmp_path / "run", base, "nf4")


def test_a_merged_model_equals_base_and_adapters(
    lora: pathlib.Path, base: str, tmp_path: pathlib.Path, capsys: Any
) -> None:
    adapter, merged = str(lora / "adapter"), str(tmp_path / "merged")
    flags = ("--checkpoint", base, "--adapter", adapter, "--output", merged)
    assert "merged" in succeed(capsys, "merge", *flags)
    beside, whole = load(base, adapter=adapter), load(merged)
    tokens = jnp.asarray([[1, 40, 50, 60]])
    found, _ = apply(whole.model, whole.params, tokens)
    wanted, _ = apply(beside.model, beside.params, tokens)
    scale = float(jnp.max(jnp.abs(wanted)))
    np.testing.assert_allclose(found, wanted, atol=EQUAL_FORWARD * scale)
    assert "already exists" in refused(capsys, "merge", *flags)


def test_a_tokenizer_and_a_model_are_trained_from_scratch(
    tmp_path: pathlib.Path, capsys: Any
) -> None:
    texts = write(
        tmp_path / "texts.jsonl", [f"{text} {n}" for n in range(9) for text in TEXTS]
    )
    made = str(tmp_path / "tokenizer")
    said = succeed(
        capsys, "tokenizer", "--data", texts, "--vocab-size", "300", "--output", made
    )
    assert "300 pieces" in said
    assert Tokenizer.from_file(f"{made}/tokenizer.model").vocab_size == 300
    output = tmp_path / "run"
    succeed(
        capsys, "--from-scratch", "--preset", "L1,D16,N2,F24,V304", "--tokenizer", made,
        "--data", texts, "--output", str(output), "--seq-length", "16", *SMALL,
        "--packing", "split", "--steps", "8", "--warmup", "2",
        "--rope-scaling", "dynamic,factor=2",
    )  # fmt: skip
    found = records(output)
    assert found[0]["loss"] == pytest.approx(np.log(304), rel=0.02)  # knows nothing
    assert found[-1]["loss"] < found[0]["loss"] - 0.1
    assert found[0]["learning_rate"] == pytest.approx(5e-3)
    loaded = load(output / "model")
    assert loaded.tokenizer.vocab_size == 300
    config = loaded.model.config
    assert config.max_seq_len == 32
    assert config.rope_scaling == parse_rope_scaling("dynamic,factor=2", 16)


@pytest.mark.slow
def test_a_run_on_a_mesh_has_the_losses_of_one_device(
    base: str, data: str, tmp_path: pathlib.Path, capsys: Any
) -> None:
    flags = ("--checkpoint", base, "--data", data, "--steps", "2", *SMALL)
    succeed(capsys, *flags, "--output", str(tmp_path / "one"))
    mesh = ("--mesh", "data=2,fsdp=2,tensor=2", "--accumulate", "1")
    succeed(capsys, *flags, "--output", str(tmp_path / "mesh"), *mesh)
    for one, other in zip(
        records(tmp_path / "one"), records(tmp_path / "mesh"), strict=True
    ):
        assert one["loss"] == pytest.approx(other["loss"], rel=EQUAL_FORWARD)
    mesh = ("--mesh", "data=8", "--format", "text")
    said = refused(capsys, *flags, "--output", str(tmp_path / "no"), *mesh)
    assert "4 rows at a time, which the 8 devices" in said


def test_skipped_batches_are_saved_and_end_the_run(
    data: str, tmp_path: pathlib.Path, capsys: Any, monkeypatch: Any
) -> None:
    params = random_params(TALKING)
    token = tiny_tokenizer().encode("cats", bos=False, eos=False)[-1]
    table = params["transformer"]["embedding"]
    params["transformer"]["embedding"] = table.at[token].set(jnp.nan)
    save_params(tmp_path / "base", params, TALKING, tokenizer=tiny_tokenizer())
    texts = write(tmp_path / "texts.jsonl", ["the sun was warm"] * 6 + ["12 cats"] * 3)
    output = tmp_path / "run"
    flags = ("--checkpoint", str(tmp_path / "base"), "--data", texts, *SMALL)
    flags += ("--output", str(output), "--epochs", "3", "--batch-size", "1")
    status, _, err = run(capsys, *flags, "--output", f"{output}-of-weights")
    assert status == 2
    assert "error: step" in err
    assert "because transformer/embedding has numbers that are NaN" in err
    assert not pathlib.Path(f"{output}-of-weights", "model").exists()
    # From here on as if all weights were numbers.
    monkeypatch.setattr(loop, "find_non_finite", lambda params: None)
    status, _, err = run(capsys, *flags, "--max-skipped", "2")
    assert status == 2
    assert "3 steps had a loss or a gradient that was not finite" in err
    assert "Traceback" not in err
    found = records(output)
    skipped = [record["step"] for record in found if record["skipped"]]
    assert len(skipped) == 3
    assert all(json.loads(line) for line in (output / "metrics.jsonl").open())
    for step in skipped:
        with np.load(output / f"skipped-{step:06d}.npz") as kept:
            assert token in kept["tokens"]
    said = succeed(capsys, "--output", str(output), "--resume", "--max-skipped", "99")
    assert f"resumed after step {found[-1]['step']}" in said
    assert len(records(output)) == 27
    assert sum(record["skipped"] for record in records(output)) == 9


def test_a_run_is_resumed_after_a_signal(
    base: str,
    data: str,
    done: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: Any,
    monkeypatch: Any,
) -> None:
    taken, count = Loader.__next__, 0

    def watched(loader: Loader) -> Any:
        nonlocal count
        count += 1
        if count == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return taken(loader)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(Loader, "__next__", watched)
    flags = ("--checkpoint", base, "--data", data, "--epochs", "3", *SMALL)
    output = ("--output", str(tmp_path / "asked"))
    said = succeed(capsys, *flags, *output)
    assert "stopped after step 8; resume with: python -m llama_jax.finetune" in said
    assert f"--resume --output {tmp_path / 'asked'}" in said
    assert signal.getsignal(signal.SIGTERM) == before
    assert not (tmp_path / "asked" / "model").exists()
    succeed(capsys, *output, "--resume")
    losses = [
        [record["loss"] for record in records(folder)]
        for folder in (done, tmp_path / "asked")
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 12


def test_show_batch_prints_rows_and_trains_nothing(
    base: str, data: str, capsys: Any
) -> None:
    flags = ("--checkpoint", base, "--data", data, "--packing", "pad")
    status, out, _ = run(capsys, *flags, "--show-batch", "2")
    assert status == 0
    assert out.count("row ") == 2
    assert "⟦" in out
    assert any(text in out for text in TEXTS)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--seq-length", "99"), "seq_length: 99 is more than the model's context"),
        (("--accumulate", "3"), "accumulate: batch_size 4 cannot be cut into 3"),
        (("--learning-rate", "-1"), "learning_rate: must be positive, got -1.0"),
        (("--mesh", "rows=2"), "'rows'"),
        (
            ("--method", "lora", "--lora-alpha", "-2"),
            "alpha must be a positive number, got -2.0",
        ),
        (("--format", "alpaca"), "plain text"),
        (("--checkpoint", "nowhere/at-all"), "nowhere/at-all"),
        (("--from-scratch", "--preset", "lama2-7b"), "llama2-7b"),
        (("--from-scratch", "--preset", "L1,D8,N2,F8,V9"), "--tokenizer"),
        (("--eval-data", "no/such.jsonl"), "no/such.jsonl"),
        (("--tensorboard", "--wandb", "x"), "pip install"),
    ],
)
def test_invalid_input_is_refused_in_one_sentence(
    base: str, data: str, tmp_path: pathlib.Path, capsys: Any, monkeypatch: Any,
    flags: tuple[str, ...], words: str,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto", None)
    given = ("--data", data, "--output", str(tmp_path / "run"), *SMALL)
    if "--from-scratch" not in flags and "--checkpoint" not in flags:
        given += ("--checkpoint", base)
    status, out, err = run(capsys, *given, *flags)
    assert status == 2
    assert out == ""
    assert words in err
    assert "Traceback" not in err
    assert [line for line in err.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize(
    "argv",
    [
        ("--output", "x"),
        ("--data", "x"),
        ("--data", "x", "--output", "y", "--epochs", "1", "--steps", "2"),
        ("--data", "x", "--output", "y", "--quantize", "int8"),
        ("--data", "x", "--output", "y", "--preset", "llama2-7b"),
        ("--data", "x", "--output", "y", "--from-scratch"),
        ("--data", "x", "--output", "y", "--from-scratch", "--method", "lora"),
        ("--data", "x", "--output", "y", "--method", "full", "--lora-rank", "2"),
        ("--data", "x", "--output", "y", "--format", "aplaca"),
        ("--data", "x", "--output", "y", "--no-such-flag"),
        ("merge", "--adapter", "x"),
        ("tokenizer", "--data", "x"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(
    argv: tuple[str, ...], capsys: Any
) -> None:
    status, out, err = run(capsys, *argv)
    assert status == 2
    assert out == ""
    assert "error: " in err.splitlines()[-1]


@pytest.mark.parametrize("command", [(), ("merge",), ("tokenizer",)])
def test_help_is_printed(command: tuple[str, ...], capsys: Any) -> None:
    status, out, _ = run(capsys, *command, "--help")
    assert status == 0
    assert "--output" in out
    assert "--data" in out or "--adapter" in out
    assert max(map(len, out.splitlines())) < 200


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ((), {"learning_rate": 2e-5, "batch_size": 64, "weight_decay": 0.1}),
        (("--method", "lora"), {"learning_rate": 2e-4, "weight_decay": 0.0}),
        (("--method", "qlora"), {"quantize": "nf4", "batch_size": 16, "lora_rank": 16}),
        (
            ("--from-scratch", "--preset", "llama2-7b"),
            {"learning_rate": 3e-4, "epochs": 1, "batch_size": 64},
        ),
        (("--steps", "9"), {"epochs": None, "steps": 9}),
        ((), {"epochs": 2, "seq_length": 4096, "clip": 1.0, "schedule": "cosine"}),
    ],
)
def test_defaults_are_the_papers(
    flags: tuple[str, ...], wanted: dict[str, Any]
) -> None:
    config = configured(*flags).for_model(preset("codellama-7b"), "float32")
    assert {name: getattr(config, name) for name in wanted} == wanted


def configured(*flags: str) -> FinetuneConfig:
    return FinetuneConfig.from_settings(
        vars(parse(["--data", "x", "--output", "y", *flags]))
    )


def test_warmup_is_a_fraction_of_the_run() -> None:
    assert configured().warmup_steps(1000) == 30
    scratch = configured("--from-scratch", "--preset", "llama2-7b")
    assert [scratch.warmup_steps(n) for n in (10, 1000, 10**6)] == [1, 100, 2000]
    assert configured("--warmup", "7").warmup_steps(1000) == 7


def test_dialogs_are_learnt_with_the_checkpoints_template(
    capsys: Any, tmp_path: pathlib.Path
) -> None:
    tokenizer = tiny_tokenizer().replace_settings(chat_templates={"default": CHATML})
    params = random_params(TALKING)
    save_params(tmp_path / "base", params, TALKING, tokenizer=tokenizer)
    data = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "hello"}]
    turns.append({"role": "assistant", "content": "the sun"})
    data.write_text(json.dumps({"messages": turns}) + "\n")
    first = ("--checkpoint", str(tmp_path / "base"), "--data", str(data))
    output = tmp_path / "run"
    err = succeed(
        capsys, *first, "--output", str(output), *SMALL, "--steps", "1",
        "--sample-prompt", "hello", "--sample-tokens", "2",
    )  # fmt: skip
    assert "data: format template\n" in err
    saved = json.loads((output / "run.json").read_text())["arguments"]
    assert saved["format"] == "template"
    assert load(output / "model").tokenizer.settings == tokenizer.settings
    status, shown, err = run(capsys, *first, "--show-batch", "1")
    assert status == 0
    assert "<|user|>hello</s> <|assistant|>⟦the sun</s>⟧" in shown
    status, _, err = run(capsys, *first, "--format", "llama2-chat", "--show-batch", "1")
    assert (
        "format llama2-chat, not the checkpoint's chat template (--format template)"
        in err
    )
    err = refused(capsys, *first, "--format", "template:no", "--show-batch", "1")
    assert "choose from default" in err
    flags = ("--checkpoint", str(output / "model"), "--prompt", "a", "--seed", "1")
    chats = [
        run(capsys, *flags, "--max-new-tokens", "2", "--json", *more, main=sample.main)
        for more in (("--chat",), ("--format", "template"), ("--format", "wizardlm-7b"))
    ]
    assert [status for status, _, _ in chats] == [0, 0, 0]
    assert chats[0][1] == chats[1][1]
    assert ["format wizardlm-7b, not" in err for _, _, err in chats] == [
        False,
        False,
        True,
    ]
