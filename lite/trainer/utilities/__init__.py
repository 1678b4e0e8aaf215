"""Names that scripts take from Lightning's package `utilities`; what they do is elsewhere."""

from __future__ import annotations

from lite.trainer.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn

__all__ = ["rank_zero_info", "rank_zero_only", "rank_zero_warn"]
