"""`python -m aqlm_cli` is `aqlm`."""

from __future__ import annotations

from aqlm_cli.cli.app import main

if __name__ == "__main__":
    main()
