"""What holds during forward holds when it is computed again, and in compiled code."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.wrap.hand import batches, forward, gap, mlp, sgd
from tram_ds.algorithms.stepper import wrap
from tram_ds.models.output import Output


class Blocks(nn.Module):
    """Two layers, of which the second is the noise site; `how` its stack runs."""

    def __init__(self, how: str = "plain"):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.site, self.head = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.how = how

    def stack(self, x: Tensor) -> Tensor:
        return torch.tanh(self.site(torch.tanh(self.first(x))))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "plain":
            return self.head(self.stack(x))
        reentrant = self.how == "reentrant"
        return self.head(checkpoint(self.stack, x.requires_grad_(), use_reentrant=reentrant))


def trained(how: str, row: str, **options: Any) -> tuple[nn.Module, list[float]]:
    model = Blocks(how)
    stepper = wrap(model, sgd(model), row, noise_site=model.site, sigma=1.0, **options)
    return model, [float(stepper.step(batches(), forward).ascent_norm) for _ in range(2)]


@pytest.mark.parametrize("how", ["plain", "reentrant", "non_reentrant"])
@pytest.mark.parametrize("row", ["tram_fisher", "tram_x"])
def test_noise_in_a_checkpointed_block_is_there_when_it_is_computed_again(how, row) -> None:
    expected, norms = trained("plain", row)
    model, found = trained(how, row)
    assert found == pytest.approx(norms, rel=1e-6) and gap(expected, model) < 1e-6
    assert not model.site._forward_hooks, "no hook is left in the model"


def test_a_noised_and_a_clean_pass_through_one_recomputed_block_are_refused() -> None:
    """R3F differentiates both at once, and the recomputation cannot know whose it is."""
    with pytest.raises(ValueError, match=r"noise site lies in a checkpointed block.*noise_site"):
        trained("non_reentrant", "r3f")
    trained("plain", "r3f")


@pytest.mark.parametrize("how", ["whole", "in_place", "block"])
def test_noise_reaches_compiled_code(how: str) -> None:
    """Compiled, and run, before the hook is there: dynamo does not look for it again."""
    torch._dynamo.reset()
    found = []
    for compiled in (False, True):
        model: Any = Blocks()
        site = model.site
        run = model
        if compiled and how == "whole":
            run = torch.compile(model, backend="eager")
        elif compiled and how == "in_place":
            model.compile(backend="eager")
        elif compiled:
            model.site = torch.compile(model.site, backend="eager")
        with torch.no_grad():
            run(batches()[0][0])
        stepper = wrap(run, sgd(model), "tram_x", noise_site=model.site, sigma=0.5)
        found.append(float(stepper.step(batches(), forward).distance))
        assert not site._forward_hooks
    assert found[0] > 0 and found[1] == pytest.approx(found[0], rel=1e-5)


def test_a_site_that_the_forward_pass_does_not_call_is_refused() -> None:
    model = Blocks()
    with pytest.raises(ValueError, match=r"never reached noise_site \(Linear\)"):
        wrap(model, sgd(model), "tram_x", noise_site=nn.Linear(2, 2)).step(batches(), forward)


class Pair(NamedTuple):
    states: Tensor
    extra: int


class Returns(nn.Module):
    def __init__(self, kind: str):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.kind = nn.Linear(5, 8), kind

    def forward(self, x: Tensor) -> Any:
        h = self.layer(x)
        kinds: dict[str, Any] = {
            "tensor": h,
            "tuple": (h, 1),
            "list": [h],
            "named": Pair(h, 1),
            "dict": {"h": h},
            "integers": h.long(),
        }
        return kinds[self.kind]


def returning(kind: str) -> float:
    model = nn.ModuleDict({"site": Returns(kind), "head": mlp(d=8)})

    def run(m: Any, batch: Any) -> Any:
        out = m["site"](batch[0])
        h = out if isinstance(out, Tensor) else out["h"] if isinstance(out, dict) else out[0]
        return forward(m["head"], (h.float(), batch[1]))

    stepper = wrap(model, sgd(model), "tram_x", noise_site=model["site"], sigma=0.5)
    return float(stepper.step(batches(), run).distance)


def test_of_a_site_that_returns_several_things_the_first_is_noised() -> None:
    assert len({returning(kind) for kind in ("tensor", "tuple", "list", "named")}) == 1


@pytest.mark.parametrize("kind, words", [("dict", "returns a dict"), ("integers", "torch.int64")])
def test_a_site_that_returns_no_real_tensor_is_refused(kind: str, words: str) -> None:
    with pytest.raises(ValueError, match=f"{words}.*module"):
        returning(kind)


def test_logits_of_three_dimensions_count_every_position() -> None:
    """(B, T, C) is (B T, C): d is a mean over positions, and `counted` is flattened with it."""
    ids, found = torch.arange(8).view(2, 4), []
    for flat in (True, False):
        torch.manual_seed(0)
        model: Any = nn.Sequential(nn.Embedding(9, 6), nn.Tanh(), nn.Linear(6, 9))

        def run(m: Any, batch: Tensor, flat: bool = flat) -> Output:
            z, kept = m(batch), batch > 2
            loss = F.cross_entropy(z.flatten(0, 1), batch.flatten(), reduction="sum")
            if flat:
                z, kept = z.flatten(0, 1), kept.flatten()
            return Output(loss, 8, z, counted=kept)

        options = {"noise_site": model[0], "sigma": 0.5, "positions": "labelled"}
        found.append(float(wrap(model, sgd(model), "tram_x", **options).step([ids], run).distance))
    assert found[0] == found[1] > 0
