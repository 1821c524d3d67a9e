"""`python -m bench FAMILY… [--quick] [--case REGEX] [--out DIR] [--add] [--list]`: check and time families of cases.

Full runs write bench/results/FAMILY.json and .md; --quick and --case write to bench/results/partial, because a part of the
cases is not an answer to the targets. --out overrides both. --add: a long family in several runs, one report. Exit status: 0,
or 1 if a case failed, 2 if a family cannot run.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    from bench.families import FAMILIES

    parser = argparse.ArgumentParser(
        "python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("family", nargs="*", metavar="FAMILY", help=", ".join(FAMILIES))
    parser.add_argument("--quick", action="store_true", help="few cases, short measurements, no torch.compile")
    parser.add_argument("--case", metavar="REGEX", help="only the cases whose id matches")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the results go")
    parser.add_argument("--add", action="store_true", help="to the report that is there, of this machine and commit")
    parser.add_argument("--list", action="store_true", help="print the ids of the cases and stop")
    parser.add_argument("--commit", metavar="SHA", help="what to record where there is no .git")
    args = parser.parse_args(arguments)
    if unknown := [name for name in args.family if name not in FAMILIES]:
        parser.error(f"unknown family {unknown[0]!r}, known are {', '.join(FAMILIES)}")
    try:
        wanted = re.compile(args.case or "")
    except re.error as error:
        parser.error(f"--case is {args.case!r}, which is no regular expression: {error}")
    families = [FAMILIES[name] for name in dict.fromkeys(args.family)]
    if args.list:
        for family in families or FAMILIES.values():
            print(f"{family.name} ({family.device}): {family.about}")
            for spec in family.specs:
                if wanted.search(spec.id) and (spec.quick or not args.quick):
                    print(f"  {spec.id}")
        return 0
    if not families:
        parser.error(f"which family? Known are {', '.join(FAMILIES)}; --list shows their cases")
    if len(families) > 1:
        # One process each: a context that one family's kernel breaks, or a peer's memory, is not the next one's.
        return max(_run_apart(family.name, args) for family in families)

    from bench.harness.case import Context
    from bench.harness.report import Report
    from bench.harness.runner import UnavailableError, device_for, run_family

    family = families[0]
    specs = [spec for spec in family.specs if wanted.search(spec.id) and (spec.quick or not args.quick)]
    if not specs:
        parser.error(f"no case of {family.name} matches {args.case!r}{' and is in --quick' if args.quick else ''}")
    partial = args.quick or args.case is not None
    meta = {"partial": partial} | ({"commit": args.commit} if args.commit else {})
    out = args.out or (RESULTS / "partial" if partial else RESULTS)
    earlier = Report.read(out, family.name) if args.add else None
    if earlier is not None:
        ids = {row["id"] for row in earlier.cases} | {spec.id for spec in specs}
        meta["partial"] = args.quick or ids != {spec.id for spec in family.specs}
    try:
        context = Context(device_for(family), args.quick, tuple(spec.id for spec in specs))
        report = run_family(family, specs, context, out, meta, earlier)
    except UnavailableError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    return 1 if report.failed else 0


def _run_apart(name: str, args: argparse.Namespace) -> int:
    command = [sys.executable, "-m", "bench", name]
    command += ["--quick"] * args.quick + ["--add"] * args.add
    for option, value in (("--case", args.case), ("--out", args.out), ("--commit", args.commit)):
        command += [option, str(value)] if value is not None else []
    code = subprocess.run(command, check=False).returncode
    return code if code >= 0 else 1  # a signal ended it


if __name__ == "__main__":
    sys.exit(main())
