"""What the layers hand to one another. Everything else in the package may import this module.

Shape letters, the same everywhere: B batch, K classes, D width, M modalities, T frames, F frequency bins, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# One tensor per modality [B, ...], "label" [B] int64, and "row" [B] int64: the row's number within its split.
Batch = dict[str, "Tensor"]

# One line of records.jsonl, the truth that every table, picture and gauge is drawn from. All have `seq` (0, 1, ...),
# `time` (Unix seconds) and `kind`:
#   start     run, method, corpus, protocol (or null), modalities, classes (names), epochs (of all stages),
#             stages [{name, epochs, aside} (aside only where true)], batches (per epoch), samples {split: n},
#             parameters, workers, device, seed
#   epoch     epoch (1-based), stage (its name), lr,
#             train {loss, losses {term: mean}, accuracy {fused, <modality>}, score {<modality>}}: what was computed,
#             valid {loss, accuracy {fused, <modality>}, score} or null, gap (valid; best minus worst modality),
#             classifiers {<modality>: n} or {}, coefficients {name: mean}, best_epoch,
#             classifier_weights {<modality>: [of each, in order]} (only of methods that have others than 1),
#             seconds, data_wait_s, samples_per_s
#             rank_step_s (with several workers): median seconds of a step on each, without what it waits for others
#   decision  epoch, action, add [modalities], inputs {...}, classifiers {<modality>: n after it}
#   event     event ("resumed", "skipped_rows", "checkpoint_fallback", "interrupted", ...) and free fields; "failed" has
#             the error's text and its type, "resumed" epoch, batch and step, workers, workers_before if they were more
#             or fewer, and after: what ended the workers before, if that is known
#   end       summary (the content of summary.json)
Record = dict[str, Any]

LABEL = "label"
ROW = "row"


class CounterpoiseError(Exception):
    """A failure the user can act on: its text is the whole message, no traceback is needed."""

    exit_code = 1


class ConfigError(CounterpoiseError, ValueError):
    """A wrong name, key or value in an experiment, a card or on the command line."""

    exit_code = 2


class DataError(CounterpoiseError, ValueError):
    """A corpus that is missing, damaged, or not what its card says."""

    exit_code = 3


class ResourceError(CounterpoiseError):
    """Something the job needs is not there: a device, a Ray cluster, disk, a package."""

    exit_code = 4


class RefusedError(CounterpoiseError):
    """Refused for safety: a run name in use, an experiment changed under a run, a damaged checkpoint."""

    exit_code = 6


class NonFiniteLossError(CounterpoiseError):
    """The loss became NaN or infinite."""


class Interrupted(CounterpoiseError):
    """Stopped on request, with a checkpoint written. Exit 130 after SIGINT, 75 (requeue me) after SIGTERM."""

    exit_code = 130


class Moved(Interrupted):
    """Stopped, with a checkpoint, to go on with other workers or on other machines. Nothing has failed.

    why: a few words, for the run's records.
    """

    def __init__(self, text: str, why: str = "") -> None:
        super().__init__(text)
        self.why = why


@dataclass
class Outputs:
    """What one forward pass gives.

    features: pooled encoder features per modality [B, D_m].
    unimodal: logits per modality [B, K]; in sum-like heads they add up to `fused`.
    fused: logits of all modalities together [B, K], or None when the pass covered only some modalities.
    stacks: logits of every classifier of a modality [B, n_m, K]; only for heads that keep a stack.
    extra: whatever else a method's forward pass wants to hand to its losses.
    """

    features: dict[str, Tensor]
    unimodal: dict[str, Tensor]
    fused: Tensor | None = None
    stacks: dict[str, Tensor] = field(default_factory=dict)
    extra: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """A stretch of epochs with one purpose. Most methods have a single one, "train", as long as the run.

    name: may repeat. epochs: at least 1.
    fresh_optimizer: momentum and moments are forgotten when it begins.
    own_schedule: the schedule of the learning rate spans this stage alone. Otherwise it spans all stages of that
        kind together, and a stage aside takes the rates that the epochs it precedes would have.
    begin: the weights it begins with: the last, or those of the epoch selected so far.
    aside: a rehearsal. Network and optimizer are put back afterwards, and its epochs are never selected.
    selectable: its epochs may become the tested one.
    """

    name: str
    epochs: int
    fresh_optimizer: bool = False
    own_schedule: bool = False
    begin: Literal["last", "best"] = "last"
    aside: bool = False
    selectable: bool = True


@dataclass(frozen=True)
class Step:
    """Where in the run an update stands. All counts are of the whole run, not of one worker."""

    epoch: int  # 1-based, over all stages
    batch: int  # 0-based within the epoch
    index: int  # 0-based over the run
    phase: str  # which of the batch's updates this is
    batch_size: int  # samples of the global batch, over all workers
    share: float  # this worker's part of the global batch, 0..1; shares of all workers add up to 1
    rng: torch.Generator  # on the CPU, equal on every worker; draw anything that replicas must agree on from here
    start: int = 0  # where this worker's rows begin in the global batch
    num_batches: int = 1  # of the epoch
    stage: Stage = Stage("train", 1)
    stage_epoch: int = 1  # 1-based within the stage


@dataclass
class SplitStats:
    """Sums over one pass through a split, already reduced over all workers, and the means they give.

    `losses` and `scores` are sums over samples, `correct` counts; "fused" stands beside the modality names.
    """

    samples: int
    losses: dict[str, float]
    correct: dict[str, int]
    scores: dict[str, float]

    @property
    def loss(self) -> float:
        return sum(self.losses.values()) / max(self.samples, 1)

    @property
    def accuracy(self) -> dict[str, float]:
        return {name: n / max(self.samples, 1) for name, n in self.correct.items()}

    @property
    def mean_scores(self) -> dict[str, float]:
        return {name: s / max(self.samples, 1) for name, s in self.scores.items()}


@dataclass(frozen=True)
class EpochStats:
    """One finished epoch, as `Method.decide` sees it. It never holds anything of the test split."""

    epoch: int
    train: SplitStats
    valid: SplitStats | None
    stage: str = "train"

    @property
    def held_out(self) -> SplitStats:
        """Valid, or train where the corpus has no valid split."""
        return self.valid or self.train


@dataclass(frozen=True)
class EpochContext:
    """What a method may look at before an epoch begins and after it has ended. Never the test split.

    epoch, stage, stage_epoch: the epoch that begins or has ended, as in `Step`.
    history: all epochs that have ended, with sums over all workers: equal on every worker.
    read: `batches` below, as the loop provides it.
    """

    epoch: int
    stage: Stage
    stage_epoch: int
    history: Sequence[EpochStats]
    read: Callable[[str, float], Iterator[Batch]]

    def batches(self, split: Literal["train", "valid"], fraction: float = 1.0) -> Iterator[Batch]:
        """This worker's part of a split, on its device, without augmentation, in row order.

        fraction: of the rows, at least one; chosen anew every epoch, the same rows for any number of workers.
        Workers get different numbers of batches (even none), so collectives belong after the last one. A split that
        the corpus lacks has none.
        """
        return self.read(split, fraction)


@dataclass(frozen=True)
class Decision:
    """A change of course between epochs, made on rank 0 and applied everywhere.

    action: what kind of change, e.g. "assign_classifier". add: modalities that get one more classifier.
    inputs: the numbers that led to it, so that anybody can check the rule by hand.
    """

    epoch: int
    action: str
    add: tuple[str, ...] = ()
    inputs: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"add": list(self.add), "inputs": dict(self.inputs)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Decision:
        return cls(data["epoch"], data["action"], tuple(data["add"]), dict(data["inputs"]))


@dataclass(frozen=True)
class InputSpec:
    """The tensor of one modality, without the batch dimension, as the encoder will get it."""

    kind: str  # audio | image | frames | text | vector | series
    shape: tuple[int, ...]  # audio [1, F, T], image [C, H, W], frames [T, C, H, W], text [L], vector [D], series [T, C]
    vocabulary: int = 0  # text only: token ids lie in 0..vocabulary-1, 0 pads
    tokenizer: str = ""  # text only: fingerprint of the tokenizer; empty for hashed words
    separator: int = 0  # text only: id of the token that ends each text, 0 if there is none


class Comm(Protocol):
    """The collectives a method or the loop may use. One worker alone has a Comm too, so nobody asks how many."""

    rank: int
    world: int

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of `tensor` over all workers, as a new tensor on the same device."""
        ...

    def begin_gradients(self, kind: str) -> None:
        """Say that one backward pass follows, and no other before `sum_gradients`: sums may begin while it goes on.

        kind: passes of the same kind mostly fill the same gradients.
        """
        ...

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter], extra: Tensor) -> Tensor:
        """Replace every gradient that is not None by its sum over all workers (losses are already shares).

        `extra` [n] travels in the same message; its sum over workers is returned.
        """
        ...

    def broadcast(self, value: Any) -> Any:
        """Rank 0's JSON-like value, on every rank."""
        ...

    def broadcast_tensors(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite `tensors` in place with rank 0's."""
        ...

    def gather(self, value: Any) -> list[Any] | None:
        """Every rank's JSON-like value in rank order on rank 0, None elsewhere."""
        ...

    def barrier(self) -> None: ...


class DataSource(Protocol):
    """One worker's view of a corpus. Rank and world size are inside; the loop never asks for them.

    The order of training samples is a pure function of (seed, epoch) and the same for any number of workers:
    global batch b of an epoch is order[bounds[b]:bounds[b + 1]], and worker r of W gets the r-th of W nearly
    equal contiguous parts of it.
    """

    modalities: tuple[str, ...]
    classes: tuple[str, ...]
    inputs: Mapping[str, InputSpec]
    fingerprint: str
    selects_on: Literal["valid", "test"]  # test: the valid split is the test split, as a paper's protocol may have it

    def num_samples(self, split: str) -> int:
        """Rows of the split ("train", "valid" or "test") over all workers; 0 if the corpus has no such split."""
        ...

    def sample_ids(self, split: str) -> Sequence[str]: ...

    def labels(self, split: str) -> Any:
        """Labels of all rows of a split in row order, numpy int64 [N]."""
        ...

    def bounds(self) -> Sequence[int]:
        """Positions in the epoch's order where global train batches begin, and the end of the last one."""
        ...

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """This worker's part of every global batch of the epoch, from global batch `start` on."""
        ...

    def expect(self, epoch: int) -> None:
        """Say that the batches of an epoch will be asked for next, but for other splits: reading may begin."""
        ...

    def batches(self, split: str, rows: Sequence[int] | None = None) -> Iterator[Batch]:
        """This worker's part of a split, without augmentation; together the workers see every row exactly once.

        rows: only these rows, in this order; ascending order reads least.
        """
        ...

    def finish(self, batch: Batch) -> Batch:
        """What is left to do to a batch once it is on the device that trains."""
        ...

    def skipped(self) -> list[dict[str, Any]]:
        """Rows this worker could not decode since the last call: split, sample_id, modality, file, reason."""
        ...

    def preprocessing_state(self) -> dict[str, Any]:
        """What was learned from the train split (means, deviations), JSON-able, to be stored with a run."""
        ...

    def close(self) -> None: ...
