"""One table per format: which tensor is which weight, and how its axes are laid out.

The layout change is part of each row, as a pattern (see `axis_patterns`). Read forwards
a table converts, read backwards it exports. A new format is a table here and a module
that reads (and writes) its files.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

from llama_jax.params import AXES, LAYERS

FormatName = Literal["orbax", "meta", "hf", "gguf", "llama2c"]


class Rule(NamedTuple):
    """One kind of weight in one format.

    Attributes:
      row: its row of `params.AXES`.
      foreign_name: its name in the format, with `{l}` for the layer.
      pattern: from the foreign axes to ours.
      rank_axis: foreign axis that model-parallel ranks divide; None if each rank
        stores the whole tensor.
    """

    row: str
    foreign_name: str
    pattern: str
    rank_axis: int | None = None


class Format(NamedTuple):
    """The tensors of a checkpoint format.

    Attributes:
      name: for messages.
      rules: one per kind of weight.
      dropped: foreign name and axes of tensors whose shape is checked, but that are
        not parameters (rotary tables).
      can_tie: whether a tied model has no output head in this format. If False, the
        embedding is written a second time as the head.
    """

    name: str
    rules: tuple[Rule, ...]
    dropped: tuple[tuple[str, str], ...] = ()
    can_tie: bool = True


def _rules(
    prefix: str, layer_rows: dict[str, tuple], other_rows: dict[str, tuple]
) -> tuple[Rule, ...]:
    """Build the rules of the layers, whose names share a prefix, and of the rest."""
    rules = [Rule(LAYERS + ours, prefix + theirs, *layout)
             for ours, (theirs, *layout) in layer_rows.items()]  # fmt: skip
    return tuple(rules + [Rule(ours, *fields) for ours, fields in other_rows.items()])


# Meta interleaves the two numbers of a rotary pair; ours are half a head apart.
_PAIRS_Q, _PAIRS_K = "(N h two) D -> D (N two h)", "(K h two) D -> D (K two h)"

META = Format(
    "Meta",
    _rules(
        "layers.{l}.",
        {
            "attention_norm/scale": ("attention_norm.weight", "D -> D"),
            "attention/q_proj": ("attention.wq.weight", _PAIRS_Q, 0),
            "attention/k_proj": ("attention.wk.weight", _PAIRS_K, 0),
            "attention/v_proj": ("attention.wv.weight", "KH D -> D KH", 0),
            "attention/o_proj": ("attention.wo.weight", "D NH -> NH D", 1),
            "mlp_norm/scale": ("ffn_norm.weight", "D -> D"),
            "mlp/gate_proj": ("feed_forward.w1.weight", "F D -> D F", 0),
            "mlp/up_proj": ("feed_forward.w3.weight", "F D -> D F", 0),
            "mlp/down_proj": ("feed_forward.w2.weight", "D F -> F D", 1),
        },
        {
            "transformer/embedding": ("tok_embeddings.weight", "V D -> V D", 1),
            "transformer/final_norm/scale": ("norm.weight", "D -> D"),
            "lm_head": ("output.weight", "V D -> D V", 0),
        },
    ),
    dropped=(
        ("rope.freqs", "h"),
        ("layers.{l}.attention.inner_attention.rope.freqs", "h"),
    ),
    can_tie=False,
)

HUGGING_FACE = Format(
    "Hugging Face",
    _rules(
        "model.layers.{l}.",
        {
            "attention_norm/scale": ("input_layernorm.weight", "D -> D"),
            "attention/q_proj": ("self_attn.q_proj.weight", "NH D -> D NH"),
            "attention/k_proj": ("self_attn.k_proj.weight", "KH D -> D KH"),
            "attention/v_proj": ("self_attn.v_proj.weight", "KH D -> D KH"),
            "attention/o_proj": ("self_attn.o_proj.weight", "D NH -> NH D"),
            "mlp_norm/scale": ("post_attention_layernorm.weight", "D -> D"),
            "mlp/gate_proj": ("mlp.gate_proj.weight", "F D -> D F"),
            "mlp/up_proj": ("mlp.up_proj.weight", "F D -> D F"),
            "mlp/down_proj": ("mlp.down_proj.weight", "D F -> F D"),
        },
        {
            "transformer/embedding": ("model.embed_tokens.weight", "V D -> V D"),
            "transformer/final_norm/scale": ("model.norm.weight", "D -> D"),
            "lm_head": ("lm_head.weight", "V D -> D V"),
        },
    ),
)

GGUF = Format(
    "GGUF",
    _rules(
        "blk.{l}.",
        {
            "attention_norm/scale": ("attn_norm.weight", "D -> D"),
            "attention/q_proj": ("attn_q.weight", _PAIRS_Q),
            "attention/k_proj": ("attn_k.weight", _PAIRS_K),
            "attention/v_proj": ("attn_v.weight", "KH D -> D KH"),
            "attention/o_proj": ("attn_output.weight", "D NH -> NH D"),
            "mlp_norm/scale": ("ffn_norm.weight", "D -> D"),
            "mlp/gate_proj": ("ffn_gate.weight", "F D -> D F"),
            "mlp/up_proj": ("ffn_up.weight", "F D -> D F"),
            "mlp/down_proj": ("ffn_down.weight", "D F -> F D"),
        },
        {
            "transformer/embedding": ("token_embd.weight", "V D -> V D"),
            "transformer/final_norm/scale": ("output_norm.weight", "D -> D"),
            "lm_head": ("output.weight", "V D -> D V"),
        },
    ),
    dropped=(("rope_freqs.weight", "h"), ("blk.{l}.attn_rot_embd", "h")),
)

# On disk each kind of weight is stored for all layers together; see `llama2c`.
LLAMA2C = Format(
    "llama2.c",
    _rules(
        "",
        {
            "attention_norm/scale": ("rms_att.{l}", "D -> D"),
            "attention/q_proj": ("wq.{l}", _PAIRS_Q),
            "attention/k_proj": ("wk.{l}", _PAIRS_K),
            "attention/v_proj": ("wv.{l}", "KH D -> D KH"),
            "attention/o_proj": ("wo.{l}", "D NH -> NH D"),
            "mlp_norm/scale": ("rms_ffn.{l}", "D -> D"),
            "mlp/gate_proj": ("w1.{l}", "F D -> D F"),
            "mlp/up_proj": ("w3.{l}", "F D -> D F"),
            "mlp/down_proj": ("w2.{l}", "D F -> F D"),
        },
        {
            "transformer/embedding": ("token_embedding", "V D -> V D"),
            "transformer/final_norm/scale": ("rms_final", "D -> D"),
            "lm_head": ("wcls", "V D -> D V"),
        },
    ),
    dropped=(("freq_cis_real", "S h"), ("freq_cis_imag", "S h")),
)


def _identity_rule(row: str) -> Rule:
    axes = AXES[row].removeprefix("L ")
    return Rule(row, row.replace(LAYERS, LAYERS + "{l}/"), f"{axes} -> {axes}")


ORBAX = Format("llama_jax", tuple(map(_identity_rule, AXES)))

TABLES: Mapping[FormatName, Format] = {
    "orbax": ORBAX,
    "meta": META,
    "hf": HUGGING_FACE,
    "gguf": GGUF,
    "llama2c": LLAMA2C,
}
