"""The doctor: what it reports for healthy, broken and missing things, and that it names nobody."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
from pathlib import Path

import pytest

from pipeline import doctor, machine
from pipeline.doctor import project_checks, run_doctor, without_names
from pipeline.machine import Check, locked_versions
from pipeline.tracking_journal import Journal

ROOT = Path(__file__).resolve().parents[1]


def _git(folder: Path, *words: str) -> None:
    subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A committed project of one stage, with the real params.yaml and its own home folder."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = tmp_path / "project"
    (root / ".dvc").mkdir(parents=True)
    (root / ".dvc" / "config").write_text("[core]\n    analytics = false\n", encoding="utf-8")
    (root / "params.yaml").write_text((ROOT / "params.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    (root / "dvc.yaml").write_text("stages:\n  one:\n    cmd: echo\n    outs: [out]\n", encoding="utf-8")
    _git(root, "init", "-q")
    _git(root, "config", "user.name", "someone")
    _git(root, "config", "user.email", "someone@example.org")
    _git(root, "add", ".")
    _git(root, "commit", "-qm", "start")
    monkeypatch.chdir(root)
    monkeypatch.setenv("DVC_ROOT", str(root))
    return root


def _by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_project_checks__healthy(project: Path) -> None:
    checks = project_checks(project)
    assert {check.status for check in checks} == {"ok"}, checks
    found = _by_name(checks)
    assert "1 stages" in found["dvc"].found and "made by the first run" in found["mlflow store"].found
    assert not (project / "mlflow.db").exists() and not (project / ".scratch").exists()


def test_project_checks__each_trouble_is_named_with_what_to_do(project: Path) -> None:
    text = (project / "params.yaml").read_text(encoding="utf-8").replace("source: data/phantom", "source: clips", 1)
    (project / "params.yaml").write_text(text, encoding="utf-8")
    (project / "mlflow.db").write_bytes(b"no database at all" * 100)
    (project / ".gitignore").write_text("dvc.lock\n", encoding="utf-8")
    (project / ".tracking").mkdir()
    (project / ".tracking" / "a.jsonl").write_text("{}\n", encoding="utf-8")
    os.utime(project / ".tracking" / "a.jsonl", (0, 0))
    found = _by_name(project_checks(project))
    assert {name: found[name].status for name in ("data.source", "mlflow store", "dvc", "mlflow delivery")} == {
        "data.source": "problem",
        "mlflow store": "problem",
        "dvc": "problem",
        "mlflow delivery": "warning",
    }
    assert all(check.todo for check in found.values() if check.status != "ok")


def test_journals__of_running_stages_are_no_trouble(project: Path) -> None:
    young, running, left = (Journal.open(project, name) for name in ("young", "running", "left"))
    young.close(), left.close()
    for journal in (running, left):
        os.utime(journal.path, (0, 0))
    checks = [check for check in project_checks(project) if check.name == "mlflow delivery"]
    running.close()
    assert [check.status for check in checks] == ["ok", "warning"]
    assert checks[0].found.startswith("2 journal(s)") and checks[1].found.startswith("1 run(s)") and checks[1].todo == "sonoscope sync"


def test_project_checks__relative_source_does_not_reach_the_queue(project: Path) -> None:
    text = (project / "params.yaml").read_text(encoding="utf-8").replace("source: data/phantom", "source: clips", 1)
    (project / "params.yaml").write_text(text, encoding="utf-8")
    (project / "clips").mkdir()
    assert _by_name(project_checks(project))["data.source"].found == "clips: empty"
    (project / "clips" / "a.mp4").write_bytes(b"x")
    check = _by_name(project_checks(project))["data.source"]
    assert check.status == "warning" and "absolute" in check.todo
    (project / "clips.dvc").write_text("outs: []\n", encoding="utf-8")
    assert _by_name(project_checks(project))["data.source"].status == "ok"


def test_project_checks__store_is_opened_but_not_written(project: Path) -> None:
    with sqlite3.connect(project / "mlflow.db") as store:
        store.execute("create table runs (run_uuid text)")
        store.execute("insert into runs values ('a')")
    before = (project / "mlflow.db").read_bytes()
    check = _by_name(project_checks(project))["mlflow store"]
    assert check.status == "ok" and "1 runs" in check.found
    assert (project / "mlflow.db").read_bytes() == before and not list(project.glob("mlflow.db-*"))


def test_project_checks__server_that_does_not_answer_is_a_warning(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://someone:secret@127.0.0.1:9")
    check = _by_name(project_checks(project))["mlflow store"]
    assert check.status == "warning" and "secret" not in check.found + check.todo


def test_project_checks__bad_parameters_do_not_end_the_report(project: Path) -> None:
    (project / "params.yaml").write_text("data: {sorce: x}\nextract: {short_side: 1}\n", encoding="utf-8")
    found = _by_name(project_checks(project))
    assert found["params.yaml"].status == "problem" and "extract.short_side" in found["params.yaml"].found
    assert "git" in found and "dvc" in found


def test_project_checks__no_repository_and_no_identity(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(project.parent / "nothing"))
    _git(project, "config", "--unset", "user.email")
    assert _by_name(project_checks(project))["git identity"].status == "warning"
    (project / ".git").rename(project.parent / "elsewhere")
    assert _by_name(project_checks(project))["git"].status == "problem"


def test_run_doctor__a_check_that_fails_is_a_line(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def torn(root: Path) -> list[Check]:
        raise OSError("disk gone")

    assert run_doctor(probes=(torn, project_checks)) == 1
    text = capsys.readouterr().out
    assert "disk gone" in text and "params.yaml" in text and "1 problem(s)" in text


def test_report__names_nobody(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("getpass.getuser", lambda: "marlene")
    monkeypatch.setattr("socket.gethostname", lambda: "echo-lab7.example.org")
    home = project.parent / "home"

    def gossip(root: Path) -> list[Check]:
        return [
            Check(
                "a",
                "warning",
                f"{home}/clips of marlene on echo-lab7: /data/marlene/x",
                "ask marlene@echo-lab7.example.org",
            )
        ]

    assert run_doctor(probes=(gossip, project_checks)) == 0
    text = capsys.readouterr().out
    assert run_doctor(as_json=True, probes=(gossip,)) == 0
    text += capsys.readouterr().out
    assert "marlene" not in text and "echo-lab7" not in text and str(home) not in text and "~/clips" in text


def test_without_names__account_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr("getpass.getuser", nobody)
    assert without_names("plain text") == "plain text"


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("warning", 0), ("problem", 1)])
def test_run_doctor__exit_code_and_json(
    status: str, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    probe = (lambda root: [Check("thing", status, "found words", "do this")],)
    assert run_doctor(probes=probe) == code
    table = capsys.readouterr().out
    assert all(word in table for word in ("thing", status, "found words", "do this", "what to do"))
    assert run_doctor(as_json=True, probes=probe) == code
    report = json.loads(capsys.readouterr().out)
    assert report["checks"] == [{"name": "thing", "status": status, "found": "found words", "todo": "do this"}]
    assert report["schema"] == 1 and report["problems"] == code


def test_opencv__codecs_are_written_and_read_back(tmp_path: Path) -> None:
    checks = _by_name(machine._opencv(tmp_path))
    assert checks["opencv"].status == "ok" and checks["codecs"].status == "ok", checks


def test_opencv__missing_libgl_names_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = "ImportError: libGL.so.1: cannot open shared object file: No such file or directory"
    monkeypatch.setattr(machine, "_OPENCV_PROBE", f"raise {message.split(':')[0]}({message.split(': ', 1)[1]!r})")
    (check,) = machine._opencv(tmp_path)
    assert (
        check.status == "problem"
        and "apt-get install libgl1 libglib2.0-0" in check.todo
        and "make install" in check.todo
    )


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import os; os.abort()", "signal 6"),
        ("raise ImportError('torn')", "torn"),
        ("pass", "exit code 0"),
    ],
)
def test_probe__a_broken_library_cannot_end_the_report(code: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_TORCH_PROBE", code)
    (check,) = machine._torch()
    assert check.status == "problem" and words in check.found and check.todo


def test_timeout__is_a_warning_in_its_own_words(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCH", "OPENCV"):
        monkeypatch.setattr(machine, f"_{name}_PROBE", "import time; time.sleep(30)")
        monkeypatch.setattr(machine, f"{name}_SECONDS", 0.5)
    checks = [*machine._torch(), *machine._opencv(project)]
    real = subprocess.run

    def slow(words: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        if "dvc" in words:
            raise subprocess.TimeoutExpired(words, 60)
        return real(words, **options)

    monkeypatch.setattr(doctor.subprocess, "run", slow)
    checks.append(_by_name(project_checks(project))["dvc"])
    assert [check.name for check in checks] == ["torch", "opencv", "dvc"] and {check.status for check in checks} == {"warning"}
    assert [check.found for check in checks] == [f"no answer within {seconds} s; the machine may be busy" for seconds in ("0.5", "0.5", "60")]
    assert all("again" in check.todo for check in checks)


def test_torch__gpu_hidden_by_driver_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {
        "torch": "2.15.0",
        "torchvision": "0.29.2",
        "cuda_build": "13.2",
        "devices": [],
        "mps": False,
        "gloo": True,
        "nccl": True,
    }
    monkeypatch.setattr(machine, "_TORCH_PROBE", f"print({json.dumps(facts)!r})")
    monkeypatch.setattr(machine, "_nvidia_present", lambda: True)
    checks = _by_name(machine._torch())
    assert checks["gpu"].status == "warning" and "CUDA 13.2" in checks["gpu"].found and "driver" in checks["gpu"].todo


def test_packages__missing_and_other_versions(tmp_path: Path) -> None:
    lines = [
        "no-such-package==1.0 \\",
        "    --hash=sha256:00",
        "pyyaml==0.1 \\",
        "pydantic==1 ; python_full_version < '3'",
    ]
    (tmp_path / "requirements.lock").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert locked_versions(tmp_path / "requirements.lock") == {"no-such-package": "1.0", "pyyaml": "0.1"}
    missing, different = machine._packages(tmp_path)
    assert (missing.status, different.status) == ("problem", "warning")
    assert "no-such-package" in missing.found and "lock: 0.1" in different.found


def test_resources__names_and_no_folder_made(tmp_path: Path) -> None:
    names = set(_by_name(machine._resources(tmp_path)))
    assert {"cpu", "memory", "disk"} <= names and "scratch disk" not in names
    assert list(tmp_path.iterdir()) == []


def test_table__fits_the_width() -> None:
    table = doctor._table([Check("name", "problem", "word " * 60, "act " * 60)], 100)
    assert max(len(line) for line in table.splitlines()) <= 100
