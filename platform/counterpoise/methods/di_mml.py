"""DI-MML: detached and interactive multimodal learning.

Fan, Xu, Wang, Liu, Guo. Detached and Interactive Multimodal Learning. ACM Multimedia 2024.

Stage "unimodal". Encoders share no loss but a classifier, and teach one another where they are sure of themselves:

    L = sum_m [CE(W_m u^m, y) + CE(W u^m, y)] + sum_{m != j} DUC(m -> j)              W is one for all modalities
    DUC(m -> j) = InfoNCE: CE over the batch of u^j_i . sg[u^m_b] / T1 on the dimensions E_mj, b = i is the right one

A dimension is effective for m if it tells classes (by the nearest class mean in that one dimension, over all of the
train split) better than the average dimension of m does. E_mj are those effective for m and not for j; they are found
once, when 20 of 150 epochs are over, and DUC begins then.

Stage "fusion". Encoders and classifiers are frozen; a Linear over the joined features learns with CE(z^0, y).

Prediction: sum_h w_h z^h over the classifiers W_m and the fusion one, w = softmax_h(max_k softmax(z^h)_k / T2).

Differs from the released code: classes are streamed instead of holding all rows times all classes; features for E are
those of images without augmentation; negatives are the rows of the whole batch, however many workers share it; DUC
without a dimension is 0 instead of log B. Stage "fusion" starts from the last epoch, as there.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import permutations

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from counterpoise.contracts import LABEL, Batch, Comm, ConfigError, EpochContext, Outputs, Stage, Step
from counterpoise.methods.base import Method, MethodConfig, Setting, evaluating, global_rows
from counterpoise.models.heads import Adapters, Head, joined_features, linear
from counterpoise.models.network import MultimodalNet

CHUNK = 64  # classes whose distances are held at a time


def nearest_mean_hits(features: Tensor, labels: Tensor, means: Tensor, chunk: int = CHUNK) -> Tensor:
    """For every dimension [D] how many rows are nearest, in it alone, to the mean of their class.

    features [B, D], means [K, D]; infinite for classes without rows. Of equally near classes the first counts.
    """
    best = torch.full_like(features, torch.inf)
    found = torch.full_like(features, -1, dtype=labels.dtype)
    for start in range(0, len(means), chunk):
        distance, nearest = (features.unsqueeze(1) - means[start : start + chunk]).abs().min(dim=1)
        closer = distance < best
        best, found = torch.where(closer, distance, best), torch.where(closer, nearest + start, found)
    return (found == labels.unsqueeze(1)).sum(dim=0)


def unidirectional_contrast(
    student: Tensor, teacher: Tensor, dimensions: Tensor, temperature: float, start: int = 0
) -> Tensor:
    """InfoNCE of a student [B', D] that learns from a teacher [B, D] on some dimensions [D], bool; 0 if there are none.

    Row i of the student belongs to row start + i of the teacher; all others are its negatives.
    """
    logits = (student * dimensions) @ teacher.detach().T / temperature
    own = torch.arange(start, start + len(student), device=student.device)
    return F.cross_entropy(logits, own) * dimensions.any()


def fuse_by_confidence(heads: Tensor, temperature: float) -> Tensor:
    """sum_h w_h z^h of logits [H, B, K], w = softmax over heads of max_k softmax(z^h)_k / temperature."""
    confidence = torch.softmax(heads, dim=-1).amax(dim=-1)
    return (torch.softmax(confidence / temperature, dim=0).unsqueeze(-1) * heads).sum(dim=0)


class DetachedHead(Head):
    """A Linear per modality, one for all modalities, and one over their joined features; features at one width.

    effective [M, D]: the dimensions that tell classes well, none until they are known.
    """

    effective: Tensor

    def __init__(self, widths: Mapping[str, int], num_classes: int, temperature: float) -> None:
        super().__init__(widths, num_classes)
        self.temperature = temperature
        self.adapters = Adapters(widths)
        width = self.adapters.width
        self.private = nn.ModuleDict({name: linear(width, num_classes) for name in widths})
        self.shared = linear(width, num_classes)
        self.fusion = linear(width * len(widths), num_classes)
        self.register_buffer("effective", torch.zeros(len(widths), width, dtype=torch.bool))

    def forward(self, features: dict[str, Tensor]) -> Outputs:
        adapted = self.adapters(features)
        out = Outputs(adapted, {name: self.private[name](u) for name, u in adapted.items()})
        out.extra = {f"shared/{name}": self.shared(u) for name, u in adapted.items()} | {"effective": self.effective}
        if len(adapted) == len(self.modalities):
            self.join(out)
        return out

    def join(self, out: Outputs) -> None:
        """Put the logits of the fusion classifier into `extra`, and the prediction into `fused`."""
        joined = self.fusion(joined_features(out.features, dict.fromkeys(self.modalities, self.adapters.width)))
        out.extra["fusion"] = joined
        out.fused = fuse_by_confidence(
            torch.stack([*(out.unimodal[m] for m in self.present(out)), joined]), self.temperature
        )

    def fuse_present(self, out: Outputs) -> Tensor:
        """The classifiers of those present, and the fusion classifier with features of zeros for the missing."""
        self.join(out)
        assert out.fused is not None
        return out.fused


class DIMMLConfig(MethodConfig):
    fusion_epochs: int | None = Field(
        None, ge=1, description="epochs of stage fusion; default (ours) 20 of 170 as released, scaled to the run"
    )
    contrast_after: int | None = Field(
        None, ge=1, description="epochs before DUC begins; default (ours) 20 of 150 as released, scaled to the stage"
    )
    shared_weight: float = Field(1.0, ge=0, description="weight of the shared classifier's loss (released)")
    contrast_weight: float = Field(1.0, ge=0, description="weight of DUC (released)")
    contrast_temperature: float = Field(50.0, gt=0, description="T1 (released, CREMA-D and ModelNet; AVE and UCF 10)")
    fusion_temperature: float = Field(1.0, gt=0, description="T2 (released, CREMA-D and UCF; AVE and ModelNet 3)")


class DIMML(Method[DIMMLConfig]):
    """Encoders train apart, teach one another their effective dimensions, then a fusion layer joins them frozen."""

    Config = DIMMLConfig
    paper = "Fan, Xu, Wang, Liu, Guo. ACM MM 2024"
    modality_predictions = "the modality's own classifier W_m u_m; parts: the fusion classifier without the others"
    beyond_two = (
        "ours: DUC for every ordered pair of modalities (teacher, student), on the dimensions effective for the "
        "teacher and not for the student; prediction over M + 1 classifiers. With two, the published terms"
    )
    released = (
        "Both agree on the method. The code finds effective dimensions on augmented images and keeps all rows times "
        "all classes in memory; here rows are not augmented and classes are streamed. Its DUC is a constant if there "
        "is no effective dimension, here 0. It selects on the test split."
    )
    min_modalities = 2

    def __init__(self, config: DIMMLConfig, setting: Setting, comm: Comm) -> None:
        super().__init__(config, setting, comm)
        fusion = config.fusion_epochs or max(1, round(setting.epochs * 20 / 170))
        if fusion >= setting.epochs:
            raise ConfigError(
                f"di_mml has {fusion} epochs of fusion after its unimodal ones; epochs is {setting.epochs}, it needs "
                f"{fusion + 1} or more"
            )
        unimodal = setting.epochs - fusion
        self.contrast_after = config.contrast_after or max(1, round(unimodal * 20 / 150))
        self._stages = (
            Stage("unimodal", unimodal, selectable=False),
            Stage("fusion", fusion, fresh_optimizer=True, own_schedule=True),
        )

    def stages(self) -> tuple[Stage, ...]:
        return self._stages

    def head(self, widths: Mapping[str, int]) -> Head:
        return DetachedHead(widths, self.setting.num_classes, self.config.fusion_temperature)

    def begin_epoch(self, net: MultimodalNet, context: EpochContext) -> None:
        if context.stage.name == "unimodal" and context.stage_epoch == self.contrast_after + 1:
            _head(net).effective.copy_(self._effective(net, context))
            self.comm.broadcast_tensors([_head(net).effective])

    def _effective(self, net: MultimodalNet, context: EpochContext) -> Tensor:
        """The dimensions in which more than the average number of train rows are nearest to their class's mean."""
        effective = _head(net).effective
        num_classes = self.setting.num_classes
        sums = torch.zeros(num_classes, *effective.shape, dtype=torch.float64, device=effective.device)
        counts = torch.zeros(num_classes, dtype=torch.float64, device=effective.device)
        hits = torch.zeros(effective.shape, dtype=torch.float64, device=effective.device)
        with evaluating(net):
            for batch in context.batches("train"):
                members = F.one_hot(batch[LABEL], num_classes).double()
                sums += torch.einsum("bk,bmd->kmd", members, self._features(net, batch).double())
                counts += members.sum(dim=0)
            sums, counts = self.comm.sum(sums), self.comm.sum(counts)
            means = torch.where(counts.view(-1, 1, 1) > 0, sums / counts.view(-1, 1, 1), torch.inf).float()
            for batch in context.batches("train"):
                for index, features in enumerate(self._features(net, batch).unbind(dim=1)):
                    hits[index] += nearest_mean_hits(features, batch[LABEL], means[:, index])
        hits = self.comm.sum(hits)
        return hits > hits.mean(dim=1, keepdim=True)

    def _features(self, net: MultimodalNet, batch: Batch) -> Tensor:
        """Features of all modalities at one width [B, M, D]."""
        features = net(batch).features
        return torch.stack([features[m] for m in self.modalities], dim=1)

    def forward(self, net: MultimodalNet, batch: Batch, step: Step) -> Outputs:
        if step.stage.name == "unimodal":
            return net(batch)
        with evaluating(net):
            out: Outputs = net(batch)
        _head(net).join(out)
        return out

    def losses(self, out: Outputs, batch: Batch, step: Step) -> dict[str, Tensor]:
        config, labels = self.config, batch[LABEL]
        if step.stage.name == "fusion":
            return {"fusion": F.cross_entropy(out.extra["fusion"], labels)}
        losses = {name: F.cross_entropy(logits, labels) for name, logits in out.unimodal.items()}
        for name in self.modalities:
            losses[f"shared/{name}"] = config.shared_weight * F.cross_entropy(out.extra[f"shared/{name}"], labels)
        if step.stage_epoch > self.contrast_after:
            features = torch.stack([out.features[m] for m in self.modalities], dim=1)
            teachers = dict(zip(self.modalities, global_rows(self.comm, features, step).unbind(dim=1), strict=True))
            effective = dict(zip(self.modalities, out.extra["effective"], strict=True))
            for teacher, student in permutations(self.modalities, 2):
                losses[f"contrast/{teacher}-{student}"] = config.contrast_weight * unidirectional_contrast(
                    out.features[student],
                    teachers[teacher],
                    effective[teacher] & ~effective[student],
                    config.contrast_temperature,
                    step.start,
                )
        return losses

    def parts(self, net: MultimodalNet, out: Outputs) -> dict[str, Tensor]:
        return {"fusion": out.extra["fusion"]}


def _head(net: MultimodalNet) -> DetachedHead:
    assert isinstance(net.head, DetachedHead)
    return net.head
