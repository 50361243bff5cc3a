"""Ovis2.5, written natively: published checkpoints load and save without remote code."""
