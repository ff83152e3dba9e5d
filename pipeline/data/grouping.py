"""Which videos may never be divided: patients as groups, joined where their videos show one recording.

Groups span all sources, so that a further source cannot bring a test patient into pretraining by another door.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from pipeline.data.manifest import Manifest

__all__ = ["group_videos"]

SHOWN = 20
"""Joints told one by one; a data set with more of them has another problem."""
_TWO_PATIENTS = re.compile(r"same content under two patients: ([P0-9a-f ]+)")


class _Groups:
    """Which ids belong together: a union-find forest over base groups (patient pseudonyms and `V<video>`)."""

    def __init__(self, manifest: Manifest, extra: Mapping[str, Manifest], by_patient: bool) -> None:
        self.base: dict[str, str] = {}
        self.parent: dict[str, str] = {}
        self.main: set[str] = set()
        for source, table in (("main", manifest), *extra.items()):
            for row in table.rows:
                name = row.patient if by_patient and row.patient else f"V{row.video}"
                self.parent.setdefault(name, name)
                if source == "main":
                    self.main.add(name)
                # The same file in two sources is one video: its groups are one.
                self.join(self.base.setdefault(row.video, name), name)
                named = _TWO_PATIENTS.search(row.warnings) if by_patient else None
                for patient in named.group(1).split() if named else ():
                    self.parent.setdefault(patient, patient)
                    self.join(name, patient)

    def root(self, name: str) -> str:
        while self.parent[name] != name:
            self.parent[name] = name = self.parent[self.parent[name]]
        return name

    def join(self, first: str, second: str) -> bool:
        """Merge two groups; False if they were one already. The smaller name stays, names of the main source first."""
        roots = sorted({self.root(first), self.root(second)}, key=lambda name: (name not in self.main, name))
        self.parent[roots[-1]] = roots[0]
        return len(roots) == 2

    def of_videos(self) -> dict[str, str]:
        return {video: self.root(name) for video, name in sorted(self.base.items())}


def group_videos(
    manifest: Manifest,
    extra: Mapping[str, Manifest],
    by_patient: bool,
    pairs: Iterable[tuple[str, str]],
    warnings: list[str],
) -> dict[str, str]:
    """Group of every video, near-duplicates joined; a joint of two known patients is worth a warning."""
    if not by_patient:
        warnings.append(
            "data.group is video: clips of one patient may lie on both sides of a fold, so every number is likely too "
            "good. "
            "Use data.group: patient wherever patients are known."
        )
    forest = _Groups(manifest, extra, by_patient)
    total = len({forest.root(name) for name in forest.parent})
    joined = 0
    for first, second in sorted(tuple(sorted(pair)) for pair in pairs):
        names = [forest.base[video] for video in (first, second)]
        if forest.join(*names):
            joined += 1
            if by_patient and joined <= SHOWN:
                warnings.append(
                    f"near-duplicate videos {first} ({names[0]}) and {second} ({names[1]}) are kept in one group"
                )
    if by_patient and joined > SHOWN:
        warnings.append(
            f"{joined - SHOWN} more pairs of near-duplicate videos joined groups (reports/split/near_duplicates.csv)"
        )
    if joined > max(2, total // 5):
        warnings.append(
            f"near-duplicates joined {joined} of {total} groups: unusually many, so look at some pairs "
            "(reports/split/near_duplicates.csv)"
        )
    return forest.of_videos()
