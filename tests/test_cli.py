"""The command line: one public function each, JSON on stdout, one-line errors, exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image

from wsiscale.cli import app, main
from wsiscale.testing import planted_slide, write_svs

SAMPLES = Path(__file__).parents[1] / "sample_slides"
SAMPLE = str(SAMPLES / "tissue_mpp0.25.svs")
VERBS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
QUICK = ["--places", "12", "--tile-size", "64"]

FIELDS = {
    *("slide", "mpp", "ci90", "magnification", "scale", "abstained", "criterion", "model", "layers", "places", "forwards"),
    *("seconds", "slide_mpp", "mpp_source", "curve", "votes", "versions", "seed"),
}


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command line: (exit code, stdout, stderr)."""

    def run(*argv: str) -> tuple[int, str, str]:
        code = main(argv)
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_info_tells_what_the_file_says_and_whether_to_believe_it(cli: Any) -> None:
    code, out, _ = cli("info", SAMPLE, "--json")

    record = json.loads(out)
    assert code == 0
    assert record["mpp"] == pytest.approx(0.25)
    assert record["calibration"]["verdict"] == "trusted"
    assert record["levels"][1]["downsample"] == 4
    assert "0.25" in cli("info", SAMPLE)[1]


def test_info_on_a_slide_that_lies_names_the_lie(cli: Any) -> None:
    code, out, _ = cli("info", str(SAMPLES / "wrong_mpp.svs"))

    assert code == 0
    assert "unknown" in out
    assert "refused" in out


def test_tissue_writes_a_mask_of_the_slides_shape(cli: Any, tmp_path: Path) -> None:
    code, out, _ = cli("tissue", SAMPLE, "-o", str(tmp_path / "mask.png"), "--json")

    record = json.loads(out)
    mask = np.asarray(Image.open(tmp_path / "mask.png"))
    info = json.loads(cli("info", SAMPLE, "--json")[1])
    assert code == 0
    assert mask.shape == (int(np.ceil(info["height"] / record["step"])), int(np.ceil(info["width"] / record["step"])))
    assert (mask > 0).mean() == pytest.approx(record["fraction"], abs=1e-4)


def test_estimate_gives_every_field_and_finds_what_the_embedded_network_was_trained_at(cli: Any) -> None:
    code, out, err = cli("estimate", SAMPLE, "--json", "--places", "24")

    record = json.loads(out)
    assert code == 0, (record["abstained"], err)
    assert set(record) >= FIELDS
    assert abs(np.log2(record["mpp"] / 0.5)) <= 0.35
    assert record["ci90"][0] <= record["mpp"] <= record["ci90"][1]
    assert record["magnification"] == pytest.approx(10 / record["mpp"])
    assert record["mpp_source"] == "metadata"
    assert len(record["curve"]["mpp"]) == len(record["curve"]["score"])


def test_a_slide_without_mpp_is_answered_in_relative_scale(cli: Any) -> None:
    code, out, _ = cli("estimate", str(SAMPLES / "no_mpp.svs"), "--json", *QUICK)

    record = json.loads(out)
    assert code in (0, 3)
    assert record["mpp"] is None
    assert record["magnification"] is None
    assert record["mpp_source"] == "none"
    assert "scale" in record["curve"]


def test_an_implausible_mpp_is_refused_and_the_way_out_works(cli: Any) -> None:
    slide = str(SAMPLES / "wrong_mpp.svs")

    code, out, err = cli("estimate", slide, *QUICK)
    assert (code, out) == (1, "")
    assert "implausible" in err
    assert err.count("\n") == 1
    record = json.loads(cli("estimate", slide, "--slide-mpp", "0.25", "--json", *QUICK)[1])
    assert record["mpp_source"] == "override"
    record = json.loads(cli("estimate", slide, "--scale-range", "1:8", "--json", *QUICK)[1])
    assert record["mpp"] is None


def test_a_csv_of_mpps_overrides_the_file(cli: Any, tmp_path: Path) -> None:
    (tmp_path / "mpp.csv").write_text("wsi,mpp\ntissue_mpp0.25.svs,0.31\n")

    record = json.loads(cli("info", SAMPLE, "--mpp-csv", str(tmp_path / "mpp.csv"), "--json")[1])

    assert record["mpp"] == 0.31
    assert record["calibration"]["source"] == "override"


def test_a_slide_without_tissue_abstains_by_name(cli: Any, tmp_path: Path) -> None:
    blank = tmp_path / "blank.svs"
    write_svs(blank, np.full((1024, 1300, 3), 244, np.uint8), mpp=0.25, power=40, levels=(1, 4))

    code, out, _ = cli("estimate", str(blank), "--json")
    assert code == 3
    assert json.loads(out)["abstained"]["reason"] == "no_tissue"
    code, _, err = cli("tile", str(blank), "--mpp", "0.5", "-o", str(tmp_path / "blank.ome.zarr"))
    assert code == 3
    assert "tissue" in err
    assert not (tmp_path / "blank.ome.zarr").exists()


def test_tile_writes_a_store_that_verify_accepts_until_a_byte_is_changed(cli: Any, tmp_path: Path) -> None:
    store = tmp_path / "tissue.ome.zarr"

    code, _, err = cli("tile", SAMPLE, "--mpp", "0.5", "-o", str(store))
    assert code == 0, err
    for word in ("tiles", "GB", "free"):
        assert word in err
    assert cli("verify", str(store))[0] == 0
    chunk = max((p for p in (store / "0").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    damaged = bytearray(chunk.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    chunk.write_bytes(bytes(damaged))
    code, out, _ = cli("verify", str(store))
    assert code == 1
    assert str(chunk.relative_to(store)) in out


def test_tile_auto_estimates_first_and_records_it(cli: Any, tmp_path: Path) -> None:
    store = tmp_path / "auto.ome.zarr"

    code, out, err = cli("tile", SAMPLE, "--mpp", "auto", "-o", str(store), "--places", "24", "--json")

    assert code == 0, err
    attributes = json.loads((store / "zarr.json").read_text())["attributes"]
    assert attributes["wsiscale"]["estimate"]["mpp"] == pytest.approx(attributes["wsiscale"]["requested_mpp"])
    assert json.loads(out)["tiles"] > 0


def test_tile_without_a_known_mpp_names_the_way_out(cli: Any, tmp_path: Path) -> None:
    code, _, err = cli("tile", str(SAMPLES / "no_mpp.svs"), "--mpp", "0.5", "-o", str(tmp_path / "x.ome.zarr"))

    assert code == 1
    assert "--slide-mpp" in err


def test_stack_writes_named_dimensions(cli: Any, tmp_path: Path) -> None:
    few = ["--places", "5", "--tile-size", "48"]

    code, out, _ = cli("stack", SAMPLE, "--mpp", "1,0.25,0.5", "-o", str(tmp_path / "s.zarr"), *few)

    assert code == 0, out
    metadata = json.loads((tmp_path / "s.zarr" / "images" / "zarr.json").read_text())
    assert metadata["dimension_names"] == ["place", "scale", "y", "x", "rgb"]
    assert metadata["shape"] == [5, 3, 48, 48, 3]


def test_an_own_network_and_an_own_criterion_are_named_by_file(cli: Any, tmp_path: Path) -> None:
    blobs = planted_slide(12, seed=0).read(level=0, y=0, x=0, height=1600, width=1600)
    write_svs(tmp_path / "blobs.svs", blobs, mpp=0.25, power=40)
    (tmp_path / "mine.py").write_text(
        "from wsiscale.testing import planted_network\n"
        "def net():\n    return planted_network(6)\n"
        "def sharp(response):\n    return response.outputs.margin.mean(axis=0)\n"
    )
    common = ["--scale-range", "1:8", "--places", "16", "--tile-size", "96", "--json"]

    command = ["estimate", str(tmp_path / "blobs.svs"), "--model", f"{tmp_path}/mine.py:net"]

    code, out, err = cli(*command, "--criterion", "confidence", *common)
    assert code == 0, (out, err)
    assert abs(np.log2(json.loads(out)["scale"] / 2)) <= 0.1
    out = cli(*command, "--criterion", f"{tmp_path}/mine.py:sharp", *common)[1]
    assert json.loads(out)["criterion"].endswith("mine.py:sharp")


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (["estimate"], 2, "Missing argument"),
        (["estimate", SAMPLE, "--nonsense"], 2, "No such option"),
        (["estimate", SAMPLE, "--mpp-range", "1-2"], 2, "LO:HI"),
        (["estimate", SAMPLE, "--mpp-range", "2:1"], 2, "low to high"),
        (["estimate", SAMPLE, "--criterion", "magic"], 2, "penkin2022"),
        (["estimate", "nowhere.svs"], 1, "nowhere.svs"),
        (["estimate", SAMPLE, "--model", "nowhere.py:net"], 2, "nowhere.py"),
        (["tile", SAMPLE, "-o", "x.ome.zarr"], 2, "--mpp"),
        (["tile", SAMPLE, "--mpp", "half", "-o", "x.ome.zarr"], 2, "auto"),
        (["tile", SAMPLE, "--mpp", "0.1", "-o", "x.ome.zarr"], 1, "--max-upsample"),
        (["tile", SAMPLE, "--mpp", "0.5", "-o", "nowhere/x.ome.zarr"], 1, "nowhere"),
        (["stack", SAMPLE, "--mpp", "0.5,a", "-o", "x.zarr"], 2, "commas"),
        (["tissue", SAMPLE, "-o", "nowhere/mask.png"], 2, "nowhere"),
        (["info", SAMPLE, "--reader", "magic"], 2, "magic"),
        (["verify", "nowhere.ome.zarr"], 1, "nowhere"),
    ],
)
def test_errors_are_one_line_that_helps(cli: Any, argv: list[str], code: int, says: str) -> None:
    got, out, err = cli(*argv)

    assert (got, out) == (code, "")
    assert says in err
    assert err.count("\n") == 1, err


def test_an_interrupt_is_one_line_and_exit_code_130(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("wsiscale.readers.open_slide", interrupted)

    assert cli("info", SAMPLE)[::2] == (130, "wsiscale: interrupted\n")


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("wsiscale.readers.open_slide", broken)

    with pytest.raises(ZeroDivisionError):
        main(["info", SAMPLE])


def test_cards_lists_what_comes_along(cli: Any) -> None:
    code, out, _ = cli("cards")
    names = [card["name"] for card in json.loads(cli("cards", "--json")[1])]

    assert code == 0
    assert "default" in names
    assert [line.split()[0] for line in out.splitlines()] == names


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_command_has_help_with_an_example(cli: Any, verb: str) -> None:
    code, out, _ = cli(verb, "--help")

    assert code == 0
    assert f"Example: wsiscale {verb} " in " ".join(out.split()) + " "


def test_the_version_is_the_packages(cli: Any) -> None:
    assert cli("--version") == (0, f"wsiscale {version('wsiscale')}\n", "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_completes_commands(shell: str) -> None:
    typed = {
        "COMP_WORDS": "wsiscale ",
        "COMP_CWORD": "1",
        "_TYPER_COMPLETE_ARGS": "wsiscale ",
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    environment = os.environ | typed | {"_WSISCALE_COMPLETE": f"complete_{shell}"}

    done = subprocess.run(
        [sys.executable, "-c", "from wsiscale.cli import run; run()"], env=environment, capture_output=True, text=True
    )

    assert all(verb in done.stdout for verb in VERBS), done
    assert done.stderr == ""


def test_a_profile_goes_into_a_card_that_estimate_takes(cli: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import numpy as np\n"
        "from wsiscale.testing import planted_network\n"
        "def net():\n    return planted_network(6)\n"
        "def everywhere(image):\n    return np.ones(image.shape[:2], bool)\n"
    )
    for number, mpp in enumerate((0.25, 0.2, 0.25, None)):  # blobs of 3 µm, best at 0.5 µm/px
        pixels = planted_slide(3 / (mpp or 0.25), seed=number, size=900).read(level=0, y=0, x=0, height=900, width=900)
        write_svs(tmp_path / f"{number}.svs", pixels, mpp=mpp, power=None, levels=(1, 4))
    slides = [str(tmp_path / f"{number}.svs") for number in range(4)]
    card, network = str(tmp_path / "card.json"), f"{tmp_path}/mine.py:net"
    looking = ["--places", "12", "--tissue", f"{tmp_path}/mine.py:everywhere", "--criterion", "confidence"]
    making = ["--tile-size", "96", "-o", card, "--keep", str(tmp_path / "kept"), *looking]

    code, out, err = cli("profile", *slides, "--model", network, *making, "--json")
    assert code == 0, err
    record = json.loads(out)
    assert record["slides"] == ["0.svs", "1.svs", "2.svs"]
    assert abs(np.log2(record["optimum"] / 0.5)) < 0.1
    assert err.count("\n") == 1
    assert "3.svs is left out: no µm/px" in err
    code, out, err = cli("profile", *slides[:1], slides[3], "--model", network, *making)
    assert code == 2
    assert "--overwrite" in err
    code, _, err = cli("profile", *slides[:1], slides[3], "--model", network, *making, "--overwrite")
    assert code == 2
    assert "two slides" in err
    # The card is whole after all that, and its network is the one; a slide without µm/px gets its from the profile.
    command = ["estimate", slides[3], "--model", card, "--trust-model", "--json", *looking]
    found = json.loads(cli(*command)[1])
    assert found["mpp_source"] == "estimated"
    assert abs(np.log2(found["slide_mpp"] / 0.25)) < 0.2
    assert abs(np.log2(found["mpp"] / 0.5)) < 0.2
    assert json.loads(cli(*command, "--profile", "none")[1])["registration"] is None
