"""Additive quantization of language models from the command line; `cli` is the entrance, `stages` the work."""
