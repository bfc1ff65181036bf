"""``lit-merge audit``: experts looked at from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import refused
from test_audit import Planted, straight, suite

from lit_merge.auditing import AuditOptions
from lit_merge.cli import main
from lit_merge.commands import audit as command
from lit_merge.perturbations import Ascent
from lit_merge.suites import MiniSuite, NetworkSuite
from lit_merge.suites.backdoor import BackdoorSuite

QUICK = (
    "--images=24", "--inversion.steps=20", "--inversion.area=0.0625",
    "--ascent.steps=1", "--ascent.epsilon=0.05",
)  # fmt: skip


class Strangers(NetworkSuite):
    """Three experts, of which some may be poisoned."""

    def __init__(self, bad: list[str] | None = None) -> None:
        self.__dict__.update(vars(straight(suite(*(bad or ())))))


class AnyPlanted(Planted):
    """The planted backdoor, with arguments that a config may give."""

    def __init__(self, target: int = 1, size: int = 2) -> None:
        super().__init__(target=target, size=size)


def run(*args: str) -> dict[str, Any]:
    main(["audit", *QUICK, *args, "--output=found"])
    content: dict[str, Any] = json.loads(Path("found/audit.json").read_text())
    return content


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.mark.parametrize("bad", [[], ["b"]])
def test_it_points_or_says_that_there_is_nothing(bad: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    found = run("--suite=test_audit_command.Strangers", f"--suite.bad={json.dumps(bad)}")
    assert found["pointed"] == bad
    assert found["options"]["inversion"]["steps"] == 20
    assert set(found["experts"]) == {"a", "b", "c"}
    said = capsys.readouterr().out
    assert ("suspicious: b: one change of 6.2 % of the pixels" in said) == bool(bad)
    assert ("nothing suspicious" in said) == (not bad)
    assert "poisoned in this laboratory" not in said


def test_configs_of_runs_are_read_for_their_suite(capsys: pytest.CaptureFixture[str]) -> None:
    overlay = {
        "suite": {
            "class_path": "lit_merge.suites.backdoor.BackdoorSuite",
            "init_args": {
                "suite": {"class_path": "test_audit_command.Strangers"},
                "attacks": {"c": {"class_path": "test_audit_command.AnyPlanted"}},
                "schedule": {"class_path": "lit_merge.attacks.Schedule", "init_args": {"steps": 1}},
                "cache_dir": "cache",
            },
        },
        "trainer": {"callbacks+": [{"class_path": "no.such.Callback"}], "max_epochs": 3},
        "model": {"class_path": "no.such.Model"},
        "images": 20,
    }
    Path("lab.yaml").write_text(yaml.safe_dump(overlay))
    main(["audit", *QUICK[1:], "--config=lab.yaml", "--output=found"])
    found = json.loads(Path("found/audit.json").read_text())
    assert found["laboratory"]["compromised"] == found["pointed"] == ["c"]
    assert found["options"]["images"] == 20
    assert "poisoned in this laboratory: c; found 1, missed none, false alarms none" in capsys.readouterr().out


def test_the_bundled_laboratory_goes_by_bare_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Enough(Exception):
        pass

    def look(made: BackdoorSuite, options: AuditOptions, say: object) -> None:
        assert (made.compromised, options.ascent) == (("mnist",), Ascent(0.2, steps=10))
        raise Enough

    for made in (BackdoorSuite, MiniSuite):
        monkeypatch.setattr(made, "prepare", lambda self: None)
    monkeypatch.setattr(command, "audit", look)
    with pytest.raises(Enough):
        command.main(["--config=task-arithmetic.yaml", "--config=suites/backdoor.yaml", "--ascent.epsilon=0.2"])


@pytest.mark.parametrize(
    ("content", "args", "status", "message"),
    [
        ("imags: 3\n", ["--config=mine.yaml"], 2, "imags"),
        ("suite: [\n", ["--config=mine.yaml"], 2, "mine.yaml: not a YAML file"),
        ("", ["--config=adamergin.yaml"], 2, "did you mean adamerging"),
        ("", ["--imags=3"], 2, "imags"),
        ("", ["--images=0", "--suite=test_audit_command.Strangers"], 1, "images: expected at least 1, found 0"),
        ("", ["--output=mine.yaml", "--suite=test_audit_command.Strangers"], 1, "expected a folder that can be made"),
    ],
)
def test_what_is_refused(
    content: str, args: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine.yaml").write_text(content)
    assert message in refused(capsys, "audit", *args, status=status)
