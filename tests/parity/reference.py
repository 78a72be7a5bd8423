"""Algorithm 1 and every other row, from the paper's equations: float64, one process, no engine.

Written against the paper alone. It shares with the product only the drawn noise z, which is an
input.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch.func import functional_call

from tram_ds.models.randomness import StepRandomness

DEFAULT_RHO = {
    "sam": 0.05,
    "functional_sam": 0.05,
    "asam": 0.5,
    "asam_trpo": 0.5,
    "asam_r3f": 0.5,
    "asam_mesa": 0.5,
    "fsam": 0.1,
    "tram_fisher": 0.1,
    "tram_prev": 0.5,
    "tram_init": 0.5,
    "tram_x": 0.5,
}
BEFORE, NOISED = (
    ("trpo", "mesa", "kl_init", "asam_trpo", "asam_mesa", "tram_prev", "tram_init"),
    ("r3f", "asam_r3f", "tram_x"),
)


def kl(reference, current):
    """sum over N positions and C classes of p_ref (log p_ref - log p)."""
    p, q = reference.log_softmax(-1), current.log_softmax(-1)
    return (p.exp() * (p - q)).sum()


class Oracle:
    """theta: name -> float64 tensor. All sums run over the whole global batch before anything is
    divided."""

    def __init__(
        self,
        model,
        forward,
        name,
        *,
        lr,
        seed,
        embedding=None,
        rho=None,
        eta=0.1,
        sigma=0.1,
        weight=0.1,
        pull=0.1,
        weight_sigma=0.05,
        decay=0.999,
        radius_scale=1.0,
        radius="distance",
        calibration_steps=50,
        fisher="shared",
        descent_noise=False,
        adaptive_filter="all",
        precondition=False,
        adam=None,
        distance=kl,
    ):
        self.model, self.forward, self.name, self.lr, self.seed, self.embedding = (
            model,
            forward,
            name,
            lr,
            seed,
            embedding,
        )
        self.eta, self.sigma, self.weight, self.decay, self.scale = (
            eta,
            sigma,
            weight,
            decay,
            radius_scale,
        )
        self.descent_noise = descent_noise
        self.norms_only = adaptive_filter == "norms"
        self.weight_sigma = weight_sigma
        self.pull = pull if name == "l2sp" else 0.0
        self.rule, self.calibration_steps, self.distances = radius, calibration_steps, []
        self.rho, self.fisher, self.distance = (
            DEFAULT_RHO.get(name) if rho is None else rho,
            fisher,
            distance,
        )
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.theta = {n: p.detach().double() for n, p in trained}
        self.previous, self.initial, self.ema, self.t = self.theta, self.theta, self.theta, 0
        self.momentum = 0.9 if name == "msam" else 0.0  # SGD's
        self.m = {n: torch.zeros_like(p) for n, p in self.theta.items()}
        self.precondition, self.adam, self.v = precondition, adam, self.m

    def run(self, theta, j, batch, noised=False, detach=False):
        """Output of micro-batch j at theta, on x or on x + z."""
        handle = None
        if noised:

            def add(_, __, out):
                z = (
                    StepRandomness(self.seed, self.t)
                    .noise(torch.empty(out.shape, device=out.device), j, self.sigma, "normal")
                    .double()
                )
                return (out.detach() if detach else out) + z

            handle = self.embedding.register_forward_hook(add)
        try:
            return self.forward(lambda **kw: functional_call(self.model, theta, kwargs=kw), batch)
        finally:
            if handle:
                handle.remove()

    def gradient(self, theta, batches, noised=False, penalty=False, detach=False):
        """(gradient of the mean loss, that loss, the mean distance) at theta."""
        theta = {n: p.detach().requires_grad_() for n, p in theta.items()}
        outs = [self.run(theta, j, b, noised, detach) for j, b in enumerate(batches)]
        targets, positions = sum(o.count for o in outs), sum(len(o.logits) for o in outs)
        loss = sum(o.loss_sum for o in outs) / targets
        d = torch.zeros((), dtype=torch.float64)
        if self.name in BEFORE:
            at = (
                self.initial
                if "init" in self.name
                else self.ema
                if "mesa" in self.name
                else self.previous
            )
            refs = [self.run(at, j, b).logits.detach() for j, b in enumerate(batches)]
            d = sum(self.distance(r, o.logits) for r, o in zip(refs, outs, strict=True)) / positions
        elif self.name in NOISED:
            refs = [self.run(theta, j, b, True, detach=True).logits for j, b in enumerate(batches)]
            d = (
                sum(
                    self.distance(r if penalty else r.detach(), o.logits)
                    for r, o in zip(refs, outs, strict=True)
                )
                / positions
            )
        total = loss + self.weight * d if penalty else loss
        # zeros of an untied embedding below the noise
        g = torch.autograd.grad(total, list(theta.values()), materialize_grads=True)
        return (
            dict(zip(theta, g, strict=True)),
            loss.detach(),
            d.detach(),
        )

    def shifted(self):
        """theta + epsilon of the rows whose epsilon needs no gradient of the step."""
        if self.name == "rwp":
            return {n: p + self.noise_of(n, p) for n, p in self.theta.items()}
        if self.name != "msam" or not self.t:
            return self.theta
        size = sum(v.square().sum() for v in self.m.values()).sqrt()
        return {n: p - self.rho * self.m[n] / size for n, p in self.theta.items()}

    def noise_of(self, name, p):
        """sigma |W_i| / sqrt(n) z_ij of a matrix (rows, n)."""
        if p.dim() < 2:
            return torch.zeros_like(p)
        like = torch.empty(p.numel(), device=p.device)
        z = StepRandomness(self.seed, self.t).weights(name, 0, like)
        size = p.square().sum(1, keepdim=True).sqrt() / p.shape[1] ** 0.5
        return self.weight_sigma * size * z.double().view_as(p)

    def epsilon(self, g, batches, radius):
        theta = self.theta
        norm = lambda x: sum(v.square().sum() for v in x.values()).sqrt()  # noqa: E731
        if self.name in ("sam", "functional_sam"):  # Eq. 2, T = 1
            g = self.divided(g, self.squares(g)) if self.precondition else g
            return {n: radius * g[n] / norm(g) for n in g}
        if self.name in ("fsam", "tram_fisher"):  # Eq. 8
            h = self.gradient(theta, batches, noised=True)[0] if self.fisher == "alg2" else g
            inverse = {n: 1 / (1 + self.eta * h[n] ** 2) for n in g}
            root = sum((inverse[n] * g[n] ** 2).sum() for n in g).sqrt()
            return {n: radius * inverse[n] * g[n] / root for n in g}
        # T = |theta|, of GPT-2's norms alone where asked for
        t = {n: p * (not self.norms_only or "ln_" in n) for n, p in theta.items()}
        size = norm({n: t[n] * g[n] for n in g})  # Eq. 7
        return {n: radius * t[n] ** 2 * g[n] / size for n in g}

    def squares(self, g):
        """Adam's second moments with g in them."""
        beta = self.adam["betas"][1]
        return {n: beta * self.v[n] + (1 - beta) * g[n] ** 2 for n in g}

    def divided(self, x, v):
        """x / (sqrt(v) + eps), v without its bias to 0."""
        (_, beta), eps = self.adam["betas"], self.adam["eps"]
        return {n: x[n] / ((v[n] / (1 - beta ** (self.t + 1))).sqrt() + eps) for n in x}

    def through_logits(self, theta, batches):
        """J^T r: J of the logits at `theta`, r = d(mean loss)/dlogits at theta_t."""
        logits = lambda theta, b: functional_call(self.model, theta, kwargs=b).logits  # noqa: E731
        theta = {n: p.detach().requires_grad_() for n, p in theta.items()}
        total = targets = 0
        for batch in batches:
            z = logits(self.theta, batch).detach().requires_grad_()
            out = self.forward(lambda z=z, **_: SimpleNamespace(logits=z), batch)
            (r,) = torch.autograd.grad(out.loss_sum, z)
            total, targets = total + (r * logits(theta, batch)).sum(), targets + out.count
        found = torch.autograd.grad(total / targets, list(theta.values()))
        return dict(zip(theta, found, strict=True))

    def radius(self, d):
        """Eq. 7 with d <= rho = 0.5; or rho times d over a mean of the distances above 0."""
        if self.rule == "distance" and self.scale != "auto":
            return min(self.scale * d, torch.tensor(0.5, dtype=torch.float64))
        self.distances += [d] if d > 0 else []
        if not self.distances:
            return d
        if self.rule == "relative":  # the newest counts most
            weights = [0.99**age for age in reversed(range(len(self.distances)))]
        else:
            weights = [float(i < self.calibration_steps) for i in range(len(self.distances))]
        pairs = zip(weights, self.distances, strict=True)
        return self.rho * d * sum(weights) / sum(w * seen for w, seen in pairs)

    def base(self, g):
        """What the base optimizer makes of g, to be multiplied by lr: SGD, or Adam."""
        if self.adam is None:
            self.m = {n: self.momentum * self.m[n] + g[n] for n in g}
            return self.m
        beta = self.adam["betas"][0]
        self.m = {n: beta * self.m[n] + (1 - beta) * g[n] for n in g}
        self.v = self.squares(g)
        return self.divided({n: m / (1 - beta ** (self.t + 1)) for n, m in self.m.items()}, self.v)

    def step(self, batches):
        """theta_t -> theta_{t+1}; returns (loss, d, loss at theta + epsilon)."""
        penalty = "tram" not in self.name and (self.name in BEFORE or self.name in NOISED)
        noised = self.name == "tram_fisher" and self.fisher == "shared"
        g, loss, d = self.gradient(self.shifted(), batches, noised, penalty)
        perturbed = loss
        radius = self.radius(d) if self.name in ("tram_prev", "tram_init", "tram_x") else self.rho
        if radius is not None and self.name != "msam":
            eps = self.epsilon(g, batches, radius)
            moved = {n: p + eps[n] for n, p in self.theta.items()}
            g, perturbed, _ = self.gradient(
                moved, batches, self.descent_noise, penalty, detach=True
            )
            if self.name == "functional_sam":
                g = self.through_logits(moved, batches)
        self.previous = self.theta
        g = self.base(g)
        self.theta = {
            n: p - self.lr * (g[n] + self.pull * (p - self.initial[n]))
            for n, p in self.theta.items()
        }
        self.ema = {
            n: self.decay * self.ema[n] + (1 - self.decay) * p for n, p in self.theta.items()
        }
        self.t += 1
        return loss, d, perturbed
