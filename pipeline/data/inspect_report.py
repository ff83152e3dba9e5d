"""What `sonoscope inspect` found, as text for the terminal, tables (CSV, JSON) and one page of HTML that needs nothing else.

File names stand in all of them: they are for the computer they were made on.
"""

from __future__ import annotations

import base64
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, select_autoescape

from pipeline.data.inspect import FileReport, Inspection
from pipeline.data.trouble import KINDS, SEVERITIES, Finding
from pipeline.errors import DataError
from pipeline.files import atomic_write, csv_text, write_json

__all__ = ["as_text", "summary", "write_inspection"]

EXAMPLES = 3
PICTURES = 60
"""Files shown with pictures on the page, most serious first."""
LISTED = 200
"""Findings of one kind listed on the page; all stand in files.csv."""
COLUMNS = (
    "path", "kind", "readable", "label", "patient", "container", "codec", "width", "height", "frames", "frames_claimed", "fps",
    "repeated_share", "tint_red_green", "tint_green_blue", "bytes", "errors", "warnings", "notes",
)


def summary(inspection: Inspection) -> dict[str, Any]:
    """Counts, ranges and findings by kind (with the paths concerned; a pair of copies counts once), as JSON."""
    files = inspection.files
    good = [report for report in files if report.readable]
    clips = [report for report in good if report.kind != "image"]
    classes: dict[str, dict[str, int]] = {}
    for label in sorted({report.label for report in good} - {""}):
        own = [report for report in good if report.label == label]
        classes[label] = {"files": len(own), "patients": len({report.patient for report in own} - {""})}
    kinds: dict[str, dict[str, Any]] = {}
    for path, finding in inspection.all_findings():
        if finding.again:
            continue
        kind = KINDS[finding.code]
        entry = kinds.setdefault(finding.code, {"severity": kind.severity, "title": kind.title, "advice": kind.advice, "count": 0, "found": []})
        entry["count"] += 1
        entry["found"].append({"path": path, "what": finding.text})
    seconds = [report.frames / report.header.fps for report in clips if report.frames and report.header.fps]
    return {
        "schema": 1,
        "quick": inspection.quick,
        "files": len(files),
        "unreadable": len(files) - len(good),
        "videos": sum(report.kind == "video" for report in good),
        "frame_folders": sum(report.kind == "frames" for report in good),
        "stills": sum(report.kind == "image" for report in good),
        "frames": sum(report.frames or 0 for report in good),
        "seconds": round(sum(seconds), 1),
        "megabytes": round(sum(report.bytes for report in files) / 1e6, 3),
        "patients": len({report.patient for report in good} - {""}),
        "patient_known": sum(bool(report.patient) for report in good),
        "labelled": sum(bool(report.label) for report in good),
        "classes": classes,
        "containers": dict(Counter(report.header.container for report in good).most_common()),
        "width": _range([report.header.width for report in good if report.header.width]),
        "height": _range([report.header.height for report in good if report.header.height]),
        "frames_a_clip": _range([report.frames for report in clips if report.frames]),
        "fps": _range([report.header.fps for report in clips if report.header.fps]),
        "notes": inspection.notes,
        "findings": kinds,
    }


def _range(values: Sequence[float]) -> dict[str, float] | None:
    """Smallest, middle and largest."""
    if not values:
        return None
    return {"min": round(float(min(values)), 3), "median": round(float(np.median(values)), 3), "max": round(float(max(values)), 3)}


def as_text(facts: dict[str, Any]) -> str:
    """The picture for a terminal, from `summary`."""
    lines = [headline(facts)]
    if facts["classes"]:
        said = (f"{name} {count['files']} ({_plural(count['patients'], 'patient')})" for name, count in facts["classes"].items())
        lines.append(f"classes: {', '.join(said)}")
    ranges = (("pixels wide", "width"), ("high", "height"), ("frames a clip", "frames_a_clip"), ("per second", "fps"))
    spans = [f"{_span(facts[key])} {name}" for name, key in ranges if facts[key]]
    if spans:
        lines.append(", ".join(spans))
    lines += facts["notes"]
    for severity in SEVERITIES:
        kinds = [entry for entry in facts["findings"].values() if entry["severity"] == severity]
        if kinds:
            lines += ["", f"{severity}s"]
        for entry in kinds:
            lines.append(f"  {entry['count']:4d}  {entry['title']}: {_examples(entry['found'])}")
            if severity != "note":
                lines.append(f"        -> {entry['advice']}")
    if not facts["findings"]:
        lines += ["", "nothing wrong was found"]
    return "\n".join(lines)


def headline(facts: dict[str, Any]) -> str:
    """What is there, in one line."""
    parts = [("videos", "video"), ("frame_folders", "frame folder"), ("stills", "still")]
    said = ", ".join(_plural(facts[key], word) for key, word in parts if facts[key]) or "no media"
    claimed = " by their headers" if facts["quick"] else ""
    length = f" ({facts['seconds'] / 60:.1f} minutes)" if facts["seconds"] else ""
    said += f"; {_plural(facts['frames'], 'frame')}{claimed}{length}, {facts['megabytes']:.1f} MB"
    said += f"; {facts['labelled']} labelled, {_plural(facts['patients'], 'patient')}"
    good = facts["files"] - facts["unreadable"]
    said += f" (known for {facts['patient_known']} of {_plural(good, 'file')})" if 0 < facts["patient_known"] < good else ""
    return said + (f"; {facts['unreadable']} unreadable" if facts["unreadable"] else "")


def _plural(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"


def _span(span: dict[str, float]) -> str:
    low, high = (f"{value:.4g}" for value in (span["min"], span["max"]))
    return low if low == high else f"{low} to {high}"


def _examples(found: list[dict[str, str]]) -> str:
    """Up to three names, the first with what was found there; findings of the folder have no name."""
    names = [item["path"].rsplit("/", 1)[-1] or item["what"] for item in found[:EXAMPLES]]
    if found[0]["path"]:
        names[0] += f" ({found[0]['what']})"
    more = len(found) - len(names)
    return ("; " if not found[0]["path"] else ", ").join(names) + (f" and {more} more" if more else "")


def write_inspection(inspection: Inspection, output: Path) -> dict[str, Any]:
    """Write files.csv, summary.json and index.html into `output`; returns the summary.

    Raises:
        DataError: the folder cannot be written.
    """
    facts = summary(inspection)
    try:
        atomic_write(output / "files.csv", _table(inspection))
        write_json(output / "summary.json", facts)
        atomic_write(output / "index.html", _page(inspection, facts))
    except OSError as error:
        raise DataError(f"--out: {output} cannot be written ({error.strerror}). Name another folder.") from None
    return facts


def _table(inspection: Inspection) -> str:
    """One row a file, other files and links included; findings as `code: text`, by severity."""
    rows = []
    for report in inspection.files:
        header = report.header
        rows.append({
            "path": report.path, "kind": report.kind, "readable": "yes" if report.readable else "no", "label": report.label,
            "patient": report.patient, "container": header.container, "codec": header.codec, "width": header.width or "",
            "height": header.height or "", "frames": "" if report.frames is None else report.frames,
            "frames_claimed": "" if header.frames is None else header.frames, "fps": "" if header.fps is None else f"{header.fps:.4g}",
            "repeated_share": "" if report.repeated is None else f"{report.repeated:.3f}",
            "tint_red_green": f"{report.tint[0]:.2f}", "tint_green_blue": f"{report.tint[1]:.2f}", "bytes": report.bytes,
            **_by_severity(report.findings),
        })
    for path, finding in inspection.others:
        rows.append({"path": path, "kind": "other", "readable": "no", **_by_severity([finding])})
    return csv_text(COLUMNS, ([row.get(name, "") for name in COLUMNS] for row in rows))


def _by_severity(findings: Sequence[Finding]) -> dict[str, str]:
    cells = {f"{severity}s": "" for severity in SEVERITIES}
    for severity in SEVERITIES:
        said = (f"{finding.code}: {finding.text}" for finding in findings if KINDS[finding.code].severity == severity)
        cells[f"{severity}s"] = " | ".join(said)
    return cells


# --- the page ---------------------------------------------------------------------------------------------------------


def _page(inspection: Inspection, facts: dict[str, Any]) -> str:
    folder = Path(__file__).parent
    environment = Environment(loader=FileSystemLoader(folder), autoescape=select_autoescape(default=True), trim_blocks=True, lstrip_blocks=True)
    groups = {severity: [(code, entry) for code, entry in facts["findings"].items() if entry["severity"] == severity] for severity in SEVERITIES}
    return environment.get_template("inspection.html.j2").render(
        folder=str(inspection.folder), facts=facts, headline=headline(facts), groups=groups, cases=_cases(inspection), listed=LISTED,
        histograms=_histograms(inspection.files), sources=_sources(inspection.files),
    )


def _cases(inspection: Inspection) -> list[dict[str, Any]]:
    """Files with pictures and an error or warning, most serious first."""
    reports = {report.path: report for report in inspection.files if report.pictures}
    order = dict.fromkeys(path for path, finding in inspection.all_findings() if path in reports and KINDS[finding.code].severity != "note")
    cases = []
    for path in list(order)[:PICTURES]:
        report = reports[path]
        serious = [finding for finding in report.findings if KINDS[finding.code].severity != "note"]
        cases.append({
            "path": path, "label": report.label,
            "findings": [{"severity": KINDS[item.code].severity, "title": KINDS[item.code].title, "text": item.text} for item in serious],
            "pictures": [{"frame": frame, "data": base64.b64encode(jpeg).decode("ascii")} for frame, jpeg in report.pictures],
        })
    return cases


def _histograms(files: Sequence[FileReport]) -> list[dict[str, Any]]:
    """Counts of clips by length, rate, size and repeats, in at most twelve bars each."""
    good = [report for report in files if report.readable]
    clips = [report for report in good if report.kind != "image"]
    series = {
        "Frames a clip": [report.frames for report in clips if report.frames],
        "Frames per second": [report.header.fps for report in clips if report.header.fps],
        "Short side, pixels": [min(report.header.width, report.header.height) for report in good if report.header.width],
        "Repeated neighbours, percent": [100 * report.repeated for report in clips if report.repeated is not None],
    }
    return [{"title": title, "bars": _bars(values)} for title, values in series.items() if values]


def _bars(values: Sequence[float]) -> list[dict[str, Any]]:
    """Bars of equal width with round limits: label, count, share of the tallest."""
    low, high = min(values), max(values)
    raw = max((high - low) / 10, 1e-9)
    power = 10.0 ** np.floor(np.log10(raw))
    width = max(next(step * power for step in (1, 2, 5, 10) if step * power >= raw), 1.0)
    start = np.floor(low / width)
    counts = Counter(int(np.floor(value / width) - start) for value in values)
    tallest = max(counts.values())
    return [
        {"label": f"{(start + place) * width:.4g}", "count": counts[place], "share": 100 * counts[place] / tallest}
        for place in range(max(counts) + 1)
    ]


def _sources(files: Sequence[FileReport]) -> dict[str, Any] | None:
    """Extension against class, the shortcut that is easiest to see; None with fewer than two of either."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for report in files:
        if report.label and report.readable:
            counts[Path(report.path).suffix.lower() or "none"][report.label] += 1
    classes = sorted({label for row in counts.values() for label in row})
    if len(classes) < 2 or len(counts) < 2:
        return None
    return {"classes": classes, "rows": [(name, [row[label] for label in classes]) for name, row in sorted(counts.items())]}


def as_json(facts: dict[str, Any]) -> str:
    """The summary as JSON text."""
    return json.dumps(facts, indent=2, ensure_ascii=False)
