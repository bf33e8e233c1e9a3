"""Networks of the package transformers: BERT and its like over token ids, AST over spectrograms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from counterpoise import hub
from counterpoise.contracts import ConfigError, DataError, InputSpec, RefusedError

_SHOWN = 5


def configuration(model: str) -> Any:
    """The configuration of a model, given by folder, URI or name of the hub."""
    package = hub.transformers()
    with hub.folder(model, "configuration") as path:
        try:
            return package.AutoConfig.from_pretrained(path, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{model}: not the configuration of a model that transformers knows ({_line(error)})"
            ) from None


def network(model: str, config: Any, pretrained: bool, pooler: bool = True) -> nn.Module:
    """The network of a configuration, with the model's own weights or freshly initialised.

    pooler: whether its pooler is used, so that its weights must be there.

    Attention is computed step by step ("eager"): the fused kernels of GPUs add gradients in an order of their own.
    """
    package = hub.transformers()
    if not pretrained:
        return package.AutoModel.from_config(
            config, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
        )
    with hub.folder(model, "weights") as path:
        try:
            trunk, report = package.AutoModel.from_pretrained(
                path,
                config=config,
                dtype=torch.float32,
                attn_implementation="eager",
                trust_remote_code=False,
                weights_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise DataError(f"{model}: its weights cannot be read ({_line(error)})") from None
        except Exception as error:  # what torch and safetensors raise shares no class
            if "weights_only" in str(error) or "Unsupported" in str(error):
                raise RefusedError(
                    f"{model}: its weights hold more than tensors, and reading that could run code; "
                    "give a folder with safetensors"
                ) from None
            raise DataError(f"{model}: its weights cannot be read ({_line(error)})") from None
    _check(model, trunk, report, () if pooler else ("pooler.",))
    return trunk


def _check(model: str, trunk: nn.Module, report: dict[str, Any], unused: tuple[str, ...]) -> None:
    """DataError if weights are missing, of another shape or of another network. Those of a head for another task may be
    left over."""
    missing = [n for n in sorted(report["missing_keys"]) if not n.startswith(unused)]
    shapes = sorted(str(entry[0] if isinstance(entry, tuple) else entry) for entry in report["mismatched_keys"])
    own = set(trunk.state_dict())
    prefix = f"{getattr(trunk, 'base_model_prefix', '')}."
    parts = {n.split(".")[0] for n in own}
    unexpected = [
        n for n in sorted(report["unexpected_keys"]) if n.removeprefix(prefix).split(".")[0] in parts and n not in own
    ]
    problems = [
        f"{what}: {', '.join(names[:_SHOWN])}" + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        for what, names in (("missing", missing), ("of another shape", shapes), ("not in this network", unexpected))
        if names
    ]
    if problems:
        raise DataError(f"{model}: its weights are not those of its config.json; {'; '.join(problems)}")


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class TextTransformer(nn.Module):
    """Token ids [B, L] in, pooled features [B, D] out. Id 0 pads, and is left out of attention.

    pooling: cls, the last state of the first token; mean, over all tokens that do not pad; pooler, the model's own
    layer over the first token.
    Tokenizers that pad with another id p exchange p and 0 when a corpus is read; here they are exchanged back.
    Models that tell two texts apart (type_vocab_size > 1) get 0 up to the first separator and 1 after it.
    """

    def __init__(self, trunk: Any, spec: InputSpec, pooling: str) -> None:
        super().__init__()
        if pooling != "pooler" and getattr(trunk, "pooler", None) is not None:
            trunk.pooler = None
        self.trunk = trunk
        self.pooling = pooling
        self.padding = int(getattr(trunk.config, "pad_token_id", None) or 0)
        self.separator = spec.separator if (getattr(trunk.config, "type_vocab_size", None) or 0) > 1 else 0

    def forward(self, x: Tensor) -> Tensor:
        used = x != 0
        ids = x
        if self.padding:
            ids = torch.where(used, torch.where(x == self.padding, 0, x), self.padding)
        inputs = {"input_ids": ids, "attention_mask": used.long()}
        if self.separator:
            ends = (x == self.separator).long()
            inputs["token_type_ids"] = ((ends.cumsum(1) - ends) > 0).long() * used
        out = self.trunk(**inputs)
        if self.pooling == "pooler":
            return out.pooler_output
        states = out.last_hidden_state
        if self.pooling == "cls":
            return states[:, 0]
        weights = used.unsqueeze(2).to(states.dtype)
        return (states * weights).sum(1) / weights.sum(1).clamp(min=1)


class AudioTransformer(nn.Module):
    """Spectrograms [B, 1, F, T] in, the model's pooled features [B, D] out (Audio Spectrogram Transformer)."""

    def __init__(self, trunk: Any) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, x: Tensor) -> Tensor:
        return self.trunk(input_values=x.squeeze(1).transpose(1, 2)).pooler_output


def text_transformer(model: str, spec: InputSpec, pooling: str, pretrained: bool) -> TextTransformer:
    """A text model for the token ids of `spec`."""
    config = configuration(model)
    known = getattr(config, "vocab_size", None)
    if known is None:
        raise ConfigError(f"{model}: not a model of texts (it has no vocabulary)")
    if pretrained and not spec.tokenizer:
        raise ConfigError(
            f"{model} has learned the ids of its own tokenizer, and the card hashes words; "
            f"set preprocess: {{tokenizer: {model}}} on the card, or weights: none"
        )
    if spec.vocabulary > known:
        raise ConfigError(
            f"{model} knows {known} token ids, the card gives {spec.vocabulary}; set preprocess.tokenizer of the card "
            "to the model's own"
        )
    trunk = network(model, config, pretrained, pooler=pooling == "pooler")
    if pooling == "pooler" and getattr(trunk, "pooler", None) is None:
        raise ConfigError(f"{model} has no pooler; choose pooling cls or mean")
    return TextTransformer(trunk, spec, pooling)


def audio_transformer(model: str, spec: InputSpec, pretrained: bool) -> AudioTransformer:
    """An Audio Spectrogram Transformer for the spectrograms of `spec`."""
    config = configuration(model)
    if config.model_type != "audio-spectrogram-transformer":
        raise ConfigError(f"{model} is a {config.model_type}; of audio models, audio-spectrogram-transformer is known")
    _, bands, frames = spec.shape
    if pretrained and (config.num_mel_bins, config.max_length) != (bands, frames):
        raise ConfigError(
            f"{model} has learned spectrograms of {config.num_mel_bins} x {config.max_length}, the card gives "
            f"{bands} x {frames}; change mel, seconds and hop_length of the card, or set weights: none"
        )
    config.num_mel_bins, config.max_length = bands, frames
    return AudioTransformer(network(model, config, pretrained))
