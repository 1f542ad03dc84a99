"""f-INE in anybody's Lightning Trainer: events are translated here, formulas are in ``fine``."""

from fine_bench.callback.fine import FINECallback
from fine_bench.callback.paper import PaperFINECallback
from fine_bench.fine.batch_adapter import BatchAdapter

__all__ = ["BatchAdapter", "FINECallback", "PaperFINECallback"]
