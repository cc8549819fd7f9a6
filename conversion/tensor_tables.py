"""One table per foreign format: which tensor is which weight, and how its axes lie.

The change of layout is in the row, as a pattern (see `patterns.py`). Read forwards
the rows convert, read backwards they export. A new format is a table here and a
module that reads (and writes) its files.
"""

from typing import NamedTuple

from llama_jax.params import AXES, LAYERS


class Rule(NamedTuple):
    """Where one kind of weight lies.

    Attributes:
      target: its row of `params.AXES`.
      source: the foreign name, with `{l}` for the layer.
      pattern: from the foreign axes to ours.
      split: the foreign axis that model-parallel ranks divide; none: each has all.
    """

    target: str
    source: str
    pattern: str
    split: int | None = None


class Format(NamedTuple):
    """A foreign format: its rules, and what it holds that is no parameter.

    Attributes:
      name: as people call it.
      rules: one per kind of weight.
      dropped: foreign name and axes of tensors that are checked and left out.
      can_tie: whether a checkpoint may lack the output head, which is the embedding
        then. Where it may not, a tied model is written with a second copy.
    """

    name: str
    rules: tuple[Rule, ...]
    dropped: tuple[tuple[str, str], ...] = ()
    can_tie: bool = True


def _rules(prefix: str, layer: dict[str, tuple], rest: dict[str, tuple]) -> tuple:
    """Rows of a layer, whose names begin alike on both sides, and of the rest."""
    rows = [Rule(LAYERS + to, prefix + row[0], *row[1:]) for to, row in layer.items()]
    return tuple(rows + [Rule(to, *row) for to, row in rest.items()])


# Rotary pairs lie next to each other in Meta's formats, half a head apart in ours.
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
    dropped=(("model.layers.{l}.self_attn.rotary_emb.inv_freq", "h"),),
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

# On disk these lie kind by kind, stacked over the layers; see `llama2c.py`.
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


def _own(row: str) -> Rule:
    axes = AXES[row].removeprefix("L ")
    source = row.replace(LAYERS, LAYERS + "{l}/")
    return Rule(row, source, f"{axes} -> {axes}")


ORBAX = Format("llama_jax", tuple(map(_own, AXES)))
