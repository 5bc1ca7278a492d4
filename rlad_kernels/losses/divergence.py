"""Full-vocabulary divergences between student and teacher, both from hidden states: exact distillation without logits."""

from __future__ import annotations

from rlad_kernels.core.registry import add_method
from rlad_kernels.linear.divergence import linear_divergence_loss


def _row(name: str, divergence: str, formula: str, paper: str, confidence: str, note: str = "", **options: object) -> None:
    add_method(
        name, "divergence", linear_divergence_loss, formula=formula, needs=("teacher_hidden", "teacher_head"), paper=paper,
        confidence=confidence, products=4, note=note, options={"divergence": divergence, **options},
    )  # fmt: skip


_row("forward_kl", "forward_kl", "Σp·log(p/q)", "arXiv 1503.02531", "A")
_row("reverse_kl", "reverse_kl", "Σq·log(q/p)", "arXiv 2306.08543", "A")
_row("jeffreys", "jeffreys", "½KL(p‖q) + ½KL(q‖p)", "textbook", "D")
_row(
    "gkd_jsd", "jsd", "β·KL(p‖m) + (1−β)·KL(q‖m), m = βp + (1−β)q", "arXiv 2306.13649", "A", beta=0.5,
    note="β = 0 and 1 are the forward and the reverse KL, as in TRL and Liger; the formula itself tends to 0 there.",
)  # fmt: skip
_row("skew_kl", "skew_kl", "KL(p‖λp + (1−λ)q)", "arXiv 2402.03898", "A", lam=0.1)
_row("skew_rkl", "skew_rkl", "KL(q‖(1−λ)p + λq)", "arXiv 2402.03898", "A", lam=0.1)
_row(
    "abkd", "alpha_beta", "−Σ[p^α q^β − α/(α+β)·p^(α+β) − β/(α+β)·q^(α+β)]/(αβ)", "arXiv 2505.04560", "A", alpha=0.2, beta=0.7
)  # fmt: skip
_row("alpha_divergence", "alpha", "(1 − Σp^α q^(1−α))/(α(1−α))", "textbook", "D", alpha=0.5)
_row(
    "power_divergence", "power", "Σp[(p/q)^λ − 1]/(λ(λ+1))", "Cressie and Read 1984", "B", lam=2 / 3,
    note="REDistill's own equation was not read: this is the textbook direction, which weighs p > q up.",
)  # fmt: skip
_row("hellinger", "hellinger", "1 − Σ√(pq)", "textbook", "D")
_row("total_variation", "total_variation", "½Σ|p − q|", "arXiv 2604.00626", "A")
_row(
    "todi", "todi", "Σ[σ·p·w − (1−σ)·q·w], w = log p − log q, σ = sg sigmoid(w)", "arXiv 2505.16297", "A", beta=1.0,
    note="The forward KL dominates where the student is below the teacher.",
)  # fmt: skip
_row(
    "akl", "akl", "(g_head·KL(p‖q) + g_tail·KL(q‖p))/(g_head + g_tail), g = sg Σ|p − q|", "arXiv 2404.02657", "A", mu=0.5,
    note="Sorts the vocabulary of each token.",
)  # fmt: skip
_row(
    "taid", "taid", "KL(p_τ‖q), p_τ = sg softmax((1−τ)·z_student + τ·z_teacher)", "arXiv 2501.16937", "A", tau=0.4,
    note="The mixture is of logits, not of probabilities; τ rises from 0.4 to 1 in training.",
)  # fmt: skip
_row("multi_teacher_rkl", "reverse_kl", "Σ_i w_i·KL(q‖p_i)", "DeepSeek-V4 report", "C")
