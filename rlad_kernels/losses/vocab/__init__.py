"""Divergences over the whole vocabulary, p the teacher's distribution and q the student's, w = log p − log q.

A token's divergence is inf where the formula is, or is too large for float32: see :func:`linear_divergence`.
"""
