"""How errors travel back through linear layers: by other matrices than the weights, and how far that is from
backpropagation.

With y = W x + b forward in any case, and g = dL/dy:

    backprop         grad_x = g W    grad_W = gᵀ x    grad_b = Σ g
    fa               grad_x = g B, the rest alike: B a fixed random matrix of W's shape (Lillicrap et al. 2016)
    sign_symmetric   the same with B = sign(W)·‖W‖/√n, n the number of weights in W, as W is now (Xiao et al. 2018)
    dfa              g is e B in place of dL/dy, where e = dL/dlogits and B is a fixed random matrix (V, out) of the
                     layer's own (Nøkland 2016, Launay et al. 2020): grad_W = (e B)ᵀ x, grad_b = Σ e B, grad_x = e B W

The head is a linear layer like any other; under dfa its g is e itself. What is no linear layer (norms, activations,
attention products, the normalizer) keeps its true derivatives: under dfa, of the signals at the next linear layers'
outputs and, along the residual stream, of what the head sends back.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from measure.jacobian import backpropagate, backward_mode, cosine_and_norm_ratio, dot_products, take_gradients
from measure.moments import float64, whole
from measure.probe import rows_of_c_attn
from model import GPT

Feedback = Literal["backprop", "fa", "sign_symmetric", "dfa"]


class FeedbackLinear(nn.Linear):
    """A linear layer with the parameters and the output of the one given, whose error goes back as `how` says.

    `feedback`: B, where it is fixed. `error`: a dict that all layers of a model share, in which the head, the first to
    run backward, leaves dL/dlogits for the others under dfa.
    """

    feedback: Tensor | None

    def __init__(self, linear: nn.Linear, how: Feedback, feedback: Tensor | None, error: dict[str, Tensor]):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias, self.training = linear.weight, linear.bias, linear.training
        self.how, self.error = how, error
        self.register_buffer("feedback", feedback, persistent=False)  # so that the state dict is the plain model's

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "dfa":
            y = super().forward(x)
            if y.requires_grad:
                y.register_hook(self._keep_error if self.feedback is None else self._direct)
            return y
        y = F.linear(x.detach(), self.weight, self.bias)
        return _ByFeedback.apply(y, x, self.weight.detach() if self.feedback is None else self.feedback, self.how)

    def _keep_error(self, grad: Tensor) -> None:
        self.error["logits"] = grad

    def _direct(self, grad: Tensor) -> Tensor:
        assert self.feedback is not None  # all layers but the head have one
        error = self.error["logits"]
        return (error @ self.feedback.to(error.dtype)).to(grad.dtype)


class _ByFeedback(torch.autograd.Function):
    """y; its gradient goes on to y as it is, and to x through the feedback."""

    @staticmethod
    def forward(ctx, y, x, matrix, how):
        ctx.save_for_backward(matrix)
        ctx.how, ctx.dtype = how, x.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad):
        (matrix,) = ctx.saved_tensors
        matrix = matrix if ctx.how == "fa" else signs(matrix)
        return grad, (grad @ matrix.to(grad.dtype)).to(ctx.dtype), None, None


def signs(weight: Tensor) -> Tensor:
    """The signs of a weight, scaled to its norm."""
    return weight.sign() * (weight.norm() / math.sqrt(weight.numel()))


# --- on a model -----------------------------------------------------------------------------------------------------


def apply_feedback(model: GPT, how: Feedback, seed: int = 0, matrices: Mapping[str, Tensor] | None = None) -> GPT:
    """Make every linear layer of the model a `FeedbackLinear`, under its name and with its parameters; under backprop
    change nothing. `matrices`, as `feedback_matrices` gives them, or each drawn from (seed, name).

    Returns the model. ValueError where the head is the token embedding, or the matrices are not of this model.
    """
    if how == "backprop":
        return model
    if model.config.tie_embeddings:
        raise ValueError(f"feedback {how} takes a head of its own: tie_embeddings false")
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    shapes = {f"{name}.weight": tuple(linear.weight.shape) for name, linear in linears.items()}
    if how == "dfa":
        head = shapes.pop("lm_head.weight")
        shapes = {name: (head[0], out) for name, (out, _) in shapes.items()}
    if how == "sign_symmetric":
        shapes = {}
    if matrices is None:
        matrices = {name: draw(name, shape, model.config.n_layer, seed) for name, shape in shapes.items()}
    if {name: tuple(matrix.shape) for name, matrix in matrices.items()} != shapes:
        raise ValueError(f"the feedback matrices are not those of {how} in this model")
    error: dict[str, Tensor] = {}
    for name, linear in linears.items():
        matrix = matrices.get(f"{name}.weight")
        matrix = None if matrix is None else matrix.to(linear.weight)
        model.set_submodule(name, FeedbackLinear(linear, how, matrix, error))
    return model


def draw(name: str, shape: tuple[int, ...], n_layer: int, seed: int) -> Tensor:
    """A matrix from the distribution that the weight of that name starts with (`GPT`): a function of (seed, name)."""
    std = 0.02 / math.sqrt(2 * n_layer) if name.endswith("c_proj.weight") else 0.02
    (hashed,) = np.random.SeedSequence([seed, *name.encode()]).generate_state(1)
    return torch.empty(shape).normal_(std=std, generator=torch.Generator().manual_seed(int(hashed)))


def feedback_layers(model: GPT) -> dict[str, FeedbackLinear]:
    """By the name of the layer's weight."""
    return {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, FeedbackLinear)}


def feedback_matrices(model: GPT) -> dict[str, Tensor]:
    """Every fixed B, by the name of its layer's weight: what a checkpoint keeps of them."""
    return {name: layer.feedback for name, layer in feedback_layers(model).items() if layer.feedback is not None}


def feedback_metrics(model: GPT) -> dict[str, float | None]:
    """Of every layer with a B of its weight's shape, and of c_attn's q, k and v apart: `feedback/angle/…`, in degrees
    between the two as vectors, and, where B is fixed, `feedback/norm_ratio/…`, ‖B‖/‖W‖. None with a zero norm."""
    metrics: dict[str, float | None] = {}
    for name, layer in feedback_layers(model).items():
        if layer.how == "dfa":
            continue
        weight, fixed = whole(layer.weight.detach()), layer.feedback
        pairs = {name: (signs(weight) if fixed is None else fixed, weight)}
        if ".c_attn." in name:
            parts = [rows_of_c_attn(x, model.config) for x in pairs[name]]
            pairs |= {f"{name}[{part}]": (parts[0][part], parts[1][part]) for part in parts[0]}
        for part, pair in pairs.items():
            cosine, ratio = cosine_and_norm_ratio(dot_products(*pair))
            angle = None if cosine is None else math.degrees(math.acos(max(-1.0, min(cosine, 1.0))))
            metrics |= {f"feedback/angle/{part}": angle} | (
                {} if fixed is None else {f"feedback/norm_ratio/{part}": ratio}
            )
    return metrics


@contextlib.contextmanager
def trained_by(model: GPT, how: Feedback, matrices: Mapping[str, Tensor]) -> Iterator[None]:
    """Within this context gradients flow back through the plain model's linear layers as `how` says."""
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    apply_feedback(model, how, matrices=matrices)
    try:
        yield
    finally:
        for name, linear in linears.items():
            model.set_submodule(name, linear)


# --- beside backpropagation -------------------------------------------------------------------------------------------


class Comparison(NamedTuple):
    """What `compare_with_backprop` finds."""

    splits: list[list[dict[str, Tensor]]]
    """for each layer, the `split_of_sequence` of every sequence under backpropagation"""
    products: dict[str, Tensor]
    """parameter → `dot_products` of its gradient under the feedback with that under backpropagation"""
    norms: dict[str, dict[str, float]]
    """module with parameters → of its output h and the gradients that arrive there, under the feedback and under
    backpropagation, h_norm, g_norm and backprop_g_norm: the root mean square of a token's norm"""


def compare_with_backprop(
    model: GPT,
    how: Feedback,
    matrices: Mapping[str, Tensor],
    batches: Callable[[str], Iterable[tuple[Tensor, Tensor]]],
) -> Comparison:
    """Run `batches(what)`, the same (x, y) each time, (B, T) int64, backward through the plain model and through the
    same with the feedback, the normalizer's whole Jacobian in both."""
    splits: list[list[dict[str, Tensor]]] = [[] for _ in model.transformer.h]
    with backward_mode(model, "full"):
        with watch_outputs(model) as true:
            for x, y in batches("backprop"):
                backpropagate(model, x, y, splits)
        gradients = take_gradients(model)
        with trained_by(model, how, matrices), watch_outputs(model) as own:
            for x, y in batches(how):
                backpropagate(model, x, y)
    products = {name: dot_products(x, gradients[name]) for name, x in take_gradients(model).items()}
    norms = {name: {"h_norm": own[name][0], "g_norm": own[name][1], "backprop_g_norm": true[name][1]} for name in own}
    return Comparison(splits, products, norms)


@contextlib.contextmanager
def watch_outputs(model: GPT) -> Iterator[dict[str, tuple[float, float]]]:
    """A dict that has in the end, for every module with parameters of its own that has run, the root mean squares over
    tokens of the norms of its output and of the gradient that arrived there."""
    squares: dict[str, Tensor] = {}  # name → (tokens, Σ‖h‖², Σ‖g‖²)

    def hook_for(name: str):
        def hook(_module, _inputs, out):
            def arrived(grad):
                found = (torch.tensor(out[..., 0].numel()), *(float64(x.detach()).square().sum() for x in (out, grad)))
                squares[name] = squares.get(name, 0) + torch.stack([x.double().cpu() for x in found])

            out.register_hook(arrived)

        return hook

    owners = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
    handles = [model.get_submodule(name).register_forward_hook(hook_for(name)) for name in owners]
    norms: dict[str, tuple[float, float]] = {}
    try:
        yield norms
    finally:
        for handle in handles:
            handle.remove()
    for name, (tokens, of_h, of_g) in squares.items():
        norms[name] = (of_h / tokens).sqrt().item(), (of_g / tokens).sqrt().item()
