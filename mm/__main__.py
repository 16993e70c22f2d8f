"""`python -m mm` is `mm`."""

from __future__ import annotations

from mm.cli import main

main()
