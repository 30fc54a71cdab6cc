"""Fitting of whole modules after their matrices are quantized. Knows modules and tensors only."""
