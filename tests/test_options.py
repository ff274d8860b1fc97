"""Options: every field checked, every message with what was asked, what is allowed and what to do."""

from __future__ import annotations

import dataclasses
import logging
import os
import pickle

import pytest
import torch

from attnc.errors import AttncError, UsageError
from attnc.options import Options, configure_logging
from attnc.plan import Plan


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch):
    """The "attnc" logger, put back as it was afterwards."""
    logger = logging.getLogger("attnc")
    level, handlers = logger.level, list(logger.handlers)
    yield logger
    logger.setLevel(level)
    logger.handlers[:] = handlers


def refusal(**asked: object) -> str:
    with pytest.raises(UsageError) as caught:
        Options.from_torch(asked)
    assert isinstance(caught.value, AttncError)
    assert isinstance(caught.value, ValueError)
    return str(caught.value)


def test_nothing_asked_gives_the_defaults():
    assert Options.from_torch() == Options.from_torch(None, None) == Options.from_torch({}) == Options()
    plain = Options()
    assert (plain.inner, plain.mode, plain.strict, plain.check) == ("inductor", None, False, True)
    assert (plain.forms, plain.force, plain.inductor) == (None, None, {})


def test_every_field_can_be_set_by_torch_compile(tmp_path):
    asked = {
        "inner": "inductor",
        "inductor": {"max_autotune": True, "triton.cudagraphs": False},
        "mode": "max-autotune",
        "strict": True,
        "check": False,
        "forms": ["dense", "block_sparse"],
        "allow": ["low_rank"],
        "force": "block_sparse{provider=sdpa}",
        "device": "h100",
        "plan": Plan(),
        "weights": {"layer": {"query_map": torch.ones(2, 4, 4)}},
        "store": str(tmp_path),
    }
    built = Options.from_torch(asked)
    assert asked.keys() == {f.name for f in dataclasses.fields(Options)}
    assert built == Options(**{**asked, "forms": ("dense", "block_sparse"), "allow": ("low_rank",)})
    shown = {f.name: getattr(built, f.name) for f in dataclasses.fields(built)}
    assert shown == {**asked, "forms": built.forms, "allow": built.allow}


def test_keywords_beside_the_options_are_options():
    assert Options.from_torch({"inner": "eager"}, None, strict=True) == Options(inner="eager", strict=True)


def test_an_option_given_twice_must_agree():
    assert Options.from_torch({"strict": True}, strict=True).strict
    with pytest.raises(UsageError, match=r"mode: given twice, as 'max-autotune' .* 'reduce-overhead'"):
        Options.from_torch({"mode": "max-autotune"}, "reduce-overhead")


def test_options_are_values():
    one, other = Options(inductor={"max_autotune": True}), Options(inductor={"max-autotune": True})
    assert one == other
    assert hash(one) == hash(other)
    assert pickle.loads(pickle.dumps(one)) == one
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.strict = True


def test_options_keep_no_hold_on_what_was_passed():
    settings = {"max_autotune": True}
    built = Options(inductor=settings)
    settings["max_autotune"] = False
    assert built.inductor == {"max_autotune": True}


@pytest.mark.parametrize(("mistyped", "meant"), [("strikt", "strict"), ("form", "forms"), ("iner", "inner")])
def test_an_unknown_option_names_the_nearest(mistyped, meant):
    message = refusal(**{mistyped: True})
    assert f"option {mistyped}=True" in message
    assert f"Did you mean {meant!r}?" in message


def test_an_unknown_option_near_none_lists_all():
    message = refusal(zzzzz=1)
    assert all(f.name in message for f in dataclasses.fields(Options))
    assert message.endswith("Leave it out.")


@pytest.mark.parametrize("setting", ["max_autotune", "triton.cudagraphs", "max-autotune"])
def test_an_inductor_setting_in_the_wrong_place_is_shown_its_place(setting):
    assert 'options={"inductor": {' in refusal(**{setting: True})


def test_an_option_that_is_no_text_is_refused():
    with pytest.raises(UsageError, match="no such option"):
        Options.from_torch({3: True})


@pytest.mark.parametrize("options", ["strict", ["strict"], 1])
def test_options_must_be_a_dict(options):
    with pytest.raises(UsageError, match=f"found {type(options).__name__}, allowed is a dict"):
        Options.from_torch(options)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("inner", "indctor", "allowed are inductor, aot_eager, eager. Did you mean 'inductor'?"),
        ("inner", "xla", "Use inner='inductor'."),
        ("inner", None, "found NoneType"),
        ("mode", "max-autotun", "Did you mean 'max-autotune'?"),
        ("mode", "qqq", "Leave mode out for the default."),
        ("mode", 3, "found int"),
        ("strict", 1, "found int, allowed is bool. Use strict=True or strict=False."),
        ("check", "yes", "found str, allowed is bool"),
        ("forms", "dense", "found str, allowed is a tuple or list"),
        ("forms", 3, "found int"),
        ("forms", ("dense", 3), "found 3, allowed are names of forms"),
        ("forms", ("",), "found ''"),
        ("allow", "low_rank", "found str, allowed is a tuple or list"),
        ("allow", None, "found NoneType"),
        ("allow", ("",), "found ''"),
        ("force", 3, "found int, allowed is a form's spelling or None"),
        ("force", "  ", "found an empty text"),
        ("device", 90, "found int, allowed is the name of a device"),
        ("plan", {}, "allowed is an attnc.Plan or None"),
        ("store", 3, "found int, allowed is the path of a directory"),
        ("store", __file__, "found a file, allowed is a directory"),
        ("inductor", ["max_autotune"], "found list, allowed is a dict"),
        ("inductor", {"max_autotun": True}, "Did you mean 'max_autotune'?"),
        ("inductor", {"qqqqqqqq": True}, "See torch._inductor.list_options()."),
        ("inductor", {3: True}, "'3' is no setting"),
        ("inductor", {"max_autotune": "yes"}, "found str, allowed is bool. Inductor's value now is "),
    ],
)
def test_a_wrong_value_says_what_is_allowed(name, value, says):
    message = refusal(**{name: value})
    assert f"option {name}" in message
    assert says in message


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize(("name", "value"), [("mode", "max-autotune"), ("inductor", {"max_autotune": True})])
def test_inductor_settings_for_another_inner_compiler_are_refused(inner, name, value):
    assert "Leave " + name + " out, or use inner='inductor'." in refusal(inner=inner, **{name: value})


@pytest.mark.parametrize("inner", ["inductor", "eager", "aot_eager"])
def test_the_default_mode_goes_with_every_inner_compiler(inner):
    assert Options.from_torch({"inner": inner}, "default").mode is None


def test_every_mode_of_inductor_is_known():
    for mode in torch._inductor.list_mode_options():
        assert Options.from_torch(None, mode).mode == (None if mode == "default" else mode)


def test_every_setting_of_inductor_is_accepted_at_its_own_value():
    current = torch._inductor.config.get_config_copy()
    typed = {k: v for k, v in current.items() if isinstance(v, bool | int | str)}
    assert len(typed) > 100
    assert Options(inductor=typed).inductor == typed


def test_the_store_is_the_given_directory_else_the_environments_else_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("ATTNC_STORE", str(tmp_path / "theirs"))
    assert Options(store=str(tmp_path / "mine")).store == str(tmp_path / "mine")
    assert Options(store=tmp_path / "mine").store == str(tmp_path / "mine")
    assert Options().store == Options(store=None).store == str(tmp_path / "theirs")
    monkeypatch.delenv("ATTNC_STORE")
    assert Options().store == os.path.expanduser("~/.cache/attnc")
    assert Options(store="~/x").store == os.path.expanduser("~/x")
    assert Options(store="x").store == os.path.abspath("x")


def test_building_options_creates_no_directory(tmp_path):
    Options(store=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_logging_is_left_alone_when_the_environment_asks_nothing(monkeypatch, log):
    monkeypatch.delenv("ATTNC_LOG", raising=False)
    level, handlers = log.level, list(log.handlers)
    configure_logging()
    assert (log.level, log.handlers) == (level, handlers)


def test_logging_is_set_up_once_at_the_level_asked(monkeypatch, log):
    monkeypatch.setenv("ATTNC_LOG", "Info")
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    configure_logging()
    configure_logging()
    assert log.level == logging.INFO
    assert len(log.handlers) == 1


def test_logging_keeps_an_applications_own_handlers(monkeypatch, log):
    monkeypatch.setenv("ATTNC_LOG", "debug")
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.NullHandler()])
    configure_logging()
    assert (log.level, log.handlers) == (logging.DEBUG, [])


def test_an_unknown_log_level_names_the_nearest(monkeypatch, log):
    monkeypatch.setenv("ATTNC_LOG", "debugg")
    with pytest.raises(UsageError, match=r"ATTNC_LOG='debugg'.*allowed are debug, .*Did you mean 'debug'"):
        configure_logging()
