"""Losses on a support of K tokens."""
