"""One vector in training: the order of its examples, its optimizer, early stopping, and all that the next step needs.

Each has random numbers of its own, so that vectors which are trained together are those that would be trained alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fgsteer.interventions.adding import AdaptiveAdd
from fgsteer.interventions.base import Intervention
from fgsteer.learning.losses import strength_and_rest
from fgsteer.learning.objectives import NULL_OUT, OBJECTIVES, READ_OUT, Rows, Strength, Texts, Unit
from fgsteer.learning.response_passes import ResponsePasses
from fgsteer.learning.settings import VectorTraining
from fgsteer.learning.spaces import Space

HOLD_OUT = 2  # every so-manieth example, with early stopping


class Learner:
    """The training of one vector.

    Args:
        settings: How it is trained.
        space: What is trained.
        passes: The answers, of this vector's examples among others.
        texts: What losses need of their rows.
        examples: The rows of its examples.
        device: Where it is trained.
    """

    def __init__(
        self,
        settings: VectorTraining,
        space: Space,
        passes: ResponsePasses,
        texts: Texts,
        examples: Sequence[Rows],
        device: torch.device,
    ) -> None:
        self.settings, self.space, self.passes, self.texts = settings, space, passes, texts
        self.objective = OBJECTIVES[settings.objective]
        held_out = settings.patience is not None
        self.examples = [rows for n, rows in enumerate(examples) if not held_out or n % HOLD_OUT == 0]
        self.held_out = [rows for n, rows in enumerate(examples) if held_out and n % HOLD_OUT]
        self.random = torch.Generator().manual_seed(settings.seed)
        self.weights = nn.Parameter(self._first_weights().to(device))
        self.unit = self._typical_unit() if settings.relative else 1.0
        self.bias = nn.Parameter(torch.zeros((), device=device))
        self.optimizer = torch.optim.AdamW(self._parameters(), settings.lr, weight_decay=settings.weight_decay)
        self.steps_an_epoch = math.ceil(len(self.examples) / settings.batch)
        self.steps = settings.epochs * self.steps_an_epoch
        self.warm_up = min(settings.warm_up, self.steps // 2)
        self.step = 0
        self.losses: list[float] = []
        self.held_out_losses: list[float] = []
        self.best = self.weights.detach().clone()
        self.order = torch.arange(len(self.examples))
        self.sign = 1.0
        self.mask: Tensor | None = None
        self.batch: list[Unit] = []

    def _first_weights(self) -> Tensor:
        size, init = self.space.size, self.settings.init
        if init is not None:
            return torch.full((size,), float(init))
        return (2 * torch.rand(size, generator=self.random) - 1) / math.sqrt(size)  # nn.Linear's

    @torch.no_grad()
    def _typical_unit(self) -> float:
        """The size of numbers whose direction is as long as an activation of the examples, if their signs are random.

        That is the median ‖h‖ over √(Σᵢ ‖row i‖²), as products of different rows cancel; the median, as a first token
        can be some hundred times as long as the others.
        """
        rows = [row for pair in [*self.examples, *self.held_out] for row in pair if row is not None]
        norms = torch.cat([self.passes.activations(row).norm(dim=-1).cpu() for row in rows])
        return float(norms.median()) / self.space.size_of_rows()

    def _parameters(self) -> list[nn.Parameter]:
        trains_bias = self.settings.objective == "reps" and self.settings.compat
        return [self.weights, self.bias] if trains_bias else [self.weights]

    @property
    def done(self) -> bool:
        """Whether all steps are done, or early stopping ended them."""
        patience, losses = self.settings.patience, self.held_out_losses
        stopped = patience is not None and len(losses) - 1 - _best(losses) >= patience if losses else False
        return self.step >= self.steps or stopped

    @property
    def epoch_ended(self) -> bool:
        """Whether the last step was the last of an epoch."""
        return self.step > 0 and self.step % self.steps_an_epoch == 0

    # ------------------------------------------------------------ steps

    def begin_step(self) -> list[Unit]:
        """Draw the next batch, and set the rate; the units are what it reads."""
        settings = self.settings
        place = self.step % self.steps_an_epoch
        if not place:
            self.order = torch.randperm(len(self.examples), generator=self.random)
        chosen = self.order[place * settings.batch : (place + 1) * settings.batch].tolist()
        if self.objective.signed:
            self._draw_sign()
        self.batch = [u for n in chosen for u in self.objective.units(self.examples[n], self._draw_strength)]
        if settings.dropout:
            kept = torch.rand(self.space.size, generator=self.random) >= settings.dropout
            self.mask = (kept / (1 - settings.dropout)).to(self.weights)
        if settings.objective == "reft_r1":
            self._make_unit()
        self.optimizer.zero_grad(set_to_none=True)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * rate(settings.schedule, self.step, self.steps, self.warm_up)
        return self.batch

    def end_step(self, loss: float) -> None:
        """Take a step of the optimizer along the gradients that the batch left."""
        if self.settings.objective == "reft_r1" and self.weights.grad is not None:
            w = self.weights.detach()
            self.weights.grad -= (self.weights.grad @ w) / (w @ w) * w
        if self.settings.clip is not None:
            nn.utils.clip_grad_norm_(self._parameters(), self.settings.clip)
        self.optimizer.step()
        self.losses.append(loss)
        self.step += 1
        self.mask = None

    def note_held_out(self, loss: float) -> None:
        """Note the loss on held-out examples after an epoch, and the weights where it is the lowest so far."""
        self.held_out_losses.append(loss)
        if _best(self.held_out_losses) == len(self.held_out_losses) - 1:
            self.best = self.weights.detach().clone()

    def held_out_units(self) -> list[Unit]:
        """Units of the held-out examples, the same after each epoch: strengths in turn, or both signs."""
        strengths = [1.0, -1.0] if self.objective.signed else list(self.settings.factors)
        rounds = len(strengths) if self.objective.signed else 1
        turn = _cycle(strengths)
        self.batch = [
            unit
            for start in range(rounds)
            for rows in self.held_out
            for unit in self.objective.units(rows, (lambda s=strengths[start]: s) if self.objective.signed else turn)  # type: ignore[misc]
        ]
        return self.batch

    def _draw_strength(self) -> float:
        if self.objective.signed:
            return self.sign
        factors = self.settings.factors
        return factors[int(torch.randint(len(factors), (), generator=self.random))]

    def _draw_sign(self) -> None:
        """Draw a batch's sign; of each two batches one has either, unless signs are drawn as the paper's code does."""
        if self.settings.compat or self.step % 2 == 0:
            self.sign = 1.0 - 2.0 * int(torch.randint(2, (), generator=self.random))
        else:
            self.sign = -self.sign

    @torch.no_grad()
    def _make_unit(self) -> None:
        self.weights.div_(self.space.direction(self.weights).norm())

    # ------------------------------------------------------------ readings and losses

    def entries(self, units: Sequence[Unit]) -> tuple[list[Intervention], Tensor]:
        """The intervention of each reading, and the sum of what ReFT-r1 reads of tokens besides the strongest."""
        weights = self.weights if self.mask is None else self.weights * self.mask
        weights = self.unit * weights
        direction = self.space.direction(weights)
        rest = direction.new_zeros(())
        made: dict[Strength, Intervention] = {}
        entries = []
        for unit in units:
            for row, strength in unit.readings:
                if strength == READ_OUT:
                    readings = (self.passes.activations(row).to(direction.device) @ direction).relu()
                    amount, others = strength_and_rest(readings, self.settings.top)
                    rest = rest + others
                    entries.append(self.space.add(weights, direction, amount))
                    continue
                if strength not in made:
                    made[strength] = self._intervention(weights, direction, strength)
                entries.append(made[strength])
        return entries, rest

    def _intervention(self, weights: Tensor, direction: Tensor, strength: Strength) -> Intervention:
        bias = self.bias if len(self._parameters()) > 1 else 0.0
        if strength == NULL_OUT:
            return null_out(direction, bias, self.space)
        assert isinstance(strength, float)
        return self.space.add(weights, direction, strength + bias)

    def loss(self, units: Sequence[Unit], values: Float[Tensor, " readings"], rest: Tensor) -> Tensor:
        """The part of the batch's loss that these units are: the parts of a batch add up to a mean."""
        if self.objective.pair_loss is not None:
            pairs = self.objective.pair_loss(units, values.view(-1, 2), self.texts, self.settings)
            return pairs.sum() / len(self.batch)
        total = -values.sum() / sum(self.passes.answer_tokens(row) for unit in self.batch for row in unit.rows)
        if self.settings.objective == "reft_r1":
            lengths = [len(self.passes.activations(row)) for unit in self.batch for row in unit.rows]
            others = sum(max(0, length - self.settings.top) for length in lengths)
            weight = self.settings.l1 * self.step / self.steps
            total = total + (weight * rest / max(1, others)).to(total.device)
        return total

    # ------------------------------------------------------------ what is left of it

    @torch.no_grad()
    def result(self) -> tuple[Tensor, Tensor]:
        """The trained numbers and their direction; of ReFT-r1 at norm 1."""
        weights = self.unit * (self.best if self.held_out_losses else self.weights.detach())
        direction = self.space.direction(weights)
        if self.settings.objective == "reft_r1" and not self.settings.compat:
            weights = weights / direction.norm()
            direction = self.space.direction(weights)
        return weights, direction

    @torch.no_grad()
    def largest_reading(self) -> float:
        """The largest projection of a token of its examples on the direction, at least 0: ReFT-r1's a_max."""
        direction = self.result()[1]
        rows = [row for pair in [*self.examples, *self.held_out] for row in pair if row is not None]
        return max(float((self.passes.activations(row).to(direction.device) @ direction).relu().max()) for row in rows)

    def state(self) -> dict[str, Tensor]:
        """All that the next step depends on."""
        tensors = {
            "weights": self.weights.detach(),
            "bias": self.bias.detach(),
            "best": self.best,
            "order": self.order,
            "random": self.random.get_state(),
            "counts": torch.tensor([float(self.step), self.sign], dtype=torch.float64),
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "held_out_losses": torch.tensor(self.held_out_losses, dtype=torch.float64),
        }
        for number, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam/{number}/{name}": torch.as_tensor(value) for name, value in moments.items()}
        return tensors

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from a state. Raises LookupError, ValueError or RuntimeError for one that is none."""
        self.weights.copy_(tensors["weights"])
        self.bias.copy_(tensors["bias"])
        self.best, self.order = tensors["best"].to(self.weights), tensors["order"]
        self.random.set_state(tensors["random"])
        step, self.sign = tensors["counts"].tolist()
        self.step = int(step)
        self.losses, self.held_out_losses = tensors["losses"].tolist(), tensors["held_out_losses"].tolist()
        moments: dict[int, dict[str, Any]] = {}
        for name, value in tensors.items():
            if name.startswith("adam/"):
                _, number, key = name.split("/")
                moments.setdefault(int(number), {})[key] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})


def null_out(direction: Tensor, bias: Any, space: Space) -> AdaptiveAdd:
    """RePS's removal, ``h' = h − relu(v·h + b)/‖v‖²·v``, after which ``v·h' + b = min(v·h + b, 0)``."""
    return AdaptiveAdd(
        direction=direction / direction.pow(2).sum(),
        read=direction,
        bias=bias,
        coefficient=-1.0,
        hookpoint=space.hookpoint,
        scope=space.scope,
    )


def rate(schedule: str, step: int, steps: int, warm_up: int) -> float:
    """The learning rate of a step (from 0 on) of so many, as a share of the highest."""
    if step < warm_up:
        return step / warm_up
    if schedule == "constant":
        return 1.0
    share = (step - warm_up) / (steps - warm_up)
    return 1 - share if schedule == "linear" else (1 + math.cos(math.pi * share)) / 2


def _best(losses: Sequence[float]) -> int:
    """The first epoch of the lowest loss."""
    return min(range(len(losses)), key=losses.__getitem__)


def _cycle(strengths: Sequence[float]) -> Any:
    def turns() -> Iterator[float]:
        while True:
            yield from strengths

    turn = turns()
    return lambda: next(turn)
