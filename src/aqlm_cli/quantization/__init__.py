"""Weights and statistics of their inputs in, quantized matrices out."""
