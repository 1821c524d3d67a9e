"""Results as the JSON that the targets are held against, and as a table."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.harness.ceilings import Ceilings, Work
from bench.harness.timing import Timing

# A case without a time of ours (wrong, or it raised) must not look like a case that was left out: it is very slow. Finite,
# because whoever reads this takes logarithms.
FAILED_US = 1e12
FAILED_CEILING = 1e-9
# Times that were come by in another way than the report's method says.
_NOTED = ("stream", "estimated", "published")


@dataclass
class Report:
    """meta, ceilings, and a row for each case. `complete` turns true when the last case is in."""

    family: str
    meta: dict[str, Any]
    ceilings: Ceilings
    cases: list[dict[str, Any]] = field(default_factory=list)

    def add(
        self,
        case_id: str,
        timings: dict[str, Timing | Exception],
        notes: dict[str, str],
        work: Work,
        config: str,
        error_share: float,
        target: float | None = None,
    ) -> dict[str, Any]:
        """timings: "ours" and every peer that was timed. notes: name → why there is no time, or how it was launched."""
        ours = timings.pop("ours")
        if isinstance(ours, Exception):
            return self.fail(case_id, one_line(ours), config, work)
        notes = dict(notes)
        peers: dict[str, float | None] = {name: None for name in notes if name != "ours"}
        for name, timing in timings.items():
            peers[name] = None if isinstance(timing, Exception) else round(timing.us, 3)
            if isinstance(timing, Exception):
                notes[name] = one_line(timing)
        for name, timing in {"ours": ours, **timings}.items():
            if isinstance(timing, Timing) and timing.how.startswith(_NOTED):
                notes[name] = timing.how
        floor, bound = work.floor_us(self.ceilings)
        row = {
            "id": case_id,
            "ours_us": round(ours.us, 3),
            "peers_us": peers,
            "ceiling": round(floor / ours.us, 4) if floor else None,
            "config": config,
            "ratio": ratio(ours.us, peers),
            "target": target,
            "floor_us": round(floor, 3),
            "bound": bound,
            "achieved": work.achieved(ours.us, bound),
            "spread": round(ours.spread, 4),
            "error_share": round(error_share, 4),
            "notes": notes,
        }
        self.cases.append(row)
        return row

    def fail(self, case_id: str, why: str, config: str = "", work: Work | None = None) -> dict[str, Any]:
        """A case that gave a wrong result or none."""
        bounded = work is None or bool(work.num_bytes or work.num_ops)
        row = {
            "id": case_id,
            "ours_us": FAILED_US,
            "peers_us": {
                "none": 1.0
            },  # with a stand-in there is a ratio, 1e-12, so no target holds with this case in it
            "ceiling": FAILED_CEILING if bounded else None,
            "config": config,
            "ratio": None,
            "failed": why,
        }
        self.cases.append(row)
        return row

    @classmethod
    def read(cls, folder: Path, family: str) -> Report | None:
        """What was written there; None if nothing was."""
        path = folder / f"{family}.json"
        if not path.is_file():
            return None
        body = json.loads(path.read_text(encoding="utf-8"))
        return cls(family, body["meta"], body["ceilings"], body["cases"])

    def take(self, earlier: Report, but: Collection[str]) -> None:
        """The cases of an earlier run, except those named, before this one's. Raises ValueError if it was of another commit or
        GPU: their figures don't belong in one table."""
        for name in ("gpu", "commit"):
            if earlier.meta[name] != self.meta[name]:
                raise ValueError(f"--add: the report is of {name} {earlier.meta[name]}, this run of {self.meta[name]}")
        self.cases[:0] = [row for row in earlier.cases if row["id"] not in but]
        self.meta["command"] = f"{earlier.meta['command']}; {self.meta['command']}"

    @property
    def failed(self) -> list[str]:
        return [row["id"] for row in self.cases if "failed" in row]

    def as_json(self) -> str:
        body = {"meta": self.meta, "ceilings": self.ceilings, "cases": self.cases}
        return json.dumps(body, indent=1, allow_nan=False) + "\n"

    def as_table(self) -> str:
        """Markdown: one line a case, then what was left out and why."""
        names = list(dict.fromkeys(name for row in self.cases if "failed" not in row for name in row["peers_us"]))
        head = ["case", "ours µs", "speed", "of ceiling", *(f"{name} µs" for name in names), "ratio", "error / allowed"]
        lines = [f"# {self.family}", "", *self._header(), "", _line(head), _line(["---"] * len(head))]
        for row in self.cases:
            if "failed" in row:
                lines.append(_line([row["id"], f"FAILED: {row['failed']}", *[""] * (len(head) - 2)]))
                continue
            share = f"{row['ceiling']:.0%} {row['bound']}" if row["ceiling"] else ""
            times = [_us(row["peers_us"].get(name)) for name in names]
            lines.append(
                _line(
                    [
                        row["id"],
                        _us(row["ours_us"]),
                        row["achieved"],
                        share,
                        *times,
                        verdict(row),
                        f"{row['error_share']:.2f}",
                    ]
                )
            )
        ratios = [row["ratio"] for row in self.cases if row["ratio"]]
        if ratios:
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            lines += [
                "",
                f"Ratio to the best peer: lowest {min(ratios):.2f}, geometric mean {mean:.2f}, {len(ratios)} cases.",
            ]
        notes = sorted({(name, note) for row in self.cases for name, note in row.get("notes", {}).items()})
        if notes:
            lines += ["", "Left out, or launched differently:", "", *(f"- {name}: {note}" for name, note in notes)]
        return "\n".join(lines) + "\n"

    def _header(self) -> list[str]:
        m, c = self.meta, self.ceilings
        where = m["gpu"] or f"{m['cpu']}, load average {m['load_average']}"
        versions = ", ".join(f"{name} {version}" for name, version in m["peers"].items())
        ceilings = ", ".join(f"{name} {value:g}" for name, value in c.items() if value)
        return [
            f"{where}; {m['date']}; commit {m['commit']}; CUDA {m['cuda']}, driver {m['driver']}; {versions}.",
            "",
            f"Command: `{m['command']}`. Method: {m['method']}.",
            "",
            f"Ceilings of the same run: {ceilings}. Ratio: best peer / ours, above 1 is faster."
            + ("" if m.get("complete") else " The run is not complete."),
        ]

    def write(self, folder: Path) -> Path:
        """FAMILY.json and FAMILY.md; each is whole at any time, also if the process is killed."""
        folder.mkdir(parents=True, exist_ok=True)
        for suffix, text in (("json", self.as_json()), ("md", self.as_table())):
            partial = folder / f".{self.family}.{suffix}.{os.getpid()}"
            partial.write_text(text, encoding="utf-8")
            partial.replace(folder / f"{self.family}.{suffix}")
        return folder / f"{self.family}.json"


def ratio(ours_us: float, peers_us: dict[str, float | None]) -> float | None:
    """Best peer's time over ours; None where no peer was timed."""
    known = [us for us in peers_us.values() if us]
    return round(min(known) / ours_us, 4) if known else None


def verdict(row: dict[str, Any]) -> str:
    """The ratio, and whether it reaches the case's own target."""
    if row["ratio"] is None:
        return "-"
    if row["target"] is None:
        return f"{row['ratio']:.2f}"
    return f"{row['ratio']:.2f} of {row['target']:g} {'ok' if row['ratio'] >= row['target'] else 'MISSED'}"


def one_line(error: BaseException) -> str:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first[:300]}" if first else type(error).__name__


def _us(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"
