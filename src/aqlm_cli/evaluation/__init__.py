"""A network and text in, numbers with their error out."""
