"""Text and audio models of transformers, made small here: a configuration, a vocabulary, random weights."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from counterpoise.contracts import ConfigError, CounterpoiseError, DataError, InputSpec, RefusedError, ResourceError
from counterpoise.models.encoders import EncoderConfig, build_encoder

transformers = pytest.importorskip("transformers")

BERT = {
    "model_type": "bert", "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 12, "type_vocab_size": 2, "pad_token_id": 0,
}  # fmt: skip
ROBERTA = BERT | {"model_type": "roberta", "type_vocab_size": 1, "pad_token_id": 1, "max_position_embeddings": 14}
AST = {
    "model_type": "audio-spectrogram-transformer", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 24, "num_mel_bins": 32, "max_length": 40, "patch_size": 8,
}  # fmt: skip
WORDS = InputSpec("text", (8,), vocabulary=40)
PIECES = InputSpec("text", (8,), vocabulary=40, tokenizer="0123", separator=3)
TEXT = torch.tensor([[2, 10, 11, 3, 12, 3, 0, 0], [2, 10, 11, 12, 13, 14, 15, 3]])


def folder(place: Path, config: dict[str, Any], seed: int | None = None, **more: Any) -> str:
    """A folder with a configuration and, with a seed, weights."""
    place.mkdir(exist_ok=True)
    (place / "config.json").write_text(json.dumps(config))
    if seed is not None:
        torch.manual_seed(seed)
        model = transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(place))
        model.save_pretrained(place, **more)
    return str(place)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return folder(tmp_path_factory.mktemp("models") / "bert", BERT, seed=0)


def encoder(spec: InputSpec, model: str | None, name: str = "transformers", **settings: Any) -> nn.Module:
    return build_encoder(spec, EncoderConfig(name=name, model=model, **settings)).eval()


def original(place: str) -> Any:
    return transformers.AutoModel.from_pretrained(place, attn_implementation="eager").eval()


def test_a_model_with_its_weights_gives_its_first_token(bert: str) -> None:
    segments = torch.tensor([[0, 0, 0, 0, 1, 1, 0, 0], [0] * 8])
    expected = original(bert)(input_ids=TEXT, attention_mask=(TEXT != 0).long(), token_type_ids=segments)
    module = encoder(PIECES, bert)
    assert module.width == 16
    torch.testing.assert_close(module(TEXT), expected.last_hidden_state[:, 0])
    torch.testing.assert_close(encoder(PIECES, bert, name="bert")(TEXT), expected.last_hidden_state[:, 0])
    torch.testing.assert_close(encoder(PIECES, bert, pooling="pooler")(TEXT), expected.pooler_output)
    first = expected.last_hidden_state[0, :6].mean(0)
    torch.testing.assert_close(encoder(PIECES, bert, pooling="mean")(TEXT)[0], first)


def test_the_second_text_is_another_segment_than_the_first(bert: str) -> None:
    one_segment = InputSpec("text", (8,), vocabulary=40, tokenizer="0123")
    told, untold = encoder(PIECES, bert)(TEXT), encoder(one_segment, bert)(TEXT)
    assert not torch.allclose(told[0], untold[0]), "a pair"
    torch.testing.assert_close(told[1], untold[1])


@pytest.mark.parametrize("config", [BERT, ROBERTA], ids=["bert", "roberta"])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_padding_changes_nothing(config: dict[str, Any], pooling: str, tmp_path: Path) -> None:
    module = encoder(PIECES, folder(tmp_path / "m", config), weights="none", pooling=pooling)
    short = torch.tensor([[2, 10, 11, 3]])
    padded = torch.nn.functional.pad(short, (0, 4))
    torch.testing.assert_close(module(padded), module(short))


def test_ids_that_were_exchanged_for_padding_are_exchanged_back(tmp_path: Path) -> None:
    place = folder(tmp_path / "roberta", ROBERTA, seed=0)
    stored = torch.tensor([[1, 10, 11, 2, 0, 0]])  # <s> is 0 and <pad> is 1 in this model
    ids = torch.tensor([[0, 10, 11, 2, 1, 1]])
    expected = original(place)(input_ids=ids, attention_mask=(ids != 1).long()).last_hidden_state[:, 0]
    torch.testing.assert_close(encoder(PIECES, place)(stored), expected)


def test_gradients_reach_every_weight(bert: str) -> None:
    for pooling in ("cls", "mean", "pooler"):
        module = encoder(PIECES, bert, pooling=pooling).train()
        module(TEXT).square().sum().backward()
        assert [n for n, p in module.named_parameters() if p.grad is None] == []


def test_weights_are_float32_whatever_they_were_saved_as(tmp_path: Path) -> None:
    place = folder(tmp_path / "half", BERT)
    config = transformers.AutoConfig.from_pretrained(place)
    transformers.AutoModel.from_config(config).half().save_pretrained(place)
    assert {p.dtype for p in encoder(PIECES, place).parameters()} == {torch.float32}


def test_a_head_for_another_task_is_left_over(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(transformers.BertConfig(**BERT))
    model.save_pretrained(tmp_path)
    expected = model.eval().bert(input_ids=TEXT, attention_mask=(TEXT != 0).long()).last_hidden_state[:, 0]
    spec = InputSpec("text", (8,), vocabulary=40, tokenizer="0123")
    torch.testing.assert_close(encoder(spec, str(tmp_path))(TEXT), expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(DataError, match=r"pooler"):
        encoder(spec, str(tmp_path), pooling="pooler")


# --- random initialisation


IN_ANOTHER_PROCESS = """
import sys, torch
from counterpoise.contracts import InputSpec
from counterpoise.models.encoders import EncoderConfig, build_encoder
torch.manual_seed(5)
config = EncoderConfig(name="transformers", model=sys.argv[1], weights="none")
module = build_encoder(InputSpec("text", (8,), vocabulary=40), config)
print(sum(p.detach().double().abs().sum().item() for p in module.parameters()).hex())
"""


def test_a_seed_gives_the_same_network_in_any_process(tmp_path: Path) -> None:
    place = folder(tmp_path / "bert", BERT)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2] / "platform")}
    command = [sys.executable, "-c", IN_ANOTHER_PROCESS, place]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr

    def total(seed: int) -> float:
        torch.manual_seed(seed)
        module = encoder(WORDS, place, weights="none")
        return sum(p.detach().double().abs().sum().item() for p in module.parameters())

    assert total(5) == float.fromhex(done.stdout.split()[-1]) != total(6)


def test_a_network_for_a_checkpoint_needs_the_configuration_alone(tmp_path: Path) -> None:
    place = folder(tmp_path / "bert", BERT)
    module = build_encoder(PIECES, EncoderConfig(name="transformers", model=place), pretrained=False)
    assert module.eval()(TEXT).shape == (2, 16)
    with pytest.raises(ResourceError, match="holds no weights of a model"):
        encoder(PIECES, place)


# --- audio


def test_an_audio_transformer_takes_the_spectrograms_of_the_card(tmp_path: Path) -> None:
    place = folder(tmp_path / "ast", AST, seed=0)
    spec = InputSpec("audio", (1, 32, 40))
    sound = torch.randn(2, *spec.shape)
    expected = original(place)(input_values=sound[:, 0].transpose(1, 2)).pooler_output
    torch.testing.assert_close(encoder(spec, place)(sound), expected)
    other = InputSpec("audio", (1, 24, 60))
    with pytest.raises(ConfigError, match=r"learned spectrograms of 32 x 40, the card gives 24 x 60.*weights: none"):
        encoder(other, place)
    assert encoder(other, place, weights="none")(torch.randn(2, 1, 24, 60)).shape == (2, 16)


# --- what is refused


@pytest.mark.parametrize(
    ("spec", "settings", "message"),
    [
        (WORDS, {}, r"the card hashes words; set preprocess: \{tokenizer: .*or weights: none"),
        (InputSpec("text", (8,), 41, "0123"), {}, "knows 40 token ids, the card gives 41"),
        (InputSpec("text", (13,), 40, "0123"), {}, "does not take inputs of 13: "),
        (PIECES, {"weights": "a.pt"}, "weights is 'a.pt'; give pretrained or none"),
        (InputSpec("image", (3, 8, 8)), {}, "encoder transformers takes text or audio, not image"),
        (InputSpec("audio", (1, 8, 8)), {}, "is a bert; of audio models"),
        (InputSpec("audio", (1, 8, 8)), {"name": "bert"}, "encoder bert takes text, not audio"),
        (PIECES, {"model": None}, "encoder transformers needs a model"),
        (PIECES, {"model": "a b"}, "model is 'a b'; give a folder"),
    ],
)
def test_what_does_not_fit_is_explained(spec: InputSpec, settings: dict[str, Any], message: str, bert: str) -> None:
    with pytest.raises(ConfigError, match=message):
        encoder(spec, **({"model": bert} | settings))


def test_a_model_that_has_no_pooler_says_so(tmp_path: Path) -> None:
    place = folder(
        tmp_path / "d", {"model_type": "distilbert", "vocab_size": 40, "dim": 16, "n_layers": 1, "n_heads": 2}
    )
    assert encoder(PIECES, place, weights="none")(TEXT).shape == (2, 16)
    with pytest.raises(ConfigError, match="has no pooler; choose pooling cls or mean"):
        encoder(PIECES, place, weights="none", pooling="pooler")


def test_weights_that_are_not_those_of_the_configuration_are_named(tmp_path: Path) -> None:
    place = folder(tmp_path / "bert", BERT, seed=0)
    folder(tmp_path / "bert", BERT | {"num_hidden_layers": 3})
    with pytest.raises(DataError, match=r"missing: encoder\.layer\.2\.attention"):
        encoder(PIECES, place)
    folder(tmp_path / "bert", BERT | {"num_hidden_layers": 1})
    with pytest.raises(DataError, match=r"not in this network: encoder\.layer\.1\.attention"):
        encoder(PIECES, place)
    folder(tmp_path / "bert", BERT | {"intermediate_size": 32})
    with pytest.raises(DataError, match=r"of another shape: encoder\.layer\.0\.intermediate"):
        encoder(PIECES, place)


class Attack:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


def test_weights_that_would_run_code_are_refused_and_run_none(tmp_path: Path) -> None:
    place, trace = folder(tmp_path / "bert", BERT), tmp_path / "it-ran"
    torch.save({"embeddings.word_embeddings.weight": Attack(trace)}, tmp_path / "bert" / "pytorch_model.bin")
    with pytest.raises(RefusedError, match="hold more than tensors"):
        encoder(PIECES, place)
    (tmp_path / "bert" / "pytorch_model.bin").write_bytes(pickle.dumps(Attack(trace)))
    with pytest.raises(CounterpoiseError):
        encoder(PIECES, place)
    assert not trace.exists()


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "it-ran"
    place = folder(tmp_path / "m", {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModel": "own.M"}})
    (tmp_path / "m" / "own.py").write_text(f"open({str(trace)!r}, 'w').close()\n")
    with pytest.raises(ConfigError, match="not the configuration of a model that transformers knows"):
        encoder(PIECES, place)
    assert not trace.exists()


def test_a_name_that_is_not_in_the_cache_says_how_to_give_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ResourceError, match=r"'google-bert/bert-base-uncased' is not in .*HF_HUB_OFFLINE.*give its folder"
    ):
        encoder(PIECES, None, name="bert")
    (tmp_path / "bert").mkdir()
    with pytest.raises(ResourceError, match=r"for the folder of that name here, write \./bert"):
        encoder(PIECES, "bert")


@pytest.mark.parametrize("place", ["./missing", "/nowhere/bert"])
def test_a_folder_that_is_not_there_is_named(place: str) -> None:
    with pytest.raises(ResourceError, match=f"{place}: no such folder"):
        encoder(PIECES, place)


def test_without_the_package_the_remedy_is_said(bert: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ResourceError, match="uv sync --extra text"):
        encoder(PIECES, bert)
