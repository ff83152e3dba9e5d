"""`sonoscope protocols`: commands that differ in the protocol only, and a table that subtracts nothing it should not."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from fake_experiment import FakeExperiment

from pipeline import protocols
from pipeline.cli import main
from pipeline.data.splits import FRAME_LEVEL, OPTIMISTIC, VIDEO_LEVEL
from pipeline.errors import ConfigError, DataError, PipelineError
from pipeline.evaluation import predictions
from pipeline.evaluation.compare import compare
from pipeline.evaluation.compare_tables import as_markdown
from pipeline.evaluation.compare_tables import protocol as how
from pipeline.evaluation.content import data_tables
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.metrics import aggregate
from pipeline.evaluation.report import stamp_words
from pipeline.evaluation.statistics import holm
from pipeline.protocols import PROTOCOLS, choose_protocols, commands, run_protocols, show_protocols


def finished(folder: Path, group: str, selection: str, stamp: str, skill: float = 2.0, **more: Any) -> str:
    """The folder of a finished experiment, as far as the table reads it."""
    params = {"data": {"group": group}, "pretrain": {"method": "random", "init": "random"}, "finetune": {"selection": selection}}
    fake = FakeExperiment(folder, skill={"pretrained": skill}, group=group, params=params, **{"frames": 24 if group == "frame" else 4, **more})
    videos = aggregate(predictions.test_rows(predictions.read_items(fake.folders), fake.splits), fake.classes, "video")
    if group == "video":
        videos = videos.assign(patient="V" + videos["video"], fold=(videos["fold"] + 1) % 3)
    output = folder / "reports/evaluate"
    output.mkdir(parents=True)
    videos.to_csv(output / "predictions_video.csv", index=False)
    (output / "metrics.json").write_text(json.dumps({"stamp": stamp or "none", "pretrained": {"stamp": stamp or "none"}}))
    return str(folder)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No DVC project and no MLflow store around."""
    monkeypatch.chdir(tmp_path)


def test_table__one_row_a_protocol_with_stamp_interval_and_difference(tmp_path: Path) -> None:
    names = [
        finished(tmp_path / "video-test", "video", "best_on_test", f"{VIDEO_LEVEL}, {OPTIMISTIC}", 3.0),
        finished(tmp_path / "frame-test", "frame", "best_on_test", f"{FRAME_LEVEL}, {OPTIMISTIC}", 4.0),
        finished(tmp_path / "patient-test", "patient", "best_on_test", OPTIMISTIC, 2.5),
        finished(tmp_path / "patient-inner", "patient", "inner", "", 0.3),
    ]
    lines = show_protocols(names).split("\n")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    head, _, honest, chosen, video, frame = rows
    assert head == ["protocol", "balanced accuracy", "accuracy", "macro F1", "AUROC", "balanced accuracy minus honest", "p", "p (Holm)", "stamp"]
    assert [row[0] for row in rows[2:]] == [PROTOCOLS[place].title for place in (0, 1, 3, 4)]
    assert honest[5:] == ["", "", "", "none"]
    assert [row[8] for row in rows[3:]] == [OPTIMISTIC, f"{VIDEO_LEVEL}, {OPTIMISTIC}", f"{FRAME_LEVEL}, {OPTIMISTIC}"]
    assert " to " in chosen[5] and 0 < float(chosen[6]) <= 1 and chosen[7] == chosen[6], "equal folds: a paired interval and a test"
    for row in (video, frame):
        assert row[5] == f"{float(row[1].split()[0]) - float(honest[1].split()[0]):+.2f}" or abs(
            float(row[5]) - (float(row[1].split()[0]) - float(honest[1].split()[0]))) <= 0.0101
        assert row[6] == row[7] == "–"
    notes = "\n".join(line for line in lines if not line.startswith("|"))
    assert "In the split by frame a video counts once a fold" in notes
    assert "12 patients, 24 units, 3 folds, 1 seed" in notes
    assert "No test for video-test, frame-test: the folds are not those of patient-inner" in notes and "more than the protocol" not in notes


def test_table__says_when_more_than_the_protocol_differs_or_nothing_is_honest(tmp_path: Path) -> None:
    honest = finished(tmp_path / "patient-inner", "patient", "inner", "")
    other = finished(tmp_path / "longer", "patient", "best_on_test", OPTIMISTIC)
    path = Path(other) / "params.yaml"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pretrain": {"method": "random", "init": "random", "image_size": 64}}))
    assert "longer differs from patient-inner in more than the protocol: pretrain.image_size." in show_protocols([honest, other])
    second = show_protocols([honest, finished(tmp_path / "again", "patient", "inner", "")])
    assert "(honest): patient-inner |" in second and "(honest): again |" in second
    alone = show_protocols([other])
    assert "| patients apart, best epoch on test |" in alone and "No row is honest" in alone and "| – | – | – | optimistic" in alone
    classes = finished(tmp_path / "three", "patient", "best_on_test", OPTIMISTIC, classes=["a", "b", "c"])
    assert "three tells apart other classes (a, b, c), so nothing is subtracted" in show_protocols([honest, classes])


def test_table__nested_and_last_are_honest_where_there_is_no_inner_row(tmp_path: Path) -> None:
    nested, last, inner, chosen = (
        finished(tmp_path / f"run-{selection}", "patient", selection, OPTIMISTIC if selection == "best_on_test" else "", skill)
        for selection, skill in (("nested", 0.5), ("last", 0.4), ("inner", 0.3), ("best_on_test", 2.5))
    )

    def first(*names: str) -> tuple[str, str]:
        text = show_protocols(names)
        assert "No row is honest" not in text
        row = [cell.strip() for cell in text.split("\n")[2].strip("|").split("|")]
        return row[0], row[5]

    assert first(chosen, last) == ("patients apart, selection last (honest)", "")
    assert first(chosen, last, nested) == ("patients apart, selection nested (honest)", "")
    assert first(last, nested, inner) == (PROTOCOLS[0].title, "")
    with_all = finished(tmp_path / "all", "patient", "nested", "transductive pretraining", 0.5)
    path = Path(with_all) / "params.yaml"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pretrain": {"method": "random", "init": "random", "scope": "all"}}))
    assert "patients apart, selection nested, transductive |" in (text := show_protocols([with_all])) and "No row is honest" in text


def test_table__why_there_is_no_test_is_what_differs(tmp_path: Path) -> None:
    """Equal folds and other seeds are not other folds."""
    honest = finished(tmp_path / "patient-inner", "patient", "inner", "", 0.5)
    seeds = finished(tmp_path / "seeds", "patient", "best_on_test", OPTIMISTIC, 2.5, seeds=[0, 1])
    folds = finished(tmp_path / "other-folds", "patient", "best_on_test", OPTIMISTIC, 2.5, folds=4)
    text = show_protocols([honest, seeds, folds])
    assert "No test for seeds, so the difference is that of the two values" in text and "'seeds' and 'patient-inner' have different seeds: 0, 1 and 0" in text
    assert "'other-folds' and 'patient-inner' were not judged on the same folds: 4 folds and 3 folds" in text
    assert "the folds are not those of" not in text


def test_table__several_tests_are_corrected_and_two_methods_named_once(tmp_path: Path) -> None:
    names = [finished(tmp_path / "patient-inner", "patient", "inner", "", 0.3)]
    names += [finished(tmp_path / name, "patient", "best_on_test", OPTIMISTIC, skill) for name, skill in (("one", 2.5), ("two", 1.0))]
    path = Path(names[2]) / "params.yaml"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pretrain": {"method": "ucl", "init": "random"}}))
    text = show_protocols(names)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.split("\n") if line.startswith("|")][3:]
    raw, corrected = ([float(row[place]) for row in rows] for place in (6, 7))
    assert corrected == pytest.approx(holm(raw), abs=0.0021) and corrected != raw
    assert "corrected for the 2 tests of this table" in text
    assert "two differs from patient-inner in more than the protocol: pretrain.method." in text


def test_compare__words_and_fold_test_follow_the_protocol(tmp_path: Path) -> None:
    """Groups of videos are not called patients; what only chooses the epoch is not taken for training."""
    found = {
        group: compare([finished(tmp_path / f"{group}-{one}", group, one, "", 0.5 + place) for place, one in enumerate(("last", "best_on_test", "inner"))])
        for group in ("patient", "video")
    }
    for group, who, count in (("patient", "patient", 12), ("video", "group", 24)):
        words = "\n".join([as_markdown(found[group], full=False), *how(found[group])])
        assert found[group].who == who and f"{count} {who}s, 24 videos, 3 folds" in words and f"fine-tuned without its {who}" in words
        assert [pair.folds["trained"] for pair in found[group].pairs] == [1.0, pytest.approx(2 / 3)]
        plain, inner = (pair.folds["test_over_train"] for pair in found[group].pairs)
        assert inner == pytest.approx(1.5 * plain)
    assert "patients" not in words.replace("where patients are unknown", "") and "its patient" not in words


def test_table__nothing_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no experiment protocol-patient-inner"):
        show_protocols([])
    assert main(["protocols", "--show", "nowhere"]) == 2


def test_commands__differ_in_the_protocol_only() -> None:
    made = commands(["data.source=/clips", "++split.folds=[0,1]"], choose_protocols([]), prefix="x")
    assert list(made) == ["x-patient-inner", "x-patient-test", "x-video-inner", "x-video-test", "x-frame-test"]
    for protocol, (name, words) in zip(PROTOCOLS, made.items(), strict=False):
        assert words[:6] == ["dvc", "exp", "run", "--temp", "--name", name]
        assert words[6:10] == ["-S", "data.source=/clips", "-S", "++split.folds=[0,1]"]
        assert words[10:] == [w for k, v in zip(protocols.KEYS, protocol.values, strict=True) for w in ("-S", f"{k}={v}")]
    assert all("--queue" in words for words in commands([], choose_protocols([]), queue=True).values())
    assert [one.key for one in choose_protocols(["patient-transductive", "patient-inner"])] == ["patient-inner", "patient-transductive"]
    with pytest.raises(ConfigError, match="unknown protocol 'patient-iner'.*Did you mean 'patient-inner'"):
        choose_protocols(["patient-iner"])
    with pytest.raises(ConfigError, match="data.group is what the protocols differ in"):
        commands(["++data.group=video"], choose_protocols([]))


def test_run__one_after_another_stops_at_a_failure_and_never_overwrites(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    called: list[list[str]] = []

    def fake(words: list[str], check: bool) -> subprocess.CompletedProcess[str]:
        called.append(words)
        return subprocess.CompletedProcess(words, 1 if len(called) == 2 else 0)

    monkeypatch.setattr(protocols.subprocess, "run", fake)
    with pytest.raises(PipelineError, match="protocol-patient-test ended with exit code 1"):
        run_protocols([], choose_protocols([]))
    assert len(called) == 2 and called[0][1:4] == ["-m", "dvc", "exp"]
    assert "$ dvc exp run --temp --name protocol-patient-inner -S data.group=patient" in capsys.readouterr().out
    monkeypatch.setattr(protocols.Finder, "knows", lambda self, name: name.endswith("video-inner"))
    with pytest.raises(PipelineError, match="protocol-video-inner exists already.*--show protocol-video-inner.*--prefix"):
        run_protocols([], choose_protocols([]))
    assert len(called) == 2
    assert run_protocols([], choose_protocols(["patient-inner"]), queue=True) == ["protocol-patient-inner"]


def test_command__prints_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["protocols", "--print", "-S", "pretrain.method=random", "--rows", "frame-test"]) == 0
    assert capsys.readouterr().out == (
        "dvc exp run --temp --name protocol-frame-test -S pretrain.method=random -S data.group=frame -S finetune.selection=best_on_test "
        "-S pretrain.scope=fold\n"
    )


# --- stamps reach every number -------------------------------------------------------------------------------------------


def test_stamps__of_all_shortcuts_together_are_on_every_number(tmp_path: Path) -> None:
    """A split by frame, an epoch chosen on test and pretraining on everything: in files, MLflow's tags, the page and the tables."""
    from pipeline.evaluation.evaluate import log_results
    from pipeline.tracking import NullTracker

    fake = FakeExperiment(tmp_path, group="frame", frames=24, params={"data": {"group": "frame"}, "pretrain": {"method": "ucl"}})
    for folder in fake.folders:
        changes = {"selection": "best_on_test", "stamp": f"{FRAME_LEVEL}, {OPTIMISTIC}"}
        if folder.name.startswith("pretrained"):
            changes |= {"pretrain_scope": "all", "pretrain_groups": sorted(set(fake.groups.values()))}
        fake.edit_card(folder.name, **changes)
    output = tmp_path / "reports/evaluate"
    metrics = evaluate(fake.config, fake.folders, fake.splits, None, output)
    whole = f"{FRAME_LEVEL}, {OPTIMISTIC}, transductive pretraining"
    assert metrics["stamp"] == whole and metrics["headline"].endswith(f" – {whole}")
    assert metrics["random"]["stamp"] == f"{FRAME_LEVEL}, {OPTIMISTIC}"
    places = [metrics["pretrained"][level] for level in ("frame", "video", "patient", "fold_mean")]
    places += [*metrics["pretrained"]["folds"].values(), metrics["difference"]["video"]]
    assert {place["stamp"] for place in places} == {whole}
    short = json.loads((output / "metrics.json").read_text())
    assert (short["stamp"], short["pretrained"]["stamp"]) == (whole, whole)
    for name in ("predictions.csv", "predictions_video.csv", "predictions_patient.csv"):
        assert whole in (output / name).read_text(encoding="utf-8").splitlines()[1]
    page = (output / "report.html").read_text(encoding="utf-8")
    for sentence in stamp_words(whole):
        assert sentence in page
    assert "Frames of the tested videos were trained on" in page and "No group is on both sides" not in page
    tags: dict[str, str] = {}

    class Recorder(NullTracker):
        def set_tags(self, values: Any) -> None:
            tags.update(values)

        set_parent_tags = set_tags

    log_results(Recorder("evaluate"), metrics, output)
    assert tags["stamp"] == whole
    assert whole in show_protocols([str(tmp_path)])


def test_repeats__numbers_are_means_over_repeats_with_their_spread(tmp_path: Path) -> None:
    fake = FakeExperiment(tmp_path, repeats=2, skill={"pretrained": 2.0})
    columns = [f"p_{name}" for name in fake.classes]
    for fold in fake.splits.folds:

        def change(table: Any, right: bool = fold.repeat == 0) -> Any:
            table[columns] = [[0.9, 0.1] if (label == "a") == right else [0.1, 0.9] for label in table["label"]]
            return table

        fake.edit_table(f"pretrained-seed0-fold{fold.fold}", change)
    config = fake.config.model_copy(update={"finetune": fake.config.finetune.model_copy(update={"initialisations": ["pretrained"]})})
    metrics = evaluate(config, fake.folders, fake.splits, None, tmp_path / "out")
    video = metrics["pretrained"]["video"]
    assert video["balanced_accuracy"] == 0.5 and video["balanced_accuracy_repeat_sd"] == pytest.approx(2**-0.5)
    assert video["confusion"] == [[6, 6], [6, 6]] and video["n"] == 24, "one repeat holds every video once"
    assert (metrics["folds"], metrics["repeats"], len(metrics["pretrained"]["folds"])) == (3, 2, 6)
    assert metrics["majority"]["video"]["accuracy"] == 0.5
    assert metrics["headline"].endswith("12 patients, 24 videos, 3 folds × 2 repeats")
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "fold 5, repeat 1" in page and "SD over repeats, pooled" in page and "3 folds × 2 repeats" in page
    lines = (tmp_path / "out/predictions_video.csv").read_text(encoding="utf-8").splitlines()
    folds = (tmp_path / "out/folds.csv").read_text(encoding="utf-8").splitlines()
    assert [line.split(",")[1:3] for line in folds[1:]] == [[str(number), str(number // 3)] for number in range(6)]
    assert lines[0].startswith("init,seed,fold,repeat,part,video,patient,label") and len(lines) == 1 + 2 * 24


def test_label_fraction__data_table_says_how_many_patients_were_used(tmp_path: Path) -> None:
    fake = FakeExperiment(tmp_path, seeds=[0, 1], skill={"pretrained": 2.0})
    assert "whose labels were used" not in str(data_tables(fake.splits, None, "patient", predictions.read_items(fake.folders))[1].columns)
    for folder in fake.folders:
        groups = fake.splits.groups_of(fake.labels)[4 : 6 + ("seed1" in folder.name)]
        fake.edit_card(folder.name, label_fraction=0.3, train_groups=groups[:1], validation_groups=groups[1:])
    table = data_tables(fake.splits, None, "patient", predictions.read_items(fake.folders))[1]
    assert table.columns[-1] == "Patients whose labels were used" and [row[-1] for row in table.rows] == ["2–3"] * 3
