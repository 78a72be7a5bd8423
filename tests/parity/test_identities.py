"""Equalities between methods, and properties of one step that hold whatever the numbers are. One
process, fp32 or fp64."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.parity import problem
from tests.parity.worker import compare
from tram_ds.algorithms.radius import Scaled
from tram_ds.algorithms.shift import row_sizes
from tram_ds.algorithms.stepper import wrap
from tram_ds.algorithms.table import ALGORITHMS
from tram_ds.engines.shards import Shards, Span
from tram_ds.models.output import Output
from tram_ds.models.randomness import StepRandomness

pytestmark = pytest.mark.parity


def train(
    algorithm: str,
    steps: int = 3,
    micros: int = 2,
    dropout: float = 0.0,
    seed: int = problem.SEED,
    **options: Any,
) -> Any:
    """(final parameters, reports) of a short run."""
    model = problem.model(dropout)
    optimizer = problem.optimizer(algorithm)(model.parameters())
    built = wrap(model, optimizer, algorithm, seed=seed, **options)
    reports = [
        built.step(batches, problem.forward, problem.counts)
        for batches in problem.global_batches(steps, micros)
    ]
    return [p.detach().clone() for p in model.parameters()], reports


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def close(a: list[torch.Tensor], b: list[torch.Tensor], tolerance: float = 1e-6) -> bool:
    return all(
        float((x - y).abs().max()) <= tolerance * float(y.abs().max())
        for x, y in zip(a, b, strict=True)
    )


def test_fisher_without_curvature_is_sam() -> None:
    """eta = 0 makes F the identity: Eq. 8 becomes Eq. 2 with T = 1."""
    assert close(train("fsam", rho=0.3, eta=0.0)[0], train("sam", rho=0.3)[0])
    assert not close(train("fsam", rho=0.3, eta=50.0)[0], train("sam", rho=0.3)[0], 1e-4)


@pytest.mark.parametrize("tram", ("tram_prev", "tram_init", "tram_x"))
def test_tram_with_d_set_to_rho_is_asam(tram: str) -> None:
    assert same(train(tram, radius_min=0.5, radius_max=0.5)[0], train("asam", rho=0.5)[0])


@pytest.mark.parametrize("method", ("trpo", "r3f", "mesa"))
def test_a_penalty_of_weight_zero_is_base(method: str) -> None:
    assert same(train(method, weight=0.0)[0], train("base")[0])


@pytest.mark.parametrize("method", ("trpo", "r3f", "mesa"))
def test_asam_with_a_penalty_of_weight_zero_is_asam(method: str) -> None:
    assert same(train(f"asam_{method}", weight=0.0)[0], train("asam")[0])


def test_a_descent_on_noise_leaves_an_untied_word_embedding_as_it_is() -> None:
    """Bit for bit, as the released code does; on x it learns. All else learns either way."""
    for noise in (True, False):
        torch.manual_seed(0)
        table, head = torch.nn.Embedding(5, 4), torch.nn.Linear(4, 5)
        model = torch.nn.Sequential(table, head)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        built = wrap(model, optimizer, "tram_x", descent_noise=noise, noise_site=table)

        def forward(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, int, torch.Tensor]:
            logits = m(x)
            return torch.nn.functional.cross_entropy(logits, x, reduction="sum"), len(x), logits

        for _ in range(2):
            built.step([torch.arange(5)], forward)
        kept = [torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
        assert kept == [noise, False, False]
        assert table.weight.grad is None  # dropped after the step


def test_norms_that_are_not_trained_cannot_climb() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2).requires_grad_(False))
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"^algorithm.adaptive_filter = norms: .* set it to all"):
        wrap(model, optimizer, "asam", adaptive_filter="norms")


def test_a_pull_of_zero_is_base_bit_for_bit() -> None:
    assert same(train("l2sp", pull=0.0)[0], train("base")[0])
    assert not close(train("l2sp", pull=2.0)[0], train("base")[0], 1e-3)


def test_momentum_by_hand() -> None:
    """L = w^2 / 2, lr .1, momentum .9, rho .5, from w = 2: m = 2, w = 1.8; then the gradient at
    1.8 - .5 is 1.3, m = .9 * 2 + 1.3 = 3.1, w = 1.8 - .31."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 2.0)
    built = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), "msam", rho=0.5)

    def forward(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, int, None]:
        return (m(x).square() / 2).sum(), 1, None

    reports = [built.step([torch.ones(1, 1)], forward) for _ in range(2)]
    assert [float(r.loss) for r in reports] == pytest.approx([2.0, 1.3**2 / 2])
    assert [float(r.grad_norm) for r in reports] == pytest.approx([2.0, 1.3])
    assert float(reports[1].radius) == 0.5
    assert model.weight.item() == pytest.approx(1.49)


def test_a_random_weight_is_its_own_whatever_piece_it_is_asked_for_with() -> None:
    """Over blocks, and by the name, the step and the seed; N(0, 1)."""
    draws, like = StepRandomness(3, 7), torch.empty(70_000)
    whole = draws.weights("w", 0, like)
    assert torch.equal(draws.weights("w", 65_530, torch.empty(9)), whole[65_530:65_539])
    assert torch.equal(StepRandomness(3, 7, first=5).weights("w", 0, like), whole)
    assert not torch.equal(draws.weights("v", 0, like), whole)
    assert not torch.equal(StepRandomness(3, 8).weights("w", 0, like), whole)
    # the standard errors of mean and deviation are 1 / sqrt(n) and 1 / sqrt(2 n)
    assert abs(float(whole.mean())) < 4 / len(whole) ** 0.5
    assert abs(float(whole.std()) - 1.0) < 4 / (2 * len(whole)) ** 0.5


def test_noise_has_the_size_of_its_row_whatever_pieces_it_lies_in() -> None:
    """|W_i| / sqrt(n) of rows (3, 4) and 0: 5 / sqrt(2) and 0."""
    pieces = [torch.tensor([3.0]), torch.tensor([4.0, 0.0, 0.0])]
    layout = (Span("weight", 0, 1, (2, 2)), Span("weight", 1, 3, (2, 2)))
    engine: Any = SimpleNamespace(
        module=torch.nn.Linear(2, 2), device=torch.device("cpu"), shard_group=None
    )
    found = row_sizes(engine, Shards(pieces, layout))
    assert found["weight"].tolist() == pytest.approx([5 / 2**0.5, 0.0])
    assert list(found) == ["weight"]


def test_random_weights_that_would_be_something_else_are_refused() -> None:
    model = torch.nn.Linear(2, 3)
    model.weight.data = torch.randn(2, 3).T
    with pytest.raises(ValueError, match=r"^algorithm.name = rwp .*weight.*contiguous"):
        wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), "rwp")
    norm = torch.nn.LayerNorm(3)
    with pytest.raises(ValueError, match=r"^algorithm.name = rwp .*none is trained"):
        wrap(norm, torch.optim.SGD(norm.parameters(), lr=0.1), "rwp")


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.RMSprop(p, lr=0.1),
        lambda p: torch.optim.Adagrad(p, lr=0.1),
    ],
)
def test_momentum_needs_an_optimizer_that_has_one(optimizer: Any) -> None:
    model = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"^algorithm.name = msam .* keeps none: use Adam"):
        wrap(model, optimizer(model.parameters()), "msam")


def test_momentum_of_an_optimizer_that_shows_its_state_late() -> None:
    class Own(torch.optim.Optimizer):
        def __init__(self, parameters: Any):
            super().__init__(parameters, {"lr": 0.1})

        def step(self, closure: Any = None) -> None:
            pass

    model = torch.nn.Linear(1, 1)
    built = wrap(model, Own(model.parameters()), "msam")

    def forward(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, int, None]:
        return m(x).sum(), 1, None

    built.step([torch.ones(1, 1)], forward)
    with pytest.raises(ValueError, match="Own as it is set keeps none"):
        built.step([torch.ones(1, 1)], forward)


def test_a_pull_is_per_unit_of_one_learning_rate() -> None:
    """And never further than theta_0: lr lambda is at most 1."""
    model = torch.nn.Linear(2, 1)
    groups = [{"params": [model.weight], "lr": 0.1}, {"params": [model.bias], "lr": 0.2}]
    batch = [torch.ones(1, 2)]

    def forward(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, int, None]:
        return m(x).sum(), 1, None

    before = model.weight.detach().clone()
    with pytest.raises(ValueError, match=r"algorithm.pull .*learning rate.*one lr"):
        wrap(model, torch.optim.SGD(groups), "l2sp").step(batch, forward)
    far = wrap(model, torch.optim.SGD(model.parameters(), lr=0.5), "l2sp", pull=4.0)
    with pytest.raises(ValueError, match=r"algorithm.pull = 4: .* past theta_0: set it to 2 or"):
        far.step(batch, forward)
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("tram", ("tram_prev", "tram_init"))
def test_a_distance_of_zero_is_base_bit_for_bit(tram: str) -> None:
    """Without dropout theta_{-1} = theta_0 gives d = 0 at step 0, so epsilon = 0 and pass 2 is the
    plain gradient."""
    after, reports = train(tram, steps=1)
    assert float(reports[0].distance) == 0.0
    assert same(after, train("base", steps=1)[0])


def test_d_at_step_one_is_the_kl_between_two_saved_checkpoints() -> None:
    """sum over valid positions of KL(p_{theta_0} || p_{theta_1}) on the second batch / their
    number, from saved weights."""
    model = problem.model()
    built = wrap(model, torch.optim.SGD(model.parameters(), lr=problem.LR), "tram_prev", seed=0)
    first, second = problem.global_batches(2, 2)
    saved = [copy.deepcopy(model).double()]
    built.step(first, problem.forward)
    saved.append(copy.deepcopy(model).double())
    report = built.step(second, problem.forward)
    total, positions = 0.0, 0
    for batch in second:
        before, after = (problem.forward(m, batch).logits.log_softmax(-1) for m in saved)
        total += float((before.exp() * (before - after)).sum().detach())
        positions += len(before)
    assert float(report.distance) == pytest.approx(total / positions, rel=1e-4)
    assert float(report.distance) > 1e-6


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_batch_is_never_changed(name: str) -> None:
    batch = problem.batch(0, 0)
    copies, keys = {k: v.clone() for k, v in batch.items()}, list(batch)
    model = problem.model()
    wrap(model, problem.optimizer(name)(model.parameters()), name).step(
        [batch], problem.forward, problem.counts
    )
    assert list(batch) == keys
    assert all(torch.equal(batch[k], copies[k]) for k in keys)


@pytest.mark.parametrize("name", ("base", "asam", "trpo", "tram_prev"))
def test_loss_and_gradient_do_not_depend_on_micro_batch_size(name: str) -> None:
    """The same 8 rows as 1, 2 or 4 micro-batches; uneven counts make a mean of means visible."""
    rows = [problem.batch(0, j) for j in range(4)]
    longest = max(b["input_ids"].shape[1] for b in rows)
    pad = lambda x: torch.nn.functional.pad(x, (0, longest - x.shape[1]))  # noqa: E731
    joined = {k: torch.cat([pad(b[k]) for b in rows]) for k in rows[0]}
    found = []
    for micros in (1, 2, 4):
        model = problem.model()
        built = wrap(
            model,
            torch.optim.SGD(model.parameters(), lr=problem.LR),
            name,
            **problem.OPTIONS.get(name, {}),
        )
        cuts = [
            {k: v[i] for k, v in joined.items()}
            for i in torch.arange(len(joined["input_ids"])).chunk(micros)
        ]
        for _ in range(2):
            report = built.step(cuts, problem.forward, problem.counts)
        found.append(([p.detach() for p in model.parameters()], float(report.loss)))
    for parameters, loss in found[1:]:
        assert close(parameters, found[0][0])
        assert loss == pytest.approx(found[0][1], rel=1e-6)


def test_sam_and_tram_do_not_depend_on_the_scale_of_the_gradient_but_fisher_does() -> None:
    """epsilon is invariant to g -> c g in Eq. 2 and 7; F scales with c^2 in Eq. 8."""
    from tram_ds.algorithms.bound import algorithm
    from tram_ds.engines.shards import Shards, Span

    theta = Shards([torch.tensor([0.5, -1.0, 2.0])], (Span("w", 0, 3, (3,)),))
    g = Shards([torch.tensor([0.1, 0.2, -0.3])], theta.layout)
    norm = lambda x: x.square_sum().sqrt()  # noqa: E731
    for name, options in (("sam", {}), ("asam", {}), ("fsam", {"eta": 50.0})):
        ascent = algorithm(name, **options).ascent
        assert ascent is not None
        a, b = (ascent(theta, g * c, 0.1, norm).realise()[0] for c in (1.0, 100.0))
        assert torch.allclose(a, b, rtol=1e-5) is (name != "fsam")


def test_dropout_masks_of_pass_2_are_fresh_or_replayed() -> None:
    """With a radius that fp32 rounds away pass 2 stands at theta_t: replayed masks give pass 1's
    loss again, fresh ones another."""
    replayed = train("asam", steps=1, dropout=0.2, rho=1e-12, pass2_dropout="replay")[1][0]
    fresh = train("asam", steps=1, dropout=0.2, rho=1e-12)[1][0]
    assert float(replayed.loss) == float(replayed.perturbed_loss)
    assert float(fresh.loss) != float(fresh.perturbed_loss)


def test_reference_modes() -> None:
    """At step 0 theta_{-1} = theta_0: with dropout d is 0 only where the reference uses the
    student's own masks."""
    d = {
        mode: float(train("tram_prev", 1, dropout=0.2, reference_mode=mode)[1][0].distance)
        for mode in ("eval", "paired")
    }
    # at x + z with next to no z, the reference has masks of its own
    d["train"] = float(train("tram_x", 1, dropout=0.2, sigma=1e-6)[1][0].distance)
    assert d["paired"] == 0.0
    assert d["eval"] > 1e-4
    assert d["train"] > d["eval"]
    assert float(train("tram_prev", 1, dropout=0.2, student_mode="eval")[1][0].distance) == 0.0


def test_the_released_kl_is_divided_by_classes_and_rows() -> None:
    """kl.py: mean over all elements, then / batch: d / (C * rows) with C = 19 and 3 rows."""
    d = [float(train("tram_x", 1, kl_norm=norm)[1][0].distance) for norm in ("mean", "official")]
    assert d[1] == pytest.approx(d[0] / (19 * 3), rel=1e-6)


def test_alg2_equals_the_oracle() -> None:
    """Algorithm 2 of the paper: F from a pass of its own at x + z."""
    row = compare("single", "tram_fisher", 2, 0, 1, fisher="alg2", sigma=0.5)
    assert row["theta"] <= 1e-6 and row["moved"] > 0.05


def test_alg2_equals_shared_fisher_where_the_noise_vanishes() -> None:
    tiny = {"sigma": 1e-12, "rho": 0.5, "eta": 50.0}
    assert close(
        train("tram_fisher", fisher="alg2", **tiny)[0], train("fsam", rho=0.5, eta=50.0)[0]
    )
    assert close(
        train("tram_fisher", fisher="shared", **tiny)[0], train("fsam", rho=0.5, eta=50.0)[0]
    )


def test_adaptive_filters() -> None:
    """matrices: 1-D parameters stay where they are; norms: all but norms do; samsung: biases move
    with T = 1."""
    from tram_ds.algorithms.ascent import adaptive_scale
    from tram_ds.engines.shards import Shards, Span

    layout = (
        Span("fc.weight", 0, 2, (1, 2)),
        Span("fc.bias", 0, 2, (2,)),
        Span("ln.weight", 0, 2, (2,), "norm"),
    )
    theta = Shards([torch.tensor([-2.0, 0.5])] * 3, layout)
    assert [t.tolist() for t in adaptive_scale("all")(theta)] == [[2.0, 0.5]] * 3
    assert [t.tolist() for t in adaptive_scale("matrices")(theta)] == [
        [2.0, 0.5],
        [0.0, 0.0],
        [0.0, 0.0],
    ]
    assert [t.tolist() for t in adaptive_scale("norms")(theta)] == [[0.0] * 2] * 2 + [[2.0, 0.5]]
    samsung = [pytest.approx(x) for x in ([2.01, 0.51], [1.0, 1.0], [2.01, 0.51])]
    assert [t.tolist() for t in adaptive_scale("samsung")(theta)] == samsung


def test_clipping_scales_the_second_gradient_only() -> None:
    """SGD: the update is lr * min(1, clip / |g|) * g; the reported norm is |g| before clipping."""
    free, clipped = train("sam", 1), None
    model = problem.model()
    start = [p.detach().clone() for p in model.parameters()]
    built = wrap(
        model,
        torch.optim.SGD(model.parameters(), lr=problem.LR),
        "sam",
        seed=problem.SEED,
        clip_norm=0.1,
    )
    clipped = built.step(problem.global_batches(1, 2)[0], problem.forward)
    norm = float(free[1][0].grad_norm)
    assert norm > 0.1
    assert float(clipped.grad_norm) == pytest.approx(norm, rel=1e-6)
    want = [p0 + (p1 - p0) * (0.1 / norm) for p0, p1 in zip(start, free[0], strict=True)]
    assert close([p.detach() for p in model.parameters()], want, 1e-5)


def flops(name: str, **options: Any) -> int:
    model = problem.model()
    built = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), name, **options)
    batches = problem.global_batches(2, 2)
    built.step(batches[0], problem.forward, problem.counts)
    with FlopCounterMode(display=False) as counter:
        built.step(batches[1], problem.forward, problem.counts)
    return counter.get_total_flops()


def test_a_seed_is_a_run() -> None:
    """Twice the same seed: bit for bit. Another seed: other dropout masks, another end."""
    ends = [train("tram_x", dropout=0.2, seed=seed)[0] for seed in (1, 1, 2)]
    assert same(ends[0], ends[1])
    assert not same(ends[0], ends[2])


def test_no_pass_is_hidden() -> None:
    """Forward 1, backward 2 units: base 3, SAM 6, TRAM 7, TRAM-Fisher 6 (Table 2). Embedding
    gradients cost nothing."""
    base = flops("base")
    for name in ("sam", "asam", "fsam", "tram_fisher"):
        assert flops(name) / base == pytest.approx(2.0, rel=0.01), name
    for name in ("tram_prev", "tram_init", "tram_x"):
        assert flops(name) / base == pytest.approx(7 / 3, rel=0.01), name
    for name in ("trpo", "mesa"):
        assert flops(name) / base == pytest.approx(4 / 3, rel=0.01), name
    # the teacher's logits serve both passes
    assert flops("asam_trpo") / base == pytest.approx(7 / 3, rel=0.01)
    assert flops("tram_fisher", fisher="alg2") / base == pytest.approx(3.0, rel=0.01)


def test_the_callers_random_state_is_left_alone() -> None:
    model = problem.model(0.2)
    built = wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), "tram_x")
    torch.manual_seed(3)
    want = torch.rand(4)
    torch.manual_seed(3)
    built.step([problem.batch(0, 0)], problem.forward)
    assert torch.equal(torch.rand(4), want)


def test_a_users_tuple_is_an_output() -> None:
    model, other = problem.model(), problem.model()
    as_tuple = lambda m, b: (lambda o: (o.loss_sum, o.count, o.logits))(problem.forward(m, b))  # noqa: E731
    for m, forward in ((model, problem.forward), (other, as_tuple)):
        wrap(m, torch.optim.SGD(m.parameters(), lr=0.1), "tram_x", seed=1).step(
            [problem.batch(0, 0)], forward
        )
    assert same(list(model.parameters()), list(other.parameters()))


def test_mmd_gathers_the_global_batch() -> None:
    """The radius of 4 micro-batches is the MMD of their concatenation, not a mean of four."""
    from tram_ds.algorithms.distance import mmd

    def classify(m: Any, b: Any) -> Output:
        out = problem.forward(m, b)
        last = out.logits[:3].detach() * 0 + out.logits[:3]
        return Output(out.loss_sum, out.count, last)

    model = problem.model()
    built = wrap(
        model, torch.optim.SGD(model.parameters(), lr=problem.LR), "tram_init", distance="mmd"
    )
    batches = problem.global_batches(2, 4)
    built.step(batches[0], classify)
    report = built.step(batches[1], classify)
    fresh, now = problem.model(), problem.model()
    other = wrap(now, torch.optim.SGD(now.parameters(), lr=problem.LR), "tram_init", distance="mmd")
    other.step(batches[0], classify)
    rows = [torch.cat([classify(m, b).logits.detach() for b in batches[1]]) for m in (fresh, now)]
    assert float(report.distance) == pytest.approx(float(mmd(*rows)) / len(rows[0]), rel=1e-4)
    assert float(report.distance) > 0.0


def test_an_epsilon_per_micro_batch_accumulates_their_second_gradients() -> None:
    """`accumulation: micro` under SGD: the update is the target-weighted mean of the updates of
    single-micro-batch steps."""
    batches = problem.global_batches(1, 3)[0]

    def update(cut: list[Any], **options: Any) -> torch.Tensor:
        model = problem.model()
        before = [p.detach().clone() for p in model.parameters()]
        wrap(model, torch.optim.SGD(model.parameters(), lr=problem.LR), "asam", **options).step(
            cut, problem.forward
        )
        return torch.cat(
            [(p.detach() - b).flatten() for p, b in zip(model.parameters(), before, strict=True)]
        )

    together = update(batches, accumulation="micro")
    alone, targets = [update([b]) for b in batches], [problem.counts(b)[0] for b in batches]
    want = torch.stack([n * u for n, u in zip(targets, alone, strict=True)]).sum(0) / sum(targets)
    # an update is a difference of weights 100 times its size
    assert close([together], [want], 1e-4)
    assert not close([together], [update(batches)], 1e-2)


@problem.few_rows()
def test_looking_ahead_is_bitwise_the_swap() -> None:
    """theta_{t-1}'s predictions made at the end of its own step are those made at its remembered
    weights one step later."""
    found = {}
    for ahead in (False, True):
        model = problem.model(dropout=0.2)
        built = wrap(
            model,
            torch.optim.SGD(model.parameters(), lr=problem.LR),
            "tram_prev",
            radius_scale=20.0,
        )
        steps = problem.global_batches(steps=5, micros=2)
        for batches, upcoming in zip(steps, [*steps[1:], None], strict=True):
            report = built.step(
                batches,
                problem.chunked_forward(),
                problem.counts,
                upcoming=upcoming if ahead else None,
            )
            assert built.restorable is (not ahead or upcoming is None)
        found[ahead] = [p.detach() for p in model.parameters()], float(report.distance)
    assert found[True][1] == found[False][1] > 0
    assert all(torch.equal(a, b) for a, b in zip(found[True][0], found[False][0], strict=True))


def test_a_state_that_was_not_kept_is_refused() -> None:
    model = problem.model()
    built = wrap(model, torch.optim.SGD(model.parameters(), lr=problem.LR), "tram_prev")
    one, two = problem.global_batches(steps=2, micros=1)
    built.step(one, problem.forward, upcoming=two)
    with pytest.raises(ValueError, match="without `upcoming`"):
        built.state()
    built.step(two, problem.forward)
    assert "previous" in built.state().references


@problem.few_rows()
def test_chunked_logits_are_whole_logits() -> None:
    """Loss, distance and gradient, with padding, of every algorithm: see also the parity suite."""
    model = problem.model()
    batch, forward = problem.batch(0, 1), problem.chunked_forward()
    whole, chunks = problem.forward(model, batch), forward(model, batch)
    assert (
        chunks.logits is None
        and chunks.losses is not None
        and chunks.losses.shape == (len(whole.logits),)
    )
    assert float(chunks.loss_sum.detach()) == pytest.approx(
        float(whole.loss_sum.detach()), rel=1e-6
    )
    want, got = (torch.autograd.grad(o.loss_sum, list(model.parameters())) for o in (whole, chunks))
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(want, got, strict=True))
    with torch.no_grad():
        assert float(forward(model, batch).loss_sum) == pytest.approx(
            float(whole.loss_sum), rel=1e-6
        )


@problem.few_rows()
def test_a_model_that_changes_its_logits_is_not_chunked() -> None:
    model = problem.model()
    plain = model.forward

    def scaled(**inputs: Any) -> Any:
        out = plain(**inputs)
        out.logits = out.logits * 0.5
        return out

    model.forward = scaled
    with pytest.raises(ValueError, match=r"model\.logits: whole"):
        problem.chunked_forward()(model, problem.batch(0, 0))


def test_perturbing_every_second_step_alternates_with_the_base_optimizer() -> None:
    steps = problem.global_batches(steps=4, micros=1)
    model = problem.model()
    every = wrap(
        model,
        torch.optim.SGD(model.parameters(), lr=problem.LR),
        "tram_prev",
        radius_scale=20.0,
        perturb_every=2,
    )
    reports = [
        every.step(b, problem.forward, upcoming=u)
        for b, u in zip(steps, [*steps[1:], None], strict=True)
    ]
    # at step 0 theta_{t-1} = theta_0
    assert [float(r.radius) > 0 for r in reports] == [False, False, True, False]

    other = problem.model()
    optimizer = torch.optim.SGD(other.parameters(), lr=problem.LR)
    base, tram = (wrap(other, optimizer, name) for name in ("base", "tram_prev"))
    tram.algorithm.radius.rule = Scaled(20.0)  # type: ignore[union-attr]
    for step, batches in enumerate(steps):
        if step == 2:
            tram.algorithm.radius.reference.load({"previous": before})  # type: ignore[union-attr]  # noqa: F821
        turn = base if step % 2 else tram
        turn.steps = step
        before = turn.engine.params(keep=True)  # noqa: F841
        turn.step(batches, problem.forward)
    assert close([p.detach() for p in model.parameters()], [p.detach() for p in other.parameters()])
