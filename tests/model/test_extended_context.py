"""A longer context for a model, as a user writes it."""

import math
from typing import Any

import pytest
from support.models import TINY

from llama_jax.config import RopeScaling
from llama_jax.errors import ConfigError
from llama_jax.model.extended_context import extend_context, parse_rope_scaling

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("linear,factor=2.5", {"factor": 2.5}),
        ("dynamic,factor=2", {"factor": 2, "original_max_seq_len": 64}),
        (
            "yarn,factor=4",
            {"factor": 4, "original_max_seq_len": 64, **YARN}
            | {"attention_factor": 0.1 * math.log(4) + 1},
        ),
        (
            "yarn,truncate=false,attention_factor=1,factor=4,beta_fast=16,"
            "beta_slow=2,original_max_seq_len=16",
            {"factor": 4, "original_max_seq_len": 16, "attention_factor": 1}
            | {"beta_fast": 16, "beta_slow": 2, "truncate": False},
        ),
        ("llama3,factor=8", {"factor": 8, "original_max_seq_len": 64, **LLAMA3}),
    ],
)
def test_a_scaling_is_parsed(text: str, fields: dict[str, Any]) -> None:
    expected = RopeScaling.from_dict({"kind": text.partition(",")[0], **fields})
    assert parse_rope_scaling(text, 64) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not a kind; choose from linear, dynamic, yarn, llama3, as in"),
        ("yran,factor=4", "'yran' is not a kind; did you mean 'yarn'?"),
        ("longrope,factor=4", "'longrope' is not a kind"),
        ("yarn", "lacks factor, by which the context grows; .* yarn,factor=4"),
        ("yarn,factor=2,factor=4", "factor is given twice"),
        ("yarn,4", "'4' is not a field of yarn; choose from factor"),
        ("yarn,beta_fats=4", "did you mean 'beta_fast'"),
        ("linear,factor=2,original_max_seq_len=9", "not a field of linear"),
        ("yarn,factor=four", "factor is 'four'; it must be a number"),
        ("yarn,factor=4,truncate=no", "truncate is 'no'; it must be true or false"),
        ("dynamic,factor=0.5", "factor is 0.5; it must be a number of at least 1"),
        ("dynamic,factor=2,original_max_seq_len=1.5", "is '1.5'; it must be an int"),
    ],
)
def test_another_text_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"rope_scaling.*{message}"):
        parse_rope_scaling(text, 64)


@pytest.mark.parametrize(
    ("before", "text", "max_seq_len", "context", "original"),
    [
        (None, "yarn,factor=4", None, 256, 64),
        (None, "yarn,factor=4", 100, 100, 64),
        (None, "linear,factor=1.5", None, 96, None),
        (None, "dynamic,factor=2,original_max_seq_len=16", None, 32, 16),
        ("linear,factor=4", "yarn,factor=2", None, 32, 16),
        ("yarn,factor=4,original_max_seq_len=32", "dynamic,factor=8", None, 256, 32),
    ],
)
def test_the_context_grows_from_that_without_scaling(
    before: str | None,
    text: str,
    max_seq_len: int | None,
    context: int,
    original: int | None,
) -> None:
    config = TINY
    if before is not None:
        config = config.replace(rope_scaling=parse_rope_scaling(before, 64))
    actual = extend_context(config, text, max_seq_len)
    assert actual.max_seq_len == context
    assert actual.rope_scaling is not None
    assert actual.rope_scaling.original_max_seq_len == original
    assert actual.replace(max_seq_len=64, rope_scaling=None) == TINY
