"""params.yaml: every mistake is named with key, value, what is allowed and the nearest key, all at once."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.config import Config, fingerprint, load_config, pretraining_name
from pipeline.errors import ConfigError
from pipeline.registry import METHODS

ROOT = Path(__file__).resolve().parents[1]


def problems(tmp_path: Path, text: str | bytes) -> str:
    """The message of a refused file, without the folder's name."""
    path = tmp_path / "params.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as refused:
        load_config(path)
    return str(refused.value).replace(str(tmp_path) + "/", "")


def accepted(tmp_path: Path, text: str) -> Config:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    return load_config(path)


def test_load_config__the_shipped_file_says_everything() -> None:
    """Valid, and complete: a key that the file does not show cannot be set by `dvc exp run -S key=value`.

    But for `optional` sections: their keys are added with `-S +key=value`.
    """
    config = load_config(ROOT / "params.yaml")
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())
    known = config.model_dump(mode="json", exclude={"methods"}) | {
        "methods": {name: params.model_dump(mode="json") for name, params in config.methods.items()}
    }

    def missing(want: dict, have: dict, prefix: str = "") -> list[str]:
        lines = []
        for key, value in want.items():
            if key not in have:
                lines.append(prefix + key)
            elif isinstance(value, dict) and isinstance(have[key], dict) and key != "optional":
                lines += missing(value, have[key], f"{prefix}{key}.")
        return lines

    known["methods"].pop("random")  # nothing to choose there
    assert missing(known, raw) == []
    assert set(raw["methods"]) == set(METHODS.names())


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (
            "pretrian: {epochs: 3}",
            ["pretrian: unknown key (value {'epochs': 3}). Did you mean 'pretrain'?", "Allowed here: data, "],
        ),
        ("pretrain: {batchsize: 8}", ["pretrain.batchsize: unknown key (value 8). Did you mean 'batch_size'?"]),
        (
            "pretrain: {optimizer: {learning: 1}}",
            ["pretrain.optimizer.learning: unknown key (value 1).", "Allowed here: name, lr,"],
        ),
        (
            "methods: {ucl: {temprature: 1}}",
            ["methods.ucl.temprature: unknown key (value 1). Did you mean 'temperature'?"],
        ),
        (
            "methods: {ucl: {augmentation: {blurr: 0}}}",
            ["methods.ucl.augmentation.blurr: unknown key (value 0). Did you mean 'blur'?"],
        ),
        (
            "data: {extra_sources: {more: {path: x, lables: y}}}",
            ["data.extra_sources.more.lables", "Did you mean 'labels'?"],
        ),
        (
            "methods: {mocko: {}}",
            ["methods.mocko: unknown method 'mocko'. Allowed: barlow, byol, ", "vicreg. Did you mean 'moco'?"],
        ),
        ("pretrain: {method: ucll}", ["pretrain.method: unknown method 'ucll'.", "Did you mean 'ucl'?"]),
        ("pretrain: {method: [ucl]}", ["pretrain.method: got ['ucl']; input should be a valid string"]),
        ("pretrain: {epochs: many}", ["pretrain.epochs: got 'many'; input should be a valid integer"]),
        ("pretrain: {image_size: 64.5}", ["pretrain.image_size: got 64.5; input should be a valid integer"]),
        ("pretrain: {epochs: true}", ["pretrain.epochs: got True; a number or text is wanted here"]),
        (
            "finetune: {class_weights: false}",
            ["finetune.class_weights: got False; a number or text is wanted here (quote the word"],
        ),
        ("pretrain: {optimizer: {lr: .nan}}", ["pretrain.optimizer.lr: got nan; input should be a finite number"]),
        ("methods: {ucl: {temperature: .inf}}", ["methods.ucl.temperature: got inf; input should be a finite number"]),
        ("methods: {simclr: {temperature: 0}}", ["methods.simclr.temperature: got 0; input should be greater than 0"]),
        ("pretrain: {seed: -1}", ["pretrain.seed: got -1; input should be greater than or equal to 0"]),
        ("finetune: {seeds: [0, -4]}", ["finetune.seeds.1: got -4"]),
        (
            "finetune: {label_fraction: 1.5}",
            ["finetune.label_fraction: got 1.5; input should be less than or equal to 1"],
        ),
        ("extract: {color: grau}", ["extract.color: got 'grau'; allowed: 'gray' or 'rgb'"]),
        ("extract: {color: GREY}", ["extract.color: got 'GREY'; allowed: 'gray' or 'rgb'. Did you mean 'gray'?"]),
        ("finetune: {selection: iner}", ["finetune.selection: got 'iner'; allowed: ", "Did you mean 'inner'?"]),
        ("launch: {processes: atuo}", ["or allowed: 'auto'. Did you mean 'auto'?"]),
        (
            "launch: {processes: several}",
            ["launch.processes: got 'several'; input should be a valid integer", "or allowed: 'auto'"],
        ),
        ("pretrain: {optimizer: 5}", ["pretrain.optimizer: got 5; input should be a valid dictionary"]),
        ("pretrain:", ["pretrain: got None; input should be a valid dictionary"]),
        (
            "split: {folds: [1, 2]}",
            ["split.folds: must be the numbers 0 to k-1 in order, for example [0, 1, 2, 3, 4]; got [1, 2]"],
        ),
        ("pretrain: {batch_size: 6, accumulate: 4}", ["pretrain: batch_size (6) must be a multiple of accumulate (4)"]),
        ("methods: {ucl: {low: 0.4, high: 0.3}}", ["methods.ucl: low (0.4) must be smaller than high (0.3)"]),
        (
            "methods: {moco: {augmentation: {scale: [0.9, 0.2]}}}",
            ["methods.moco.augmentation: scale must satisfy 0 < low <= high <= 1"],
        ),
        ("pretrain: {sources: [main, cohort]}", ["pretrain.sources: unknown source 'cohort'. Allowed: main"]),
        ("finetune: {source: other}", ["finetune.source: got 'other'; allowed: main"]),
        ("data: {extra_sources: {../x: {path: y}}}", ["data.extra_sources.../x: a source name is letters, digits"]),
        ("methods: [ucl]", ["methods: expected one block per method, found list"]),
        ("methods: {ucl: 5}", ["methods.ucl: got 5; input should be a valid dictionary"]),
        ("1: 2", ["1: got 1; keys should be strings"]),
    ],
)
def test_load_config__one_mistake(tmp_path: Path, text: str, lines: list[str]) -> None:
    message = problems(tmp_path, text)
    assert message.startswith("params.yaml: 1 problem\n"), message
    for line in lines:
        assert line in message


@pytest.mark.parametrize(
    ("section", "line"),
    [
        ({"pretrain": {"init_allow_missing": [""]}}, "pretrain.init_allow_missing: must be names of parts"),
        ({"pretrain": {"optimizer": {"lr": 0.01, "min_lr": 0.1}}}, r"pretrain.optimizer: min_lr \(0.1\) is above lr \(0.01\)"),
        (
            {"pretrain": {"epochs": 10, "optimizer": {"warmup_epochs": 8, "constant_epochs": 3}}},
            r"pretrain: optimizer: warmup_epochs \(8\) and constant_epochs \(3\) take longer than all epochs \(10\)",
        ),
        ({"finetune": {"epochs": 2, "optimizer": {"warmup_epochs": 2.5, "schedule": "constant"}}}, r"finetune: optimizer: warmup_epochs \(2.5\)"),
        ({"methods": {"msn": {"sharpen": 2}}}, "methods.msn.sharpen: got 2; input should be less than or equal to 1"),
        ({"methods": {"msn": {"sharpen_end": 1.1}}}, "methods.msn.sharpen_end: got 1.1; "),
    ],
)
def test_load_config__values_that_make_no_sense_together(tmp_path: Path, section: dict, line: str) -> None:
    assert re.search(f"1 problem\n  {line}", problems(tmp_path, yaml.safe_dump(section)))
    fits = {"pretrain": {"epochs": 10, "optimizer": {"warmup_epochs": 7, "constant_epochs": 3, "lr": 0.1, "min_lr": 0.1}}}
    assert accepted(tmp_path, yaml.safe_dump(fits)).pretrain.epochs == 10


def test_load_config__all_mistakes_at_once(tmp_path: Path) -> None:
    message = problems(
        tmp_path,
        "pretrain: {epochs: 0, optimiser: {}}\nmethods: {ucl: {support_size: 0, momentun: 1}, nope: {}}\n"
        "evaluate: {bootstrap: 1}\n",
    )
    first, *lines = message.splitlines()
    assert first == "params.yaml: 6 problems"
    keys = [
        "pretrain.epochs",
        "pretrain.optimiser",
        "methods.ucl.support_size",
        "methods.ucl.momentun",
        "methods.nope",
        "evaluate.bootstrap",
    ]
    assert sorted(line.split(":")[0].strip() for line in lines) == sorted(keys)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pretrain: {epochs: [1", "params.yaml line 1, column 22: not valid YAML (expected ',' or ']'"),
        ("pretrain:\n\tepochs: 3\n", "params.yaml line 2, column 1: not valid YAML (found character '\\t'"),
        ("when: 2021-13-45", "params.yaml: not valid YAML (month must be in 1..12)"),
        ("- pretrain", "params.yaml: expected sections such as data: and pretrain:, found list"),
        ("", "params.yaml: expected sections such as data: and pretrain:, found NoneType"),
        (b"\xff\xfe\x00", "params.yaml: not UTF-8 text (byte 0)"),
        (
            "data: !!python/object/apply:os.system ['true']",
            "params.yaml line 1, column 7: not valid YAML (could not determine a constructor",
        ),
    ],
    ids=["bracket", "tab", "date", "list", "empty", "bytes", "code"],
)
def test_load_config__not_a_mapping_or_not_yaml(tmp_path: Path, text: str | bytes, expected: str) -> None:
    assert problems(tmp_path, text).startswith(expected)


def test_load_config__missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"not found\. Run from the project folder, where params\.yaml lies"):
        load_config(tmp_path / "params.yaml")


def test_load_config__what_yaml_writes_as_text_is_still_a_number(tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-3 as text."""
    config = accepted(tmp_path, "pretrain: {optimizer: {lr: 1e-3}, compile: true}\nmethods: {moco: {}}\n")
    assert config.pretrain.optimizer.lr == 0.001
    assert config.pretrain.compile is True
    assert set(config.methods) == {"moco", "ucl"}, "the chosen method has its defaults when it is not listed"
    assert config.method_params.temperature == 0.07


def test_config__is_frozen(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        accepted(tmp_path, "data: {}").pretrain.epochs = 3


def test_load_config__needs_no_torch(tmp_path: Path) -> None:
    """Every stage and `dvc repro` with nothing to do pays for this import."""
    path = str(ROOT / "params.yaml")
    program = (
        f"import sys; from pipeline.config import load_config; load_config({path!r}); print('torch' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
        == "False"
    )


def test_fingerprint__sees_values_not_order(tmp_path: Path) -> None:
    config = accepted(tmp_path, "data: {}")
    other = accepted(tmp_path, "methods: {ucl: {temperature: 0.08}}")
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint(config.method_params) != fingerprint(other.method_params)
    assert fingerprint("ab", "c") != fingerprint("a", "bc")
    assert len(fingerprint(config)) == 16


def test_pretraining_name__says_from_what() -> None:
    assert pretraining_name("random", "random") == "random"
    assert pretraining_name("random", "imagenet") == "imagenet"
    assert pretraining_name("random", "weights/msn.pth") == pretraining_name("random", "weights file") == "weights file"
    assert pretraining_name("ucl", "random") == "ucl"
    assert pretraining_name("byol", "imagenet") == "byol from imagenet"
    assert pretraining_name("dino", "weights/msn.pth") == "dino from weights file"
