"""The report: self-contained, escaped, honest words, nothing private; and the pictures behind it."""

from __future__ import annotations

import base64
import html.parser
import io
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from fake_experiment import FakeExperiment
from PIL import Image

from pipeline.evaluation import content, plots
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.report import (
    cautions,
    frame_uri,
    headline_sentence,
    interval_words,
    number,
    p_words,
    plural,
    signed,
    verdict,
)

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(html.parser.HTMLParser):
    """Tags with attributes, text, and whether every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))

    def all(self, name: str) -> list[dict]:
        return [attributes for tag, attributes in self.tags if tag == name]


def make(fake: FakeExperiment, store=None, stages=()) -> tuple[str, dict]:
    output = fake.root / "reports/evaluate"
    metrics = evaluate(fake.config, fake.folders, fake.splits, store, output, stages)
    return (output / "report.html").read_text(encoding="utf-8"), metrics


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """One complete report with frames, curves and stage rows."""
    fake = FakeExperiment(
        tmp_path_factory.mktemp("report"),
        classes=["healthy", "B-lines", "effusion"],
        patients=18,
        params={
            "data": {"pseudonym_key": "top-secret-key", "source": "/home/clinic/videos"},
            "evaluate": {"bootstrap": 200, "title": "Lung study"},
        },
    )
    for fold in range(3):
        folder = fake.root / f"models/encoders/fold{fold}"
        folder.mkdir(parents=True)
        (folder / "curves.csv").write_text(
            "epoch,loss,chance_loss,embedding_std,learning_rate\n0,2.1,0.7,0.3,0.1\n1,1.5,0.7,,0.1\n2,1.1,0.7,0.5,0.1\n"
        )
    (fake.folders[0] / "curves.csv").write_text("epoch,train_loss\n0,1.0\n1,0.5\n")
    stages = [
        {
            "stage": "pretrain",
            "item": "fold0",
            "status": "FINISHED",
            "fingerprint": "abc",
            "seconds": 3.0,
            "run_id": None,
            "linked": True,
        }
    ]
    text, metrics = make(fake, fake.store(), stages)
    return text, metrics, Page(text)


def test_report__is_self_contained(written):
    text, _, page = written
    sources = [
        value
        for _, attributes in page.tags
        for key, value in attributes.items()
        if key in {"src", "href", "srcset", "data", "action"}
    ]
    assert sources and all(value.startswith(("data:image/", "#")) for value in sources)
    assert not page.all("script") and not page.all("link") and not page.all("iframe")
    assert not re.search(r"https?://|url\(|@import|javascript:", text)
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert not any(key.startswith("on") for _, attributes in page.tags for key in attributes)


def test_report__pictures_are_whole_and_described(written):
    _, _, page = written
    pictures = page.all("img")
    assert len(pictures) > 12
    for picture in pictures:
        head, raw = picture["src"].split(",", 1)
        image = Image.open(io.BytesIO(base64.b64decode(raw, validate=True)))
        image.load()
        assert head == f"data:image/{image.format.lower()};base64"
        assert len(picture["alt"]) > 20
    assert all(anchor["href"][1:] in {section.get("id") for section in page.all("section")} for anchor in page.all("a"))


def test_report__headings_go_down_one_step_at_a_time(written):
    _, _, page = written
    levels = [int(tag[1]) for tag, _ in page.tags if tag in {"h1", "h2", "h3", "h4"}]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False))
    # Every section but the summary, which has a label, begins with its own title.
    assert levels.count(2) == len(page.all("section")) - 1
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))


def test_report__says_what_a_clinician_needs(written):
    _, metrics, page = written
    assert metrics["headline"].replace("\u00a0", " ") in page.text.replace("\u00a0", " ")
    for words in (
        "What these numbers may not be used for",
        "Does pretraining help?",
        "Every patient, errors first",
        "Split: who is tested where",
        "effective rank to one",
        "Stages behind these numbers",
        "earlier run",
        "sonoscope ui",
    ):
        assert words in page.text
    wrong = sum(sum(row) for row in metrics["pretrained"]["video"]["confusion"]) - sum(
        metrics["pretrained"]["video"]["confusion"][index][index] for index in range(3)
    )
    assert f"Videos judged wrongly: {wrong:g} of 36" in page.text
    assert "Not for diagnosis" in page.text and "synthetic" not in page.text


def test_errors__are_those_of_the_networks_and_not_of_their_mean(tmp_path):
    """Each of three networks is wrong, and not very sure, about another third of the videos: their mean would be right everywhere."""
    fake = FakeExperiment(tmp_path, seeds=[0, 1, 2])
    for folder in fake.folders:
        def change(table):
            wrong = (table["video"].map(lambda video: int(video[:8], 16) + int(video[8:], 16)) + table["seed"]) % 3 == 0
            chance = np.where(wrong, 0.45, 0.95)
            table["p_a"] = np.where(table["label"] == "a", chance, 1 - chance)
            table["p_b"] = 1 - table["p_a"]
            return table

        fake.edit_table(folder.name, change)
    text, metrics = make(fake)
    page = Page(text)
    assert metrics["pretrained"]["video"]["accuracy"] == pytest.approx(2 / 3)
    assert "one of them judges 8 of 24 videos wrongly on average" in page.text
    assert "No video was judged wrongly by most of its networks." in page.text and "No video was judged wrongly." not in page.text
    assert page.text.count("2 of 3 networks right") == 4 and "right in 3 of 3" in page.text
    assert "1.3 of 2" in page.text, "videos right of a patient: two videos, each right in two of three networks"


def test_report__numbers_are_right_aligned(written):
    text, _, page = written
    assert re.search(r"th\.n, td\.n \{ text-align:right", text)
    assert any(cell.get("class") == "n" for cell in page.all("td"))
    assert all(cell.get("scope") in {"col", "row"} for cell in page.all("th"))


def test_report__names_no_secret_and_no_path(written):
    text, _, _ = written
    assert "top-secret-key" not in text and "/home/clinic" not in text and "pytest-of" not in text
    assert "pretrain.image_size" in text


def test_report__is_printable_and_follows_the_theme(written):
    text, _, _ = written
    assert "@media print" in text and "prefers-color-scheme: dark" in text and "size:A4" in text


def test_report__hostile_names_are_escaped(tmp_path):
    hostile = '<script>alert("x")</script>'
    fake = FakeExperiment(
        tmp_path,
        classes=[hostile, '"><img src=x onerror=y>'],
        params={"evaluate": {"bootstrap": 100, "title": hostile}},
    )
    fake.splits.warnings.append("<b>bold</b> https-free warning")
    text, _ = make(fake, fake.store())
    page = Page(text)
    assert "<script" not in text.lower() and not any("onerror" in attributes for _, attributes in page.tags)
    assert hostile in page.text and "<b>bold</b>" in page.text
    assert all(picture["src"].startswith("data:image/") for picture in page.all("img"))


def test_report__phantoms_are_called_phantoms(tmp_path):
    text, _ = make(FakeExperiment(tmp_path))
    assert "The videos are synthetic phantoms" in text and "Not for diagnosis" not in text


def test_report__videos_as_groups_are_said_loudly(tmp_path):
    text, metrics = make(FakeExperiment(tmp_path, group="video"))
    assert "12 groups" in metrics["headline"] and "Patient identities were not given" in text


def test_report__unknown_patients_are_not_called_patients(tmp_path):
    """The default keeps patients together; where a table names none of them, the page must not count patients."""
    fake = FakeExperiment(tmp_path)
    assert make(fake)[1]["unit"] == "patient"
    video = next(iter(fake.labels))
    metrics = {"stamp": "", "group": "patient", "patients": 12, "seeds": 2, "headline_init": "random", "random": {"patient": {"accuracy": 0.5}}}
    unknown = replace(fake.splits, groups={**fake.groups, video: f"V{video}"})
    assert (fake.splits.unit, unknown.unit) == ("patient", "group")
    assert not any("identities" in line for line in cautions(fake.config, {**metrics, "unit": "patient"}, []))
    said = cautions(fake.config, {**metrics, "unit": unknown.unit}, [])
    assert any("not given for every video; those without were treated as independent" in line for line in said)


def test_report__a_split_by_frame_counts_patients_where_they_are_known(tmp_path):
    fake = FakeExperiment(tmp_path, group="frame", frames=24)
    text, metrics = make(fake)
    assert "12 patients" in metrics["headline"] and "12 groups" not in text and "Training patients" in text
    video = next(iter(fake.labels))
    unknown = replace(fake.splits, groups={**fake.groups, video: f"V{video}"})
    assert fake.splits.unit == "patient" and unknown.unit == "group"


def test_report__without_store_and_curves(tmp_path):
    text, _ = make(FakeExperiment(tmp_path))
    assert 'id="training"' not in text and "Fold by fold" in text


# words


def test_number__signs_and_gaps():
    assert [number(0.705), number(-0.001), number(None), number(float("nan")), number(-0.25)] == [
        "0.70",
        "0.00",
        "–",
        "–",
        "−0.25",
    ]
    assert [signed(0.12), signed(-0.12), signed(0.001), signed(None)] == ["+0.12", "−0.12", "0.00", "–"]
    assert [p_words(0.0004), p_words(0.034), p_words(0.5), p_words(0.999), p_words(None)] == [
        "p < 0.001",
        "p = 0.034",
        "p = 0.50",
        "p > 0.99",
        "p undefined",
    ]
    assert [plural(1, "patient"), plural(2, "class"), plural(1200, "frame")] == [
        "1 patient",
        "2 classes",
        "1\u202f200 frames",
    ]


def test_folds__without_intervals_say_why(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.evaluation.evaluate.PARTS", ())
    fake = FakeExperiment(tmp_path, skill={"pretrained": 50.0})
    page, metrics = make(fake)
    reason = metrics["pretrained"]["folds"]["0"]["undefined"]["balanced_accuracy interval"]
    text = Page(page).text
    assert f"No fold has an interval: {reason}. Right: all folds together." in text and "lines: intervals over the fold" not in text
    assert "Dots: value; no intervals: " in text
    assert "All metrics" in text and 'href="#pretraining">Does' not in page


def test_headline__reads_as_specified():
    values = {"balanced_accuracy": 0.71, "balanced_accuracy_low": 0.60, "balanced_accuracy_high": 0.81}
    metrics = {
        "headline_init": "pretrained",
        "pretrained": {"video": values},
        "group": "patient",
        "unit": "patient",
        "patients": 24,
        "videos": 48,
        "folds": 3,
        "seeds": 1,
        "stamp": "",
    }
    sentence = headline_sentence(metrics, 0.95).replace("\u00a0", " ")
    assert sentence == "Balanced accuracy per video 0.71 (95 % interval 0.60 to 0.81), 24 patients, 48 videos, 3 folds"
    stamped = headline_sentence({**metrics, "stamp": "transductive pretraining"}, 0.95)
    assert stamped.endswith(" – transductive pretraining")
    assert "no interval" in interval_words(
        {"balanced_accuracy": 1.0, "balanced_accuracy_low": None}, "balanced_accuracy", 0.95
    )


@pytest.mark.parametrize(
    ("low", "high", "p", "answer"),
    [
        (0.02, 0.2, 0.01, "Yes"),
        (-0.2, -0.02, 0.01, "No"),
        (-0.1, 0.2, 0.4, "Not shown"),
        (0.01, 0.2, 0.08, "Not shown"),
        (None, None, 1.0, "Not shown"),
    ],
)
def test_verdict__needs_interval_and_test(low, high, p, answer):
    difference = {
        "balanced_accuracy": 0.1,
        "balanced_accuracy_low": low,
        "balanced_accuracy_high": high,
        "balanced_accuracy_p": p,
    }
    assert verdict(difference, 0.95)["answer"] == answer


def test_verdict__nothing_compared():
    assert verdict(None, 0.95) is None


def test_verdict__says_why_something_is_missing():
    ends = {"balanced_accuracy_low": None, "balanced_accuracy_high": None}
    unknown = verdict({"balanced_accuracy": None, **ends, "balanced_accuracy_reason": "a class has no patient"}, 0.95)
    assert unknown["answer"] == "Unknown" and unknown["sentence"] == "The difference could not be computed: a class has no patient."
    same = verdict({"balanced_accuracy": 0.0, **ends, "balanced_accuracy_p": 1.0, "balanced_accuracy_reason": "all patients alike"}, 0.95)
    assert "p > 0.99" in same["sentence"] and same["sentence"].endswith("There is no interval: all patients alike.")


def test_cautions__no_error_is_no_proof(tmp_path):
    config = FakeExperiment(tmp_path).config
    metrics = {
        "stamp": "optimistic (selected on test)",
        "group": "patient",
        "unit": "patient",
        "patients": 24,
        "seeds": 1,
        "headline_init": "random",
        "random": {"patient": {"accuracy": 1.0}},
    }
    lines = " ".join(cautions(config, metrics, [])).replace("\u00a0", " ")
    # 1 - 0.05 ** (1 / 24)
    assert "an error in 11.7 % of patients" in lines and "chosen on the same patients" in lines


# pictures and curves


def test_frame_uri__keeps_colour_and_shrinks():
    image = np.zeros((300, 600, 3), np.uint8)
    image[..., 0] = 250
    raw = base64.b64decode(frame_uri(image).split(",", 1)[1])
    picture = Image.open(io.BytesIO(raw))
    assert picture.size == (220, 110) and picture.getpixel((5, 5))[0] > 240


def test_confusion__picture_survives_any_class_name(tmp_path):
    path = tmp_path / "confusion.png"
    plots.draw_confusion(
        path, np.array([[3, 0], [1.5, 0]]), ["$x_{", "a very long class name that goes on and on"], "Videos", "stamped"
    )
    with Image.open(path) as picture:
        assert picture.width > 300


def test_confusion__text_contrasts_with_its_cell():
    assert plots._on((1, 1, 1, 1)) == plots.INK and plots._on((0.05, 0.25, 0.5, 1)) == "white"


@pytest.mark.parametrize(
    "raw", [b"", b"epoch\n1\n", b"\xff\xfe", b"epoch,loss\nx,y\n", b"epoch,note\n0,hello\n1,you\n"]
)
def test_read_curves__foreign_files_are_passed_over(tmp_path, raw):
    path = tmp_path / "curves.csv"
    path.write_bytes(raw)
    table = content.read_curves(path)
    assert table is None or content.curve_columns({"run": table}) == []
    assert content.read_curves(tmp_path / "absent.csv") is None


def test_curve_columns__monitors_first_constants_and_timings_never():
    table = pd.DataFrame(
        {
            "x": [0, 1],
            "epoch": [0, 1],
            "lr": [1, 2],
            "images_per_second": [5, 6],
            "odd": [1, 2],
            "flat": [1, 1],
            "effective_rank": [4, 5],
            "loss": [2, 1],
            "chance_loss": [1, 2],
            "knn_balanced_accuracy": [0.2, 0.4],
        }
    )
    assert content.curve_columns({"run": table}) == ["loss", "knn_balanced_accuracy", "effective_rank", "odd"]
