"""A quantized model in, files that others load out: one file a format."""
