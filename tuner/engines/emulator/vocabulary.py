"""Text and token ids: the model folder's own tokenizer where it has one, one token per four bytes where not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Vocabulary:
    """Encodes and decodes for ``model``; the tokenizer is read at the first text, so that a server starts at once."""

    def __init__(self, model: str, size: int) -> None:
        self.size = size
        self._path = Path(model) / "tokenizer.json"
        self._loaded: Any = None
        self._pieces: dict[int, bytes] = {}

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, at least one."""
        tokenizer = self._tokenizer()
        if tokenizer:
            return tokenizer.encode(text).ids or [0]
        data = text.encode()
        return [int.from_bytes(data[i : i + 4], "big") % self.size for i in range(0, len(data), 4)] or [0]

    def decode(self, ids: list[int]) -> str:
        """The text of ``ids``."""
        tokenizer = self._tokenizer()
        return tokenizer.decode(ids) if tokenizer else "".join(f" t{one}" for one in ids)

    def piece(self, token: int) -> bytes:
        """The text of one token as the inside of a JSON string."""
        known = self._pieces.get(token)
        if known is None:
            known = self._pieces[token] = json.dumps(self.decode([token]))[1:-1].encode()
        return known

    def _tokenizer(self) -> Any:
        if self._loaded is None:
            self._loaded = False
            if self._path.exists():
                try:
                    from tokenizers import Tokenizer

                    self._loaded = Tokenizer.from_file(str(self._path))
                except ImportError:
                    pass
        return self._loaded
