"""The zoo's records as tables: what was found against the truth, what is equal, what was refused and why.

A record is one model under one setting, as `benchmarks/zoo_check.py` measures it. Pure functions: text in, text out.
"""

from __future__ import annotations

import json
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]
TRUTH = {"attention": "n_attention_cores", "ffn": "n_ffn", "moe": "n_moe", "recurrence": "n_linear_mixer"}
OPTIONAL_FFN = ("n_head_mlp", "n_aux_ffn")  # heads and adapters that look like a feed-forward block may be counted
KINDS = tuple(TRUTH)
GOALS = {"attention": 0.98, "ffn": 0.95, "moe": 0.95, "recurrence": 0.90}
VERDICTS = ("equal", "wrong", "failed", "late", "open", "left out")
SLOW = 10.0  # seconds
MOST_REASONS, MOST_NAMES, WIDEST = 30, 12, 220


def load(folder: Path) -> list[Record]:
    """The records of every file in `folder`."""
    return [record for path in sorted(folder.glob("*.jsonl")) for record in load_file(path)]


def load_file(path: Path) -> list[Record]:
    """The latest record of each key, in order of keys."""
    latest = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:  # the last line of a run that was killed
            continue
        latest[record["key"]] = record
    return [latest[key] for key in sorted(latest)]


def truth_of(entry: Mapping[str, Any]) -> dict[str, int]:
    """The counts of one model of public.json by kind; `optional`: what may be counted as ffn besides."""
    counts = {kind: int(entry.get(name, 0)) for kind, name in TRUTH.items()}
    return counts | {"optional": sum(int(entry.get(name, 0)) for name in OPTIONAL_FFN)}


def part(record: Record, name: str) -> Mapping[str, Any]:
    return (record.get("result") or {}).get(name) or {}


def within(errors: Mapping[str, float | None] | None, tolerance: float) -> bool:
    """Whether every error is there and at most `tolerance`."""
    return bool(errors) and all(e is not None and e <= tolerance for e in errors.values())


def verdict(record: Record) -> str:
    """One of VERDICTS.

    wrong, failed: the controls are equal, attnc is not or raised. open: a control is no better (Dynamo alone, the inner
    compiler alone, eager with its weights moved by one unit in the last place, eager in float64). late: out of time or
    memory, or the process died. left out: the library has no such model.
    """
    if (record.get("result") or {}).get("skipped"):
        return "left out"
    ours, control = part(record, "attnc"), part(record, "control")
    tolerance = record.get("tolerance", 1e-4)
    if within(ours.get("errors"), tolerance):
        return "equal"
    if not ours or (not control and record["status"] != "ok"):
        return "failed" if record["status"] == "error" else "late"
    held = [control.get("errors"), control.get("eager")]
    held += [errors] if (errors := part(record, "inner_alone").get("errors")) else []
    held += [part(record, name) for name in ("nudged", "float64") if _measured(part(record, name))]
    if not all(within(errors, tolerance) for errors in held):
        return "open"
    return "failed" if "failed" in ours else "wrong"


def _measured(errors: Mapping[str, float | None]) -> bool:
    return bool(errors) and None not in errors.values()


def counted(records: Iterable[Record]) -> list[Record]:
    return [r for r in records if verdict(r) != "left out"]


def found_of(record: Record, kind: str) -> int:
    return int((part(record, "attnc").get("regions") or {}).get(kind, 0))


def wanted_of(record: Record, kind: str) -> int:
    return int((record.get("truth") or {}).get(kind, 0))


def allowed_of(record: Record, kind: str) -> int:
    extra = (record.get("truth") or {}).get("optional", 0) if kind == "ffn" else 0
    return wanted_of(record, kind) + int(extra)


def recall(records: Iterable[Record], kind: str) -> tuple[int, int]:
    """Regions of `kind` found, at most the truth of each record, and the truth."""
    pairs = [(found_of(r, kind), wanted_of(r, kind)) for r in counted(records)]
    return sum(min(pair) for pair in pairs), sum(wanted for _, wanted in pairs)


def missed(records: Iterable[Record], kind: str) -> list[Record]:
    return [r for r in counted(records) if found_of(r, kind) < wanted_of(r, kind)]


def beyond(records: Iterable[Record], kind: str) -> list[Record]:
    return [r for r in counted(records) if "truth" in r and found_of(r, kind) > allowed_of(r, kind)]


def silent(records: Iterable[Record]) -> list[Record]:
    """Records with a miss of which attnc says nothing: no refusal, no problem, no failure."""
    found = [r for r in counted(records) if any(found_of(r, k) < wanted_of(r, k) for k in KINDS)]
    said = ("unmatched", "problems", "failed")
    return [r for r in found if part(r, "attnc") and not any(part(r, "attnc").get(name) for name in said)]


def more_breaks(record: Record) -> bool:
    """Whether attnc's compile has more graph breaks, or graphs, than Dynamo alone, with either backend it ran under."""
    ours, *controls = (part(record, name) for name in ("attnc", "control", "inner_alone"))
    held = [control for control in controls if "graphs" in control]
    if "graphs" not in ours or not held:
        return False
    return all(_breaks(ours) > _breaks(control) or ours["graphs"] > control["graphs"] for control in held)


def _breaks(compiled: Mapping[str, Any]) -> int:
    return sum(compiled["breaks"].values())


def refusals(records: Iterable[Record]) -> list[tuple[str, int, list[Record]]]:
    """(reason, how often it stood in the way, records) of records with a miss; numbers do not tell reasons apart."""
    times: Counter[str] = Counter()
    where: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if not any(found_of(record, k) < wanted_of(record, k) for k in KINDS):
            continue
        for entry in part(record, "attnc").get("unmatched") or ():
            reason = re.sub(r"\d+", "n", re.sub(r"_\d+\b", "", entry[1]))
            times[reason] += max(entry[4], 1)
            if record not in where[reason]:
                where[reason].append(record)
    return [(reason, count, where[reason]) for reason, count in times.most_common()]


# Text.


def setting_of(record: Record) -> str:
    parts = [record["attn"], record["mask"], record["mode"]]
    parts += [record[name] for name in ("inner", "experts") if record.get(name) not in (None, "aot_eager")]
    parts += ["force_" + record["force"]] if record.get("force") else []
    return "-".join(parts + [name for name in ("cache", "unlisted") if record.get(name)])


def is_plain(record: Record) -> bool:
    """Of the eight settings that the goals are about."""
    return record.get("inner", "aot_eager") == "aot_eager" and not any(
        record.get(name) for name in ("cache", "experts", "force", "unlisted")
    )


def ratio(found: int, wanted: int) -> str:
    return "-" if not wanted else f"{found}/{wanted} {100 * found / wanted:.1f}%"


def grouped(records: Iterable[Record], by: Callable[[Record], str]) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[by(record)].append(record)
    return dict(groups)


def row(records: Sequence[Record]) -> list[str]:
    """Records, found/truth by kind, verdicts, graphs, records with more breaks than Dynamo alone, seconds."""
    verdicts = Counter(map(verdict, records))
    both = [r for r in records if "graphs" in part(r, "attnc") and "graphs" in part(r, "control")]
    graphs = (sum(part(r, name)["graphs"] for r in both) for name in ("attnc", "control"))
    return [
        str(len(counted(records))),
        *(ratio(*recall(records, kind)) for kind in KINDS),
        *(str(verdicts[name]) for name in VERDICTS),
        " / ".join(map(str, graphs)),
        str(sum(map(more_breaks, records))),
        middle(part(r, "attnc").get("compile_s") for r in records),
        middle(part(r, "control").get("compile_s") for r in records),
    ]


ROW = ("records", *KINDS, *VERDICTS, "graphs attnc / Dynamo", "more breaks", "attnc s", "Dynamo s")


def middle(values: Iterable[float | None]) -> str:
    known = [v for v in values if v is not None]
    return f"{statistics.median(known):.1f}" if known else "-"


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def named(records: Iterable[Record], most: int = MOST_NAMES, tell: Callable[[Record], str] = lambda r: "") -> str:
    """Models, each once with its number of settings and what `tell` says of its first record."""
    groups = grouped(records, lambda r: r["model"])
    parts = []
    for model, own in list(groups.items())[:most]:
        notes = [note for note in (tell(own[0]), f"x{len(own)}" if len(own) > 1 else "") if note]
        parts.append(model + (f" ({', '.join(notes)})" if notes else ""))
    return ", ".join(parts) + (f" and {len(groups) - most} more" if len(groups) > most else "")


def trouble(record: Record) -> str:
    """What went wrong, in few words."""
    ours = part(record, "attnc")
    errors = ours.get("errors") or {}
    worst = max((e for e in errors.values() if e is not None), default=None)
    text = ours.get("failed") or record.get("why") or ("" if worst is None else f"error {worst:.1e}")
    return str(text)[:WIDEST] or "other shapes"


def origin(records: Iterable[Record]) -> str:
    """Versions of the records, one line each."""
    groups = Counter(", ".join(f"{k} {v}" for k, v in (r.get("on") or {}).items()) for r in records)
    return "\n".join(f"- {count} records: {on}" for on, count in groups.most_common())


def page(records: Sequence[Record]) -> str:
    """The whole of docs/zoo.md."""
    plain = [r for r in records if is_plain(r)]
    order = {name: at for at, name in enumerate(sorted({setting_of(r) for r in records}))}
    settings = sorted(grouped(records, setting_of).items(), key=lambda item: (not is_plain(item[1][0]), order[item[0]]))
    categories = sorted(grouped(plain, lambda r: r["category"]).items())
    goals = ", ".join(f"{kind} {100 * goal:.0f}%" for kind, goal in GOALS.items())
    blocks = [
        "# The zoo: tiny models of the architectures in transformers",
        "Written by `python benchmarks/zoo.py table` from the records in `benchmarks/results/cpu/zoo/`, which "
        "`python benchmarks/zoo.py run` makes. Each record is one model of `shared/zoo/public.json`, compiled with "
        '`backend="attnc"` and compared with eager (1e-4 of each output\'s largest value in float32, gradients in '
        "training), and with Dynamo alone as control; where that differs, with the inner compiler alone and "
        "with eager in float64 and with its weights moved by one unit in the last place too. A setting is "
        "attention-mask-mode.",
        f"## What was run\n\n{origin(records)}",
        "`found/truth` counts regions that ran in one call; a record's found is at most its truth. Goals: "
        f"{goals}. wrong, failed: where the control is equal. late: out of time, or the process died. open: the "
        "control is no better. left out: the library has no such model. Seconds are medians of the first call.",
        markdown(["setting", *ROW], [[name, *row(own)] for name, own in settings] + _sum("all of aot_eager", plain)),
        "## By category, the settings of aot_eager without cache",
        markdown(["category", *ROW], [[name, *row(own)] for name, own in categories] + _sum("all", plain)),
        *_lists(plain, "aot_eager without cache"),
    ]
    others = [r for r in records if not is_plain(r)]
    blocks += _lists(others, "other settings") if others else []
    return "\n\n".join(blocks) + "\n"


def _sum(name: str, records: Sequence[Record]) -> list[list[str]]:
    return [[name, *row(records)]] if records else []


def _lists(records: Sequence[Record], title: str) -> list[str]:
    """What is not as it should be: misses, refusals, wrong results, failures."""
    blocks = [f"## What is missing, {title}"]
    lines = []
    for kind in KINDS:
        low, high = missed(records, kind), beyond(records, kind)
        tell = _count(kind)
        lines += [f"- {kind} missed in {named(low, 1000, tell)}"] if low else []
        lines += [f"- {kind} beyond the truth in {named(high, 1000, tell)}"] if high else []
    quiet, breaks = silent(records), [r for r in records if more_breaks(r)]
    slow = [r for r in records if own_seconds(r) > SLOW]
    lines += [f"- missed without a refusal: {named(quiet, 1000)}"] if quiet else []
    lines += [f"- more graph breaks than Dynamo alone: {named(breaks, 1000)}"] if breaks else []
    lines += [f"- more than {SLOW:.0f} s in attnc's own passes: {named(slow, 1000, _longest)}"] if slow else []
    for name in ("wrong", "failed", "late", "open"):
        own = [r for r in records if verdict(r) == name]
        lines += [f"- {name}: {named(own, 1000, trouble)}"] if own else []
    blocks.append("\n".join(lines) or "Nothing.")
    reasons = refusals(records)
    if reasons:
        shown = [[reason[:WIDEST], str(count), named(own, 4)] for reason, count, own in reasons[:MOST_REASONS]]
        rest = len(reasons) - len(shown)
        count = f"{len(reasons)} reasons" + (f", {rest} not shown" if rest else "")
        blocks.append(f"Refusals in models with a miss, {count}:")
        blocks.append(markdown(["reason", "times", "models"], shown))
    return blocks


def own_seconds(record: Record) -> float:
    return float(sum((part(record, "attnc").get("own_s") or {}).values()))


def _longest(record: Record) -> str:
    name, seconds = max(part(record, "attnc")["own_s"].items(), key=lambda item: item[1])
    return f"{name} {seconds:.0f} s"


def _count(kind: str) -> Callable[[Record], str]:
    return lambda record: f"{found_of(record, kind)}/{wanted_of(record, kind)}"
