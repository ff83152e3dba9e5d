"""What is special in USCL: interpolated pairs, partly labelled batches, and whose labels pretraining may read."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import check_goldens
import goldens_uscl
import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.stats import chisquare
from training_kit import CPU, ListTracker, make_config, make_method, make_project, make_store, merged, never, toy_loader

from pipeline import losses
from pipeline.config import load_config
from pipeline.data import clips
from pipeline.data.clips import PairParams
from pipeline.data.splits import Splits
from pipeline.data.splitting import make_splits
from pipeline.data.store import FrameStore
from pipeline.data.transforms import draw_view, render
from pipeline.errors import ConfigError, LeakageError
from pipeline.methods.base import MethodContext, Progress, Setting
from pipeline.methods.uscl import USCL, USCLParams
from pipeline.parameters import AugmentationParams
from pipeline.preflight import check_named_files
from pipeline.presets import load_preset, write_preset
from pipeline.training.finetune_stage import run_finetune_stage
from pipeline.training.inputs import PretrainInputs, open_pretrain_inputs
from pipeline.training.optim import learning_rate
from pipeline.training.pretrain import Pretraining
from pipeline.training.pretrain_stage import run_pretrain_stage

VARIANTS = ("official", "two_coefficients", "meta")
ROOT = Path(__file__).resolve().parents[1]


# --- frames and coefficients ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("frames", "low", "high"), [(3, 0, None), (6, 0, None), (9, 2, None), (9, 0, 4), (11, 2, 6)])
def test_sample_triple__every_allowed_triple_equally_often(frames: int, low: int, high: int | None) -> None:
    rng, params = np.random.default_rng(0), PairParams(min_gap=low, max_gap=high)
    allowed = [
        triple for triple in itertools.permutations(range(frames), 3)
        if all(max(1, low) <= abs(a - b) <= (high or frames) for a, b in itertools.combinations(triple, 2))
    ]
    found = Counter(tuple(clips.sample_triple(params, frames, rng).tolist()) for _ in range(40 * len(allowed)))
    assert set(found) == set(allowed)
    assert chisquare([found[triple] for triple in allowed]).pvalue > 1e-3


def test_sample_triple__meta_keeps_the_order_and_draws_offsets_evenly() -> None:
    rng, params = np.random.default_rng(0), PairParams(variant="meta", max_gap=5)
    drawn = [clips.sample_triple(params, 12, rng).tolist() for _ in range(4000)]
    assert all(first < anchor < second < 12 for first, second, anchor in drawn)
    offsets = Counter((anchor - first, second - first) for first, second, anchor in drawn)
    assert set(offsets) == set(itertools.combinations(range(1, 6), 2))
    assert chisquare(list(offsets.values())).pvalue > 1e-3
    starts = Counter(first for first, second, _ in drawn if second - first == 5)
    assert sorted(starts) == list(range(7)), "every start from which the span fits"


def test_sample_triple__a_gap_too_wide_for_the_video_shrinks() -> None:
    drawn = {tuple(sorted(clips.sample_triple(PairParams(min_gap=9), 8, np.random.default_rng(s)).tolist())) for s in range(60)}
    assert drawn == {(0, 3, 6), (0, 3, 7), (0, 4, 7), (1, 4, 7)}


def test_sample_weights__laws_of_the_variants() -> None:
    rng = np.random.default_rng(0)
    drawn = {v: np.stack([clips.sample_weights(PairParams(variant=v), rng) for _ in range(6000)]) for v in VARIANTS}
    assert (drawn["official"][:, 0] == drawn["official"][:, 1]).all()
    assert abs(np.corrcoef(drawn["two_coefficients"].T)[0, 1]) < 0.05
    assert drawn["two_coefficients"].mean() == pytest.approx(0.5, abs=0.02)
    assert (drawn["official"] < 0.1).mean() == pytest.approx(0.2048, abs=0.02), "arcsine law"
    assert drawn["meta"].mean() == pytest.approx(1 - 3 / 8, abs=0.01), "Beta(3, 5) of the anchor"
    fixed = PairParams(variant="meta", alpha=50, beta=50)
    assert np.mean([clips.sample_weights(fixed, rng) for _ in range(500)]) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shared", [True, False])
def test_draw_pair__sizes_never_depend_on_the_video(variant: str, shared: bool) -> None:
    """The loader makes its arrays before it knows the video; short videos mix nothing."""
    params = PairParams(variant=variant, shared_anchor_augmentation=shared)
    for seed, frames in itertools.product(range(10), (1, 2, 3, 50)):
        roles = clips.draw_pair(params, frames, np.random.default_rng(seed))
        weight = roles.pop("weight")
        anchors = {"anchor": 1 if shared else 2, "boundary": 2}
        assert {name: len(x) for name, x in roles.items()} == ({"first": 2, "second": 2} if variant == "meta" else anchors)
        assert all(x.dtype == np.int64 and 0 <= x.min() and x.max() < frames for x in roles.values())
        ends = roles["boundary"] if variant != "meta" else np.array([roles["first"][0], roles["second"][0]])
        assert len(set(ends.tolist())) == min(frames, 2)
        assert (weight == 1).all() == (frames < 3)


def test_mixed_pair__weight_of_the_boundary_frame() -> None:
    frames = {"boundary": torch.randn(2, 2, 3, 4, 4), "anchor": torch.randn(2, 1, 3, 4, 4)}
    weight = torch.tensor([[1.0, 0.0], [0.25, 0.5]])
    one, two = clips.mixed_pair(clips.ClipBatch(frames, torch.arange(2), torch.arange(2), {"weight": weight}))
    assert torch.equal(one[0], frames["boundary"][0, 0])
    assert torch.equal(two[0], frames["anchor"][0, 0])
    torch.testing.assert_close(one[1], 0.25 * frames["boundary"][1, 0] + 0.75 * frames["anchor"][1, 0])
    torch.testing.assert_close(two[1], 0.5 * frames["boundary"][1, 1] + 0.5 * frames["anchor"][1, 0])
    linked = {"first": torch.stack([frames["boundary"][:, 0], frames["anchor"][:, 0]], 1)}
    linked["second"] = torch.stack([frames["boundary"][:, 1], frames["anchor"][:, 0]], 1)
    again = clips.mixed_pair(clips.ClipBatch(linked, torch.arange(2), torch.arange(2), {"weight": weight}))
    assert torch.equal(again[0], one) and torch.equal(again[1], two)


def test_pair_views__mixing_linked_views_is_mixing_first() -> None:
    """`meta` augments the mixture; here the two frames get one view and are mixed then."""
    rng = np.random.default_rng(0)
    boundary, anchor = (rng.integers(70, 180, (60, 50)).astype(np.uint8) for _ in range(2))
    augmentation = AugmentationParams(jitter=1.0, blur=1.0, brightness=0.3, contrast=0.3)
    rules = clips.pair_views(PairParams(variant="meta"), 32, augmentation)
    assert {role: rule.linked for role, rule in rules.items()} == {"first": True, "second": True}
    assert clips.pair_views(PairParams(), 32, augmentation) == {}
    for seed, weight in enumerate((0.2, 0.5, 0.9)):
        view = draw_view(augmentation, np.random.default_rng(seed), boundary.shape, 32)
        shown = []
        for frame in (boundary, anchor, np.round(weight * boundary + (1 - weight) * anchor).astype(np.uint8)):
            shown.append(np.empty((32, 32), np.uint8))
            render(frame, view, 32, shown[-1])
        mixed = weight * shown[0].astype(float) + (1 - weight) * shown[1]
        assert np.abs(mixed - shown[2]).max() < 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"alpha": 0.5}, "alpha and beta must both be numbers or both be null"),
        ({"min_gap": 4, "max_gap": 7}, r"max_gap \(7\) must be at least twice min_gap \(4\)"),
        ({"max_gap": 1}, "greater than or equal to 2"),
    ],
)
def test_pair_params__impossible_pairs(values: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PairParams(**values)


# --- the step ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FrameStore:
    return make_store(tmp_path_factory.mktemp("store"), patients=6, frames=[24, 2, 1], side=32)


def first_batch(method: USCL, store: FrameStore, **plan) -> clips.ClipBatch:
    return next(iter(toy_loader(store, USCL, method.params, batch=6, **plan).epoch(0, CPU)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_step__videos_of_one_and_two_frames(variant: str, store: FrameStore) -> None:
    method = make_method("uscl", pair={"variant": variant})
    output = method.step(first_batch(method, store), Progress(0, 0))
    output.loss.backward()
    assert torch.isfinite(output.loss)


@pytest.mark.parametrize("source", ["representation", "projection"])
def test_step__no_labelled_row_adds_exactly_nothing(source: str, store: FrameStore) -> None:
    """The published loss is NaN here. Every weight keeps a gradient, which DistributedDataParallel counts on."""
    method = make_method("uscl", classifier_input=source)
    batch = first_batch(method, store)
    batch.label[:] = -1
    output = method.step(batch, Progress(0, 0))
    output.loss.backward()
    assert torch.equal(output.loss.detach(), output.metrics["contrastive"])
    assert all(not weight.grad.any() for weight in method.networks["classifier"].parameters())
    assert float(method.chance_loss(Progress(0, 0))) == pytest.approx(math.log(11))


def test_objective__mean_over_labelled_rows_of_each_view() -> None:
    method = USCL(torch.nn.Identity(), USCLParams(supervised_weight=0.3), MethodContext(4, 1, 1, 4, classes=3))
    z, logits = (list(torch.randn(2, 4, 3, dtype=torch.float64)) for _ in range(2))
    labels = torch.tensor([2, -1, 0, -1])
    loss, metrics = method.objective(z, logits, labels, torch.arange(4))
    expected = sum(torch.nn.functional.cross_entropy(view[[0, 2]], labels[[0, 2]]) for view in logits)
    assert float(loss - metrics["contrastive"]) == pytest.approx(0.3 * float(expected))
    assert float(metrics["labelled"]) == 0.5


def test_nt_xent__two_samples_of_one_video_are_no_negatives() -> None:
    """Against the definition, row by row."""
    z1, z2 = (losses.l2_normalize(torch.randn(4, 5, dtype=torch.float64)) for _ in range(2))
    videos = torch.tensor([7, 3, 7, 5])
    rows, of = torch.cat([z1, z2]), torch.cat([videos, videos])
    total = 0.0
    for i in range(8):
        partner = (i + 4) % 8
        counted = [k for k in range(8) if k == partner or of[k] != of[i]]
        total -= float(rows[i] @ rows[partner] / 0.5 - torch.logsumexp(rows[counted] @ rows[i] / 0.5, 0)) / 8
    assert float(losses.nt_xent((z1, z2), (z1, z2), 0.5, videos=videos)) == pytest.approx(total)
    plain = losses.nt_xent((z1, z2), (z1, z2), 0.5)
    assert float(losses.nt_xent((z1, z2), (z1, z2), 0.5, videos=torch.arange(4))) == pytest.approx(float(plain))


def test_step__batch_norm_sees_one_view_or_both(store: FrameStore) -> None:
    for norm in (True, False):
        separate, joint = (make_method("uscl", norm=norm, bn_views=views) for views in ("separate", "joint"))
        one, both = (float(m.step(first_batch(m, store), Progress(0, 0)).loss.detach()) for m in (separate, joint))
        assert (one == pytest.approx(both, abs=1e-6)) == (not norm)


def test_method__without_labels_has_no_classifier() -> None:
    method = make_method("uscl", supervised_weight=0)
    assert sorted(method.networks) == ["backbone", "head"]
    assert (USCL.label_share(method.params), USCL.label_share(USCLParams(label_fraction=0.25))) == (0, 0.25)
    for source, width in (("representation", 512), ("projection", 16)):
        assert make_method("uscl", classifier_input=source).networks["classifier"].in_features == width


def test_problems__labels_that_are_missing() -> None:
    def lines(labelled: dict[str, int] | None, **values) -> list[str]:
        return USCL.problems(USCLParams(**values), Setting("resnet18", 112, 32, values.pop("scope", "fold"), labelled))

    assert lines(None) == lines({"a": 3, "b": 1}) == lines({}, supervised_weight=0) == []
    (one,) = lines({"a": 3, "b": 0})
    assert one.startswith(
        "methods.uscl.supervised_weight: 0.2 needs labelled videos of at least 2 classes, and pretraining may see labels of 1: a. Give"
    )
    (none,) = USCL.problems(USCLParams(), Setting("resnet18", 112, 32, "all", {}))
    assert "see labels of 0 (pretrain.scope: all passes no label of the main source on)" in none
    (alone,) = USCL.check(USCLParams(), MethodContext(512, 1, 1, 2), 1)
    assert alone.startswith("1 video: USCL has no negatives")
    (line,) = USCL.problems(USCLParams(), Setting("resnet18", 64, 1, "fold", None))
    assert line.startswith("pretrain.batch_size: 1 sample a forward pass (batch_size / accumulate) leaves USCL no video to contrast")
    assert USCL.check(USCLParams(), MethodContext(512, 1, 1, 32), 9) == []


# --- whose labels -----------------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Splits:
    """Nine labelled patients; a further source of labelled videos, of four of these (a copy and another clip each) and of others."""
    config, _ = make_project(tmp_path, pretrain__method="uscl", data__extra_sources={"more": {"path": "x"}})
    extra = make_store(tmp_path / "data/frames/more", 8, clips=2, frames=9, first=5, source="more")
    splits = make_splits(FrameStore(tmp_path / "data/frames/main").manifest, config, extra={"more": extra.manifest})
    splits.write(tmp_path / "data/splits.json")
    monkeypatch.chdir(tmp_path)
    return splits


def opened(splits: Splits, fold: int = 0, **changes) -> PretrainInputs:
    settings = {"pretrain__method": "uscl", "data__extra_sources": {"more": {"path": "x"}}, **changes}
    return open_pretrain_inputs(make_config(Path.cwd(), **settings), splits, fold)


def told(inputs: PretrainInputs) -> dict[str, str]:
    """Label of every video that the method reads one of."""
    return {ref.video: inputs.target_classes[t] for ref, t in zip(inputs.videos, inputs.targets, strict=True) if t >= 0}


@pytest.mark.parametrize("sources", [["main"], ["main", "more"], ["more", "main"], ["more"]])
def test_targets__never_of_a_test_or_validation_patient(project: Splits, sources: list[str]) -> None:
    for fold in (0, 1, 2):
        labels = told(opened(project, fold, pretrain__sources=sources))
        held = project.fold(fold).inner[0]
        assert labels
        assert not set(project.groups_of([*project.fold(fold).test, *held.validation])) & set(project.groups_of(labels))
        main = {video for video in labels if video in project.labels}
        training = set(held.train)
        assert main == training if "main" in sources else main <= training
        assert all(labels[video] == project.labels[video] for video in main)
        transductive = told(opened(project, fold, pretrain__sources=sources, pretrain__scope="all"))
        assert not set(project.groups_of(project.labels)) & set(project.groups_of(transductive)), "all main patients are tested somewhere"
        assert bool(transductive) == ("more" in sources)


def test_targets__all_training_patients_where_no_part_is_for_validation(project: Splits) -> None:
    bare = replace(project, folds=[replace(fold, inner=[]) for fold in project.folds])
    assert set(told(opened(bare))) == set(bare.fold(0).train)


def test_targets__only_for_methods_that_read_labels(project: Splits) -> None:
    for changes in ({"pretrain__method": "simclr"}, {"methods__uscl__supervised_weight": 0}):
        inputs = opened(project, **changes)
        assert (set(inputs.targets), inputs.target_classes, inputs.target_counts()) == ({-1}, [], {})
        assert set(inputs.labels) == {0, 1}, "the monitor keeps its labels"


def test_targets__share_is_drawn_by_the_seed(project: Splits) -> None:
    full, half, again, other = (
        told(opened(project, methods__uscl__label_fraction=share, pretrain__seed=seed))
        for share, seed in ((1.0, 0), (0.4, 0), (0.4, 0), (0.4, 3))
    )
    assert half == again != other
    assert half.items() < full.items()
    assert len(half) == len(other) == math.ceil(0.4 * len(full))
    assert opened(project, methods__uscl__label_fraction=0.4).target_classes == ["a", "b"], "though a class may have lost all its labels"


def test_fingerprint__holds_the_labels_where_they_are_read(project: Splits) -> None:
    swapped = replace(project, labels={video: "ba"["ab".index(label)] for video, label in project.labels.items()})
    assert opened(project).fingerprint == opened(project).fingerprint
    assert opened(project).fingerprint != opened(swapped).fingerprint
    for changes in ({"pretrain__method": "simclr"}, {"methods__uscl__supervised_weight": 0}):
        assert opened(project, **changes).fingerprint == opened(swapped, **changes).fingerprint


def test_targets__classes_of_a_further_source_come_last(project: Splits, tmp_path: Path) -> None:
    table = tmp_path / "data/frames/more/manifest.csv"
    table.write_text(table.read_text().replace(",b,video,", ",Abdomen,video,"))
    inputs = opened(project, pretrain__sources=["main", "more"])
    assert inputs.target_classes == ["a", "b", "Abdomen"]
    assert inputs.target_counts() == dict(Counter(told(inputs).values()))


def test_card__says_how_many_labels_were_used(project: Splits, tmp_path: Path) -> None:
    config = make_config(tmp_path, pretrain__method="uscl", pretrain__epochs=1, methods__uscl__label_fraction=0.7)
    inputs = open_pretrain_inputs(config, project, 0)
    run = Pretraining(config, inputs, tmp_path / "scratch", ListTracker(), threads=1)
    run.train(never())
    run.export(tmp_path / "out")
    card = json.loads((tmp_path / "out/card.json").read_text())
    assert card["labelled_videos"] == inputs.target_counts()
    assert sum(card["labelled_videos"].values()) == math.ceil(0.7 * len(project.fold(0).inner[0].train))
    assert run.method.networks["classifier"].out_features == 2


def test_finetuning__knows_whose_labels_pretraining_read(project: Splits, tmp_path: Path) -> None:
    """Fewer labels for fine-tuning than for its encoder are stamped; a test patient's label in pretraining is refused."""
    settings = {"pretrain__method": "uscl", "pretrain__epochs": 1, "finetune__epochs": 1}
    stamps = {}
    for share, weight in ((1.0, 0.2), (0.5, 0.2), (0.5, 0.0)):
        config = make_config(tmp_path, **settings, finetune__label_fraction=share, methods__uscl__supervised_weight=weight)
        run_pretrain_stage(config, 0, tmp_path / "none.py")
        run_finetune_stage(config, "pretrained", 0, 0)
        stamps[share, weight] = json.loads((tmp_path / "models/finetuned/pretrained-seed0-fold0/card.json").read_text())["stamp"]
    assert stamps == {(1.0, 0.2): None, (0.5, 0.2): "encoder pretrained with labels beyond finetune.label_fraction", (0.5, 0.0): None}
    path = tmp_path / "models/encoders/fold0/card.json"
    for part, videos in (("test", project.fold(0).test), ("inner validation", project.fold(0).inner[0].validation)):
        (group, *_) = project.groups_of(videos)
        path.write_text(json.dumps(json.loads(path.read_text()) | {"label_groups": [group], "scope": "all"}))
        with pytest.raises(LeakageError, match=f"pretraining read the labels of 1 {part} patients of fold 0, for example {group}"):
            run_finetune_stage(config, "pretrained", 0, 0)


def test_stage__without_usable_labels_ends_before_anything_is_computed(project: Splits, tmp_path: Path) -> None:
    config = make_config(tmp_path, pretrain__method="uscl", pretrain__scope="all")
    with pytest.raises(ConfigError, match=r"pretrain, fold 0: method uscl cannot run .*\n  methods.uscl.supervised_weight: 0.2 needs"):
        run_pretrain_stage(config, 0, tmp_path / "none.py")
    assert not (tmp_path / ".scratch").exists() and not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"pretrain.scope": "all"}, True),
        ({"data.labels": "none"}, True),
        ({}, False),
        ({"data.labels": "none", "methods.uscl.supervised_weight": 0}, False),
        ({"pretrain.scope": "all", "data.extra_sources": {"more": {"path": "more"}}, "pretrain.sources": ["main", "more"]}, False),
        ({"pretrain.scope": "all", "data.extra_sources": {"more": {"path": "more"}}}, True),
    ],
)
def test_preflight__labels_that_cannot_be_there(changes: dict, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "more").mkdir()
    (tmp_path / "more/labels.csv").write_text("path,label\n")  # without a table or class folders it could have no labels
    (tmp_path / "params.yaml").write_text(json.dumps(merged({"pretrain": {"method": "uscl"}}, changes)))
    try:
        check_named_files(load_config(tmp_path / "params.yaml"))
    except ConfigError as error:
        assert refused and "methods.uscl.supervised_weight: 0.2 needs labelled videos" in str(error)
    else:
        assert not refused


# --- as published -----------------------------------------------------------------------------------------------------


def test_preset__rates_of_the_published_program(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    write_preset(load_preset("uscl_official"), tmp_path / "params.yaml")
    config = load_config(tmp_path / "params.yaml")
    rates = [learning_rate(config.pretrain.optimizer, config.pretrain.epochs, epoch) for epoch in range(config.pretrain.epochs)]
    assert rates[:11] == [3e-4] * 11 and rates[11] < 3e-4
    assert rates[299] == pytest.approx(9.94e-7, rel=1e-3)
    assert (config.finetune.trainable, config.finetune.selection, config.finetune.batchnorm) == ("layer4.1", "best_on_test", "train")
    assert isinstance(config.method_params, USCLParams)
    assert config.method_params.classifier_input == "projection"


def test_goldens__all_published_arrays(shared: Path) -> None:
    folder = shared / "golden/uscl"
    if not folder.is_dir():
        pytest.skip("the shared folder has no golden/uscl")
    passed, failed = check_goldens.check_folder(folder, goldens_uscl)
    assert (passed >= 64, failed) == (True, 0)
