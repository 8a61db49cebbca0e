"""Layouts of checkpoints that another tool quantized: what is stored of each weight, and what it stands for."""
