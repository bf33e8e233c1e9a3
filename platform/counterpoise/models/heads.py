"""Heads: features of the modalities in, logits out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from counterpoise.contracts import Outputs, RefusedError
from counterpoise.functional import seeded_generator


class Head(nn.Module):
    """Turns the features of some or all modalities into logits; `fused` only when all are there."""

    def __init__(self, widths: Mapping[str, int], num_classes: int) -> None:
        super().__init__()
        self.widths = dict(widths)
        self.modalities = tuple(widths)
        self.num_classes = num_classes

    def forward(self, features: dict[str, Tensor]) -> Outputs:
        raise NotImplementedError

    def fuse_present(self, out: Outputs) -> Tensor:
        """Logits [B, K] of the modalities that `out` has, where others are missing: here the sum of their terms."""
        return torch.stack([out.unimodal[m] for m in self.present(out)]).sum(dim=0)

    def present(self, out: Outputs) -> list[str]:
        """The modalities that `out` has, in the head's order."""
        return [m for m in self.modalities if m in out.unimodal]

    def architecture(self) -> dict[str, Any]:
        """What a checkpoint must know to rebuild this head besides its weights."""
        return {}

    def restore(self, architecture: Mapping[str, Any]) -> None:
        """Bring the head into the shape that `architecture` of a checkpoint describes."""


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A Linear as nearly all released code initialises it: Xavier-normal weights, zero bias."""
    layer = nn.Linear(inputs, outputs)
    nn.init.xavier_normal_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ConcatHead(Head):
    """One Linear over the concatenated features, W = [W_1 .. W_M].

    Modality logits are the split W_m u_m + b / M, so that they add up to the fused logits exactly.
    """

    def __init__(self, widths: Mapping[str, int], num_classes: int) -> None:
        super().__init__(widths, num_classes)
        self.linear = linear(sum(widths.values()), num_classes)

    def forward(self, features: dict[str, Tensor]) -> Outputs:
        parts = dict(zip(self.modalities, self.linear.weight.split(list(self.widths.values()), dim=1), strict=True))
        bias = self.linear.bias / len(self.modalities)
        unimodal = {name: F.linear(u, parts[name], bias) for name, u in features.items()}
        complete = len(features) == len(self.modalities)
        fused = self.linear(torch.cat([features[m] for m in self.modalities], dim=1)) if complete else None
        return Outputs(features, unimodal, fused)

    def fuse_present(self, out: Outputs) -> Tensor:
        """As with features of zeros in place of the missing: sum_m W_m u_m + b, with all of the bias."""
        return self.linear(joined_features(out.features, self.widths))


def joined_features(features: Mapping[str, Tensor], widths: Mapping[str, int]) -> Tensor:
    """Features of all modalities side by side [B, sum of widths], zeros in place of those missing."""
    like = next(iter(features.values()))
    parts = [features[m] if m in features else like.new_zeros(len(like), width) for m, width in widths.items()]
    return torch.cat(parts, dim=1)


class SumHead(Head):
    """One Linear per modality; the fused logits are the sum of the modalities' logits."""

    def __init__(self, widths: Mapping[str, int], num_classes: int) -> None:
        super().__init__(widths, num_classes)
        self.linears = nn.ModuleDict({name: linear(width, num_classes) for name, width in widths.items()})

    def term(self, modality: str, features: Tensor) -> Any:
        """Logits of a modality [B, K]."""
        return self.linears[modality](features)

    def forward(self, features: dict[str, Tensor]) -> Outputs:
        unimodal = {name: self.term(name, u) for name, u in features.items()}
        complete = len(unimodal) == len(self.modalities)
        return Outputs(features, unimodal, sum(unimodal[m] for m in self.modalities) if complete else None)


class MultiHead(ConcatHead):
    """A joint concat head for the fused logits, and a private Linear per modality for its own (G-Blend, MMPareto)."""

    def __init__(self, widths: Mapping[str, int], num_classes: int) -> None:
        super().__init__(widths, num_classes)
        self.private = nn.ModuleDict({name: linear(width, num_classes) for name, width in widths.items()})

    def forward(self, features: dict[str, Tensor]) -> Outputs:
        out = super().forward(features)
        return Outputs(features, {name: self.private[name](u) for name, u in features.items()}, out.fused)


class Adapters(nn.Module):
    """Features of all modalities at one width D, the widest: a Linear for each that has another, none otherwise.

    The papers with layers shared by all modalities use encoders of one width, for which this is the identity.
    """

    def __init__(self, widths: Mapping[str, int]) -> None:
        super().__init__()
        self.width = max(widths.values())
        self.linears = nn.ModuleDict({m: linear(w, self.width) for m, w in widths.items() if w != self.width})

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {m: self.linears[m](u) if m in self.linears else u for m, u in features.items()}


class SharedHead(Head):
    """One classifier for the features of every modality: a Linear, or Linear-ReLU-Linear if `hidden` is given.

    Features come back adapted to one width; the fused logits are the sum of the modalities' logits.
    """

    def __init__(self, widths: Mapping[str, int], num_classes: int, hidden: int | None = None) -> None:
        super().__init__(widths, num_classes)
        self.adapters = Adapters(widths)
        self.width = self.adapters.width
        self.layers: nn.Module = (
            nn.Sequential(linear(self.width, hidden), nn.ReLU(), linear(hidden, num_classes))
            if hidden
            else linear(self.width, num_classes)
        )

    def forward(self, features: dict[str, Tensor]) -> Outputs:
        adapted = self.adapters(features)
        unimodal = {name: self.layers(u) for name, u in adapted.items()}
        complete = len(unimodal) == len(self.modalities)
        return Outputs(adapted, unimodal, sum(unimodal[m] for m in self.modalities) if complete else None)


class BoostedHead(Head):
    """A growing stack of configurable classifiers per modality (AUG, section 3.2 of the paper).

        l_t^m = Layer2(relu(A_t^m u^m + c_t^m))            Layer2 is one layer for all modalities and classifiers
        Z_t^m = l_1^m + w_m (l_2^m + .. + l_t^m)           logits of modality m: Z at t = n_m
        fused = sum_m alpha_m Z^m

    Memory for `capacity[m]` classifiers is set aside at the start. Those beyond `num_classifiers[m]` take no part in
    the forward pass and have no gradient, so optimizers pass them by; growing changes no shape, no parameter name
    and no optimizer group, and a checkpoint of any moment fits. Every classifier is a parameter of its own, so an
    Adam step counter starts when its classifier does.

    All classifiers of a modality are one matrix product: their Layer1 weights are joined to [n * hidden, D].
    """

    classifier_weight: Tensor
    confidence: Tensor

    def __init__(
        self,
        widths: Mapping[str, int],
        num_classes: int,
        *,
        hidden: int,
        initial: Mapping[str, int],
        capacity: Mapping[str, int],
        fusion_weights: Mapping[str, float],
        new_classifiers: str = "xavier",
        train_new: bool = True,
        weight: float = 1.0,
        learn_weights: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(widths, num_classes)
        self.hidden = hidden
        self.num_classifiers = {name: initial[name] for name in widths}
        self.fusion_weights = {name: float(fusion_weights[name]) for name in widths}
        self.layer1_weight = nn.ModuleDict()
        self.layer1_bias = nn.ModuleDict()
        for name, width in widths.items():
            weights, biases = nn.ParameterList(), nn.ParameterList()
            for index in range(capacity[name]):
                tensor, bias = torch.empty(hidden, width), torch.zeros(hidden)
                if index >= initial[name] and new_classifiers == "zero":
                    nn.init.zeros_(tensor)
                    bias.fill_(1e-12)  # relu has no gradient at 0: the layer would never leave it
                else:  # a generator of its own, so that capacity changes no other classifier's start
                    nn.init.xavier_normal_(tensor, generator=seeded_generator(seed, "classifier", name, index))
                trained = train_new or index < initial[name]
                weights.append(nn.Parameter(tensor, requires_grad=trained))
                biases.append(nn.Parameter(bias, requires_grad=trained))
            self.layer1_weight[name], self.layer1_bias[name] = weights, biases
        self.layer2 = linear(hidden, num_classes)
        self.weigher = WeightNetwork() if learn_weights else None
        self.register_buffer("classifier_weight", torch.tensor(float(weight)))
        self.register_buffer("confidence", torch.zeros(len(widths)))
        self.register_load_state_dict_pre_hook(_fit_capacity)

    def capacity(self, modality: str) -> int:
        return len(_layers(self.layer1_weight, modality))

    def grow(self, modality: str) -> None:
        """Switch on the next classifier of a modality."""
        count = self.num_classifiers[modality]
        assert count < self.capacity(modality), f"no room for classifier {count + 1} of {modality}"
        self.num_classifiers[modality] = count + 1

    def weights(self) -> Tensor:
        """w_m of every modality [M]; constants, or what the weight network makes of the confidence state."""
        if self.weigher is None:
            return self.classifier_weight.expand(len(self.modalities))
        with torch.no_grad():  # only the weight loss trains the weight network
            return self.weigher(self.confidence)

    def stack(self, modality: str, features: Tensor) -> Tensor:
        """Logits of every active classifier of a modality [B, n, K]."""
        count = self.num_classifiers[modality]
        weight = torch.cat(list(_layers(self.layer1_weight, modality))[:count])
        bias = torch.cat(list(_layers(self.layer1_bias, modality))[:count])
        hidden = torch.relu(F.linear(features, weight, bias)).view(len(features), count, self.hidden)
        return self.layer2(hidden)

    def forward(self, features: dict[str, Tensor]) -> Outputs:
        weights = dict(zip(self.modalities, self.weights().unbind(), strict=True))
        stacks = {name: self.stack(name, u) for name, u in features.items()}
        unimodal = {name: cumulative_logits(stack, weights[name]) for name, stack in stacks.items()}
        fused = self.fuse(unimodal) if len(unimodal) == len(self.modalities) else None
        return Outputs(features, unimodal, fused, stacks, {f"weight/{name}": weights[name] for name in features})

    def fuse(self, unimodal: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([self.fusion_weights[m] * unimodal[m] for m in self.modalities]).sum(dim=0)

    def fuse_present(self, out: Outputs) -> Tensor:
        """The terms of those present, with alpha_m scaled up to the sum of all: their mean, if alpha_m = 1 / M."""
        present = self.present(out)
        scale = sum(self.fusion_weights.values()) / sum(self.fusion_weights[m] for m in present)
        return torch.stack([self.fusion_weights[m] * scale * out.unimodal[m] for m in present]).sum(dim=0)

    def architecture(self) -> dict[str, Any]:
        return {"num_classifiers": dict(self.num_classifiers)}

    def restore(self, architecture: Mapping[str, Any]) -> None:
        counts = {name: int(architecture["num_classifiers"][name]) for name in self.modalities}
        for name, count in counts.items():
            if count > self.capacity(name):
                raise RefusedError(
                    f"the checkpoint has {count} classifiers of {name}, this experiment has room for "
                    f"{self.capacity(name)}; it needs at least the epochs it was started with"
                )
        self.num_classifiers = counts


def _layers(bank: nn.ModuleDict, modality: str) -> nn.ParameterList:
    layers = bank[modality]
    assert isinstance(layers, nn.ParameterList)
    return layers


def _fit_capacity(head: BoostedHead, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let a checkpoint fit that has more or less room, as one of a run with another number of epochs has.

    Classifiers that were never switched on are what their seed made them, on both sides.
    """
    for kind in ("layer1_weight", "layer1_bias"):
        for name in head.modalities:
            own = getattr(head, kind)[name]
            for key in [key for key in state if key.startswith(f"{prefix}{kind}.{name}.")]:
                if int(key.rsplit(".", 1)[1]) >= len(own):
                    del state[key]
            for index in range(head.num_classifiers[name], len(own)):
                state.setdefault(f"{prefix}{kind}.{name}.{index}", own[index].detach())


def cumulative_logits(stack: Tensor, weight: Tensor | float, upto: int | None = None) -> Tensor:
    """Z_t = l_1 + w (l_2 + .. + l_t) of a stack [B, n, K]; t defaults to n."""
    stack = stack[:, :upto]
    return stack[:, 0] if stack.shape[1] == 1 else stack[:, 0] + weight * stack[:, 1:].sum(dim=1)


class WeightNetwork(nn.Module):
    """AUG's learned classifier weights: one small network for all modalities, scalar state -> weight in (0, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(linear(1, 512), nn.ReLU(), linear(512, 64), nn.ReLU(), linear(64, 1))

    def forward(self, state: Tensor) -> Tensor:
        return torch.sigmoid(self.layers(state.unsqueeze(-1))).squeeze(-1)
