"""What this machine and this installation can do, and what is wrong with them."""

from fastattn.doctor.facts import Facts, Gpu, collect_facts
from fastattn.doctor.verdicts import Verdict, judge

__all__ = ["Facts", "Gpu", "Verdict", "collect_facts", "judge"]
