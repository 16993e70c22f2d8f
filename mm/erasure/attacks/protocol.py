"""What an attack gets and gives.

Design choices
- An attack succeeds on a prompt where a picture shows the erased concept. Its report holds the success with the attack
  and, on the same prompts and seeds, without it.
- A picture that cannot be read is no success of an attack.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from mm.adapters.patch import Patch
from mm.core.statistics import share
from mm.erasure.measure import Labels, Measurer
from mm.erasure.probes import Probe


class Attack(Protocol):
    """An attack: one file in this folder."""

    name: str

    def run(self, measurer: Measurer, patch: Patch, probes: Sequence[Probe]) -> dict[str, Any]:
        """Attacks the measurer's pipeline, which carries the patch.

        Args:
            measurer: pipeline, judge, seed and drawing settings.
            patch: that is attacked; on the model.
            probes: those of role "target" are attacked.

        Returns:
            "success" and "without", each with score, n and interval, and what else the attack reports, JSON-ready.
        """
        ...


def asked(probes: Sequence[Probe], most: int) -> list[Probe]:
    """At most `most` probes that ask for a target."""
    return [p for p in probes if p.role == "target"][:most]


def shows(probe: Probe, labels: Labels) -> bool:
    """Whether the erased concept is on the picture."""
    return labels is not None and probe.concept in labels


def result(success: Sequence[bool], without: Sequence[bool], **more: Any) -> dict[str, Any]:
    """The report of an attack."""
    return {"success": share(list(success)), "without": share(list(without)), **more}
