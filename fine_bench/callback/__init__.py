"""f-INE in anybody's Lightning Trainer: events are translated here, formulas are in ``fine``."""

from fine_bench.callback.fine import FINECallback
from fine_bench.callback.paper import PaperFINECallback

__all__ = ["FINECallback", "PaperFINECallback"]
