"""What counts as a fault of the training, and which state it goes back to.

A loss or gradient that is not finite, or a loss spike, sends the run back to a state on disk from before the fault,
with half the learning rate from there on; after `MAX_ROLLBACKS` of that it stops. States on disk rather than copies in
memory: they cost no memory, a resumed run has them too, and a spike shows some steps after its cause. A state that
gave the fault itself is no way out: the same weights meet the same examples. So older states are kept as long as a
fault may need them.
"""

import math
from collections.abc import Mapping, Sequence

MAX_ROLLBACKS = 3
WINDOW, LASTING = 20, 5  # steps; a single bad batch is no spike, and passes by itself


def not_finite(loss: float, gradient_norm: float) -> str | None:
    """What is wrong with a step before it is taken, or None."""
    for what, value in (("loss", loss), ("gradient norm", gradient_norm)):
        if not math.isfinite(value):
            return f"{what} became {value}"
    return None


def spike(losses: Mapping[int, float], step: int, fade: int, factor: float | None) -> str | None:
    """Whether the losses of the `LASTING` steps up to `step` all lie above `factor` times the highest of the `WINDOW`
    before them, and how; None where they do not, or where that reaches back into the first `fade` steps (a fade is
    expected to raise the loss). Steps count from 1."""
    begin = step - LASTING - WINDOW + 1
    if factor is None or begin <= fade or any(at not in losses for at in range(begin, step + 1)):
        return None
    before = max(losses[at] for at in range(begin, begin + WINDOW))
    lowest = min(losses[at] for at in range(begin + WINDOW, step + 1))
    if lowest <= factor * before:
        return None
    return f"loss was {lowest:.4g} or more for {LASTING} steps, {before:.4g} or less in the {WINDOW} before"


def state_before(states: Sequence[int], taken: int) -> int | None:
    """The newest of `states` from before `taken` steps; None where there is none."""
    return max((state for state in states if state < taken), default=None)


def outdated(states: Sequence[int], step: int) -> list[int]:
    """Those of `states` that no fault found after `step` steps or later can need."""
    needed = state_before(states, step - LASTING)
    return [] if needed is None else [state for state in states if state < needed]
