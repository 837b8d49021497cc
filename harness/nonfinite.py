"""Steps whose loss or gradient is not finite: the run stops there or, by training.on_nonfinite, skips them."""

import torch
from torch import Tensor

from harness.config import Config
from harness.errors import UserError

ADVICE = "A lower optimizer.lr or a longer warm-up may help"


class Skips:
    """The steps that are skipped. Under `stop` none is, and nothing waits for the device to ask. Those that float16's
    loss scaling would skip by itself, having scaled too far, are among them."""

    def __init__(self, config: Config, before: dict[str, int] | None):
        self._limit = config.training.nonfinite_limit
        self._on = config.training.on_nonfinite == "skip"
        self.count = {"total": 0, "in_a_row": 0} | (before or {})

    def skip(self, step: int, grad_norm: Tensor, say) -> bool:
        """Whether to leave this step out: its gradient, the same on all ranks, is not finite. UserError where one more
        in a row would be beyond the limit."""
        if not self._on or grad_norm.isfinite():
            self.count["in_a_row"] = 0
            return False
        if self.count["in_a_row"] >= self._limit:
            raise UserError(
                f"step {step}: gradient norm {grad_norm.item():g}, after training.nonfinite_limit, {self._limit}, "
                f"steps in a row that were skipped; stopped, and the last checkpoint is kept. {ADVICE}"
            )
        self.count = {name: number + 1 for name, number in self.count.items()}
        say(f"step {step}: gradient norm {grad_norm.item():g}: skipped, {self.count['in_a_row']} in a row")
        return True

    def metrics(self) -> dict[str, float]:
        return {"train/skipped_steps": self.count["total"]} if self._on else {}


def check_finite(unchecked: list, ranks, scaled: bool) -> dict[str, float]:
    """The latest step's metrics, averaged over the ranks. UserError names the first step that was not finite."""
    steps, names = [step for step, *_ in unchecked], list(unchecked[0][1])
    table = [torch.stack([*means.values(), norm.float()]) for _, means, norm, _ in unchecked]
    *columns, norms = torch.stack(table).cpu().unbind(1)
    values = ranks.sum(torch.stack(columns, 1)) / ranks.size  # (steps, metrics)
    # Under float16's loss scaling an infinite gradient does no harm: the scaler skips that step.
    good = values.isfinite().all(1) & (norms.isfinite() | scaled)
    good |= torch.tensor([skipped for *_, skipped in unchecked])
    unchecked.clear()
    if not good.all():
        i = int(good.long().argmin())
        found = ", ".join(f"{name} {v:g}" for name, v in zip(names, values[i].tolist(), strict=True))
        raise UserError(
            f"step {steps[i]}: {found}, gradient norm {norms[i].item():g}: not finite; stopped, and the "
            f"last checkpoint is kept. {ADVICE}"
        )
    return dict(zip(names, values[-1].tolist(), strict=True))
