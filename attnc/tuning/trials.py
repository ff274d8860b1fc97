"""The trials of one search: an Optuna study whose trials are settings. What a stopped run left is taken up."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from attnc.errors import ArtifactError
from attnc.forms.base import Form
from attnc.records import Timing, timing_of, told
from attnc.tuning.samplers import Chooser
from attnc.tuning.storage import Opened
from attnc.tuning.tree import Branch, form_of

log = logging.getLogger("attnc.tuning")

TOLD = "timing"  # user attribute of a trial: its timing, as in a record
OWNER = "owner"  # and the process that tries it, as in `owners`
# A trial that another machine has been running for this many later trials belongs to a process that died.
LAPSED = 64


@dataclass(frozen=True)
class Trial:
    """One setting in the study. state: "done", "waiting" (ours to try) or "elsewhere" (another process tries it)."""

    number: int
    form: Form
    state: str
    timing: Timing | None = None


class Trials:
    """The trials of a study, in order. tree: the settings that trials name."""

    def __init__(self, opened: Opened, name: str, tree: Branch | Form, fidelity: str) -> None:
        self.storage: BaseStorage = opened.storage
        self.owners = opened.owners
        self.tree, self.fidelity = tree, fidelity
        self.study = optuna.create_study(storage=self.storage, study_name=name, load_if_exists=True)
        self._id = self.storage.get_study_id_from_name(name)
        self._mine: set[int] = set()
        self._seen = 0  # trials of the study when they were last read
        self._read: dict[int, Trial] = {}
        self._take_over()

    def _take_over(self) -> None:
        """Take up the trials that dead processes of this machine were running."""
        if self.owners is None or not self._elsewhere():
            return
        with self.owners.settled():
            for found in self._elsewhere():  # again: another process may have taken them over
                if self.owners.is_dead(found.user_attrs.get(OWNER)):
                    self._own(found.number)
                    self._adopt(found)

    def _elsewhere(self) -> list[FrozenTrial]:
        running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return [found for found in running if found.number not in self._mine]

    def _own(self, number: int) -> None:
        if self.owners is not None:
            self.storage.set_trial_user_attr(self._trial_id(number), OWNER, self.owners.name)

    def _trial_id(self, number: int) -> int:
        return self.storage.get_trial_id_from_study_id_trial_number(self._id, number)

    def _adopt(self, found: FrozenTrial) -> None:
        """A trial that a dead process was running: told if its time is known, tried again if its setting is."""
        form, timing = form_of(self.tree, found.params), _timing(found)
        if form is None:
            self.study.tell(found.number, state=TrialState.FAIL)
        else:
            self._mine.add(found.number)
            if timing is not None:
                self._finish(found.number, timing)

    def all(self) -> list[Trial]:
        """Every trial whose setting is in the tree, by number."""
        self._take_over()
        found = self.study.get_trials(deepcopy=False)
        self._seen = len(found)
        trials = []
        for trial in found:
            if trial.number not in self._read:
                read = self._trial(trial, len(found))
                if read is None:
                    continue
                if read.state == "done":
                    self._read[trial.number] = read
                trials.append(read)
            else:
                trials.append(self._read[trial.number])
        return trials

    def _trial(self, trial: FrozenTrial, count: int) -> Trial | None:
        form = form_of(self.tree, trial.params)
        if form is None or trial.state == TrialState.FAIL:
            return None
        if trial.state in (TrialState.COMPLETE, TrialState.PRUNED):
            timing = _timing(trial)
            return None if timing is None else Trial(trial.number, form, "done", timing)
        if trial.number in self._mine:
            return Trial(trial.number, form, "waiting")
        return Trial(trial.number, form, "elsewhere") if count - trial.number <= LAPSED else None

    def ask(self, draft: Callable[[optuna.Study, FrozenTrial], Form]) -> Trial | None:
        """Begin a trial with the setting that `draft` picks, knowing what `all` gave; None where another process has
        begun one since, so that no two try one setting."""
        self.study.sampler = chooser = Chooser(self.tree, draft)
        with self.owners.settled() if self.owners is not None else contextlib.nullcontext():
            if len(self.study.get_trials(deepcopy=False)) != self._seen:
                return None
            trial = self.study.ask()
            self._own(trial.number)
            for name, (_, choices) in chooser.params.items():
                trial.suggest_categorical(name, choices)
        form = form_of(self.tree, trial.params)
        if form is None:
            raise RuntimeError(f"trial {trial.number} names no setting of the space: {trial.params}")
        self._mine.add(trial.number)
        return Trial(trial.number, form, "waiting")

    def tell(self, trial: Trial, timing: Timing) -> None:
        """End a trial; one without a time at the study's fidelity failed or did not get that far."""
        self.storage.set_trial_user_attr(self._trial_id(trial.number), TOLD, told(timing))
        self._finish(trial.number, timing)

    def _finish(self, number: int, timing: Timing) -> None:
        seconds = timing.at(self.fidelity)
        state = TrialState.PRUNED if seconds is None else TrialState.COMPLETE
        self.study.tell(number, seconds, state=state, skip_if_finished=True)


def _timing(trial: FrozenTrial) -> Timing | None:
    if TOLD not in trial.user_attrs:
        return None
    try:
        return timing_of(trial.user_attrs[TOLD], f"trial {trial.number}")
    except ArtifactError as exc:
        log.warning("%s The trial is left out.", exc)
        return None
