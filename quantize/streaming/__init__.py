"""Carrying out a plan: reading, computing and writing in bounded memory."""
