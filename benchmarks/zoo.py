"""Is attnc right on every architecture of transformers that can be built? Recognition, equality, graphs, by category.

Tiny random models of `../shared/zoo/public.json` (181 types with ground truth) are compiled with attnc and compared
with eager, each in a process forked from a warm parent. Records are JSON lines in results/cpu/zoo/, one file for each
setting; a run goes on where an earlier one ended.

    python benchmarks/zoo.py run [--attn eager,sdpa] [--mask none,pad] [--mode eval,train] [--sample 30] [--fresh]
    python benchmarks/zoo.py run --inner inductor --sample 30
    python benchmarks/zoo.py run --cache --mode eval --sample 20       a prefill and three decode steps
    python benchmarks/zoo.py table                                     writes docs/zoo.md
    python benchmarks/zoo.py                                           prints what the records say
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

# Before torch is loaded: each job has one thread and nothing is fetched.
for _name, _value in {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
}.items():
    os.environ.setdefault(_name, _value)

import torch  # noqa: E402
import zoo_table as table  # noqa: E402
from timing import RESULTS, ROOT, print_environment, print_table  # noqa: E402

from attnc.store import source_version  # noqa: E402

ZOO = ROOT.parent / "shared" / "zoo"
RECORDS = RESULTS / "cpu" / "zoo"
PAGE = ROOT / "docs" / "zoo.md"
NEEDED = ("public.json", "zoo_build.py", "zoo_run.py", "zoo_capture.py", "zoo_truth.py", "zoo_overrides.py")
CHOICES = {"attn": ("eager", "sdpa"), "mask": ("none", "pad"), "mode": ("eval", "train")}
SEED = 11  # of the order of models: a run cut short is a fair sample too


def harness(folder: Path) -> None:
    """Put the zoo's modules on the path, without leaving compiled files beside them; ends the process if absent."""
    absent = [name for name in NEEDED if not (folder / name).is_file()]
    if absent:
        sys.exit(
            f"benchmarks/zoo.py: found no {', '.join(absent)} in {folder}; allowed is the folder of the model zoo, "
            f"which holds {', '.join(NEEDED)}. Pass it with --zoo FOLDER."
        )
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(folder))


def loaded() -> tuple[ModuleType, ModuleType, ModuleType]:
    """The zoo's modules, and the check; only once `harness` has run."""
    import transformers
    import zoo_build
    import zoo_check
    import zoo_run

    transformers.logging.set_verbosity_error()
    return zoo_build, zoo_run, zoo_check


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command")
    run = commands.add_parser("run", help="measure, and keep records")
    for name, known in CHOICES.items():
        run.add_argument(f"--{name}", type=lambda text, known=known: several(text, known), default=known)
    run.add_argument("--inner", choices=("aot_eager", "inductor", "eager"), default="aot_eager")
    run.add_argument("--cache", action="store_true", help="a prefill and decode steps with the model's own cache")
    run.add_argument("--force", help="a form's spelling for every region that it fits, as in attnc's options")
    run.add_argument("--experts", choices=("eager", "batched_mm", "grouped_mm"))
    run.add_argument("--sample", type=int, help="only so many models, a seeded choice")
    run.add_argument("--only", help="these model types, with commas")
    run.add_argument("--family", help="these families of the zoo's catalogue, with commas")
    run.add_argument("--category", help="these categories of public.json, with commas")
    run.add_argument("--unlisted", action="store_true", help="what can be built and is not in public.json: no truth")
    run.add_argument("--workers", type=int, default=2)
    run.add_argument("--timeout", type=float, default=120, help="seconds a record may take")
    run.add_argument("--minutes", type=float, help="start nothing new after so many")
    run.add_argument("--fresh", action="store_true", help="measure again what there is; controls are kept")
    run.add_argument("--controls", action="store_true", help="with --fresh, measure the controls again too")
    run.add_argument("--retry", action="store_true", help="measure again what ended without a result")
    run.add_argument("--zoo", type=Path, default=ZOO, help=f"folder of the model zoo, {ZOO} when left out")
    show = commands.add_parser("table", help=f"write {PAGE.relative_to(ROOT)}")
    show.add_argument("--page", type=Path, default=PAGE)
    for command in (run, show):
        command.add_argument("--records", type=Path, default=RECORDS)
    return parser.parse_args()


def several(text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    asked = tuple(text.split(","))
    if unknown := [name for name in asked if name not in known]:
        raise argparse.ArgumentTypeError(f"found {', '.join(unknown)}, allowed are {', '.join(known)}")
    return asked


def subjects(args: argparse.Namespace, zoo_build: ModuleType) -> list[dict[str, Any]]:
    """The models asked for, in seeded order, each with category, family and truth; without truth if unlisted.

    Ends the process where a name is unknown.
    """
    listed = json.loads((args.zoo / "public.json").read_text(encoding="utf-8"))["models"]
    known = {name: entry.family for name, entry in zoo_build.catalog().items() if name not in zoo_build.SKIP}
    names = sorted(known.keys() - listed.keys() if args.unlisted else known.keys() & listed.keys())
    if args.only and (unknown := set(args.only.split(",")) - set(names)):
        where = "of the catalogue outside public.json" if args.unlisted else "in public.json"
        sys.exit(f"benchmarks/zoo.py --only: found {', '.join(sorted(unknown))}; allowed are model types {where}.")
    random.Random(SEED).shuffle(names)
    found = []
    for name in names:
        truth = {"truth": table.truth_of(listed[name])} if name in listed else {"unlisted": True}
        found.append({"model": name, "category": listed.get(name, {}).get("category", "unlisted"), **truth})
        found[-1]["family"] = known[name]
    for field, asked in (("model", args.only), ("family", args.family), ("category", args.category)):
        found = [subject for subject in found if not asked or subject[field] in asked.split(",")]
    return found[: args.sample]


def measure(args: argparse.Namespace) -> None:
    harness(args.zoo)
    before = print_environment()
    zoo_build, zoo_run, zoo_check = loaded()
    models = subjects(args, zoo_build)
    torch.set_num_threads(1)
    zoo_check.wake(args.inner)
    on = {key: before[key] for key in ("torch", "transformers", "commit")} | {"source": source_version()}
    deadline = time.time() + 60 * args.minutes if args.minutes else None
    args.records.mkdir(parents=True, exist_ok=True)
    modes = args.mode if not args.cache else tuple(mode for mode in args.mode if mode == "eval")
    for attn, mask, mode in itertools.product(args.attn, args.mask, modes):
        setting = {"attn": attn, "mask": mask, "mode": mode, "inner": args.inner, "experts": args.experts}
        setting |= {"cache": args.cache, "force": args.force, "tolerance": zoo_check.TOLERANCE, "on": on}
        jobs = [{**subject, **setting} for subject in models]
        stem = table.setting_of(jobs[0]) if jobs else ""
        for job in jobs:
            job["key"] = f"{job['model']}|{stem}"
        path = args.records / f"{stem}.jsonl"
        keep_controls(path, jobs, zoo_check.CONTROLS, zoo_run, args)
        zoo_run.run_jobs(
            jobs, zoo_check.check, str(path), args.workers, args.timeout, deadline=deadline, retry_errors=args.retry
        )
        tidy(path)
        wanted = {job["key"] for job in jobs}
        tell([r for r in table.load(args.records) if r["key"] in wanted], stem)


def keep_controls(
    path: Path, jobs: list[dict[str, Any]], controls: dict[str, Any], zoo_run: ModuleType, args: argparse.Namespace
) -> None:
    """Controls of earlier records under the same versions; with --fresh the records themselves go."""
    records = zoo_run.load(str(path))
    controls.clear()
    for job in jobs:
        before = records.get(job["key"], {})
        same = all(before.get("on", {}).get(name) == job["on"][name] for name in ("torch", "transformers"))
        control = (before.get("result") or {}).get("control")
        if control and same and not (args.fresh and args.controls):
            controls[job["key"]] = control
        if args.fresh:
            records.pop(job["key"], None)
    if args.fresh:
        write(path, records.values())


def tidy(path: Path) -> None:
    """One line for each record, in order of models, so that two runs can be compared line by line."""
    write(path, table.load_file(path))


def write(path: Path, records: Any) -> None:
    fresh = path.with_suffix(".new")
    fresh.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    fresh.replace(path)


def tell(records: list[table.Record], stem: str) -> None:
    """Print what a setting gave, and every record that is not as it should be."""
    print_table(["setting", *table.ROW], [[stem, *table.row(records)]])
    for kind in table.KINDS:
        for record in table.missed(records, kind) + table.beyond(records, kind):
            found, wanted = table.found_of(record, kind), table.wanted_of(record, kind)
            print(f"  {record['model']}: {kind} {found} of {wanted}")
    for record in records:
        if table.verdict(record) not in ("equal", "left out"):
            print(f"  {record['model']}: {table.verdict(record)}: {table.trouble(record)}")
    walls = [record["wall"] for record in records if "wall" in record]
    if walls:
        print(f"  seconds a record: median {statistics.median(walls):.1f}, most {max(walls):.1f}, all {sum(walls):.0f}")


def main() -> None:
    args = arguments()
    if args.command == "run":
        measure(args)
        return
    folder = getattr(args, "records", RECORDS)
    records = table.load(folder)
    if not records:
        sys.exit(f"benchmarks/zoo.py: found no records in {folder}. Make them with `python benchmarks/zoo.py run`.")
    if args.command is None:
        settings = table.grouped(records, table.setting_of)
        print_table(["setting", *table.ROW], [[name, *table.row(own)] for name, own in settings.items()])
        return
    args.page.parent.mkdir(parents=True, exist_ok=True)
    args.page.write_text(table.page(records), encoding="utf-8")
    print(f"written: {args.page}")


if __name__ == "__main__":
    main()
