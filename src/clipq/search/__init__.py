"""Search for a plan: which pruning rate and bit width every tensor is to have (paper, section 3.3)."""

from clipq.search.record import SearchRecord
from clipq.search.run import run_search, search
from clipq.search.settings import Settings
from clipq.search.target import Target

__all__ = ["SearchRecord", "Settings", "Target", "run_search", "search"]
