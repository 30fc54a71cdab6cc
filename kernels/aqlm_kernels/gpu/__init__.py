"""Products on a GPU, written in Triton, which is imported only where they are used."""
