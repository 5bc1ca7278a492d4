"""Call sites of Liger-Kernel's chunked losses, and of VeOmni's and verl's top-K distillation, switched by an import.

Constructor and call arguments are those of Liger-Kernel 0.8.5; ``compiled`` and ``chunk_size`` are taken and ignored. Neither Liger
nor VeOmni is needed. Logits, log-probs and accumulated gradients are float32 whatever the dtype of the inputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlad_kernels.head import LMHead
from rlad_kernels.integrations.liger_grpo import Options, grpo_metrics, token_losses, total
from rlad_kernels.integrations.wiring import check_head
from rlad_kernels.losses.cross_entropy import linear_cross_entropy_loss
from rlad_kernels.losses.divergence import linear_divergence_loss
from rlad_kernels.scores import linear_logp


class LigerFusedLinearGRPOLoss(nn.Module):
    """``liger_kernel.chunked_loss.LigerFusedLinearGRPOLoss``: the eight losses, both levels, and its metrics.

    As Liger's, but masked positions are never computed and never matter, whatever they hold: Liger counts the KL of padding in
    LUSPO and divides it by the padded length; ours is TRL's. Gradients of the head do not depend on how the batch is chunked (Liger
    adds one chunk a sequence in the head's dtype).
    """

    def __init__(
        self, beta: float = 0.04, compiled: bool = True, use_ref_model: bool = True, chunk_size: int = 1, epsilon_low: float = 0.2,
        epsilon_high: float = 0.2, loss_type: str = "dapo", max_completion_length: int | None = None,
        importance_sampling_level: str = "token", sapo_temperature_pos: float = 1.0, sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0, delta: float | None = None, use_bias_correction_kl: bool = False, vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0, vespo_k_neg: float = 3.0, vespo_lambda_neg: float = 2.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.use_ref_model, self.temperature = use_ref_model, temperature
        self.options = Options(
            beta, epsilon_low, epsilon_high, loss_type, max_completion_length, importance_sampling_level, delta,
            use_bias_correction_kl, (sapo_temperature_pos, sapo_temperature_neg), (vespo_k_pos, vespo_lambda_pos),
            (vespo_k_neg, vespo_lambda_neg),
        )  # fmt: skip

    def forward(
        self, _input: Tensor, lin_weight: Tensor, selected_token_ids: Tensor, attention_mask: Tensor, advantages: Tensor,
        bias: Tensor | None = None, ref_per_token_logps: Tensor | None = None, old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None, ref_weight: Tensor | None = None, ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None, num_items_in_batch: Tensor | float | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
        """(loss, metrics) of ``_input (B, T, H)``; metrics are the KL to the reference, if beta is not 0, and the clipped share."""
        name, keep = "LigerFusedLinearGRPOLoss", attention_mask != 0
        logp = self._logp(name, _input, lin_weight, bias, selected_token_ids, keep)
        reference = ref_per_token_logps if self.use_ref_model else None
        if self.use_ref_model and reference is None:
            if ref_input is None or ref_weight is None:
                raise ValueError(f"{name}: use_ref_model=True needs ref_per_token_logps, or ref_input and ref_weight")
            with torch.no_grad():
                reference = self._logp(name, ref_input, ref_weight, ref_bias, selected_token_ids, keep)
        given = {"old": old_per_token_logps, "reference": reference}
        rows = {k: None if x is None else torch.where(keep, x.detach().float(), 0) for k, x in given.items()}
        ratio = _is_ratio(vllm_is_ratio, keep)
        loss, kl, clipped = token_losses(self.options, logp, keep, advantages.float().unsqueeze(1), **rows, is_ratio=ratio)
        metrics = grpo_metrics(kl, clipped, keep)
        return total(self.options, loss, keep, num_items_in_batch), metrics

    def _logp(self, name: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, keep: Tensor) -> Tensor:
        check_head(name, hidden, weight)
        return linear_logp(hidden, LMHead(weight, bias, temperature=self.temperature), torch.where(keep, ids, 0), mask=keep).logp


def _is_ratio(ratio: Tensor | None, keep: Tensor) -> Tensor | None:
    """vLLM's ratios ``(B,)``, ``(B, 1)`` or ``(B, T)``, as ``(B, 1)`` or ``(B, T)`` with 1 at masked places."""
    if ratio is None:
        return None
    wide = (ratio.unsqueeze(1) if ratio.dim() == 1 else ratio).detach().float()
    b, t = keep.shape
    if wide.shape not in ((b, 1), (b, t)):
        raise ValueError(
            f"LigerFusedLinearGRPOLoss: vllm_is_ratio has shape {tuple(ratio.shape)}, wanted ({b},), ({b}, 1) or ({b}, {t})"
        )
    return wide if wide.shape[1] != t else torch.where(keep, wide, 1)


class LigerFusedLinearJSDLoss(nn.Module):
    """``liger_kernel.chunked_loss.LigerFusedLinearJSDLoss``: weight_hard·CE + weight_soft·JSD_β over the kept tokens.

    β = 0 is KL(teacher‖student), β = 1 KL(student‖teacher). Right where Liger is not:

    - small divergences: Liger takes log-softmax in bfloat16, whose gradient is 59 % off at a KL of 1e-3; ours is within 0.5 %;
    - heads of different height: Liger gives the smaller student logits of **0** for the ids it lacks, so equal models with a padded
      teacher are 1587 nats apart; ours takes ids that only one head has as not existing, so they are 0 apart.
    """

    def __init__(
        self, weight_hard_loss: float = 0.5, weight_soft_loss: float = 0.5, beta: float = 0.5, ignore_index: int = -100,
        temperature: float = 1.0, compiled: bool = True, chunk_size: int = 1024, return_soft_hard_loss: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.weight_hard_loss, self.weight_soft_loss = weight_hard_loss, weight_soft_loss
        self.beta, self.ignore_index, self.temperature = beta, ignore_index, temperature
        self.return_soft_hard_loss = return_soft_hard_loss

    def forward(
        self, student_input: Tensor, student_weight: Tensor, teacher_input: Tensor, teacher_weight: Tensor, true_labels: Tensor,
        student_bias: Tensor | None = None, teacher_bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """The loss of ``student_input (N, H)``; with ``return_soft_hard_loss`` (loss, soft, hard), the last two without gradient.

        The temperature is the soft loss's only, and there is no factor T².
        """
        name = "LigerFusedLinearJSDLoss"
        check_head(name, student_input, student_weight)
        check_head(name + " (teacher)", teacher_input, teacher_weight)
        keep = true_labels != self.ignore_index
        divisor = keep.sum().clamp(min=1)
        size, t = min(len(student_weight), len(teacher_weight)), self.temperature
        student = LMHead(student_weight, student_bias, temperature=t, vocab_size=size)
        teacher = LMHead(teacher_weight, teacher_bias, temperature=t, vocab_size=size)
        soft = linear_divergence_loss(
            student_input, student, teacher_input, teacher, divergence="jsd", beta=self.beta, mask=keep, denominator=divisor
        ).loss  # fmt: skip
        hard = torch.zeros_like(soft)
        if self.weight_hard_loss or self.return_soft_hard_loss:
            target = torch.where(keep, true_labels, 0)
            plain = LMHead(student_weight, student_bias)
            hard = linear_cross_entropy_loss(student_input, plain, target, mask=keep, denominator=divisor).loss
        loss = self.weight_hard_loss * hard + self.weight_soft_loss * soft
        return (loss, soft.detach(), hard.detach()) if self.return_soft_hard_loss else loss


def chunk_topk_distill_function(
    hidden_states: Tensor, weights: Tensor, labels: Tensor, teacher_topk_ids: Tensor, teacher_topk_log_probs: Tensor,
    chunk_size: int = 1024, ignore_index: int = -100, shift_labels: Tensor | None = None, temperature: float = 1.0,
    log_prob_min_clamp: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """VeOmni's ``chunk_topk_distill_function``, which verl reads: Σ_K p(log p − log q) on the teacher's ids, and what goes with it.

    Args:
        hidden_states: ``(B, L, H)`` or ``(L, H)``.
        weights: ``(V, H)``.
        labels: ``(B, L)`` or ``(L,)``; ``ignore_index`` makes every output of its position 0.
        teacher_topk_ids: ``(…, L, K)`` ints, aligned with the labels; −1 is an empty slot.
        teacher_topk_log_probs: ``(…, L, K)``.
        shift_labels: labels that are already the next tokens; then nothing is shifted. Otherwise hidden state t scores
            label t + 1, and the last position is 0. (Sequence parallelism must pass it; VeOmni asks its own global state.)
        temperature: of the student's logits.
        log_prob_min_clamp: floor of both sides' log-probs in the divergence; below it the student has no gradient.

    Returns:
        (log_probs, entropy, distill_losses, student_mass, teacher_mass) in the labels' shape, float32; the masses have no gradient.
        A teacher's slot of −inf or NaN counts 0 (VeOmni gives NaN); under a clamp −inf counts as the clamp, as there.
    """
    name = "chunk_topk_distill_function"
    check_head(name, hidden_states, weights)
    ids, teacher = teacher_topk_ids, teacher_topk_log_probs
    shifted = shift_labels is None
    if shift_labels is None:
        hidden_states, ids, teacher = hidden_states[..., :-1, :], ids[..., 1:, :], teacher[..., 1:, :]
    target = labels[..., 1:] if shift_labels is None else shift_labels
    keep = target != ignore_index
    head = LMHead(weights, temperature=temperature)
    slots = torch.where(keep.unsqueeze(-1), ids, -1)
    scores = linear_logp(hidden_states, head, torch.where(keep, target, 0), topk_ids=slots, entropy=True, mask=keep)
    assert scores.topk_logp is not None and scores.entropy is not None
    q, p = scores.topk_logp, teacher.detach().float()
    if log_prob_min_clamp is not None:
        p = p.clamp_min(log_prob_min_clamp)
    live = (slots >= 0) & p.isfinite()
    p, q = torch.where(live, p, 0), torch.where(live, q, 0)
    if log_prob_min_clamp is not None:
        q = q.clamp_min(log_prob_min_clamp)
    distill = torch.where(live, p.exp() * (p - q), 0).sum(-1)
    real = (slots >= 0) & ~teacher.isnan()
    student_mass, teacher_mass = (
        torch.where(real, x.detach().float().exp(), 0).sum(-1) for x in (scores.topk_logp, teacher)
    )  # fmt: skip
    found = scores.logp, scores.entropy, distill, student_mass, teacher_mass
    return tuple(F.pad(x, (0, 1)) for x in found) if shifted else found  # type: ignore[return-value]
