"""`python -m dspark` is the command `dspark`."""

from __future__ import annotations

from dspark.cli import main

if __name__ == "__main__":
    main()
