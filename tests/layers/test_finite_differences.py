"""Central differences in fp64, and the streams as rebuilt: judges that owe nothing to autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.layers.judges import rebuild_errors, slopes
from tests.layers.tools import MIXES, make_batch, make_mask, make_model, make_pair, take_step

CASES: dict[str, dict[str, Any]] = {
    **{mix: {"attn_layers": layers} for mix, layers in MIXES.items()},
    "keys count once, own buckets": {"lsh_allow_duplicate_attention": False, "lsh_attend_across_buckets": False},
    "bidirectional, masked": {"is_decoder": False},
    "exact": {"full_attention_below": 96},
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_slopes_of_the_loss(case: str) -> None:
    """Dropout masks repeat with the random state, buckets are held."""
    reversible, plain = make_pair(torch.float64, **CASES[case])
    batch = make_batch()
    if "masked" in case:
        batch["attention_mask"] = make_mask("scattered")
    expected = take_step(plain, **batch).grads
    grads, judged = slopes(reversible, **batch)
    assert judged.keys() == grads.keys() == expected.keys()
    for name, (direction, slope) in judged.items():
        assert abs(slope) > 1e-6, f"{name} is too flat to prove anything"
        for value in (grads[name], expected[name]):
            error = abs((value * direction).sum().item() - slope)
            # A loss near 3 in fp64 leaves the difference an absolute error of about 1e-12.
            assert error <= 1e-6 * abs(slope) + 1e-11, f"{name}: off by {error:.1e} of {slope:.1e}"


@pytest.mark.parametrize("std", [0.02, 0.3])
def test_every_block_gets_its_inputs_back_at_depth_24(std: float) -> None:
    """At the usual initialisation and at one that makes streams grow."""
    model = make_model(attn_layers=["local", "lsh"] * 12, initializer_range=std)
    errors = rebuild_errors(model, **make_batch(43), attention_mask=make_mask("left", 43))
    assert len(errors) == 24
    assert max(max(pair) for pair in errors) <= 1e-6
    # Many of them to the bit, so not one error that happens to be small.
    assert sum(error == 0.0 for pair in errors for error in pair) >= 12
