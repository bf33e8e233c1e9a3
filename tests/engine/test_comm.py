from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from counterpoise.engine.comm import SingleComm, current_comm
from counterpoise.models.norm import GlobalBatchNorm, has_batch_norm

Ranks = tuple[dict[str, Any], dict[str, Any]]


@pytest.fixture(scope="module")
def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ranks", Path(__file__).with_name("ranks.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_sums_are_the_same_on_every_worker_and_leave_the_input_alone(two_ranks: Ranks) -> None:
    for rank, seen in enumerate(two_ranks):
        assert seen["comm"]["sum"].tolist() == [3, 4]
        assert seen["comm"]["local"].tolist() == [1 + rank, 2]
        assert seen["comm"]["counts"].tolist() == [1, 10] and seen["comm"]["counts"].dtype == torch.int32
        assert (seen["comm"]["many"] == 3).all(), "more than what is sent in one message"


def test_gradients_are_summed_and_missing_ones_stay_missing(two_ranks: Ranks) -> None:
    for seen in two_ranks:
        first, missing, last = seen["comm"]["gradients"]
        assert (first == 3).all() and missing is None and last.tolist() == [30]
        assert seen["comm"]["extra"].tolist() == [1, 1]


def test_gradients_are_summed_while_others_are_made_and_the_sums_are_those_of_one_message(two_ranks: Ranks) -> None:
    for seen in two_ranks:
        for number, step in enumerate(seen["overlap"]):
            assert step["extra"].tolist() == [2, 1]
            for found, wanted in zip(step["gradients"], step["wanted"], strict=True):
                assert (found is None) == (wanted is None) == (number == 2 and wanted is None)
                assert wanted is None or found.equal(wanted)
        messages = [(step["during"], step["after"]) for step in seen["overlap"]]
        # One message for each of 4 parameters, 3 of them early; a pass that fills others is sent again.
        assert messages == [(0, 4), (3, 1), (2, 3), (2, 4), (3, 5), (4, 1)]


def test_objects_and_tensors_come_from_rank_0(two_ranks: Ranks) -> None:
    for seen in two_ranks:
        assert seen["comm"]["broadcast"] == {"from": 0, "none": None}
        assert seen["comm"]["shared"][0].tolist() == [0, 0, 0] and int(seen["comm"]["shared"][1]) == 7
    assert two_ranks[0]["comm"]["gather"] == [{"rank": 0}, {"rank": 1}]
    assert two_ranks[1]["comm"]["gather"] is None


def test_one_worker_needs_no_group() -> None:
    comm = current_comm()
    assert isinstance(comm, SingleComm) and (comm.rank, comm.world) == (0, 1)
    value = torch.tensor([1.0, 2.0])
    total = comm.sum(value)
    assert total.equal(value) and total.data_ptr() != value.data_ptr()
    assert comm.gather(3) == [3] and comm.broadcast("x") == "x"


@pytest.mark.parametrize(
    ("name", "make", "shape"),
    [
        ("2d", nn.BatchNorm2d, (8, 3, 4, 5)),
        ("1d", nn.BatchNorm1d, (8, 3)),
        ("series", nn.BatchNorm1d, (8, 3, 6)),
        ("3d", nn.BatchNorm3d, (8, 3, 2, 4, 5)),
    ],
)
def test_batch_norm_over_two_workers_equals_one_over_the_whole_batch(
    two_ranks: Ranks, program: ModuleType, name: str, make: type, shape: tuple[int, ...]
) -> None:
    x, norm = program.normalisation_problem(make, shape)
    weights = torch.linspace(-1, 1, x.numel()).view(shape)
    outs, gradients = [], []
    for _ in range(2):
        whole = x.clone().requires_grad_()
        out = norm(whole)
        (out * weights).sum().backward()
        outs.append(out.detach())
        gradients.append(whole.grad)
    norm.eval()
    found = [seen["norm"][name] for seen in two_ranks]

    def together(key: str) -> torch.Tensor:
        """Two steps of both workers in the order of the whole batch: 5 + 3 rows, then 4 + 4."""
        (a, b), (c, d) = (found[0][key].split([5, 4]), found[1][key].split([3, 4]))
        return torch.cat([a, c, b, d])

    torch.testing.assert_close(together("out"), torch.cat(outs), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together("input_gradient"), torch.cat(gradients), atol=1e-5, rtol=1e-5)
    for seen in found:
        for key, parameter in norm.named_parameters():
            torch.testing.assert_close(seen[f"gradient/{key}"], parameter.grad, atol=1e-5, rtol=1e-5)
        for key, buffer in norm.named_buffers():
            torch.testing.assert_close(seen[f"buffer/{key}"], buffer, atol=1e-5, rtol=1e-6)
        torch.testing.assert_close(seen["evaluated"], norm(x).detach(), atol=1e-5, rtol=1e-5)


def test_batch_norm_is_replaced_at_any_depth_under_the_same_names(two_ranks: Ranks) -> None:
    for seen in two_ranks:
        assert seen["comm"]["replaced"] and seen["comm"]["same_names"]


def test_batch_norm_of_one_worker_equals_torchs(program: ModuleType) -> None:
    x, norm = program.normalisation_problem(nn.BatchNorm2d, (8, 3, 4, 5))
    _, twin = program.normalisation_problem(nn.BatchNorm2d, (8, 3, 4, 5))
    layer = GlobalBatchNorm(twin, SingleComm())
    torch.testing.assert_close(layer(x), norm(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.running_var, norm.running_var, atol=1e-5, rtol=1e-6)
    assert has_batch_norm(nn.Sequential(layer)) and not has_batch_norm(nn.Sequential(nn.GroupNorm(1, 3)))
