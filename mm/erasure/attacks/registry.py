"""The attacks by name. A new one is a file in this folder and a line here."""

from __future__ import annotations

from mm.core.errors import UserError
from mm.erasure.attacks.embedding import EmbeddingSearch, Inversion
from mm.erasure.attacks.genetic import Genetic
from mm.erasure.attacks.noise import Noise
from mm.erasure.attacks.paraphrase import Paraphrase
from mm.erasure.attacks.prompt_search import PromptSearch
from mm.erasure.attacks.protocol import Attack
from mm.erasure.attacks.wording import Wording

ATTACKS: dict[str, type[Attack]] = {
    kind.name: kind for kind in (Wording, Paraphrase, PromptSearch, Genetic, EmbeddingSearch, Inversion, Noise)
}


def attack_of(name: str) -> Attack:
    """The attack called `name`, with its default settings.

    Raises:
        UserError: for an unknown name, with the known ones.
    """
    if name not in ATTACKS:
        raise UserError(f"no attack {name!r}; there are {', '.join(ATTACKS)}")
    return ATTACKS[name]()
