"""Vision tokenizers behind one protocol: pictures to latents or codes, and back.

The code lives in the root folder `tokenizers/`, which holds no __init__.py. In a checkout this package extends its path to that
folder; in a wheel the files lie beside this one.
"""

from __future__ import annotations

from pathlib import Path

_root = Path(__file__).resolve().parents[2]
# Without the check, an installed wheel would adopt a folder of that name in site-packages (Hugging Face's `tokenizers`).
if (_root / "pyproject.toml").is_file() and str(_root / "tokenizers") not in __path__:
    __path__.append(str(_root / "tokenizers"))
