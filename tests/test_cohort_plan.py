"""Which slides a cohort is, and ids that cannot leave its folder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsiscale.cohort.plan import LONGEST, SlideSpec, read_cohort, safe_id, shard_of
from wsiscale.errors import OptionError


def touched(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_a_folder_is_its_slides_and_those_below(tmp_path: Path) -> None:
    touched(tmp_path, "b.SVS", "a/1.ndpi", "a/notes.txt", "x.mrxs", "x/Data0001.dat", "x/y.tif", "d/1.dcm", "d/2.dcm")
    touched(tmp_path, "done.ome.zarr/0/c.tif")

    specs = read_cohort(tmp_path)

    assert [spec.id for spec in specs] == ["a%2F1", "b", "d", "x"]
    assert specs[2].path == str(tmp_path / "d")  # a DICOM series is a folder
    assert all(spec.mpp is None for spec in specs)


def test_a_pattern_is_what_it_matches(tmp_path: Path) -> None:
    touched(tmp_path, "one/a.svs", "two/b.svs", "two/c.tif")

    assert [spec.id for spec in read_cohort(f"{tmp_path}/*/*.svs")] == ["one%2Fa", "two%2Fb"]
    with pytest.raises(OptionError, match="nothing is called"):
        read_cohort(f"{tmp_path}/*.ndpi")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("path\na.svs\n", [("a", None)]),
        ("path,id,mpp\nsub/a.svs,p 1,0.25\nb.svs,,\n", [("b", None), ("p 1", 0.25)]),
        ("wsi,mpp\na.svs,0.5\n", [("a", 0.5)]),
        ("sample_id,image_path,spacing_at_level_0,stain\ns1,a.svs,0.23,HE\n", [("s1", 0.23)]),
        ("\ufeffpath,mpp\r\na.svs,nan\r\n", [("a", None)]),
    ],
)
def test_tables_of_several_dialects(text: str, expected: list[tuple[str, float | None]], tmp_path: Path) -> None:
    table = tmp_path / "cohort.csv"
    table.write_text(text, encoding="utf-8")

    specs = read_cohort(table)

    assert [(spec.id, spec.mpp) for spec in specs] == expected
    assert all(Path(spec.path).is_relative_to(tmp_path) for spec in specs)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name\na.svs\n", "line 1: the columns are name; name them path, wsi or image_path"),
        ("path,mpp\na.svs,-1\n", "line 2, column mpp: '-1' is not a µm/px"),
        ("path,mpp\na.svs,half\n", "line 2"),
        ("path,id\n,x\n", "line 2, column path: empty"),
        ("path\n", "no lines"),
        ("path\nx/a.svs\ny/A.svs\n", "would both be written as"),
        ("path,id\na.svs,1\nb.svs,1\n", "would both be written as 1"),
    ],
)
def test_a_table_that_cannot_be_meant_names_its_line(text: str, said: str, tmp_path: Path) -> None:
    table = tmp_path / "cohort.csv"
    table.write_text(text, encoding="utf-8")

    with pytest.raises(OptionError, match=said) as caught:
        read_cohort(table)
    assert "\n" not in str(caught.value)


@settings(max_examples=2000)
@given(st.text(max_size=300))
def test_no_id_leaves_its_folder(name: str) -> None:
    try:
        safe = safe_id(name)
    except OptionError:
        return
    path = Path("/out/stores") / f"{safe}.ome.zarr"
    assert path.parent == Path("/out/stores")
    assert re.fullmatch("[A-Za-z0-9_.~ %-]+", safe)
    assert not safe.startswith(".")
    assert 0 < len(safe.encode()) <= LONGEST


@pytest.mark.parametrize("name", ["..", ".", "../x", "/etc/passwd", "a\0b", "a\nb", "C:\\x", "x. ", "", "x" * 300])
def test_hostile_names(name: str) -> None:
    try:
        safe = safe_id(name)
    except OptionError:
        assert name in ("", "x" * 300)
        return
    assert Path("stores", safe).resolve().parent == Path("stores").resolve()


def test_shards_are_disjoint_and_whole_and_do_not_depend_on_the_others() -> None:
    specs = [SlideSpec(f"slide {n}", f"{n}.svs") for n in range(200)]
    shards = [shard_of(specs, f"{i}/3") for i in range(3)]

    assert sorted(spec.id for shard in shards for spec in shard) == sorted(spec.id for spec in specs)
    assert min(map(len, shards)) > 40
    assert shard_of(specs[:50], "1/3") == [spec for spec in shards[1] if spec in specs[:50]]
    for wrong in ("3/3", "x", "1", "-1/2"):
        with pytest.raises(OptionError, match="not i/n"):
            shard_of(specs, wrong)
