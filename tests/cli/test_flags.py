"""Every flag of every command has an effect or is refused by its name.

Flags come from the parsers and effects from the commands' own code, so that a new flag
fails until the command reads it or has a rule that refuses it.
"""

import ast
import itertools
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from support.effects import effect, parsers
from support.models import TALKING, random_params, tiny_tokenizer
from support.modules import MODULES
from support.tokenizers import special_tokens

from llama_jax.checkpoint.model_folder import Loaded, save_params
from llama_jax.cli.finetune_flags import RULES, parse
from llama_jax.cli.parser import ArgumentParser, excludes, needs, refuse_unused
from llama_jax.errors import ConfigError, did_you_mean
from llama_jax.model.transformer import Llama
from llama_jax.runtime import Runtime
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.train.finetune_config import FinetuneConfig

PARSERS = parsers()
INFILLING = ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>")

# Command lines of which each flag that they do not have is added to, one at a time.
# Words in braces are files of `files`.
TRAIN = ("finetune", "--output", "{new}", "--batch-size", "4", "--data")
SCRATCH = ("--from-scratch", "--preset", "L1,D8,N2,F8,V324", "--seq-length", "210")
PPO = ("rlhf", "ppo", "--input", "{texts}", "--output", "{new}", "--steps", "9",
       "--checkpoint", "{model}")  # fmt: skip
PREFERENCES = ("--data", "{preferences}", "--checkpoint", "{model}")
REJECTION = ("rlhf", "rejection", "--input", "{texts}", "--output", "{new}")
PLAN = ("plan", "--model", "L2,D64,N2,F64,V64", "--topology", "v5e:2x2")
CONTEXTS: dict[str, tuple[str, ...]] = {
    "sample text": ("sample", "--prompt", "a cat"),
    "sample greedily": ("sample", "--prompt", "a cat", "--temperature", "0"),
    "sample an answer": ("sample", "--chat", "--prompt", "hello"),
    "sample in a conversation": ("sample", "--chat"),
    "sample infilling": ("sample", "--infill", "a", "b"),
    "sample prompts": ("sample", "--input", "{texts}", "--output", "{new}"),
    "finetune texts": (*TRAIN, "{texts}", "--checkpoint", "{model}"),
    "finetune adapters": (
        *TRAIN, "{pairs}", "--checkpoint", "{model}", "--method", "lora", "--format",
        "alpaca", "--eval-data", "{pairs}", "--sample-prompt", "hello", "--schedule",
        "constant",
    ),
    "finetune infilling": (
        *TRAIN, "{texts}", "--checkpoint", "{model}", "--method", "qlora", "--format",
        "infilling", "--schedule", "linear",
    ),
    "finetune from scratch": (*TRAIN, "{texts}", *SCRATCH, "--checkpoint", "{model}"),
    "finetune tokenizer file": (
        *TRAIN, "{more}", *SCRATCH, "--tokenizer", "{tokenizer}",
    ),
    "finetune merge": ("finetune", "merge", "--adapter", "a", "--output", "b"),
    "finetune tokenizer": (
        "finetune", "tokenizer", "--data", "{texts}", "--output", "{new}",
    ),
    "conversion to hf": ("conversion", "{model}", "new", "--to", "hf"),
    "conversion to meta": ("conversion", "{model}", "new", "--to", "meta"),
    "conversion to gguf": ("conversion", "{model}", "new", "--to", "gguf", "--dry-run"),
    "conversion verify": ("conversion", "verify", "{model}", "{model}"),
    "conversion inspect": ("conversion", "inspect", "{model}"),
    "plan decoding": PLAN,
    "plan training": (*PLAN, "--task", "train", "--batch", "1"),
    "plan qlora": (*PLAN, "--task", "qlora", "--batch", "1", "--seq", "16"),
    "plan adapters of a policy": (
        *PLAN, "--task", "ppo-lora", "--batch", "1",
    ),
    "plan GPUs": ("plan", "--topology", "h100:8", "--batch", "1"),
    "plan and compile": ("plan", "--topology", "h100", "--batch", "1", "--compile"),
    "plan and compile for TPUs": (*PLAN, "--batch", "1", "--compile"),
    "plan a table": ("plan", "--table"),
    "rlhf ghost-attention": (
        "rlhf", "ghost-attention", "--input", "{texts}", "--instructions", "{texts}",
        "--output", "{new}",
    ),
    "rlhf ppo": (*PPO, "--reward-model", "a"),
    "rlhf ppo rloo": (
        *PPO, "--judge", "a", "--estimator", "rloo", "--num-samples", "2",
    ),
    "rlhf ppo of adapters": (*PPO, "--reward-model", "a", "--lora-rank", "2"),
    "rlhf rejection": (*REJECTION, "--reward", "a"),
    "rlhf rejection greedily": (
        *REJECTION, "--reward-model", "a", "--temperature", "0", "--num-samples", "1",
    ),
    "rlhf reward": ("rlhf", "reward", "--output", "{new}", *PREFERENCES),
    "rlhf reward of adapters": (
        "rlhf", "reward", "--output", "{new}", *PREFERENCES, "--lora-rank", "2",
        "--eval-data", "{preferences}",
    ),
    "rlhf score": ("rlhf", "score", *PREFERENCES),
    "rlhf dpo": ("rlhf", "dpo", "--output", "{new}", *PREFERENCES),
    "rlhf dpo with ipo": (
        "rlhf", "dpo", "--output", "{new}", *PREFERENCES, "--loss", "ipo",
        "--lora-rank", "2", "--schedule", "constant",
    ),
    "serve": ("serve",),
    "bench train": ("bench", "train"),
    "bench decode": ("bench", "decode"),
    "bench prefill": ("bench", "prefill"),
    "bench serve": ("bench", "serve"),
    "bench kernels": ("bench", "kernels"),
    "bench kernels flash": ("bench", "kernels", "--only", "flash"),
    "bench kernels time": ("bench", "kernels", "--time"),
    "bench data": ("bench", "data"),
    "bench conversion": ("bench", "conversion"),
    "bench rlhf": ("bench", "rlhf"),
    "bench rlhf policy": ("bench", "rlhf", "--only", "policy"),
    "bench rlhf dpo": ("bench", "rlhf", "--only", "dpo"),
}  # fmt: skip
VALUES = {
    "--accumulate": ["2"],
    "--answers": ["128"],
    "--batch-size": ["128"],
    "--chips": ["v4"],
    "--chunk": ["32"],
    "--critic": ["{other}"],
    "--checkpoint": ["{other}"],
    "--data": ["{texts}", "{pairs}", "{more}"],
    "--estimator": ["rloo --num-samples 2"],
    "--eval-data": ["{texts}", "{more}", "{preferences}"],
    "--folder": ["/tmp"],
    "--format": ["alpaca", "vicuna", "text", "infilling"],
    "--from-scratch": ["--preset L1,D8,N2,F8,V324"],
    "--infill": ["x y"],
    "--input": ["{texts}"],
    "--lengths": ["64"],
    "--lora-targets": ["q_proj"],
    "--max-host-bytes": ["9T"],
    "--max-seq-len": ["220"],
    "--mesh": ["data=4,tensor=2", "data=2,tensor=2"],
    "--mini-batch": ["32"],
    "--model": ["L1,D64,N2,F64,V64"],
    "--num-samples": ["3", "4"],
    "--pages": ["64"],
    "--port": ["1234"],
    "--preset": ["L2,D8,N2,F8,V324"],
    "--prompt-file": ["{texts}"],
    "--ranks": ["2", "4"],
    "--reward-format": ["alpaca"],
    "--rope-scaling": ["linear,factor=2"],
    "--seq": ["3", "512"],
    "--seq-length": ["200"],
    "--seeds": ["5"],
    "--shapes": ["N4K4H64"],
    "--api-key-file": ["{texts}"],
    "--tokenizer": ["{tokenizer}"],
    "--topology": ["v5p:2x2x1"],
}
"""Values to try, in words, for flags without choices that need a certain one."""
IMPLIED = ("--chat",)
"""Flags that others imply."""
REFUSED = ("has no effect", "not allowed with")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Paths by the names in braces that stand for them in command lines."""
    folder = tmp_path_factory.mktemp("files")
    names = ("new", "model", "other", "texts.jsonl", "pairs.jsonl", "more.jsonl")
    names += ("preferences.jsonl",)
    paths = {name.partition(".")[0]: str(folder / name) for name in names}
    for name, records in {
        "texts": [{"text": f"the cat {'and the sun ' * n}"} for n in range(6)],
        "pairs": [{"instruction": "a", "output": f"cat {n}"} for n in range(6)],
        "more": 6 * [{"instruction": "b", "output": "the sun", "text": "a cat"}],
        "preferences": 6
        * [{"prompt": "a", "chosen": "the sun", "rejected": "a cat", "rating": 2}],
    }.items():
        pathlib.Path(paths[name]).write_text("\n".join(map(json.dumps, records)))
    for name, norm_eps in (("model", 1e-5), ("other", 1e-3)):
        config = TALKING.replace(max_seq_len=256, norm_eps=norm_eps)
        tokenizer = infilling_tokenizer(add_bos=name == "model")
        save_params(paths[name], random_params(config), config, tokenizer=tokenizer)
    paths["tokenizer"] = str(folder / "tokenizer.model")
    contents = tiny_tokenizer().contents
    pathlib.Path(paths["tokenizer"]).write_bytes(contents + b"\x12\x00")
    return paths


def infilling_tokenizer(**settings: Any) -> Tokenizer:
    plain = tiny_tokenizer()
    added = dict(enumerate(INFILLING, start=plain.vocab_size))
    tokenizer = Tokenizer(plain.contents, settings=special_tokens(added))
    return tokenizer.replace_settings(**settings)


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    model = Llama(TALKING.replace(max_seq_len=512), Runtime())
    return Loaded(model, random_params(TALKING), infilling_tokenizer())


def flags_of(parser: ArgumentParser) -> Iterator[tuple[str, list[str]]]:
    """The flags of a parser, with values to try in words."""
    for action in parser._actions:
        if not action.option_strings or action.dest in ("help", "version"):
            continue
        flag = action.option_strings[-1]
        if flag in VALUES:
            yield flag, VALUES[flag]
        elif action.nargs == 0:
            yield flag, [""]
        elif action.choices is None:
            yield flag, [{None: "word", float: "0.25"}.get(action.type, "3")]
        else:
            yield flag, list(map(str, action.choices))


@pytest.mark.parametrize("name", CONTEXTS)
def test_a_flag_has_an_effect_or_is_refused_by_name(
    name: str, files: dict[str, str], loaded: Loaded
) -> None:
    command, given = split(CONTEXTS[name])
    overruled: list[str] = []

    def decide(
        more: tuple[str, ...] = (), without: tuple[str, ...] = ()
    ) -> tuple[str, str]:
        kept = [arguments for arguments in given if arguments != without]
        words = itertools.chain(command, *kept, more)
        return effect(loaded, [word.format_map(files) for word in words])

    def is_used_or_refused(flag: str, value: str) -> bool:
        more = (flag, *value.split())
        after, error = decide(more)
        if error and flag in ("--from", "--tokenizer"):  # it has read what does not fit
            return True
        # The refused flag is this one, or one that has no effect with this one.
        refused = flag in error and any(words in error for words in REFUSED)
        if not error and after != before and flag != "--show-batch":
            overruled.extend(
                f"{other[0]} with {flag}"
                for other in effective
                if decide(more, without=other) == (after, "")
            )
        return refused or (not error and after != before)

    before, error = decide()
    assert not error
    assert decide() == (before, ""), "the effect must be repeatable"
    effective = [
        arguments
        for arguments in given
        if arguments[0] not in IMPLIED and decide(without=arguments) != (before, "")
    ]
    parser = PARSERS.get(" ".join(command[:2])) or PARSERS[command[0]]
    silent = [
        flag
        for flag, values in flags_of(parser)
        if flag not in CONTEXTS[name]
        and not any(is_used_or_refused(flag, value) for value in values)
    ]
    assert not silent, f"these have no effect and no rule that says so: {silent}"
    assert not overruled, f"the first has no effect, and no rule says so: {overruled}"


def split(context: Sequence[str]) -> tuple[list[str], list[tuple[str, ...]]]:
    """The command with its positional arguments, and each flag with its arguments."""
    first = next((i for i, x in enumerate(context) if x.startswith("--")), len(context))
    flags: list[tuple[str, ...]] = []
    for word in context[first:]:
        if word.startswith("--"):
            flags.append((word,))
        else:
            flags[-1] += (word,)
    return list(context[:first]), flags


def test_every_parser_of_the_library_is_tested() -> None:
    constructed = 0
    for name, file in MODULES.items():
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            call = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert call != "argparse.ArgumentParser", f"{name} has a parser of its own"
            constructed += call == "ArgumentParser"
    inner = {name for name in PARSERS if name.startswith("bench ")}
    assert constructed == len(PARSERS.keys() - inner)
    tested = {" ".join(context[:2]) for context in CONTEXTS.values()}
    tested |= {context[0] for context in CONTEXTS.values()}
    assert PARSERS.keys() - {"", "rlhf"} <= tested


def test_rules_are_of_flags_that_exist() -> None:
    for name, parser in PARSERS.items():
        assert parser._rules.keys() <= parser._option_string_actions.keys(), name
    assert PARSERS["finetune"]._rules


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--lora-rank", "8"), "--lora-rank: has no effect without --method lora or"),
        (("--lora-targets", "q_proj"), "--lora-targets: has no effect without"),
        (("--method", "lora", "--quantize", "nf4"), "without --method qlora"),
        (
            ("--schedule", "constant", "--final", "0"),
            "--final: has no effect without --schedule cosine or linear",
        ),
    ],
)
def test_a_refusal_says_what_the_flag_needs(
    flags: tuple[str, ...], message: str
) -> None:
    args = parse(["--data", "x", "--output", "y", *flags])
    with pytest.raises(ConfigError, match=message):
        refuse_unused(RULES, args.given, FinetuneConfig.from_settings(vars(args)))


@pytest.fixture
def parser() -> ArgumentParser:
    parser = ArgumentParser(
        rules={"--a": needs("--b", "x"), "--c": (needs("--a"), excludes("--d"))}
    )
    for flag in ("--a", "--b"):
        parser.add_argument(flag, default="y")
    parser.add_argument("--c", type=int, default=0)
    parser.add_argument("--d", action="store_true")
    parser.add_argument("--e", action="append")
    parser.add_argument("--f", choices=("bfloat16", "float16"))
    parser.add_argument("--long-name")
    return parser


def test_a_default_is_not_a_given_flag(parser: ArgumentParser) -> None:
    assert parser.parse_args([]).given == frozenset()
    args = parser.parse_args(["--c", "0", "--b", "y", "--e", "1", "--e", "2"])
    assert args.given == {"--b", "--c", "--e"}
    assert (args.a, args.b, args.c, args.d, args.e) == ("y", "y", 0, False, ["1", "2"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--a y", "--a: has no effect without --b x"),
        ("--c 0 --d", "--c: has no effect with --d"),
        ("--f fp16", "'fp16' is not one of bfloat16, float16; did you mean 'float16'?"),
        ("--long_name=3", "no flag --long_name; did you mean '--long-name'?"),
        ("--long 3", "no flag --long; did you mean '--long-name'?"),
        ("--lr 3", "there is no flag --lr (see"),
        ("-x", "there is no argument '-x'"),
    ],
)
def test_a_wrong_flag_is_named_in_one_line(
    argv: str, message: str, parser: ArgumentParser, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        parser.parse_args(argv.split())
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", PARSERS)
def test_help_fits_a_terminal_and_begins_with_short_usage(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = PARSERS[name].format_help()
    assert PARSERS[name].format_help() == text
    assert max(map(len, text.splitlines())) <= 80
    usage = text.partition("\n\n")[0]
    assert usage.startswith("usage: ")
    assert usage.count("\n") < 6


def test_help_of_finetune_begins_with_a_first_run() -> None:
    text = PARSERS["finetune"].format_help()
    first = text.split("\n\n")[2]
    assert first.startswith("a first run:\n  --checkpoint")
    words = ("--data", "--format", "--method", "--output", "--show-batch")
    assert all(word in first for word in words)
    assert "with --method lora or qlora: rank of adapters" in " ".join(text.split())


@pytest.mark.parametrize(
    ("name", "known", "suggestion"),
    [
        ("bf16", ("float32", "bfloat16"), "bfloat16"),
        ("fp16", ("int8",), None),
        ("8bit", ("int8", "nf4"), "int8"),
        ("chatml", ("llama2-chat", "template"), "template"),
        ("llama2", ("llama2-chat", "llama3"), "llama2-chat"),
        ("Lora", ("full", "lora"), "lora"),
        ("safetensors", ("orbax", "hf"), "hf"),
        ("x", ("xyz", "abc"), None),
    ],
)
def test_a_near_miss_or_a_name_of_other_software_gets_a_suggestion(
    name: str, known: tuple[str, ...], suggestion: str | None
) -> None:
    expected = f"; did you mean {suggestion!r}?" if suggestion else ""
    assert did_you_mean(name, known) == expected
