"""The Gradio app.

The code lies in the root folder `ui/`, or beside this file in an installed wheel.
"""

from __future__ import annotations

from mm.core.lazy import adopt

adopt(__path__, "ui")
