"""Decides and computes: methods, what the libraries say about a model, the plan, kernels, the streaming pipeline."""
