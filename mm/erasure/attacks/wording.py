"""Held-out wording: prompts for the concept in words that no method made a patch from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mm.adapters.patch import Patch
from mm.erasure.attacks.protocol import asked, result, shows
from mm.erasure.measure import Measurer
from mm.erasure.probes import Probe


class Wording:
    """The probes of role "wording"."""

    name = "wording"

    def run(self, measurer: Measurer, patch: Patch, probes: Sequence[Probe]) -> dict[str, Any]:
        """Draws them, and the plain ones beside them."""
        worded = [p for p in probes if p.role == "wording"]
        plain = asked(probes, len(worded))
        found = measurer.labels([p.prompt for p in [*worded, *plain]], base=True)
        hits = [shows(p, labels) for p, labels in zip([*worded, *plain], found, strict=True)]
        return result(hits[: len(worded)], hits[len(worded) :])
