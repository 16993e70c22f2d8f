"""Attacks on an erasure, for measuring one's own model: one file each behind one protocol."""

from __future__ import annotations

from mm.erasure.attacks.registry import attack_of as attack_of
