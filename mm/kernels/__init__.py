"""The ops that linear layers are made of, one module per backend; `mm doctor` lists those it finds.

The code lies in the root folder `kernels/`, or beside this file in an installed wheel.
"""

from __future__ import annotations

from mm._lazy import adopt

adopt(__path__, "kernels")
