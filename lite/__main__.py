"""`python -m lite`."""

from __future__ import annotations

import sys

from lite.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
