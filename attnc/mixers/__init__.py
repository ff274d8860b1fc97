"""Named mixers that are more than one setting of `attnc::recurrence`: what stands around it, or several of them.

A system that is one setting is a row of `attnc.forms.systems` alone. What is here is called by the hooks of libraries
that ship the system as a function, and by conversions; each function takes heads first, (B, H, L, D), and is plain
torch around the operator, so that it compiles, trains and exports as any other code.
"""

from attnc.op_recurrence import RECURRENCE

__all__ = ["RECURRENCE"]
