"""Text to token ids with a tokenizer of Hugging Face: cut, padded, with special tokens, alone or as a pair."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from counterpoise import hub
from counterpoise.contracts import ConfigError
from counterpoise.data.card import AnyModality, TextModality


@dataclass(frozen=True)
class Tokenizer:
    """Makes ids [L] of texts. Safe to share between threads.

    vocabulary: ids lie in 0..vocabulary-1. separator: the id that ends each text, 0 if there is none.
    padding: the tokenizer's own id for it. Where that is not 0, the ids of padding and 0 are exchanged, so that 0 pads
    in every corpus; encoders exchange them back.
    fingerprint: of vocabulary, rules and special tokens.
    """

    length: int
    vocabulary: int
    separator: int
    padding: int
    fingerprint: str
    _backend: Any

    def __call__(self, text: str, pair: str | None = None) -> np.ndarray | None:
        """Ids int32 [L]; None if nothing but special tokens comes out of the text or of its pair."""
        encoding = self._backend.encode(text, pair)
        kept = {part for part in encoding.sequence_ids if part is not None}
        if kept != ({0} if pair is None else {0, 1}):
            return None
        ids = np.full(self.length, self.padding, dtype=np.int32)
        ids[: len(encoding.ids)] = encoding.ids
        return _exchanged(ids, self.padding)


def _exchanged(ids: np.ndarray, padding: int) -> np.ndarray:
    return np.where(ids == padding, 0, np.where(ids == 0, padding, ids)).astype(np.int32) if padding else ids


@functools.lru_cache(maxsize=8)
def load_tokenizer(place: str, max_length: int, pair: bool = False) -> Tokenizer:
    """The tokenizer in a folder, at a URI, or of a name of the hub; once per process."""
    package = hub.transformers()
    with hub.folder(place, "tokenizer") as path:
        try:
            whole = package.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        except Exception as error:  # damaged files raise anything
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ConfigError(f"{place}: no tokenizer that transformers can read ({reason})") from None
    if getattr(whole, "backend_tokenizer", None) is None:
        raise ConfigError(f"{place}: its tokenizer has no fast form; save it as tokenizer.json")
    if whole.pad_token_id is None:
        raise ConfigError(f"{place}: its tokenizer has no token for padding; choose one that has, such as BERT's")
    from tokenizers import Tokenizer as Backend

    state = json.loads(whole.backend_tokenizer.to_str())
    state |= {"truncation": None, "padding": None}  # what earlier uses left behind
    backend = Backend.from_str(json.dumps(state))
    special = backend.num_special_tokens_to_add(pair)
    least = special + 1 + pair
    if max_length < least:
        raise ConfigError(f"max_length is {max_length}; {place} adds {special} special tokens, so give {least} or more")
    backend.enable_truncation(max_length, strategy="longest_first", direction=whole.truncation_side)
    padding = int(whole.pad_token_id)
    ends = whole.sep_token_id if whole.sep_token_id is not None else whole.eos_token_id
    separator = 0 if ends is None else int(_exchanged(np.array([ends]), padding)[0])
    facts = json.dumps([state, padding, ends, whole.truncation_side], sort_keys=True)
    return Tokenizer(
        length=max_length,
        vocabulary=1 + max(backend.get_vocab(with_added_tokens=True).values()),
        separator=separator,
        padding=padding,
        fingerprint=hashlib.sha256(facts.encode()).hexdigest(),
        _backend=backend,
    )


def tokenizer_of(modality: AnyModality) -> Tokenizer | None:
    """The tokenizer of a text modality that has one."""
    if not isinstance(modality, TextModality) or modality.preprocess.tokenizer is None:
        return None
    return load_tokenizer(modality.preprocess.tokenizer, modality.preprocess.max_length, modality.pair is not None)


def preprocessing_facts(modality: AnyModality) -> Mapping[str, Any]:
    """What a corpus fingerprint knows of how a modality is read: of a tokenizer what it does, not where it lies."""
    facts = {"kind": modality.kind, **modality.preprocess.model_dump(mode="json")}
    if isinstance(modality, TextModality):
        del facts["tokenizer"]
        tokenizer = tokenizer_of(modality)
        if tokenizer is not None:
            del facts["vocabulary"]
            facts |= {"tokenizer": tokenizer.fingerprint, "pair": modality.pair is not None}
    return facts
