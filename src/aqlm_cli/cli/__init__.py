"""Flags in, tables out: the only package that prints or knows typer. It loads torch only when a command runs."""
