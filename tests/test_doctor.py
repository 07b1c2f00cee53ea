"""What doctor finds, and what it says of what is broken."""

from __future__ import annotations

import json
from typing import Any

import imagecodecs
import numpy as np
import pytest

from wsiscale import doctor
from wsiscale.cli import main
from wsiscale.errors import SlideError


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Leaves doctor the parts of these names, and no extras."""

    def leave(*names: str) -> None:
        monkeypatch.setattr(doctor, "PARTS", [part for part in doctor.PARTS if part[0] in names])
        monkeypatch.setattr(doctor, "EXTRAS", ())

    return leave


def test_doctor_finds_this_installation_well(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", "--json"])

    findings = {finding["what"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert code == 0, findings
    assert findings["OpenSlide"]["detail"].startswith("4.")
    assert "LZW" in findings["codecs"]["detail"]
    assert findings["network"]["detail"].startswith("nuclei_default answered on ")
    assert set(findings) == {name for name, *_ in (*doctor.PARTS, *doctor.EXTRAS)}


def test_a_broken_part_is_exit_code_1_with_what_to_do(
    only: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ImportError("made without it")

    only("codecs", "disk")
    monkeypatch.setattr(imagecodecs, "lzw_decode", broken)

    assert main(["doctor"]) == 1
    codecs, disk = capsys.readouterr().out.splitlines()
    assert codecs.startswith("PROBLEM codecs: ")
    assert "what it was given: LZW; pip install -U imagecodecs" in codecs
    assert disk.startswith("ok      disk: ")


def test_a_codec_that_gives_other_pixels_is_a_problem(only: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    only("codecs")
    monkeypatch.setattr(imagecodecs, "webp_decode", lambda _: np.zeros((48, 48, 3), np.uint8))

    (finding,) = doctor.examine()

    assert not finding.ok
    assert "WebP" in finding.detail
    assert "zstd" not in finding.detail


def test_a_reader_that_cannot_open_a_slide_is_a_problem(only: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: object, **__: object) -> None:
        raise SlideError("cannot be opened", code="NOT_A_SLIDE")

    only("slide", "store")
    monkeypatch.setattr("wsiscale.readers.open_slide", closed)

    assert [(finding.ok, finding.detail) for finding in doctor.examine()] == [(False, "SlideError: cannot be opened")] * 2


@pytest.mark.parametrize(
    ("part", "name", "value", "says"),
    [
        ("memory", "LEAST_MEMORY", 1e15, "--batch-size 4"),
        ("disk", "LEAST_DISK", 1e18, "TMPDIR"),
    ],
)
def test_too_little_room_is_a_problem(
    part: str, name: str, value: float, says: str, only: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(part)
    monkeypatch.setattr(doctor, name, value)

    (finding,) = doctor.examine()

    assert not finding.ok
    assert says in finding.advice


def test_spinning_threads_are_a_problem(only: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    only("threads")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")

    (finding,) = doctor.examine()

    assert not finding.ok
    assert finding.advice.startswith("export OMP_WAIT_POLICY=PASSIVE")


def test_a_missing_extra_is_no_problem_and_says_what_it_would_give(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "PARTS", ())
    monkeypatch.setattr(doctor, "EXTRAS", (("nowhere_to_be_found", "wings", "pip install wings"), ("numpy", "numbers", "")))

    assert main(["doctor"]) == 0
    missing, there = capsys.readouterr().out.splitlines()
    assert missing == "-       nowhere_to_be_found: not installed; wings: pip install wings"
    assert there.startswith("ok      numpy: ")
