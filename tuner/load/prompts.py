"""Prompts for a trace: exactly the wanted number of tokens, sharing exactly the prefixes that the trace shares."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from tuner.errors import UsageError
from tuner.load.trace import Trace

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_WORD = re.compile(r"[a-z]{2,12}")
_FEWEST_WORDS = 64
_MOST_WORDS = 8192
_AT_ONCE_TOKENS = 65_536
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class PromptIds(Sequence[np.ndarray]):
    """A trace's prompts as token ids, made when asked for: ``prompts[i]`` is an int32 array (input_tokens[i],).

    Holds the alphabet and the trace's columns, no prompt: a million requests cost no more than the trace itself.
    """

    def __init__(self, trace: Trace, alphabet: np.ndarray, seed: int) -> None:
        self._trace = trace
        self._alphabet = alphabet
        self._units = _Units(trace, len(alphabet), seed)

    def __len__(self) -> int:
        return len(self._trace)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...
    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(index, slice):
            return self._several(range(*index.indices(len(self))))
        i = range(len(self))[index]  # negative and out-of-range numbers as in a list
        return self._alphabet[self._units.request(i, int(self._trace.input_tokens[i]))]

    def _several(self, numbers: range) -> list[np.ndarray]:
        """Short prompts without blocks at once: one by one, numpy's calls cost far more than their tokens."""
        trace, at = self._trace, np.asarray(numbers, dtype=np.int64)
        tokens = trace.input_tokens[at]
        width = int(tokens.max(initial=0))
        if width * len(at) > _AT_ONCE_TOKENS or (trace.block_offsets[at] != trace.block_offsets[at + 1]).any():
            return [self[i] for i in numbers]
        rows = self._alphabet[self._units.own(at, width)]
        return [row[:n] for row, n in zip(rows, tokens.tolist(), strict=True)]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[i] for i in range(len(self)))


def token_ids(trace: Trace, vocab_size: int, special_ids: Collection[int], seed: int) -> PromptIds:
    """The prompts of ``trace`` as token ids below ``vocab_size``, none of them in ``special_ids``.

    Request i's prompt has exactly ``input_tokens[i]`` tokens. Where the trace knows prefixes, a block's tokens are a
    function of (seed, block id): two prompts agree on exactly the leading blocks whose ids agree (a partial last
    block is the beginning of its block's tokens); tokens beyond the blocks belong to the request alone. Different
    blocks, and different requests without blocks, differ within their first few tokens by construction (one token
    where the alphabet is larger than the number of blocks and requests, two for practically every trace), so no two
    prompts are alike by accident.

    Use another ``seed`` for every replay against the same server: with the same seed the second replay would find the
    first one's prompts in the prefix cache.

    Same arguments, same tokens, on every machine. Raises UsageError where fewer than two ids are left to use.
    """
    if not 0 < vocab_size < 2**31:
        raise UsageError(f"a vocabulary of {vocab_size} tokens is not possible", fix="Give the model's vocab_size")
    allowed = np.ones(vocab_size, dtype=bool)
    banned = [i for i in special_ids if 0 <= i < vocab_size]
    allowed[banned] = False
    alphabet = np.flatnonzero(allowed).astype(np.int32)
    if len(alphabet) < 2:
        raise UsageError(f"of {vocab_size} tokens, {len(banned)} are special: too few are left to write prompts with")
    return PromptIds(trace, alphabet, seed)


class PromptTexts(Sequence[str]):
    """A trace's prompts as texts of :func:`whole_words`, made when asked for, for endpoints that take no token ids: the
    encoding of each (without special tokens) has exactly ``input_tokens[i] - overhead_tokens`` tokens, at least 1.
    ``overhead_tokens`` is what the server's chat template adds. Prefixes are shared as in :func:`token_ids`."""

    def __init__(self, trace: Trace, words: Sequence[str], seed: int, overhead_tokens: int = 0) -> None:
        self._trace = trace
        self._words = np.array(words)
        self._units = _Units(trace, len(words), seed)
        self._overhead_tokens = overhead_tokens

    def __len__(self) -> int:
        return len(self._trace)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        tokens = max(1, int(self._trace.input_tokens[i]) - self._overhead_tokens)
        return " ".join(self._words[self._units.request(i, tokens)])

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))


def whole_words(tokenizer: Tokenizer) -> list[str]:
    """Lower-case words that the tokenizer keeps as one token each, whatever stands beside them, by token id; none where
    they are too few to write prompts with."""
    by_id = sorted((number, token) for token, number in tokenizer.get_vocab().items())
    # a token's own mark for a leading space: byte-level BPE and SentencePiece
    bare = dict.fromkeys(token.lstrip("\u0120\u2581") for _, token in by_id)
    candidates = [word for word in bare if _WORD.fullmatch(word)]
    alone, thrice = (
        tokenizer.encode_batch([" ".join([word] * times) for word in candidates], add_special_tokens=False)
        for times in (1, 3)
    )
    kept = [w for w, a, t in zip(candidates, alone, thrice, strict=True) if len(a.ids) == 1 and len(t.ids) == 3]
    return kept[:_MOST_WORDS] if len(kept) >= _FEWEST_WORDS else []


def vocabulary(model: str | Path) -> tuple[int, frozenset[int]]:
    """``(vocab_size, special_ids)`` of a model: which token ids a prompt may use.

    ``model`` is a model folder, or the id of a model in the local Hugging Face cache (nothing is downloaded). An id
    is usable when both the tokenizer and the model's embedding know it; every added token (chat markers, image
    placeholders) counts as special. Raises UsageError where neither ``tokenizer.json`` nor ``config.json`` tells.
    """
    folder = model_folder(model)
    config = _json(folder / "config.json")
    text_config = config.get("text_config")
    size = config.get("vocab_size") or (text_config.get("vocab_size") if isinstance(text_config, dict) else None)
    sizes = [size] if isinstance(size, int) else []
    special: set[int] = set()
    for source in (config, text_config, _json(folder / "generation_config.json")):
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = source.get(key) if isinstance(source, dict) else None
            special.update(v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int))
    tokenizer = _json(folder / "tokenizer.json")
    if tokenizer:
        added = [t["id"] for t in tokenizer.get("added_tokens") or [] if isinstance(t.get("id"), int)]
        special.update(added)
        vocab = tokenizer.get("model", {}).get("vocab") or {}
        known = vocab.values() if isinstance(vocab, dict) else range(len(vocab))  # unigram models keep a list
        sizes.append(max([*known, *added], default=-1) + 1)
    if not sizes:
        raise UsageError(
            "neither tokenizer.json nor config.json tells the vocabulary", where=str(folder), fix="Give a model folder"
        )
    return min(sizes), frozenset(special)


def model_folder(model: str | Path) -> Path:
    """The folder of ``model``: itself where it is one, else its snapshot in the local Hugging Face cache."""
    folder = Path(model)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(model), local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise UsageError(
            f"model {model} is neither a folder nor in the local Hugging Face cache",
            fix="Give a folder that holds tokenizer.json and config.json, or: "
            f"hf download {model} tokenizer.json config.json",
        ) from error


def load_tokenizer(model: str | Path) -> Tokenizer:
    """The tokenizer of a model folder or cached model; UsageError where it has no ``tokenizer.json``."""
    from tokenizers import Tokenizer

    path = model_folder(model) / "tokenizer.json"
    if not path.is_file():
        raise UsageError("there is no tokenizer.json", where=str(path.parent), fix="Give the folder of the model")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust library raises plain Exception
        raise UsageError(f"cannot be read as a tokenizer ({error})", where=str(path)) from error


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot be read as JSON ({error})", where=str(path)) from error
    return value if isinstance(value, dict) else {}


class _Units:
    """Content as indices into an alphabet. A unit is a block (its id) or the part of a request beyond its blocks.

    Units are numbered: block ids come first, requests' own parts after the largest id. A unit begins with the digits
    of its number in base ``size``, scrambled by a bijection, so that different units differ there for certain; the
    rest is a counter-based random stream (splitmix64) of (seed, number).
    """

    def __init__(self, trace: Trace, size: int, seed: int) -> None:
        self._trace = trace
        self._size = size
        self._seed = mix64(np.array([seed % 2**64], dtype=np.uint64))[0]
        self._first_own = int(trace.block_ids.max()) + 1 if len(trace.block_ids) else 0
        units, self._digits = self._first_own + len(trace), 1
        while size**self._digits < units:
            self._digits += 1

    def request(self, i: int, tokens: int) -> np.ndarray:
        """The first ``tokens`` tokens of request i, (tokens,) int64 indices below ``size``."""
        blocks = self._trace.block_ids[self._trace.block_offsets[i] : self._trace.block_offsets[i + 1]]
        width = self._trace.block_tokens
        # ids beyond the prompt's end (it may have been shortened) are not needed
        shared = self.content(blocks[: -(-tokens // width)], width).ravel()[:tokens] if len(blocks) else blocks[:0]
        if len(shared) == tokens:
            return shared
        return np.concatenate([shared, self.own(np.array([i]), tokens - len(shared))[0]])

    def own(self, requests: np.ndarray, width: int) -> np.ndarray:
        """(len(requests), width) int64 indices: the first ``width`` tokens that belong to each alone."""
        return self.content(self._first_own + requests, width)

    def content(self, numbers: np.ndarray, width: int) -> np.ndarray:
        """(len(numbers), width) int64 indices: each unit's first ``width`` tokens."""
        number = numbers.astype(np.uint64)[:, None]
        stream = mix64(number * _GOLDEN ^ self._seed) + np.arange(1, width + 1, dtype=np.uint64) * _GOLDEN
        # multiply-shift instead of modulo: faster, and its bias is below size / 2**32
        tokens = ((mix64(stream) >> np.uint64(32)) * np.uint64(self._size)) >> np.uint64(32)
        lead = self._lead(number[:, 0])[:, :width]
        tokens[:, : lead.shape[1]] = lead
        return tokens.astype(np.int64)

    def _lead(self, number: np.ndarray) -> np.ndarray:
        """The scrambled digits, (units, digits). Each step adds to one digit a hash of the others: a Feistel network,
        hence one-to-one."""
        size, rest = np.uint64(self._size), number
        digits = np.empty((len(number), self._digits), dtype=np.uint64)
        for d in range(self._digits):
            digits[:, d], rest = rest % size, rest // size
        for d in range(self._digits):
            others = np.full(len(number), self._seed ^ np.uint64(d), dtype=np.uint64)
            for other in range(self._digits):
                if other != d:
                    others = mix64(others ^ digits[:, other])
            digits[:, d] = (digits[:, d] + mix64(others) % size) % size
        return digits


def mix64(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele, Lea, Flood 2014): a bijection on 64-bit numbers that scatters every bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
