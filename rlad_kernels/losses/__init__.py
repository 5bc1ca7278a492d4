"""Losses: one small file a method, each a pure per-token function and its public wrapper."""
