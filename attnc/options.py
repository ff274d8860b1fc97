"""What the user wants: the options of one compile, checked once and then passed on explicitly.

`torch.compile(model, backend="attnc", options={...})` hands its `options` and `mode` to the backend, which
builds an `Options` from them at once. This is also the only file that reads the environment: `ATTNC_STORE`
(where verdicts, records and kernels are kept) and `ATTNC_LOG` (how much is logged to stderr).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Protocol, get_origin, runtime_checkable

import torch

from attnc.errors import UsageError, did_you_mean

INNER = ("inductor", "aot_eager", "eager")
# What a user may supply for a region.
WEIGHTS = ("query_map", "key_map", "window_factor", "linear_factor", "gate_query", "gate_key", "centroids")
LOG_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


@runtime_checkable
class Planned(Protocol):
    """What the options need of a plan, which is made of what lies above them.

    A plan names approximations, and gives no leave for them: one is taken only where the plan has it and `allow`
    names its form as well, so that without a name in `allow` the compiled model computes the same function, whoever
    made the plan. Where `allow` does not name it, the region stays as written and says which name is missing. Regions
    that a plan for the device does not name get exact forms only: nothing measured an approximation of them.
    """

    @property
    def choices(self) -> Mapping[str, Any]: ...
    @property
    def device(self) -> str: ...


@dataclass(frozen=True)
class Options:
    """The options of one compile; every field is checked when the object is built.

    inner:    the compiler that receives the rewritten graph: "inductor", "aot_eager" or "eager".
    inductor: Inductor settings for attnc's own compiles, as `options=` of plain torch.compile takes them.
    mode:     an Inductor mode such as "max-autotune"; None is Inductor's default.
    strict:   raise where a region is in trouble, instead of leaving it as written with one warning.
    check:    validate each rewrite numerically against the subgraph it replaces.
    forms:    the only forms considered for rewriting; None means all of them.
    allow:    approximations by name, ("low_rank",), or with their knobs, ("block_mixture{block=512,top_k=4}",): forms
              that are not exact are taken only where named here, without knobs with their default ones, and with an
              error that nothing has measured; `attnc.autotune` measures it on data and chooses the knobs.
    force:    a form's spelling, used wherever it applies whatever the cost rule says.
    device:   the GPU that choices are made for, as "h100" (`attnc devices` lists them), or one of a device file of
              yours, "my_gpu.toml" or "my_gpu.toml:mine"; None: the one the model is on.
    plan:     an `attnc.Plan`, whose choices are taken where they apply, its approximations where `allow` names them;
              regions it does not name are chosen as without, among exact forms.
    weights:  tensors by name of regions by path or key, for approximations that are trained: {"layers.0.attn":
              {"query_map": w, "key_map": u}}, leaves that keep their identity: the compiled model reads them anew in
              every run, and gradients reach those that require them when it is compiled.
    store:    directory of verdicts, records and kernels; ATTNC_STORE, else a per-user cache directory, when left out.

    Raises: UsageError for a value of the wrong type or range.
    """

    inner: str = "inductor"
    inductor: Mapping[str, object] = field(default_factory=dict, hash=False)
    mode: str | None = None
    strict: bool = False
    check: bool = True
    forms: tuple[str, ...] | None = None
    allow: tuple[str, ...] = ()
    force: str | None = None
    device: str | None = None
    plan: Planned | None = field(default=None, hash=False)
    weights: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict, hash=False, compare=False)
    store: str = field(default_factory=lambda: _directory(None))

    def __post_init__(self) -> None:
        _check_inner(self.inner)
        _check_flag("strict", self.strict)
        _check_flag("check", self.check)
        _check_force(self.force)
        _check_device(self.device)
        _check_plan(self.plan)
        _check_weights(self.weights)
        checked = {
            "inductor": _inductor_settings(self.inductor),
            "mode": _mode(self.mode),
            "forms": None if self.forms is None else _form_names("forms", self.forms, "('dense',)"),
            "allow": _form_names("allow", self.allow, "('low_rank',)"),
            "store": _directory(self.store),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        for name in ("mode", "inductor"):
            if self.inner != "inductor" and checked[name]:
                raise UsageError(
                    f"option {name}={checked[name]!r} with inner={self.inner!r}: only the inner compiler "
                    f"'inductor' has modes and settings. Leave {name} out, or use inner='inductor'."
                )

    def weights_for(self, *names: str) -> Mapping[str, torch.Tensor]:
        """The weights supplied under the first of `names`, a region's key and path, that has any."""
        return next((self.weights[name] for name in names if name in self.weights), {})

    @classmethod
    def from_torch(
        cls, options: Mapping[str, object] | None = None, mode: str | None = None, **given: object
    ) -> Options:
        """Build from what torch.compile passes to a backend; further keywords are options by name.

        Raises: UsageError for an unknown option, naming the nearest known one, or one given twice.
        """
        if options is not None and not isinstance(options, Mapping):
            advice = 'Use options={"strict": True}'
            raise _wrong_type("options", options, "a dict of option names to values", advice)
        known = [f.name for f in fields(cls)]
        asked = dict(options or {})
        for name, value in {**given, **({} if mode is None else {"mode": mode})}.items():
            if name in asked and asked[name] != value:
                raise UsageError(
                    f"option {name}: given twice, as {asked[name]!r} among the options and as {value!r} "
                    f"beside them; one is allowed. Leave one out."
                )
            asked[name] = value
        for name, value in asked.items():
            if name not in known:
                raise UsageError(
                    f"option {name}={value!r}: no such option; known are {', '.join(known)}."
                    + _way_out(str(name), known)
                )
        return cls(**asked)  # type: ignore[arg-type]  # __post_init__ checks each type


def environment_without(*names: str) -> dict[str, str]:
    """The environment for a child process: this one's, but for `names`."""
    return {name: value for name, value in os.environ.items() if name not in names}


def configure_logging() -> None:
    """Log to stderr at the level that ATTNC_LOG names; without ATTNC_LOG leave logging as it is.

    An application that has its own handlers keeps them: then only the level of the "attnc" loggers is set.

    Raises: UsageError if ATTNC_LOG is no level.
    """
    asked = os.environ.get("ATTNC_LOG", "").strip()
    if not asked:
        return
    if asked.lower() not in LOG_LEVELS:
        raise UsageError(
            f"environment variable ATTNC_LOG={asked!r}: no such level; allowed are {', '.join(LOG_LEVELS)}."
            + (did_you_mean(asked.lower(), LOG_LEVELS) or " Use ATTNC_LOG=info, or unset it.")
        )
    logger = logging.getLogger("attnc")
    logger.setLevel(LOG_LEVELS[asked.lower()])
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s: %(message)s"))
        logger.addHandler(handler)


def _wrong_type(name: str, value: object, allowed: str, advice: str) -> UsageError:
    return UsageError(f"{name}={value!r}: found {type(value).__name__}, allowed is {allowed}. {advice}.")


def _way_out(name: str, known: Iterable[str]) -> str:
    """The closing sentence for an unknown option: the nearest one, or where an Inductor setting goes."""
    setting = name.replace("-", "_")
    if setting in torch._inductor.config.get_config_copy():
        return f' It is a setting of Inductor: use options={{"inductor": {{{setting!r}: ...}}}}.'
    return did_you_mean(name, known) or " Leave it out."


def _check_inner(value: object) -> None:
    if not isinstance(value, str):
        raise _wrong_type("option inner", value, f"one of {', '.join(INNER)}", "Use inner='inductor'")
    if value not in INNER:
        raise UsageError(
            f"option inner={value!r}: no such inner compiler; allowed are {', '.join(INNER)}."
            + (did_you_mean(value, INNER) or " Use inner='inductor'.")
        )


def _check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise _wrong_type(f"option {name}", value, "bool", f"Use {name}=True or {name}=False")


def _check_force(value: object) -> None:
    advice = "Use force='dense', or a form with knobs as in 'sliding_window{window=512}'"
    if value is not None and not isinstance(value, str):
        raise _wrong_type("option force", value, "a form's spelling or None", advice)
    if value is not None and not value.strip():
        raise UsageError(f"option force={value!r}: found an empty text, allowed is a spelling. {advice}.")


def _check_device(value: object) -> None:
    if value is not None and (not isinstance(value, str) or not value.strip()):
        advice = "Use device='h100', or leave device out for the one the model is on"
        raise _wrong_type("option device", value, "the name of a device or None", advice)


def _check_plan(value: object) -> None:
    if value is not None and not isinstance(value, Planned):
        advice = "Make one with attnc.autotune, or read one with attnc.Plan.from_json"
        raise _wrong_type("option plan", value, "an attnc.Plan or None", advice)


def _check_weights(value: object) -> None:
    advice = "Use weights={'layers.0.attn': {'query_map': w, 'key_map': u}}, or leave weights out"
    if not isinstance(value, Mapping) or not all(isinstance(given, Mapping) for given in value.values()):
        raise _wrong_type("option weights", value, "a dict of regions' paths or keys to dicts of tensors", advice)
    for place, given in value.items():
        for name, tensor in given.items():
            asked = f"option weights[{place!r}][{name!r}]"
            if name not in WEIGHTS:
                raise UsageError(
                    f"{asked}: no such weight; allowed are {', '.join(WEIGHTS)}."
                    + (did_you_mean(str(name), WEIGHTS) or " Leave it out.")
                )
            if not isinstance(tensor, torch.Tensor):
                raise UsageError(f"{asked}: found {type(tensor).__name__}, allowed is a tensor. {advice}.")
            if not tensor.is_floating_point():
                raise UsageError(f"{asked}: found {tensor.dtype}, allowed are floating-point types. Convert it.")
            if not tensor.is_leaf:
                raise UsageError(
                    f"{asked}: found the result of {tensor.grad_fn and tensor.grad_fn.name()}, which goes stale when "
                    "its inputs change, allowed are leaves. Pass a parameter, or the result's .detach()."
                )


def _mode(value: object) -> str | None:
    """The mode as Inductor names it; its default is None."""
    if value is None or value == "default":
        return None
    known = list(torch._inductor.list_mode_options())
    if not isinstance(value, str):
        advice = "Leave mode out for the default"
        raise _wrong_type("option mode", value, f"one of {', '.join(known)}", advice)
    if value not in known:
        raise UsageError(
            f"option mode={value!r}: no such mode of Inductor; allowed are {', '.join(known)}."
            + (did_you_mean(value, known) or " Leave mode out for the default.")
        )
    return value


def _form_names(option: str, value: object, example: str) -> tuple[str, ...]:
    advice = f"Use {option}={example}, or leave {option} out"
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise _wrong_type(f"option {option}", value, "a tuple or list of form names", advice)
    names = tuple(value)
    for name in names:
        if not isinstance(name, str) or not name.strip():
            raise UsageError(f"option {option}={value!r}: found {name!r}, allowed are names of forms. {advice}.")
    return names


def _directory(value: object) -> str:
    """The store's directory as an absolute path: as given, else ATTNC_STORE, else the user's cache."""
    given = value or os.environ.get("ATTNC_STORE") or os.path.join("~", ".cache", "attnc")
    advice = "Use store='/path/to/a/directory', or leave store out"
    if not isinstance(given, str | os.PathLike):
        raise _wrong_type("option store", value, "the path of a directory", advice)
    path = os.path.abspath(os.path.expanduser(os.fspath(given)))
    if os.path.exists(path) and not os.path.isdir(path):
        raise UsageError(f"option store={path!r}: found a file, allowed is a directory. {advice}.")
    return path


def _inductor_settings(value: object) -> dict[str, object]:
    """Inductor settings under Inductor's spelling of their names, each checked against its own table."""
    if not isinstance(value, Mapping):
        advice = 'Use inductor={"max_autotune": True}'
        raise _wrong_type("option inductor", value, "a dict of Inductor settings to values", advice)
    if not value:
        return {}
    current = torch._inductor.config.get_config_copy()
    settings = {str(key).replace("-", "_"): setting for key, setting in value.items()}
    for key, setting in settings.items():
        if key not in current:
            raise UsageError(
                f"option inductor: {key!r} is no setting of Inductor in torch {torch.__version__}, which has "
                f"{len(current)}." + (did_you_mean(key, current) or " See torch._inductor.list_options().")
            )
        kind = torch._inductor.config.get_type(key)  # type: ignore[attr-defined]  # torch gives it no stub
        # A union or container type cannot be asked about membership; torch.compile lets those pass as well.
        if get_origin(kind) is None and isinstance(kind, type) and not isinstance(setting, kind):
            raise _wrong_type(
                f"option inductor: {key}", setting, kind.__name__, f"Inductor's value now is {current[key]!r}"
            )
    return settings
