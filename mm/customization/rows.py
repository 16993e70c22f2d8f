"""What is trained of text encoders: rows of embeddings for new words.

Legend: D width of an embedding, B prompts, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mm.adapters.entry import Entry
from mm.adapters.tokens import TokenTable, add_token, release_words, tied_embeddings, tokenizer_of
from mm.core.errors import UserError
from mm.customization.objectives.protocol import Objective
from mm.customization.pieces import layer_seed
from mm.layers.surgery import roots_of, submodule


class Rows:
    """Rows of the embeddings for new words; while they are trained, a hook puts them into the embeddings' outputs.

    Args:
        objective: its pipeline has tokenizers and embeddings.
        tokens: the new words, each with the word whose row is the start ("" for the mean of all rows).
        noise: deviation of what is added to the start, as a share of the rows' deviation.
        seed: of that noise.
    """

    def __init__(
        self, objective: Objective, tokens: Mapping[str, str], *, seed: int, noise: float = 0.1,
    ) -> None:  # fmt: skip
        self.objective = objective
        self.values: dict[tuple[str, str], nn.Parameter] = {}
        self.spreads: dict[str, float] = {}  # the table's standard deviation, by the parameter's name
        self.per_sample: dict[str, Tensor] = {}  # rows (B, D) by token, for batches whose prompts differ in them
        self.ids: dict[tuple[str, str], int] = {}
        if not objective.trains_words:
            raise UserError(
                f"{type(objective.pipe).__name__} reads prompts without gradients, so that no word is learned; choose "
                "a method that learns layers alone, such as dreambooth"
            )
        self.tables: list[TokenTable] = list(objective.tables)
        if not self.tables:
            raise UserError(f"{type(objective.pipe).__name__} has no tokenizer that takes a new word")
        self._handles: list[Any] = []
        self._on = True
        try:
            for table in self.tables:
                for token, start in tokens.items():
                    self._add(table, token, start, noise, seed)
            for table in self.tables:
                for module in tied_embeddings(objective.pipe, table):
                    self._handles.append(module.register_forward_hook(self._hook(table)))
        except BaseException:
            self.remove()
            raise

    def _add(self, table: TokenTable, token: str, start: str, noise: float, seed: int) -> None:
        row = add_token(self.objective.pipe, table, token)
        embedding = self.embedding(table)
        self.ids[table.embedding, token] = row
        first = self._start(table, embedding, start, row)
        spread = embedding.weight.detach().float()[:row].std()
        drift = torch.randn(first.shape, generator=layer_seed(f"{table.embedding} {token}", seed))
        self.spreads[f"{table.embedding}|{token}"] = float(spread)
        self.values[table.embedding, token] = nn.Parameter(first + noise * spread * drift.to(first))

    def embedding(self, table: TokenTable) -> nn.Embedding:
        component, _, path = table.embedding.partition(".")
        found = submodule(roots_of(self.objective.pipe)[component], path)
        assert isinstance(found, nn.Embedding)
        return found

    def _start(self, table: TokenTable, embedding: nn.Embedding, word: str, row: int) -> Tensor:
        weight = embedding.weight.detach().float()
        if not word:
            return weight[:row].mean(0)
        tokenizer = tokenizer_of(self.objective.pipe, table)
        special = {getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad", "unk")}
        ids = [i for i in tokenizer(word).input_ids if i not in special and i < row]
        return weight[ids].mean(0) if ids else weight[:row].mean(0)

    def _hook(self, table: TokenTable) -> Any:
        def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            ids = args[0]
            for (embedding, token), value in self.values.items():
                if embedding != table.embedding or not self._on:
                    continue
                own = (ids == self.ids[embedding, token])[..., None]
                each = self.per_sample.get(f"{embedding} {token}")
                if each is not None and (number := self.objective.encoded) is not None:
                    each = each[number : number + 1]
                if each is not None and ids.ndim == 2 and len(each) == len(ids):
                    output = torch.where(own, each[:, None].to(output), output)
                else:
                    output = torch.where(own, value.to(output), output)
            return output

        return after

    def parameters(self) -> dict[str, nn.Parameter]:
        return {f"{embedding}|{token}": value for (embedding, token), value in self.values.items()}

    @contextmanager
    def off(self) -> Iterator[None]:
        self._on = False
        try:
            yield
        finally:
            self._on = True

    def settle(self) -> None:
        """The hook serves drawing as well."""

    def entries(self, only: Sequence[str] | None = None) -> dict[str, Entry]:
        out: dict[str, Entry] = {}
        for table in self.tables:
            mine = {t: v for (e, t), v in self.values.items() if e == table.embedding and (only is None or t in only)}
            ids = torch.tensor([self.ids[table.embedding, token] for token in mine])
            rows = torch.stack([value.detach().cpu().float() for value in mine.values()]).to(torch.float16)
            out[table.embedding] = Entry(kind="rows", tensors={"ids": ids, "rows": rows})
        return out

    def tokens(self, only: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """What a patch says of its words."""
        return [
            {"token": token, "tokenizer": table.tokenizer, "embedding": table.embedding,
             "id": self.ids[table.embedding, token]}
            for table in self.tables for (embedding, token) in self.values
            if embedding == table.embedding and (only is None or token in only)
        ]  # fmt: skip

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        release_words(self.objective.pipe)
