"""Liger-Kernel's fused losses, of the same names and arguments, on this library."""

from rlad_kernels.integrations.liger.functions import LigerFusedLinearGRPOLoss, LigerFusedLinearJSDLoss, chunk_topk_distill_function

__all__ = ["LigerFusedLinearGRPOLoss", "LigerFusedLinearJSDLoss", "chunk_topk_distill_function"]
