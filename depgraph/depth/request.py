"""How branches are to go, as data, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass

from ..base.checks import flag, shown, whole_number
from ..base.errors import InputError

CRITERIA = ("influence", "taylor", "loss", "magnitude")


@dataclass(frozen=True)
class Depth:
    """Which branches go, for ``prune(..., depth=Depth(...))``.

    Attributes:
        keep: how many of the branches that `branches` lists stay; None: as many as budgets, or the pruning ratio, say.
        by: what ranks branches; the lowest go first. ``"influence"``: 1 - cosine of the stream before and after the branch, the
            mean over positions (block influence: Men et al., "ShortGPT", 2024). ``"taylor"``: |gradient x output| of the
            branch, summed over channels, the mean over positions (Molchanov et al., 2019); it needs a loss. ``"loss"``: what the
            loss on the calibration data rises by without the branch. ``"magnitude"``: the mean size of its weights, without any
            data. The first two run on the calibration data, or on the example inputs where there is none. Under budgets of
            parameters, bytes or multiply-accumulates the first three are divided by what the branch saves of them.
        contiguous: the branches that go are neighbours in the order of execution (Gromov et al., "The Unreasonable
            Ineffectiveness of the Deeper Layers", 2024).
        alone: widths stay as they are: budgets are met, and the pruning ratio is followed, by branches alone.

    Raises:
        InputError: an option is out of range.
    """

    keep: int | None = None
    by: str = "influence"
    contiguous: bool = False
    alone: bool = False

    def __post_init__(self) -> None:
        if self.keep is not None:
            whole_number("keep", self.keep)
        if not isinstance(self.by, str) or self.by not in CRITERIA:
            raise InputError(f"by must be one of {', '.join(CRITERIA)}, not {shown(self.by)}")
        flag("contiguous", self.contiguous)
        flag("alone", self.alone)


def depth_of(given: object) -> Depth | None:
    """What the argument `depth` asks for: None where it asks for nothing.

    Raises:
        InputError: it is something else.
    """
    if given is None or isinstance(given, Depth):
        return given
    if isinstance(given, bool):
        return Depth() if given else None
    raise InputError(f"depth must be True, False or depgraph.Depth(keep=..., by=...), not {shown(given)}")
