"""Text that a tokenizer of Hugging Face reads, alone or in pairs."""

from __future__ import annotations

import copy
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
import yaml

from counterpoise.config import resolve
from counterpoise.contracts import ConfigError, ResourceError
from counterpoise.data import card as cards
from counterpoise.data.check import check_corpus
from counterpoise.data.decode import DecodeError, Decoder, decode_cell, input_spec
from counterpoise.data.index import fingerprint, open_splits
from counterpoise.data.loader import LocalData
from counterpoise.data.options import DataOptions
from counterpoise.data.tokens import load_tokenizer, preprocessing_facts
from counterpoise.engine.again import evaluate_run
from counterpoise.engine.comm import SingleComm
from counterpoise.engine.job import Job, execute
from counterpoise.engine.run import RunFolder
from counterpoise.models.encoders import EncoderConfig, build_encoder

from .conftest import CARD, write_corpus

transformers = pytest.importorskip("transformers")

VOCABULARY = (
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    *("red", "green", "blue", "train", "valid", "test", "number", "run", "##ning", "##s", "a", "!", "$", "t"),
    *(str(i) for i in range(10)),
    *(f"##{i}" for i in range(10)),
)
ID = {piece: i for i, piece in enumerate(VOCABULARY)}


@pytest.fixture(scope="module")
def wordpiece(tmp_path_factory: pytest.TempPathFactory) -> str:
    """As models of 2019 come: a list of pieces and a configuration."""
    place = tmp_path_factory.mktemp("tokenizers") / "bert"
    place.mkdir()
    (place / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    (place / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (place / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 512})
    )
    return str(place)


@pytest.fixture(scope="module")
def pads_with_one(tmp_path_factory: pytest.TempPathFactory) -> str:
    """As RoBERTa's: <s> is 0 and <pad> is 1, and two </s> stand between the texts of a pair."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["<s>", "<pad>", "</s>", "<unk>", "red", "green", "blue"]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    place = tmp_path_factory.mktemp("tokenizers") / "roberta"
    special = {"bos_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(place)
    return str(place)


def text(place: str, length: int = 8, pair: str | None = None) -> cards.TextModality:
    preprocess = cards.TextPreprocess(tokenizer=place, max_length=length)
    return cards.TextModality(kind="text", column="t", pair=pair, preprocess=preprocess)


def pieces(ids: np.ndarray) -> list[str]:
    return [VOCABULARY[i] for i in ids.tolist()]


def test_text_becomes_the_pieces_of_the_tokenizer(wordpiece: str) -> None:
    ids = decode_cell("Running RED reds!", text(wordpiece))
    assert pieces(ids) == ["[CLS]", "run", "##ning", "red", "red", "##s", "!", "[SEP]"]
    assert ids.dtype == np.int32
    assert pieces(decode_cell(b"red", text(wordpiece, 5))) == ["[CLS]", "red", "[SEP]", "[PAD]", "[PAD]"]
    assert pieces(decode_cell("red blue red blue", text(wordpiece, 4))) == ["[CLS]", "red", "blue", "[SEP]"]


def test_pairs_are_cut_from_the_longer_text(wordpiece: str) -> None:
    ids = decode_cell(["red green blue red", "a"], text(wordpiece, 7, pair="target"))
    assert pieces(ids) == ["[CLS]", "red", "green", "blue", "[SEP]", "a", "[SEP]"]


@pytest.mark.parametrize("pair", [None, "green blue green blue green"])
@pytest.mark.parametrize("kind", ["wordpiece", "pads_with_one"])
def test_ids_are_those_of_transformers(kind: str, pair: str | None, request: pytest.FixtureRequest) -> None:
    place = request.getfixturevalue(kind)
    theirs = transformers.AutoTokenizer.from_pretrained(place)
    for words in ("red", "blue green red unheard", "red " * 30):
        encoded = theirs(words, pair, truncation="longest_first", max_length=12, padding="max_length")
        ids = decode_cell(words if pair is None else [words, pair], text(place, 12, "p" if pair else None))
        assert (ids != 0).astype(int).tolist() == encoded["attention_mask"]
        expected = np.array(encoded["input_ids"])
        if theirs.pad_token_id == 1:
            expected = np.select([expected == 0, expected == 1], [1, 0], expected)
        assert ids.tolist() == expected.tolist()


def test_the_encoder_is_told_what_the_ids_mean(wordpiece: str, pads_with_one: str) -> None:
    spec = input_spec(text(wordpiece, 9))
    assert (spec.kind, spec.shape, spec.vocabulary, spec.separator) == ("text", (9,), len(VOCABULARY), ID["[SEP]"])
    assert spec.tokenizer == load_tokenizer(wordpiece, 9).fingerprint and len(spec.tokenizer) == 64
    assert input_spec(text(pads_with_one)).separator == 2
    hashed = input_spec(cards.TextModality(kind="text", column="t"))
    assert (hashed.vocabulary, hashed.tokenizer, hashed.separator) == (20000, "", 0)


def test_ids_of_a_corpus_reach_the_model_as_the_model_knows_them(pads_with_one: str, tmp_path: Path) -> None:
    config = transformers.RobertaConfig(
        vocab_size=7, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=20, pad_token_id=1, type_vocab_size=1,
    )  # fmt: skip
    model = transformers.RobertaModel(config).eval()
    model.save_pretrained(tmp_path)
    modality = text(pads_with_one, 9, pair="p")
    encoder = build_encoder(input_spec(modality), EncoderConfig(name="transformers", model=str(tmp_path))).eval()
    ids = torch.from_numpy(decode_cell(["red blue", "green"], modality).astype(np.int64))[None]
    theirs = transformers.AutoTokenizer.from_pretrained(pads_with_one)
    plain = theirs("red blue", "green", return_tensors="pt", return_token_type_ids=False)
    torch.testing.assert_close(encoder(ids), model(**plain).last_hidden_state[:, 0])


# --- what cannot be read


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("", "no words"),
        (" \n ", "no words"),
        (3, "int instead of text"),
        (None, "missing"),
        (b"\xff", "not UTF-8"),
        ("x" * 1_000_001, "1000001 characters"),
    ],
)
def test_text_that_cannot_be_read_says_why(value: Any, reason: str, wordpiece: str) -> None:
    with pytest.raises(DecodeError, match=reason):
        decode_cell(value, text(wordpiece))
    for cell in ([value, "red"], ["red", value]):
        with pytest.raises(DecodeError, match=reason):
            decode_cell(cell, text(wordpiece, pair="p"))


def test_tokenizers_that_will_not_do_say_why(wordpiece: str, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    with pytest.raises(ConfigError, match=r"max_length is 2; .* adds 2 special tokens, so give 3 or more"):
        input_spec(text(wordpiece, 2))
    with pytest.raises(ConfigError, match="give 5 or more"):
        input_spec(text(wordpiece, 4, pair="p"))
    with pytest.raises(ResourceError, match="/nowhere: no such folder"):
        input_spec(text("/nowhere"))
    with pytest.raises(ResourceError, match="holds no tokenizer of a model"):
        input_spec(text(str(tmp_path)))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="no tokenizer that transformers can read"):
        input_spec(text(str(tmp_path)))
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path / "bare")
    with pytest.raises(ConfigError, match="no token for padding"):
        input_spec(text(str(tmp_path / "bare")))


def test_a_name_that_is_not_in_the_cache_says_how_to_give_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ResourceError, match=r"the tokenizer of 'a/b' is not in .* give its folder"):
        input_spec(text("a/b"))


@pytest.mark.parametrize(
    ("modality", "message"),
    [
        ({"preprocess": {"tokenizer": "./t", "vocabulary": 9}}, "give tokenizer or vocabulary"),
        ({"pair": "b"}, "pair needs preprocess.tokenizer"),
        ({"pair": "a", "preprocess": {"tokenizer": "./t"}}, "pair and column are both 'a'"),
        ({"preprocess": {"tokeniser": "./t"}}, "did you mean 'tokenizer'"),
    ],
)
def test_cards_that_contradict_themselves_are_refused(modality: dict[str, Any], message: str) -> None:
    card = {**CARD, "modalities": {"text": {"kind": "text", "column": "a", **modality}}}
    with pytest.raises(ConfigError, match=message):
        cards.parse_card(json.dumps(card).encode(), "corpus.yaml")


# --- places


def test_a_folder_of_the_card_is_found_from_anywhere(wordpiece: str, tmp_path: Path) -> None:
    card = {**CARD, "modalities": {"text": {"kind": "text", "column": "a", "preprocess": {"tokenizer": "./own/bert"}}}}
    for location, found in (
        (f"{tmp_path}/corpus.yaml", f"{tmp_path}/own/bert"),
        ("s3://bucket/tiny/corpus.yaml", "s3://bucket/tiny/own/bert"),
    ):
        parsed = cards.parse_card(json.dumps(card).encode(), location)
        assert parsed.select(None)["text"].preprocess.tokenizer == found  # type: ignore[union-attr]
        assert parsed.modalities["text"].preprocess.tokenizer == "./own/bert", "the card itself stays movable"  # type: ignore[union-attr]


def test_a_tokenizer_in_object_storage_is_the_same(wordpiece: str) -> None:
    remote = fsspec.filesystem("memory")
    for file in Path(wordpiece).iterdir():
        remote.pipe(f"/tokens/{file.name}", file.read_bytes())
    there, here = load_tokenizer("memory://tokens", 8), load_tokenizer(wordpiece, 8)
    assert there.fingerprint == here.fingerprint
    assert np.array_equal(there("red blue"), here("red blue"))  # type: ignore[arg-type]


# --- fingerprints


def test_the_tokenizer_belongs_to_the_fingerprint_and_its_place_does_not(wordpiece: str, tmp_path: Path) -> None:
    first = preprocessing_facts(text(wordpiece))
    copied = tmp_path / "copy"
    copied.mkdir()
    for file in Path(wordpiece).iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    assert preprocessing_facts(text(str(copied))) == first
    assert preprocessing_facts(text(wordpiece, 9)) != first
    assert preprocessing_facts(text(wordpiece, pair="p")) != first
    other = tmp_path / "other"
    other.mkdir()
    for file in Path(wordpiece).iterdir():
        (other / file.name).write_text(file.read_text().replace("green", "grean"))
    assert preprocessing_facts(text(str(other))) != first


def test_hashed_words_have_the_fingerprint_they_always_had() -> None:
    modality = cards.TextModality(kind="text", column="t")
    assert preprocessing_facts(modality) == {"kind": "text", "max_length": 32, "vocabulary": 20000}


# --- corpora


@pytest.fixture
def tokenized(rows: dict[str, list[dict[str, Any]]], wordpiece: str, tmp_path: Path) -> cards.Card:
    """The tiny corpus with a tokenizer beside its card and a second text in a column of its own."""
    own = tmp_path / "corpus" / "tokenizer"
    own.mkdir(parents=True)
    for file in Path(wordpiece).iterdir():
        (own / file.name).write_bytes(file.read_bytes())
    more = copy.deepcopy(rows)
    for split in more.values():
        for row in split:
            row["target"] = row["text"].split()[0]
    kind = {"kind": "text", "column": "text", "preprocess": {"tokenizer": "./tokenizer", "max_length": 10}}
    card = CARD | {"modalities": {"text": kind | {"pair": "target"}, "vector": CARD["modalities"]["vector"]}}
    return write_corpus(tmp_path / "corpus", more, card=card)


def batches(card: cards.Card, **options: Any) -> list[dict[str, torch.Tensor]]:
    data = LocalData(card, batch_size=16, seed=3, options=DataOptions.model_validate(options))
    return list(data.train_batches(1)) + list(data.batches("test"))


def test_a_corpus_of_pairs_is_checked_and_read(tokenized: cards.Card) -> None:
    report = check_corpus(tokenized)
    assert report.ok and report.inputs["text"] == [10]
    found = batches(tokenized, cache="off", decode_threads=4)
    row = pieces(found[-1]["text"][0].numpy())
    assert row[0] == "[CLS]" and row.count("[SEP]") == 2 and "test" in row
    for one, two in zip(found, batches(tokenized, cache="on"), strict=True):
        assert one["text"].equal(two["text"]) and one["text"].dtype == torch.int64


def test_a_column_of_pairs_that_is_not_there_is_named(tokenized: cards.Card) -> None:
    file = Path(tokenized.location)
    file.write_text(file.read_text().replace("pair: target", "pair: targit"))
    report = check_corpus(cards.load_card(str(file)))
    assert any("no column 'targit', did you mean 'target'?" in e for e in report.errors)


def test_fingerprints_of_a_corpus_follow_its_tokenizer(tokenized: cards.Card) -> None:
    before = fingerprint(tokenized, open_splits(tokenized))
    folder = Path(tokenized.folder) / "tokenizer"
    assert fingerprint(tokenized, open_splits(tokenized)) == before
    (folder / "vocab.txt").write_text((folder / "vocab.txt").read_text().replace("number", "nomber"))
    load_tokenizer.cache_clear()
    assert fingerprint(tokenized, open_splits(tokenized)) != before


def test_decoders_work_in_threads_and_in_other_processes(wordpiece: str) -> None:
    decoder = Decoder({"text": text(wordpiece, 12, pair="p")}, {})
    cells = [{"text": [f"red number {i}", "blue"]} for i in range(64)]
    alone = [decoder(c)["text"].tolist() for c in cells]
    with ThreadPoolExecutor(8) as pool:
        assert [a["text"].tolist() for a in pool.map(decoder, cells)] == alone
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as processes:
        assert processes.submit(decoder, cells[7]).result(timeout=120)["text"].tolist() == alone[7]


def test_a_run_trains_a_text_model_and_is_evaluated_without_its_weights(tokenized: cards.Card, tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=len(VOCABULARY), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=10,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    content = {
        "corpus": tokenized.location,
        "modalities": {"text": {"name": "bert", "model": str(tmp_path / "bert")}, "vector": "mlp"},
        "method": "joint",
        "batch_size": 20,
        "epochs": 2,
    }
    experiment, provenance = resolve(content)
    saved = yaml.safe_dump(experiment.to_json())
    folder = RunFolder.create(
        str(tmp_path), "run", experiment_text=saved, provenance=provenance, manifest={"run": "run"}
    )
    summary = execute(Job(experiment.to_json(), folder.uri), SingleComm())
    assert summary is not None
    (tmp_path / "bert" / "model.safetensors").unlink()
    found = evaluate_run(folder.uri, "test", device="cpu")
    assert found["samples"] == 31 and found["accuracy"] == summary["test"]["accuracy"]
