"""What KL is: coding (section 1), Gibbs' inequality (2), asymmetry (3), the chain rule and data processing (7)."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributions import Categorical
from torch.nn import functional as F

from measure.divergence import jensen_shannon, kl_divergence
from measure.theory.checks import Check, as_tensor, at_least, at_most, equal, figures
from measure.theory.tools import LN_2, bernoulli, categorical, dirichlet


def entropy(log_p: Tensor) -> Tensor:
    """H(p) = −Σ p ln p."""
    return Categorical(logits=log_p).entropy()


def cross_entropy(log_p: Tensor, log_q: Tensor) -> Tensor:
    """H(p, q) = −Σ p ln q: the length, in nats, of a code made for q on data from p."""
    return F.cross_entropy(log_q, log_p.exp())


def check_coding() -> Iterator[Check]:
    """Coding: a code made for q costs KL(p‖q) too much on data from p"""
    p, q = categorical(0.5, 0.3, 0.2), categorical(0.7, 0.2, 0.1)
    yield equal("H(p,q) = H(p) + KL(p‖q)", cross_entropy(p, q), entropy(p) + kl_divergence(p, q))
    yield figures("KL(p‖q) in nats", kl_divergence(p, q), "0.0920329")
    yield figures("KL(p‖q) in bits", kl_divergence(p, q) / LN_2, "0.132775")
    yield figures("KL(q‖p)", kl_divergence(q, p), "0.0851228")
    yield figures("H(p)", entropy(p), "1.029653")
    yield figures("H(p,q)", cross_entropy(p, q), "1.121686")


def log_gap(t: Tensor) -> Tensor:
    """(t − 1) − ln t, which is never negative."""
    return (t - 1) - t.log()


def check_gibbs() -> Iterator[Check]:
    """Gibbs' inequality: KL ≥ 0, because ln t ≤ t − 1"""
    pairs = dirichlet(42, 5, 20_000)
    p, q = pairs[0::2], pairs[1::2]
    kl = kl_divergence(p, q)
    yield at_least("KL ≥ 0 on 10,000 random pairs, the least", kl, 0)
    yield figures("min, max, mean of these", (kl.min(), kl.max(), kl.mean()), "0.00662364 5.447494 0.798688")
    yield equal("KL(p‖p) = 0", kl_divergence(p, p), 0)
    yield equal("KL(p‖q) = Σ p ((t−1) − ln t) with t = q/p", (p.exp() * log_gap((q - p).exp())).sum(-1), kl)
    t = torch.logspace(-3, 3, 6001, dtype=torch.float64)
    yield at_least("ln t ≤ t − 1 for t from 0.001 to 1000, the least gap", log_gap(t), 0)
    yield equal("… equality at t = 1", log_gap(as_tensor(1)), 0)
    yield equal("… and nowhere else: where the least gap is", t[log_gap(t).argmin()], 1)
    yield figures("(t−1) − ln t at t = 0.01, 4", log_gap(as_tensor([0.01, 4])), "3.615170 1.613706")


def check_asymmetry() -> Iterator[Check]:
    """Asymmetry: KL(p‖q) ≠ KL(q‖p); Jensen-Shannon is symmetric and bounded"""
    ends, fair = bernoulli([0.1, 0.9]), bernoulli([0.5, 0.5])
    yield figures("KL(θ‖½) at θ = 0.1, 0.9", kl_divergence(ends, fair), "0.368064 0.368064")
    yield figures("KL(½‖θ) at θ = 0.1, 0.9", kl_divergence(fair, ends), "0.510826 0.510826")
    yield figures("JS(θ, ½) at θ = 0.1, 0.9", jensen_shannon(ends, fair), "0.101749 0.101749")
    # With x = 2θ − 1: KL(½‖θ) − KL(θ‖½) = x⁴/6 + …, all further terms positive.
    theta = torch.cat([torch.linspace(0.01, 0.45, 45), torch.linspace(0.55, 0.99, 45)]).double()
    p, fair = bernoulli(theta), bernoulli(torch.full_like(theta, 0.5))
    asymmetry = (kl_divergence(fair, p) - kl_divergence(p, fair)) / (2 * theta - 1) ** 4
    yield at_least("KL(½‖θ) > KL(θ‖½) for θ ≠ ½, by more than (2θ−1)⁴/6", asymmetry, 1 / 6)
    every = bernoulli(torch.linspace(0, 1, 101).double())
    js = jensen_shannon(every[:, None].expand(-1, 101, 2), every.expand(101, -1, 2))
    yield equal("JS(p,q) = JS(q,p)", js, js.T)
    m = torch.logaddexp(p, fair) - LN_2
    of_entropies = entropy(m) - (entropy(p) + entropy(fair)) / 2
    yield equal("JS = H(m) − ½H(p) − ½H(q) with m = ½p + ½q", jensen_shannon(p, fair), of_entropies)
    yield at_most("JS ≤ ln 2 for all pairs on a grid, the largest", js, LN_2)
    yield equal("… equality for disjoint distributions", js[0, -1], LN_2)


def chain_rule(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Joint log-probabilities (n, m) → KL of the marginals of x (n), mean over p of the KL of y given x."""
    marginals = log_p.logsumexp(-1), log_q.logsumexp(-1)
    conditionals = (log_p - marginals[0][:, None]).log_softmax(-1), (log_q - marginals[1][:, None]).log_softmax(-1)
    return kl_divergence(*marginals), (marginals[0].exp() * kl_divergence(*conditionals)).sum()


def through(log_p: Tensor, channel: Tensor) -> Tensor:
    """Log-probabilities (…, n) of what comes out of a channel (n, m), whose rows sum to 1."""
    return (log_p.exp() @ channel).log()


def check_chain_and_processing() -> Iterator[Check]:
    """The chain rule; data processing: no channel adds divergence"""
    p, q = as_tensor([[0.4, 0.1], [0.1, 0.4]]).log(), torch.full((2, 2), 0.25, dtype=torch.float64).log()
    marginal, conditional = chain_rule(p, q)
    joint = kl_divergence(p.flatten(), q.flatten())
    yield figures("joint = marginal + conditional", (joint, marginal, conditional), "0.192745 0.000000 0.192745")
    p, q = dirichlet(7, 12, 2)
    joint = kl_divergence(p, q)
    yield equal("chain rule on a random 3 × 4 joint", joint, sum(chain_rule(p.view(3, 4), q.view(3, 4))))
    yield equal("… and with x and y exchanged", joint, sum(chain_rule(p.view(3, 4).T, q.view(3, 4).T)))
    p, q = categorical(0.5, 0.3, 0.2), categorical(0.2, 0.3, 0.5)
    channel = as_tensor([[0.8, 0.2], [0.5, 0.5], [0.1, 0.9]])
    after = kl_divergence(through(p, channel), through(q, channel))
    yield figures("KL before T", kl_divergence(p, q), "0.274887")
    yield figures("KL after T", after, "0.0909298")
    identity, noise = torch.eye(3, dtype=torch.float64), torch.linspace(0, 1, 1000).double().view(-1, 1, 1)
    channels = torch.lerp(identity, dirichlet(17, 3, 3000).exp().view(1000, 3, 3), noise)
    outputs = [through(x.expand(1000, 1, 3), channels).squeeze(1) for x in (p, q)]
    yield at_most(
        "1,000 channels, from clean to random: the largest KL after",
        kl_divergence(*outputs),
        kl_divergence(p, q).item(),
    )
    kept = kl_divergence(*(through(x, identity[[2, 0, 1]]) for x in (p, q)))
    yield equal("… equality for one that can be undone", kept, kl_divergence(p, q))
