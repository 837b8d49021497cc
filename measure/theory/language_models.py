"""KL in the training of language models: RLHF (section 9), distillation (10) and DPO (16)."""

import math
from collections.abc import Iterator

import torch
from scipy import optimize
from torch import Tensor
from torch.nn import functional as F

from measure.divergence import kl_divergence
from measure.theory.checks import NUMERICAL, Check, as_tensor, at_least, at_most, equal, figures
from measure.theory.information import entropy
from measure.theory.tools import categorical, dirichlet, minimise, slope

REFERENCE_POLICY, REWARDS = categorical(0.35, 0.25, 0.2, 0.12, 0.08), as_tensor([1, 2.5, -0.5, 3, 0.5])


def optimal_policy(log_reference: Tensor, rewards: Tensor, beta) -> Tensor:
    """ln π* with π* ∝ π_ref e^{r/β}, (…, n) for β (…)."""
    return (log_reference + rewards / as_tensor(beta).unsqueeze(-1)).log_softmax(-1)


def optimal_value(log_reference: Tensor, rewards: Tensor, beta) -> Tensor:
    """β ln Z with Z = E_ref[e^{r/β}], (…) for β (…)."""
    beta = as_tensor(beta)
    return beta * (log_reference + rewards / beta.unsqueeze(-1)).logsumexp(-1)


def reward_and_kl(log_policy: Tensor, log_reference: Tensor, rewards: Tensor) -> tuple[Tensor, Tensor]:
    """E_π[r] and KL(π‖π_ref), each (…)."""
    kl = kl_divergence(log_policy, log_reference.expand_as(log_policy))
    return (log_policy.exp() * rewards).sum(-1), kl


def check_rlhf() -> Iterator[Check]:
    """RLHF: the policy of most reward at a price on its KL from the reference"""
    task = REFERENCE_POLICY, REWARDS
    policy = optimal_policy(*task, 1)
    reward, kl = reward_and_kl(policy, *task)
    yield figures("β = 1: E[r], KL, E[r] − βKL", (reward, kl, reward - kl), "2.372430 0.476237 1.896193")
    yield figures("β = ½: E[r], KL", reward_and_kl(optimal_policy(*task, 0.5), *task), "2.722541 0.963301")
    beta = torch.logspace(2, -2, 201, dtype=torch.float64)
    rewards, kls = reward_and_kl(optimal_policy(*task, beta), *task)
    yield equal("value at π* = β ln Z, β from 100 to 0.01", rewards - beta * kls, optimal_value(*task, beta))

    def loss(logits):
        reward, kl = reward_and_kl(logits.log_softmax(-1), *task)
        return kl - reward

    found = minimise(loss, REFERENCE_POLICY).log_softmax(-1)
    yield equal("π* is what an optimiser finds", found.exp(), policy.exp(), NUMERICAL)
    others = torch.lerp(policy, dirichlet(9, 5, 1000), torch.linspace(0, 1, 1000).double()[:, None]).log_softmax(-1)
    reward, kl = reward_and_kl(others, *task)
    shortfall = optimal_value(*task, 1) - (reward - kl)
    yield at_least("none of 1,000 other policies beats it: the least shortfall", shortfall, 0)
    yield equal("… which is βKL(π‖π*)", shortfall, kl_divergence(others, policy.expand_as(others)))
    yield at_least("frontier: as β falls the reward rises, least step", rewards.diff(), 0)
    yield at_least("frontier: … and so does the KL, least step", kls.diff(), 0)
    d_reward = slope(lambda b: reward_and_kl(optimal_policy(*task, b), *task)[0], beta)
    d_kl = slope(lambda b: reward_and_kl(optimal_policy(*task, b), *task)[1], beta)
    middle = (beta > 0.1) & (beta < 10)  # at the ends both derivatives underflow
    yield equal("frontier: its slope dE/dKL is β", (d_reward / d_kl)[middle], beta[middle], NUMERICAL)
    yield equal("β → 0: KL → −ln .12, all on the best answer", kls[-1], -math.log(0.12), NUMERICAL)


def soften(logits: Tensor, temperature) -> Tensor:
    """Log-probabilities (…, n) of logits (n,) at temperatures (…)."""
    return (logits / as_tensor(temperature).unsqueeze(-1)).log_softmax(-1)


def hot_limit(teacher: Tensor, student: Tensor) -> Tensor:
    """What τ² KL at temperature τ tends to: half the variance, over equal weights, of the difference of the logits."""
    return (teacher - student).var(correction=0) / 2


TEACHER, STUDENT = as_tensor([3, 1.5, 0.5, -0.5, -1.5]), as_tensor([2, 1, 0.5, -0.3, -1.2])


def check_distillation() -> Iterator[Check]:
    """Distillation: what temperature does to soft labels (Hinton et al. 2015)"""

    def at(temperature):
        teacher, student = soften(TEACHER, temperature), soften(STUDENT, temperature)
        return entropy(teacher), kl_divergence(teacher, student), kl_divergence(student, teacher)

    yield figures("τ = 1: H(T), KL(T‖S), KL(S‖T)", at(1), "0.814107 0.0703182 0.0833116")
    yield figures("τ = 5: H(T), KL(T‖S), KL(S‖T)", at(5), "1.559992 0.00511369 0.00508037")
    entropies, _, _ = at(torch.logspace(-1, 2, 301))
    yield at_least("H(T) rises with τ from 0.1 to 100, least step", entropies.diff(), 0)
    hot = 1e4  # where the next terms, of relative order 1/τ, are below 1e-4
    h, forward, reverse = at(hot)
    yield equal("τ → ∞: H(T) → ln 5", h, math.log(5), NUMERICAL)
    limit = hot_limit(TEACHER, STUDENT)
    yield figures("½ Var_uniform(z_T − z_S)", limit, "0.118000")
    yield equal("τ → ∞: τ²KL(T‖S) → ½ Var", hot**2 * forward, limit, 1e-4)
    yield equal("τ → ∞: τ²KL(S‖T) → ½ Var", hot**2 * reverse, limit, 1e-4)

    def order(temperature: float) -> float:
        _, forward, reverse = at(temperature)
        return (forward - reverse).item()

    signs = [math.copysign(1, order(temperature)) for temperature in (3.3, 3.35)]
    yield equal("KL(T‖S) < KL(S‖T) at τ = 3.3, > at 3.35: signs", signs, [-1, 1])
    # They are equal at 3.3269; from 3.28 to 3.37 they differ by less than one in 2,000.
    crossing = optimize.brentq(order, 1, 5, xtol=1e-12) if order(1) < 0 < order(5) else math.nan
    yield equal("… they are equal near τ = 3.28", crossing, 3.28, 0.05)


def implicit_reward(log_ratio, beta: float) -> Tensor:
    """β ln(π/π_ref)."""
    return beta * as_tensor(log_ratio)


def dpo_loss(preferred, other, beta: float) -> Tensor:
    """−ln σ(β(Δ_w − Δ_l)) of the log-ratios Δ = ln(π/π_ref) of both answers, (…). (Rafailov et al. 2023.)"""
    return -F.logsigmoid(implicit_reward(preferred, beta) - implicit_reward(other, beta))


def check_dpo() -> Iterator[Check]:
    """DPO: a loss on preferences alone, whose rewards are log-ratios to the reference"""
    beta = 0.1

    def loss_and_gradient(preferred, other):
        gradient = slope(lambda x: dpo_loss(x[0], x[1], beta), [preferred, other])
        return dpo_loss(preferred, other, beta), *gradient

    yield figures("Δ = .1, .1: loss, gradients", loss_and_gradient(0.1, 0.1), "0.693147 -0.050000 0.050000")
    yield figures("Δ = .8, −.3: loss, gradients", loss_and_gradient(0.8, -0.3), "0.639659 -0.047253 0.047253")
    yield figures("Δ = .8, −.3: implicit rewards", implicit_reward([0.8, -0.3], beta), "0.080000 -0.030000")
    margins = torch.cartesian_prod(*2 * [torch.linspace(-5, 5, 41, dtype=torch.float64)])
    up, down = slope(lambda x: dpo_loss(x[:, 0], x[:, 1], beta), margins).T
    yield at_most("the gradient pushes the preferred up, all Δ: largest", up, 0, 0)
    yield at_least("… and the other down: least", down, 0, 0)
    reward = implicit_reward(margins, beta)
    surprise = torch.sigmoid(reward[:, 1] - reward[:, 0])
    yield equal("… by β times the probability given to the wrong order", down, beta * surprise)
    preferred = (reward[:, 0].exp() / reward.exp().sum(1)).log()
    yield equal("loss = −ln of Bradley-Terry's probability", dpo_loss(margins[:, 0], margins[:, 1], beta), -preferred)

    def policy_loss(logits):
        ratios = logits.log_softmax(-1) - REFERENCE_POLICY
        return dpo_loss(ratios[1], ratios[2], beta)

    step = -0.1 * slope(policy_loss, REFERENCE_POLICY)
    moved = (REFERENCE_POLICY + step).log_softmax(-1) - REFERENCE_POLICY
    yield equal("one step on a policy of five answers moves only the two", step.sign(), as_tensor([0, 1, -1, 0, 0]))
    yield equal("… up and down: signs of the change of ln π", moved[[1, 2]].sign(), [1, -1])
    # Where π is the RLHF optimum, its log-ratios are the rewards themselves up to the constant β ln Z.
    implicit = implicit_reward(optimal_policy(REFERENCE_POLICY, REWARDS, beta) - REFERENCE_POLICY, beta)
    constant = optimal_value(REFERENCE_POLICY, REWARDS, beta)
    yield equal("implicit rewards of RLHF's optimum are its rewards", implicit + constant, REWARDS)
