"""`python -m llama_jax.rlhf score`: scores of answers by a reward model."""

import argparse
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import get_args

from llama_jax.checkpoint.atomic_write import write_file
from llama_jax.checkpoint.model_folder import Loaded
from llama_jax.cli import command as cli
from llama_jax.cli import prompt_files
from llama_jax.cli.output import print_format_note
from llama_jax.cli.parser import ArgumentParser
from llama_jax.data.files import Corpus
from llama_jax.data.records import OnBad
from llama_jax.loading import default_runtime, load
from llama_jax.rlhf.answers import are_preferences, encode_answers
from llama_jax.rlhf.pairs import PairSource
from llama_jax.rlhf.preferences import RATINGS
from llama_jax.rlhf.reward_model import agreement, score_pairs, score_rows
from llama_jax.rlhf.reward_report import agreement_facts
from llama_jax.sharding import make_mesh, parse_mesh
from llama_jax.text.dialogs import PromptFormat
from llama_jax.text.prompt_formats import default_format, get_format


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    args = parse(argv)
    corpus = Corpus(args.data)
    runtime = default_runtime()
    loaded = load(
        args.checkpoint,
        runtime=runtime.replace(dtype=args.dtype or runtime.dtype),
        mesh=make_mesh(parse_mesh(args.mesh)) if args.mesh else None,
        tokenizer=args.tokenizer,
        max_seq_len=args.max_seq_len,
        adapter=args.adapter,
    )
    loaded.model.config.check_head("scalar", "rlhf score")
    print_format_note(loaded.tokenizer, args.format)
    if args.format:
        style = get_format(args.format, loaded.tokenizer)
    else:
        style = default_format(loaded.tokenizer)
    score = score_preferences if are_preferences(corpus) else score_answers
    lines = score(loaded, corpus, style, args)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    if args.output is None:
        sys.stdout.write(text)
    else:
        write_file(pathlib.Path(args.output), text)
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(
        prog="python -m llama_jax.rlhf score",
        description="Score answers with a reward model. Preferences get a score for "
        "each answer, and how well the scores agree with them is printed on standard "
        "error; prompts with an answer, and dialogs, get one score.",
    )
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="FILE",
        help="preferences (see `rlhf reward`), or records with an answer: .jsonl, "
        ".json, each also with .gz; .parquet",
    )
    group.add_argument("--format", metavar="NAME", help=prompt_files.FORMAT_HELP)
    group.add_argument(
        "--on-bad",
        choices=get_args(OnBad),
        default="refuse",
        help="what to do with a record that has no answer, or does not fit the "
        "context; dropped ones are named with file and line (default: refuse)",
    )
    group.add_argument(
        "--batch-size",
        type=cli.positive_int,
        default=8,
        metavar="B",
        help="dialogs of a batch (default: 8)",
    )
    group.add_argument(
        "--output",
        metavar="FILE",
        help="file for the JSON lines (default: standard output)",
    )
    group = parser.add_argument_group("model")
    group.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="a reward model, or with --adapter the checkpoint that it is based on",
    )
    group.add_argument(
        "--adapter", metavar="DIR", help="adapters and head of `rlhf reward`"
    )
    cli.add_model_arguments(group)
    return parser.parse_args(argv)


def score_preferences(
    loaded: Loaded, corpus: Corpus, style: PromptFormat, args: argparse.Namespace
) -> list[Mapping[str, object]]:
    """Lines with the scores of pairs; their agreement is printed."""
    source = PairSource(
        corpus=corpus,
        tokenizer=loaded.tokenizer,
        format=style,
        batch_size=1,
        length=loaded.model.config.max_seq_len,
        epochs=1,
        shuffle=False,
        on_bad=args.on_bad,
        on_long=args.on_bad,
    )
    scored = score_pairs(loaded, source, batch_size=args.batch_size)
    for problem in source.problems:
        print(f"dropped: {problem}", file=sys.stderr)
    for name, value in agreement_facts(agreement(scored)).items():
        print(f"{name}: {value}", file=sys.stderr)
    return [
        {
            "location": str(location),
            "chosen": float(scores[0]),
            "rejected": float(scores[1]),
            "tokens": lengths.tolist(),
            "rating": RATINGS[rating] if rating >= 0 else None,
        }
        for location, scores, lengths, rating in zip(
            scored.locations, scored.scores, scored.lengths, scored.rating, strict=True
        )
    ]


def score_answers(
    loaded: Loaded, corpus: Corpus, style: PromptFormat, args: argparse.Namespace
) -> list[Mapping[str, object]]:
    """Lines with the scores of answers."""
    dropped = prompt_files.Dropped()
    answers = encode_answers(
        corpus,
        loaded.tokenizer,
        style,
        length=loaded.model.config.max_seq_len,
        on_problem=dropped if args.on_bad == "drop" else None,
    )
    dropped.report()
    rows = [ids for _, ids in answers]
    scores = score_rows(loaded, rows, batch_size=args.batch_size)
    return [
        {"location": str(location), "score": float(score), "tokens": len(ids)}
        for (location, ids), score in zip(answers, scores, strict=True)
    ]
