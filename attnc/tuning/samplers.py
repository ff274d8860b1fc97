"""Samplers by name: which setting to try next, given what was tried. All are functions of the seed and the history.

None is asked for a setting twice: a draft that was tried, failed or is being tried is drawn again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial

from attnc.forms.base import Form
from attnc.tuning.surrogate import Array, Features, Tried, propose
from attnc.tuning.tree import Branch, Value, params_of, walk

START = 6  # settings spread over the space before the first model, where no cheaper fidelity gives one
DRAFTS = 16  # draws before a sampler that repeats itself is overruled


@dataclass(frozen=True)
class Known:
    """What a sampler sees. rows: number of each setting of the space, the default's is 0.

    prior:  log seconds at the next cheaper fidelity, one per row; None at the cheapest.
    logs:   row -> log seconds at this fidelity.
    failed: rows that failed. waiting: rows being tried now. free: rows never to be told about yet.
    index:  how many settings were asked for before this one.
    """

    rows: Mapping[Form, int]
    tree: Branch | Form
    points: Features
    prior: Array | None
    logs: dict[int, float]
    failed: frozenset[int]
    waiting: frozenset[int]
    free: Array
    seed: int
    index: int

    @property
    def rng(self) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.index])


Draft = Callable[["optuna.Study", FrozenTrial, Known], int]


def gaussian(study: optuna.Study, trial: FrozenTrial, known: Known) -> int:
    """Greatest expected improvement of a Gaussian process, see `surrogate`."""
    prior = np.zeros(len(known.rows)) if known.prior is None else known.prior
    seen = len(known.logs) + len(known.failed) + len(known.waiting)
    if not known.logs or (known.prior is None and seen < START):
        return ranked(study, trial, known) if known.prior is not None else _far(known)
    residual = float(np.mean([log - prior[row] for row, log in known.logs.items()]))
    worst = max(known.logs.values())
    believed = known.logs | {row: prior[row] + residual for row in known.waiting} | dict.fromkeys(known.failed, worst)
    rows = sorted(believed)
    tried = Tried(np.array(rows), np.array([believed[row] for row in rows]))
    return propose(known.points, tried, known.free, prior, known.rng)


def _far(known: Known) -> int:
    """Of some random free rows the one farthest from all that were taken."""
    drawn = known.rng.choice(known.free, min(64, len(known.free)), replace=False)
    taken = np.setdiff1d(np.arange(len(known.rows)), known.free)
    if not len(taken):
        return int(drawn[0])
    points = known.points.columns
    gaps = ((points[drawn][:, None] - points[taken][None]) ** 2).sum(-1).min(1)
    return int(drawn[int(gaps.argmax())])


def ranked(study: optuna.Study, trial: FrozenTrial, known: Known) -> int:
    """All settings, the fastest at the next cheaper fidelity first; there in the order of the space."""
    return int(known.free[0] if known.prior is None else known.free[int(known.prior[known.free].argmin())])


def uniform(study: optuna.Study, trial: FrozenTrial, known: Known) -> int:
    """Any setting, all alike."""
    return int(known.rng.choice(known.free))


def parzen(study: optuna.Study, trial: FrozenTrial, known: Known) -> int:
    """Optuna's tree-structured Parzen estimator, walking the tree of what is valid."""
    free = set(known.free.tolist())
    for draw in range(DRAFTS):
        seed = int(np.random.SeedSequence([known.seed, known.index, draw]).generate_state(1)[0])
        inner = optuna.samplers.TPESampler(seed=seed, multivariate=False, constant_liar=False)
        row = known.rows[walk(known.tree, partial(_choose, inner, study, trial))]
        if row in free:
            return row
    return ranked(study, trial, known)


def _choose(inner: BaseSampler, study: optuna.Study, trial: FrozenTrial, name: str, choices: tuple[Value, ...]) -> Any:
    if any(isinstance(value, str | bool) for value in choices):
        return inner.sample_independent(study, trial, name, CategoricalDistribution(choices))
    # Optuna keeps a choice as its index: as a number it also says which choices are neighbours.
    return choices[inner.sample_independent(study, trial, name, IntDistribution(0, len(choices) - 1))]


SAMPLERS: dict[str, Draft] = {"gp": gaussian, "tpe": parzen, "random": uniform, "exhaustive": ranked}
DEFAULT = "gp"
# Samplers that get no prior draw from what the cheaper fidelity leaves over, see `search.promoted`.
USES_PRIOR = {"gp", "exhaustive"}


class Chooser(BaseSampler):
    """Optuna's side of a draft: the parameters of the drafted setting."""

    def __init__(self, tree: Branch | Form, draft: Callable[[optuna.Study, FrozenTrial], Form]) -> None:
        self.tree, self.draft = tree, draft
        self.params: dict[str, tuple[Value, tuple[Value, ...]]] = {}

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self.params = params_of(self.tree, self.draft(study, trial))

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {name: CategoricalDistribution(choices) for name, (_, choices) in self.params.items()}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {name: value for name, (value, _) in self.params.items()}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        raise NotImplementedError(f"every parameter is drafted before the trial, found {param_name}")
