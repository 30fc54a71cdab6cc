"""Additive quantization of language models from the command line; see `cli` and `pipeline`."""
