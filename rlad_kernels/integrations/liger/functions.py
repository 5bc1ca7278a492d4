"""Call sites of Liger-Kernel's chunked losses, and of VeOmni's and verl's top-K distillation, switched by an import.

Constructor and call arguments are those of Liger-Kernel 0.8.5; ``compiled`` and ``chunk_size`` are taken and ignored. Neither Liger
nor VeOmni is needed. Logits, log-probs and accumulated gradients are float32 whatever the dtype of the inputs.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlad_kernels.core.check import check_range
from rlad_kernels.core.head import LMHead
from rlad_kernels.core.reduction import Reduction, keep_mask
from rlad_kernels.engine.call import flat_call, flat_rows
from rlad_kernels.integrations.liger.grpo import NAME, Options, grpo
from rlad_kernels.integrations.wiring import check_head, kept_ids
from rlad_kernels.linear.divergence import linear_divergence_loss
from rlad_kernels.linear.logp import score
from rlad_kernels.linear.loss import linear_loss
from rlad_kernels.losses.cross_entropy import CrossEntropy
from rlad_kernels.losses.vocab.kl import JSD

JSD_NAME = "LigerFusedLinearJSDLoss"
HARD = CrossEntropy()


class LigerFusedLinearGRPOLoss(nn.Module):
    """``liger_kernel.chunked_loss.LigerFusedLinearGRPOLoss``: the eight losses, both levels, and its metrics.

    As Liger's, but masked positions are never computed and never matter, whatever they hold: Liger counts the KL of padding in
    LUSPO and divides it by the padded length; ours is TRL's. Gradients of the head do not depend on how the batch is chunked (Liger
    adds one chunk a sequence in the head's dtype). Where a ratio overflows, a clipped token has no gradient (Liger: NaN).

    Raises:
        ValueError: for an option without a meaning, when made; naming the argument, what came and what was wanted.

    Example:
        >>> import torch
        >>> from rlad_kernels.integrations.liger import LigerFusedLinearGRPOLoss
        >>> hidden, weight, tokens = torch.zeros(2, 3, 8), torch.ones(4, 8), torch.zeros(2, 3).long()
        >>> mask, advantages = torch.ones(2, 3).bool(), torch.tensor([1.0, -2.0])
        >>> loss, metrics = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False)(hidden, weight, tokens, mask, advantages)
        >>> loss
        tensor(0.5000)
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ) -> None:
        super().__init__()
        self.use_ref_model = use_ref_model
        self.options = Options(
            beta=beta,
            epsilon_low=epsilon_low,
            epsilon_high=epsilon_high,
            loss_type=loss_type,
            max_completion_length=max_completion_length,
            importance_sampling_level=importance_sampling_level,
            sapo_temperature_pos=sapo_temperature_pos,
            sapo_temperature_neg=sapo_temperature_neg,
            temperature=temperature,
            delta=delta,
            use_bias_correction_kl=use_bias_correction_kl,
            vespo_k_pos=vespo_k_pos,
            vespo_lambda_pos=vespo_lambda_pos,
            vespo_k_neg=vespo_k_neg,
            vespo_lambda_neg=vespo_lambda_neg,
        )

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(loss, metrics) of ``_input (B, T, H)``; metrics are the KL to the reference, if beta is not 0, and the clipped share.

        ``selected_token_ids``, ``attention_mask`` (bool or 0/1) and the log-probs are ``(B, T)``, advantages and vLLM's ratios
        ``(B,)``, ``(B, 1)`` or ``(B, T)``; a ``(B,)`` is always one value a sequence.
        """
        if _input.dim() != 3:
            raise ValueError(f"{NAME}: _input must be (B, T, H), got shape {tuple(_input.shape)}")
        keep = keep_mask(NAME, attention_mask, _input[..., 0], "attention_mask")
        logp = self._logp(_input, lin_weight, bias, selected_token_ids, keep)
        reference = ref_per_token_logps if self.use_ref_model else None
        if self.use_ref_model and reference is None:
            if ref_input is None or ref_weight is None:
                raise ValueError(f"{NAME}: use_ref_model=True needs ref_per_token_logps, or ref_input and ref_weight")
            if ref_input.shape[:-1] != keep.shape:
                raise ValueError(f"{NAME}: ref_input has shape {tuple(ref_input.shape)}, wanted (*{tuple(keep.shape)}, H)")
            with torch.no_grad():
                reference = self._logp(ref_input, ref_weight, ref_bias, selected_token_ids, keep)
        out = grpo(
            self.options,
            logp,
            keep,
            advantages,
            old=old_per_token_logps,
            reference=reference,
            is_ratio=vllm_is_ratio,
            items=num_items_in_batch,
        )
        return out.loss, tuple(out.metrics.values())

    def _logp(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, keep: Tensor) -> Tensor:
        check_head(NAME, hidden, weight)
        head = LMHead(weight, bias, temperature=self.options.temperature)
        return score(NAME, hidden, head, kept_ids(NAME, "selected_token_ids", ids, keep, len(weight)), mask=keep).logp


class LigerFusedLinearJSDLoss(nn.Module):
    """``liger_kernel.chunked_loss.LigerFusedLinearJSDLoss``: weight_hard·CE + weight_soft·JSD_β over the kept tokens.

    β = 0 is KL(teacher‖student), β = 1 KL(student‖teacher). Right where Liger is not:

    - small divergences: Liger takes log-softmax in bfloat16, whose gradient is 59 % off at a KL of 1e-3; ours is within 0.5 %;
    - heads of different height: Liger gives the smaller student logits of **0** for the ids it lacks, so equal models with a padded
      teacher are 1587 nats apart; ours takes ids that only one head has as not existing, so they are 0 apart.

    Raises:
        ValueError: for an option without a meaning, when made; naming the argument, what came and what was wanted.

    Example:
        >>> import torch
        >>> from rlad_kernels.integrations.liger import LigerFusedLinearJSDLoss
        >>> hidden, weight, labels = torch.zeros(3, 8), torch.ones(4, 8), torch.tensor([0, 3, -100])
        >>> LigerFusedLinearJSDLoss(weight_hard_loss=1.0)(hidden, weight, hidden, weight, labels)  # log 4, and no divergence
        tensor(1.3863)
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ) -> None:
        super().__init__()
        check_range(JSD_NAME, "beta", beta, 0, 1)
        if not 0 < temperature < math.inf:
            raise ValueError(f"{JSD_NAME}: temperature must be positive and finite, got {temperature!r}")
        for option, weight in (("weight_hard_loss", weight_hard_loss), ("weight_soft_loss", weight_soft_loss)):
            if not 0 <= weight < math.inf:
                raise ValueError(f"{JSD_NAME}: {option} must be at least 0 and finite, got {weight!r}")
        self.weight_hard_loss, self.weight_soft_loss = weight_hard_loss, weight_soft_loss
        self.beta, self.ignore_index, self.temperature = beta, ignore_index, temperature
        self.return_soft_hard_loss = return_soft_hard_loss

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """The loss of ``student_input (…, H)``; with ``return_soft_hard_loss`` (loss, soft, hard), the last two without gradient.

        ``true_labels`` are ints ``(…)``, and ``teacher_input`` has the same leading shape. The temperature is the soft loss's only,
        and there is no factor T².
        """
        check_head(JSD_NAME, student_input, student_weight)
        check_head(f"{JSD_NAME} (teacher)", teacher_input, teacher_weight)
        shape = student_input.shape[:-1]
        flat_rows(JSD_NAME, "true_labels", true_labels, shape, student_input.device, ids=True)
        flat_rows(JSD_NAME, "teacher_input", teacher_input[..., 0], shape, student_input.device)
        keep = true_labels.long() != self.ignore_index
        reduction = Reduction("token-mean", denominator=keep.sum().clamp(min=1))
        size, t = min(len(student_weight), len(teacher_weight)), self.temperature
        student = LMHead(student_weight, student_bias, temperature=t, vocab_size=size)
        teacher = LMHead(teacher_weight, teacher_bias, temperature=t, vocab_size=size)
        flat_call(JSD_NAME, student_input, student)
        flat_call(f"{JSD_NAME} (teacher)", teacher_input, teacher)
        soft = linear_divergence_loss(
            student_input, student, teacher_input, teacher, JSD(self.beta), mask=keep, reduction=reduction
        ).loss
        hard = torch.zeros_like(soft)
        if self.weight_hard_loss or self.return_soft_hard_loss:
            target = kept_ids(JSD_NAME, "true_labels", true_labels, keep, len(student_weight))
            plain = LMHead(student_weight, student_bias)
            hard = linear_loss(student_input, plain, target, HARD, mask=keep, reduction=reduction).loss
        loss = self.weight_hard_loss * hard + self.weight_soft_loss * soft
        return (loss, soft.detach(), hard.detach()) if self.return_soft_hard_loss else loss


def chunk_topk_distill_function(
    hidden_states: Tensor,
    weights: Tensor,
    labels: Tensor,
    teacher_topk_ids: Tensor,
    teacher_topk_log_probs: Tensor,
    chunk_size: int = 1024,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    temperature: float = 1.0,
    log_prob_min_clamp: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """VeOmni's ``chunk_topk_distill_function``, which verl reads: Σ_K p(log p − log q) on the teacher's ids, and what goes with it.

    Args:
        hidden_states: ``(B, L, H)`` or ``(L, H)``.
        weights: ``(V, H)``.
        labels: ``(B, L)`` or ``(L,)``; ``ignore_index`` makes every output of its position 0.
        teacher_topk_ids: ``(…, L, K)`` ints, aligned with the labels; −1 is an empty slot; K ≤ 4,096 and ≤ V.
        teacher_topk_log_probs: ``(…, L, K)``.
        shift_labels: labels that are already the next tokens; then nothing is shifted. Otherwise hidden state t scores
            label t + 1, and the last position is 0. (Sequence parallelism must pass it; VeOmni asks its own global state.)
        temperature: of the student's logits.
        log_prob_min_clamp: floor of both sides' log-probs in the divergence, negative; below it the student has no gradient.

    Returns:
        (log_probs, entropy, distill_losses, student_mass, teacher_mass) in the labels' shape, float32; the masses have no gradient.
        A teacher's slot of −inf or NaN counts 0 (VeOmni gives NaN); under a clamp −inf counts as the clamp, as there.

    Raises:
        ValueError: naming the argument, what came and what was wanted.

    Example:
        >>> import torch
        >>> from rlad_kernels.integrations.liger import chunk_topk_distill_function
        >>> hidden, weight, labels = torch.zeros(2, 8), torch.ones(4, 8), torch.tensor([0, 3])
        >>> ids, logp = torch.tensor([[1, 2], [0, 3]]), torch.tensor([[0.5, 0.25], [0.5, 0.25]]).log()
        >>> logp, entropy, distill, *masses = chunk_topk_distill_function(hidden, weight, labels, ids, logp)
        >>> distill  # position 0 is of token 1; the last has none
        tensor([0.3466, 0.0000])
    """
    name = "chunk_topk_distill_function"
    check_head(name, hidden_states, weights)
    if not isinstance(temperature, Tensor) and not 0 < temperature < math.inf:
        raise ValueError(f"{name}: temperature must be positive and finite, got {temperature!r}")
    if log_prob_min_clamp is not None and not -math.inf < log_prob_min_clamp < 0:
        raise ValueError(f"{name}: log_prob_min_clamp must be negative and finite, or None, got {log_prob_min_clamp!r}")
    if hidden_states.dim() not in (2, 3):
        raise ValueError(f"{name}: hidden_states must be (B, L, H) or (L, H), got shape {tuple(hidden_states.shape)}")
    ids, teacher = teacher_topk_ids, teacher_topk_log_probs
    shape, device = hidden_states.shape[:-1], hidden_states.device
    argument, target = ("labels", labels) if shift_labels is None else ("shift_labels", shift_labels)
    flat_rows(name, argument, target, shape, device, ids=True)
    flat_rows(name, "teacher_topk_ids", ids, shape, device, ids=True, extra=1)
    flat_rows(name, "teacher_topk_log_probs", teacher, shape, device, extra=1)
    if teacher.shape != ids.shape or not teacher.is_floating_point():
        raise ValueError(
            f"{name}: teacher_topk_log_probs must be floats {tuple(ids.shape)}, got {teacher.dtype} {tuple(teacher.shape)}"
        )
    shifted = shift_labels is None and shape[-1] > 0
    if shifted:
        hidden_states, target, ids, teacher = hidden_states[..., :-1, :], target[..., 1:], ids[..., 1:, :], teacher[..., 1:, :]
    keep = target.long() != ignore_index
    head = LMHead(weights, temperature=temperature)
    slots = kept_ids(name, "teacher_topk_ids", ids, keep, len(weights), slots=True)
    target = kept_ids(name, argument, target, keep, len(weights))
    scores = score(name, hidden_states, head, target, topk_ids=slots, entropy=True, mask=keep, ids_name="teacher_topk_ids")
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
    student_mass, teacher_mass = (torch.where(real, x.detach().float().exp(), 0).sum(-1) for x in (scores.topk_logp, teacher))
    found = scores.logp, scores.entropy, distill, student_mass, teacher_mass
    return tuple(F.pad(x, (0, 1)) for x in found) if shifted else found  # type: ignore[return-value]
