from __future__ import annotations

import pytest
import torch
from torch import nn

from counterpoise.contracts import ConfigError, InputSpec
from counterpoise.functional import derived_seed
from counterpoise.models.encoders import DEFAULT_ENCODERS, ENCODERS, EncoderConfig, Frames, build_encoder
from counterpoise.models.heads import SumHead
from counterpoise.models.network import build_network

SPECS = {
    "audio": InputSpec("audio", (1, 17, 23)),
    "image": InputSpec("image", (3, 12, 10)),
    "frames": InputSpec("frames", (4, 3, 9, 9)),
    "text": InputSpec("text", (6,), vocabulary=50),
    "vector": InputSpec("vector", (11,)),
    "series": InputSpec("series", (20, 3)),
}


def example(spec: InputSpec, rows: int = 2) -> torch.Tensor:
    if spec.kind == "text":
        return torch.randint(1, spec.vocabulary, (rows, *spec.shape))
    return torch.randn(rows, *spec.shape)


PAIRS = [
    ("audio", "cnn"),
    ("image", "cnn"),
    ("frames", "cnn"),
    ("series", "conv1d"),
    ("text", "text"),
    ("audio", "resnet18"),
    ("image", "resnet18"),
    ("frames", "resnet18"),
    ("audio", "resnet50"),
    ("image", "resnet50"),
    ("frames", "resnet50"),
    *((kind, "mlp") for kind in SPECS if kind != "text"),
]


@pytest.mark.parametrize(("kind", "encoder"), PAIRS)
def test_every_kind_becomes_features_of_the_stated_width(kind: str, encoder: str) -> None:
    module = build_encoder(SPECS[kind], EncoderConfig(name=encoder))
    module.eval()
    found = module(example(SPECS[kind]))
    assert found.shape == (2, module.width) and found.dtype == torch.float32 and torch.isfinite(found).all()


# These depend on files or on larger inputs, and have tests of their own.
ELSEWHERE = [
    ("frames", "i3d"),
    ("text", "bert"),
    ("text", "transformers"),
    ("audio", "transformers"),
    *((kind, "torchvision") for kind in ("audio", "image", "frames")),
]


@pytest.mark.parametrize(
    ("kind", "encoder"), [(k, e) for k in SPECS for e in ENCODERS if (k, e) not in [*PAIRS, *ELSEWHERE]]
)
def test_other_kinds_are_refused(kind: str, encoder: str) -> None:
    with pytest.raises(ConfigError, match=f"encoder {encoder} takes"):
        build_encoder(SPECS[kind], EncoderConfig(name=encoder))


@pytest.mark.parametrize("kind", SPECS)
def test_every_kind_has_a_usual_encoder(kind: str) -> None:
    build_encoder(SPECS[kind], EncoderConfig(name=DEFAULT_ENCODERS[kind]))


@pytest.mark.parametrize(("channels", "parameters"), [(1, 11_170_240), (3, 11_176_512)])
def test_resnet18_has_the_published_size(channels: int, parameters: int) -> None:
    module = build_encoder(InputSpec("image", (channels, 32, 32)), EncoderConfig(name="resnet18"))
    assert sum(p.numel() for p in module.parameters()) == parameters
    assert module.width == 512


def test_resnet18_takes_frames_one_by_one_and_averages() -> None:
    spec = InputSpec("frames", (4, 3, 32, 32))
    module = build_encoder(spec, EncoderConfig(name="resnet18")).eval()
    assert isinstance(module, Frames)
    clip = example(spec, 2)
    one_by_one = torch.stack([module.encoder(clip[:, t]) for t in range(4)]).mean(dim=0)
    torch.testing.assert_close(module(clip), one_by_one, atol=1e-5, rtol=1e-4)


def test_the_small_cnn_knows_the_order_of_frames() -> None:
    module = build_encoder(SPECS["frames"], EncoderConfig(name="cnn"))
    clip = example(SPECS["frames"])
    assert module(clip).shape == (len(clip), module.width)
    assert not torch.allclose(module(clip), module(clip.flip(1)), atol=1e-3)


@pytest.mark.parametrize("norm", ["group", "batch", "none"])
def test_norm_is_a_choice(norm: str) -> None:
    for kind, encoder in (("image", "cnn"), ("series", "conv1d")):
        module = build_encoder(SPECS[kind], EncoderConfig(name=encoder, norm=norm, channels=(4, 6), width=5))
        assert module(example(SPECS[kind], 3)).shape == (3, 5)
        assert any(isinstance(m, nn.GroupNorm) for m in module.modules()) == (norm == "group")


def test_an_unknown_norm_is_refused() -> None:
    with pytest.raises(ConfigError, match="norm is 'layer'; choose group, batch or none"):
        build_encoder(SPECS["image"], EncoderConfig(name="cnn", norm="layer"))


def test_group_norm_takes_any_number_of_channels() -> None:
    module = build_encoder(SPECS["image"], EncoderConfig(name="cnn", channels=(12,)))
    assert module(example(SPECS["image"])).shape == (2, 128)


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        ("image", {"name": "resnet18", "width": 64}, "resnet18 has no setting width; its settings: weights"),
        ("text", {"name": "text", "weights": "a.pt"}, "text has no setting weights"),
        ("image", {"name": "resnet50", "model": "resnet18"}, "resnet50 has no setting model"),
        ("image", {"name": "cnn", "hidden": 64}, "cnn has no setting hidden; its settings: channels, norm, width"),
        ("vector", {"name": "mlp", "norm": "batch"}, "mlp has no setting norm"),
    ],
)
def test_settings_that_an_encoder_would_ignore_are_refused(kind: str, config: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_encoder(SPECS[kind], EncoderConfig(**config))  # type: ignore[arg-type]


def test_padding_of_texts_changes_nothing() -> None:
    module = build_encoder(SPECS["text"], EncoderConfig(name="text"))
    words = torch.tensor([[3, 4, 0, 0, 0, 0]])
    longer = torch.tensor([[3, 4, 0, 0, 0, 0, 0, 0]])
    torch.testing.assert_close(module(words), module(longer))
    assert torch.isfinite(module(torch.zeros(1, 6, dtype=torch.int64))).all()


def test_methods_with_equal_seeds_start_from_equal_encoders() -> None:
    inputs = {"audio": SPECS["audio"], "visual": SPECS["image"]}
    configs = {"audio": EncoderConfig(name="cnn"), "visual": EncoderConfig(name="cnn")}
    state = torch.random.get_rng_state()
    both = build_network(inputs, configs, lambda widths: SumHead(widths, 3), seed=5)
    assert torch.random.get_rng_state().equal(state)
    alone = build_network({"visual": inputs["visual"]}, {"visual": configs["visual"]}, lambda w: SumHead(w, 3), seed=5)
    for name, value in alone.encoders["visual"].state_dict().items():
        assert value.equal(both.encoders["visual"].state_dict()[name])
    assert derived_seed(5, "encoder", "audio") != derived_seed(5, "encoder", "visual")
