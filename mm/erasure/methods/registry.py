"""The methods by name. A new one is a file in this folder and a line here."""

from __future__ import annotations

from mm.core.errors import UserError
from mm.erasure.methods.dve import DVE
from mm.erasure.methods.esd import ESD
from mm.erasure.methods.hirm import HiRM
from mm.erasure.methods.oce import OCE
from mm.erasure.methods.protocol import Method
from mm.erasure.methods.prune import Prune
from mm.erasure.methods.rece import RECE
from mm.erasure.methods.robust import Robust
from mm.erasure.methods.salun import SalUn
from mm.erasure.methods.speed import SPEED
from mm.erasure.methods.uce import UCE

METHODS: dict[str, type[Method]] = {
    kind.name: kind for kind in (UCE, RECE, Robust, SPEED, OCE, HiRM, ESD, SalUn, DVE, Prune)
}


def method_of(name: str) -> Method:
    """The method called `name`.

    Raises:
        UserError: for an unknown name, with the known ones.
    """
    if name not in METHODS:
        raise UserError(f"no erasure method {name!r}; there are {', '.join(METHODS)}")
    return METHODS[name]()
