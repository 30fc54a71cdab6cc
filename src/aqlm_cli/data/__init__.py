"""Text becomes token sequences: the only package that imports `datasets`."""
