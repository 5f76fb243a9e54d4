"""Copies of a model as ``nn.DataParallel`` makes them: they infer and train plain layers; reversible ones refuse.

``nn.DataParallel`` copies by CUDA alone. Here the copies are made by the steps that ``torch.nn.parallel.replicate``
takes, with the broadcast of parameters replaced by a sum with zero: what comes out is no leaf, as there.
"""

from __future__ import annotations

from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

from tests.distributed.test_data_parallel import batch_of, build, loss_of

COPIES = 2


def copies_of(network: nn.Module) -> list[Any]:
    modules = list(network.modules())
    # One kind of container hides from that walk; copies reach it as a child.
    modules += [child for module in modules for child in module.children() if child not in modules]
    copies: list[Any] = []
    for _ in range(COPIES):
        made: dict[nn.Module, Any] = {module: module._replicate_for_data_parallel() for module in modules}
        for module, copy in made.items():
            copy._former_parameters = OrderedDict()
            for key, child in module._modules.items():
                copy._modules[key] = None if child is None else made[child]
            for key, parameter in module._parameters.items():
                if parameter is None:
                    copy._parameters[key] = None
                else:
                    value = parameter + 0.0
                    setattr(copy, key, value)
                    copy._former_parameters[key] = value
        copies.append(made[network])
    return copies


def test_copies_train_plain_layers_to_the_same_gradients() -> None:
    model, expected = build(reversible=False), build(reversible=False)
    copies = copies_of(model)
    with ThreadPoolExecutor(COPIES) as pool:
        losses = list(pool.map(lambda copy, number: loss_of(copy, batch_of(number)), copies, range(COPIES)))
    torch.stack(losses).mean().backward()
    for number in range(COPIES):
        (loss_of(expected, batch_of(number)) / COPIES).backward()
    for (name, found), wanted in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert wanted.grad.norm() > 0
        assert (found.grad - wanted.grad).norm() <= 1e-5 * wanted.grad.norm(), name


def test_copies_infer() -> None:
    model = build().eval()
    with torch.no_grad():
        for number, copy in enumerate(copies_of(model)):
            ids = batch_of(number)
            assert torch.equal(copy(ids).logits, model(ids).logits)


def test_copies_refuse_to_train_reversible_layers() -> None:
    with pytest.raises(RuntimeError, match=r"nn\.DataParallel runs copies .*; use DistributedDataParallel"):
        loss_of(copies_of(build())[0], batch_of(0))
