"""Corrections of the sampler's mismatch by whole sequences, which are options of GRPO: Seq-TIS, Seq-MIS, Geo-RS."""

from __future__ import annotations

from rlad_kernels.losses.methods import add_method
from rlad_kernels.losses.ratio.grpo import GRPO
from rlad_kernels.losses.ratio.rollout import Rollout

_FORMULA = "(−min(rÂ, clip(r, 1−ε, 1+ε)Â))"
_PAPER = "richardli.xyz/rl-collapse"
_CLIP = "clip .2 and token-mean are ours, the source leaves them to the trainer"
add_method(
    "seq_tis",
    "ratio",
    GRPO(rollout=Rollout("truncate", high=2.0, level="sequence")),
    formula=f"min(x_i, 2)·{_FORMULA}, x_i = exp(Σ_t(log π_old − log μ))",
    paper=_PAPER,
    confidence="A",
    published=f"verl's preset decoupled_seq_is: threshold 2, weights detached; {_CLIP}.",
    note="x_i spreads with the length: of long sequences nearly all weights are 0 or at the bound.",
)
add_method(
    "seq_mis",
    "ratio",
    GRPO(rollout=Rollout("mask", 0.5, 2.0, level="sequence")),
    formula=f"x_i·1[.5 ≤ x_i ≤ 2]·{_FORMULA}, x_i = exp(Σ_t(log π_old − log μ))",
    paper=_PAPER,
    confidence="A",
    published=(
        f"verl's preset decoupled_seq_is_rs: [0.5, 2]; its rejected tokens leave the denominator too, ours stay in it. TRL's "
        f"sequence_mask, its default: no lower bound, upper 3, tokens stay. {_CLIP[0].upper()}{_CLIP[1:]}."
    ),
    note="Long sequences are rejected more often: x_i spreads with the length.",
)
add_method(
    "geo_rs",
    "ratio",
    GRPO(rollout=Rollout("reject", 0.999, 1.001, level="geometric")),
    formula=f"1[.999 ≤ x_i ≤ 1.001]·{_FORMULA}, x_i = exp(mean_t(log π_old − log μ))",
    paper=_PAPER,
    confidence="A",
    published=(
        f"verl's preset decoupled_geo_rs: the same bounds, on μ/π; its rejected tokens leave the denominator too, ours stay in it. "
        f"{_CLIP[0].upper()}{_CLIP[1:]}."
    ),
)
