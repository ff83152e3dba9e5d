"""What `sonoscope data` says: the list of recipes, one recipe, a checked copy, a prepared one, and how to get it."""

from __future__ import annotations

import shlex
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.data.recipes.base import Recipe, Scan, listing
from pipeline.data.recipes.catalog import RECIPES, recipe
from pipeline.data.recipes.fetch import fetch_pocus
from pipeline.data.recipes.lung import UPSTREAM_REVISION, UPSTREAM_URL
from pipeline.data.recipes.prepare import prepare
from pipeline.errors import DataError
from pipeline.presets import as_word

__all__ = ["check_dataset", "fetch_dataset", "list_datasets", "prepare_dataset", "run_words", "show_dataset"]

_KINDS = {"video": "videos", "image": "images", "frames": "frame folders"}


def list_datasets() -> str:
    """One line a recipe: name, how it is had, what it is."""
    ways = {name: "fetch" if name == "pocus" else "own" if name == "folder" else "ask" for name in RECIPES}
    lines = [f"{name:<10} {ways[name]:<6} {item.about}" for name, item in RECIPES.items()]
    lines += ["", "'sonoscope data fetch NAME' gets it (fetch), or says what to sign and where (ask); 'sonoscope data show NAME' says more."]
    return "\n".join(lines)


def show_dataset(name: str) -> str:
    """Everything a recipe knows, as text."""
    item = recipe(name)
    counts = item.published or item.expected(Scan(Path()), next(iter(item.variants), ""))
    facts = {
        "what": item.about, "cite": item.citation, "licence": item.licence, "get it": "\n".join(item.obtain),
        "layout": item.layout.strip("\n"), "labels": item.labels, "patients": item.patients,
        "counts": ", ".join(" ".join(filter(None, (f"{one.number} {one.what}", one.label, one.split))) for one in counts) or "none to compare with",
        "variants": "\n".join(f"{key}: {text}" for key, text in item.variants.items()), "unsure": item.certainty,
        "settings": " ".join(f"{key}={as_word(value)}" for key, value in item.settings.items()), "presets": ", ".join(item.presets),
    }
    lines = [f"{item.name}: {item.title}"]
    for key, text in facts.items():
        lines += [f"  {key + ':' if not number else '':<10} {line}" for number, line in enumerate(text.splitlines())]
    return "\n".join(lines)


@dataclass(frozen=True)
class _Examined:
    """A copy compared with its recipe."""

    recipe: Recipe
    scan: Scan
    deviations: list[str]
    text: str


def _examine(name: str, path: Path, variant: str) -> _Examined:
    item = recipe(name)
    scan = item.scan(path, variant)
    deviations = item.check(scan, variant)
    kinds = Counter(row.kind for row in scan.rows)
    labels = Counter(row.label or "unlabelled" for row in scan.rows)
    patients = len({row.patient for row in scan.rows} - {""})
    media = ", ".join(f"{kinds[kind]} {word}" for kind, word in _KINDS.items() if kinds[kind])
    lines = [f"{path}: {item.title}" + (f" ({scan.form})" if scan.form else ""), f"  {media}; {patients or 'no'} patients named"]
    lines.append("  " + ", ".join(f"{count} {label}" for label, count in sorted(labels.items())))
    lines += [f"  note: {note}" for note in listing(scan.notes)]
    if deviations:
        lines.append(f"{len(deviations)} deviation{'s' if len(deviations) > 1 else ''} from layout or published counts:")
        lines += [f"  {line}" for line in listing(deviations)]
    else:
        counted = len(item.expected(scan, variant or next(iter(item.variants), "")))
        lines.append(f"as published ({counted} counts compared)" if counted else "the layout is right; there are no counts to compare with")
    return _Examined(item, scan, deviations, "\n".join(lines))


def check_dataset(name: str, path: Path, variant: str = "") -> tuple[str, bool]:
    """Compare a copy with its recipe: the text, and whether nothing deviates."""
    done = _examine(name, path, variant)
    return done.text, not done.deviations


def run_words(settings: dict[str, Any]) -> str:
    """The command that runs with these parameters, for a shell."""
    return "dvc exp run" + "".join(f" \\\n  -S {shlex.quote(f'{key}={as_word(value)}')}" for key, value in settings.items())


def prepare_dataset(name: str, path: Path, out: Path | None = None, variant: str = "") -> str:
    """Check a copy, write what the pipeline reads of it (into data/recipes/NAME by default), and say how to run it."""
    found = _examine(name, path, variant)
    done = prepare(found.recipe, found.scan, out or Path("data/recipes", name))
    lines = [found.text, f"written: {', '.join(map(str, done.files))}; no file of the data set was copied or changed"]
    if done.changed:
        lines.append("an earlier table or split was replaced, which DVC does not see: run 'dvc repro -f extract split' once")
    if found.recipe.presets:
        presets = ", ".join(f"$(sonoscope preset {one})" for one in found.recipe.presets)
        lines.append(f"made for it, to stand right behind 'dvc exp run': {presets}")
    return "\n".join([*lines, "run it with:", "", run_words(done.settings)])


def fetch_dataset(
    name: str, path: Path | None = None, *, accepted: bool = False, url: str = UPSTREAM_URL, revision: str = UPSTREAM_REVISION
) -> str:
    """Clone the data set where that is allowed (into data/download/NAME by default), or say what to sign and where to put the files.

    Raises:
        DataError: the licence was not accepted, or the clone fails (see `fetch_pocus`).
    """
    item = recipe(name)
    steps = "\n".join(f"  {number}. {step}" for number, step in enumerate(item.obtain, start=1))
    tree = "\n".join(f"    {line}" for line in item.layout.strip("\n").splitlines())
    after = f"sonoscope data check {name} FOLDER, then sonoscope data prepare {name} FOLDER"
    if name != "pocus":
        return f"{item.title} cannot be fetched for you. Licence: {item.licence}.\n{steps}\nThe folder has to look like\n{tree}\nThen: {after}"
    if not accepted:
        raise DataError(
            f"fetch {name}: nothing was downloaded. Licence: {item.licence}. Cite: {item.citation}. Some files carry no licence: they are for "
            f"your own research, not to hand on. Read {url.removesuffix('.git')}/blob/master/data/README.md, then add --accept-licence."
        )
    target = path or Path("data/download", name)
    fetch_pocus(target, url=url, revision=revision)
    text, _ = check_dataset(name, target)
    return f"{text}\nNext: sonoscope data prepare {name} {target}"
