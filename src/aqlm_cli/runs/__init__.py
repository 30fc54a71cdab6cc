"""Everything on the disk: run directory, artifacts, files, lock and log."""
