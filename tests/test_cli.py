"""The `sonoscope` command: exit codes, presets, and that importing it costs a stage nothing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.cli import main, run_stage
from pipeline.config import load_config
from pipeline.errors import ConfigError, DataError
from pipeline.presets import Preset, as_overrides, flatten, load_preset, preset_names, write_preset

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def params(tmp_path: Path) -> Path:
    """A copy of the project's params.yaml."""
    path = tmp_path / "params.yaml"
    path.write_text((ROOT / "params.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    return path


def _raise(error: BaseException) -> None:
    raise error


def test_run_stage__success() -> None:
    assert run_stage(lambda: None) == 0


def test_run_stage__mistake_has_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_stage(lambda: _raise(DataError("clip.mp4: no frames"))) == 2
    out, err = capsys.readouterr()
    assert out == "" and err == "error: clip.mp4: no frames\n"


def test_run_stage__bug_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_stage(lambda: _raise(ZeroDivisionError("deep inside"))) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and "deep inside" in err and "bug of Sonoscope" in err


def test_run_stage__interrupt() -> None:
    assert run_stage(lambda: _raise(KeyboardInterrupt())) == 130


def test_run_stage__exit_code_of_a_stage_passes_through() -> None:
    with pytest.raises(SystemExit) as caught:
        run_stage(lambda: sys.exit(75))
    assert caught.value.code == 75


def test_import__is_light() -> None:
    code = (
        "import sys, time; before = set(sys.modules); start = time.perf_counter(); import pipeline.cli\n"
        "import json; print(json.dumps([time.perf_counter() - start, sorted(set(sys.modules) - before)]))"
    )
    # Best of three: the machine may be busy.
    answers = [
        json.loads(
            subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        )
        for _ in range(3)
    ]
    assert min(seconds for seconds, _ in answers) < 0.15
    heavy = {"torch", "torchvision", "mlflow", "cv2", "pydantic", "pandas", "numpy", "yaml"}
    assert not heavy & set(answers[0][1])


def test_check__names_what_is_wrong(params: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--params", str(params)]) == 0
    assert "valid" in capsys.readouterr().out
    params.write_text(
        params.read_text(encoding="utf-8").replace("short_side: 128", "short_sied: 128"), encoding="utf-8"
    )
    assert main(["check", "--params", str(params)]) == 2
    assert "Did you mean 'short_side'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pretrain.method=ulc"], "params.yaml with -S pretrain.method=ulc: 1 problem.*unknown method 'ulc'.* Did you mean 'ucl'"),
        (["pretrain.mehtod=ucl"], "pretrain.mehtod: unknown key .*Did you mean 'method'"),
        (["finetune.epochs=3", "pretrain.epochs=2,none"], "with -S finetune.epochs=3 -S pretrain.epochs=2,none: .*pretrain.epochs: got 'none'"),
        (["data.source=/nowhere"], "data.source: /nowhere does not exist"),
        (["finetune.augmentation.optional.shift=0.1"], r"use \+finetune.augmentation.optional.shift=0.1"),
        (["+pretrain.method=ucl"], r"Either remove \+ prefix"),
        (["pretrain.method"], "Write KEY=VALUE"), (["pretrain.seed=[1"], "Write KEY=VALUE"), (["data.source=glob(*)"], "is not supported. Write KEY=VALUE"),
    ],
)
def test_check__values_before_they_are_run(words: list[str], message: str, params: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = params.read_bytes()
    assert main(["check", "--params", str(params), *(word for one in words for word in ("-S", one))]) == 2
    told = capsys.readouterr().err
    assert re.search(message, told, re.DOTALL) and "Traceback" not in told and params.read_bytes() == before


def test_check__every_point_of_a_grid(params: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["-S", "pretrain.method=byol,ucl", "-S", "+finetune.augmentation.optional.shift=0.1"]
    assert main(["check", "--params", str(params), *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "pretraining byol" in lines[0] and "pretraining ucl" in lines[1]


def test_unknown_command__exits_2() -> None:
    with pytest.raises(SystemExit) as caught:
        main(["no-such-command"])
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("words", "line", "example"),
    [
        (["similar"], "sonoscope similar: missing: QUERY", "sonoscope similar ward3/"),
        (["compare"], "sonoscope compare: missing: EXPERIMENT", "sonoscope compare EXP_A EXP_B"),
        (["embed", "x"], "sonoscope embed: missing: --encoder", "--encoder models/encoders/fold0"),
        (["protocols", "-S"], "sonoscope protocols: argument -S/--set: expected one argument", "sonoscope protocols -S data.source="),
        (["preset", "a", "b"], "sonoscope preset: unrecognized arguments: b", "sonoscope preset --help"),
        (["check", "pretrain.method=byol"], "sonoscope check: unrecognized arguments: pretrain.method=byol", "sonoscope check --help"),
        (["check", "-S"], "sonoscope check: argument -S/--set: expected one argument", "sonoscope check --help"),
        (["data", "show"], "sonoscope data show: missing: NAME", "sonoscope data show --help"),
    ],
)
def test_arguments__one_line_and_an_example(words: list[str], line: str, example: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    first, second = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and line in first and second.startswith("example: ") and example in second


def test_preset__list_and_unknown_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preset"]) == 0
    listed = capsys.readouterr().out
    assert all(re.search(rf"^{name}\s+\S", listed, re.MULTILINE) for name in preset_names())
    assert main(["preset", "pocsu"]) == 2
    assert "Did you mean 'pocus'" in capsys.readouterr().err


@pytest.mark.parametrize("name", preset_names())
def test_preset__every_one_is_valid_and_survives_the_shell(name: str, params: Path) -> None:
    preset = load_preset(name)
    assert preset.description and preset.values
    words = as_overrides(preset)
    assert " ".join(words).split() == words
    # The shell expands $(...) to these words; no quotes, blanks or wild cards may act on the way.
    shown = subprocess.run(
        ["bash", "-c", 'printf "%s\\n" $(printf "%s" "$1")', "bash", " ".join(words)],
        capture_output=True,
        text=True,
        check=True,
        cwd=params.parent,
    ).stdout.splitlines()
    assert shown == words
    assert write_preset(preset, params)
    load_config(params)
    assert write_preset(preset, params) == []


@pytest.mark.parametrize("name", [name for name in preset_names() if "_official" in name])
def test_presets__published_recipes_say_how_large_an_epoch_is(name: str) -> None:
    values = load_preset(name).values
    assert values["pretrain.samples_per_video"] == 1 and values["pretrain.epochs"] > 1


@pytest.mark.parametrize("name", ["ucl_official_butterfly", "uscl_official", "hico_official"])
def test_preset__five_published_folds(name: str) -> None:
    """Judged on the five folds of POCUS; USCL and HiCo work on 3 pictures a second, at most 50 a video, all of them."""
    values = load_preset(name).values
    assert values["split.folds"] == [0, 1, 2, 3, 4]
    if not name.startswith("ucl"):
        frames = "extract.max_frames", "finetune.frames_per_video", "finetune.eval_frames_per_video"
        assert (values["extract.frames_per_second"], *(values[key] for key in frames)) == (3, 50, 50, 50)


@pytest.mark.parametrize("name", preset_names())
def test_preset__overrides_mean_what_write_means(name: str, params: Path) -> None:
    """The words, read by DVC's own code, give the same parameters as `--write`."""
    hydra = pytest.importorskip("dvc.utils.hydra")
    preset = load_preset(name)
    by_words = params.with_name("words.yaml")
    by_words.write_text(params.read_text(encoding="utf-8"), encoding="utf-8")
    hydra.apply_overrides(by_words, as_overrides(preset)[1::2])
    write_preset(preset, params)
    assert yaml.safe_load(by_words.read_text(encoding="utf-8")) == yaml.safe_load(params.read_text(encoding="utf-8"))


def test_write__keeps_comments_and_everything_else(params: Path) -> None:
    before = params.read_text(encoding="utf-8")
    write_preset(load_preset("pocus"), params)
    after = params.read_text(encoding="utf-8")
    comments = [re.sub(r"\s+", " ", line.split("#", 1)[1]) for line in before.splitlines() if "#" in line]
    kept = [re.sub(r"\s+", " ", line.split("#", 1)[1]) for line in after.splitlines() if "#" in line]
    assert kept == comments
    old, new = flatten(yaml.safe_load(before)), flatten(yaml.safe_load(after))
    wanted = load_preset("pocus").values
    assert {key: new[key] for key in wanted} == wanted
    assert {key for key, value in new.items() if key not in old or old[key] != value} <= set(wanted)
    assert not [line for line in after.splitlines() if line != line.rstrip()]


def test_write__refuses_what_is_not_valid_and_leaves_the_file(params: Path) -> None:
    before = params.read_bytes()
    with pytest.raises(ConfigError, match="short_side"):
        write_preset(Preset("bad", "too small", {"extract.short_side": 1}), params)
    assert params.read_bytes() == before


def test_overrides__forms_of_values() -> None:
    values = {
        "a": None,
        "b": True,
        "c": 0.0001,
        "d": [1, "x", "true"],
        "e": {"k": ["convex"]},
        "f": "it's,=",
        "g": {},
        "h": "",
    }
    assert as_overrides(Preset("p", "", values))[1::2] == [
        "++a=null",
        "++b=true",
        "++c=0.0001",
        "++d=[1,x,'true']",
        "++e={k:[convex]}",
        "++f='it\\'s,='",
        "++g={}",
        "++h=''",
    ]


def test_overrides__blank_in_a_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="--write"):
        as_overrides(Preset("p", "", {"evaluate.title": "two words"}))


def test_protocols__help_names_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    from pipeline.protocols import PROTOCOLS

    with pytest.raises(SystemExit):
        main(["protocols", "--help"])
    printed = "".join(capsys.readouterr().out.split())  # lines are cut at hyphens, too
    assert all(f"{protocol.key}(" in printed for protocol in PROTOCOLS)


def test_ui__prints_the_store_of_the_project(
    params: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_ROOT", str(params.parent))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert main(["ui", "--print", "--params", str(params)]) == 0
    printed = capsys.readouterr().out
    assert f"sqlite:///{params.parent.resolve()}/mlflow.db" in printed and "--host 127.0.0.1" in printed
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert main(["ui", "--print", "--params", str(params)]) == 0
    assert "http://127.0.0.1:9" in capsys.readouterr().out


def test_sync__without_anything_to_deliver(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    assert main(["sync"]) == 0
    assert "delivered 0 run(s)" in capsys.readouterr().out
