"""attnc: a torch.compile backend that recognises attention by meaning and rewrites it exactly.

This is the face: it names what is public and loads each name's module at first use. It defines nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attnc.backend import last_report
    from attnc.calibration import Calibration
    from attnc.errors import ArtifactError, AttncError, CaptureError, LoweringError, UsageError
    from attnc.offline import autotune, explain
    from attnc.options import Options
    from attnc.plan import Plan
    from attnc.region import Region
    from attnc.report import Report
    from attnc.tuning.calibrate import calibrate

__version__ = "0.1.0"

__all__ = [
    "ArtifactError",
    "AttncError",
    "Calibration",
    "CaptureError",
    "LoweringError",
    "Options",
    "Plan",
    "Region",
    "Report",
    "UsageError",
    "__version__",
    "autotune",
    "calibrate",
    "explain",
    "last_report",
]

_HOME = {
    "ArtifactError": "attnc.errors",
    "AttncError": "attnc.errors",
    "Calibration": "attnc.calibration",
    "CaptureError": "attnc.errors",
    "LoweringError": "attnc.errors",
    "Options": "attnc.options",
    "Plan": "attnc.plan",
    "Region": "attnc.region",
    "Report": "attnc.report",
    "UsageError": "attnc.errors",
    "autotune": "attnc.offline",
    "calibrate": "attnc.tuning.calibrate",
    "explain": "attnc.offline",
    "last_report": "attnc.backend",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'attnc' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
