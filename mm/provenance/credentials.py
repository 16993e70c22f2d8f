"""Content credentials (C2PA manifests) of a picture, read by c2pa-python.

Design choices
- c2pa-python is optional (`pip install mm-gen[c2pa]`); without it a picture's credentials are "not read", never "none".
- Nothing that a picture names is fetched: neither manifests that lie elsewhere nor the state of certificates.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm.core.safe_json import parse_json

_SETTINGS = {"verify": {"remote_manifest_fetch": False, "ocsp_fetch": False}}
MISSING = "c2pa-python is not installed; pip install 'mm-gen[c2pa]' reads content credentials"


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """What a manifest says.

    Attributes:
        state: of the validation: "Valid", "Trusted" or "Invalid".
        generator: the program that wrote the manifest.
        title: of the picture.
        signer: who has issued the certificate.
        actions: what was done, for example "c2pa.created".
    """

    state: str
    generator: str
    title: str
    signer: str
    actions: tuple[str, ...]

    def __str__(self) -> str:
        by = f"written by {self.generator or 'an unnamed program'}, signed by {self.signer or 'nobody named'}"
        return "; ".join([f"{self.state.lower()}, {by}", *([", ".join(self.actions)] if self.actions else [])])


def available() -> bool:
    """Whether c2pa-python is installed."""
    spec = importlib.util.find_spec("c2pa")
    return spec is not None and spec.origin is not None  # a folder of that name is no package


def read_credentials(path: str | Path) -> Credentials | None:
    """The credentials inside a picture; None where it has none.

    Raises:
        ModuleNotFoundError: without c2pa-python; `available` says so before.
    """
    import c2pa  # type: ignore[import-not-found, unused-ignore]  # pyright: ignore[reportMissingImports]

    settings = c2pa.Settings.from_json(json.dumps(_SETTINGS))
    try:
        reader = c2pa.Reader.try_create(Path(path), context=c2pa.Context(settings))
    except c2pa.C2paError as error:
        return Credentials(state="Invalid", generator="", title="", signer="", actions=(str(error)[:200],))
    if reader is None:
        return None
    with reader:
        found = parse_json(reader.json(), f"{path}: its content credentials cannot be read:")
        state = str(reader.get_validation_state() or "Unknown")
    return credentials_of(found, state)


def credentials_of(store: Any, state: str) -> Credentials:
    """The active manifest of a manifest store as c2pa's JSON has it."""
    manifests = _table(_table(store).get("manifests"))
    manifest = _table(manifests.get(str(_table(store).get("active_manifest"))))
    named = manifest.get("claim_generator_info")
    first = _table(named[0]) if isinstance(named, list) and named else {}
    generator = " ".join(str(first[key]) for key in ("name", "version") if first.get(key))
    assertions = manifest.get("assertions")
    actions = [
        str(_table(action).get("action", ""))
        for assertion in (assertions if isinstance(assertions, list) else [])
        if str(_table(assertion).get("label", "")).startswith("c2pa.actions")
        for action in _table(_table(assertion).get("data")).get("actions", [])
    ]
    signature = _table(manifest.get("signature_info"))
    return Credentials(
        state=state, generator=generator or str(manifest.get("claim_generator", "")),
        title=str(manifest.get("title") or ""), signer=str(signature.get("issuer") or ""), actions=tuple(actions),
    )  # fmt: skip


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
