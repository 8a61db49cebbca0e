"""Whole pipelines at work: what their models are given while they denoise, and what quantizing changed of it."""
