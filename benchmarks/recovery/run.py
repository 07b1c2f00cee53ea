"""How well a scale is found where the right answer is known: one command, tables and figures.

    python benchmarks/recovery/run.py [--data DIR] [--families nuclei32,crc] [--quick]

Families whose data is absent are skipped, and named with the reason. What the networks answered is kept in --cache, so that
an interrupted run goes on where it was, and a new criterion costs no forward pass. Ends with docs/benchmark.md.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads on shared cores cost up to 90x

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # run as a script

from benchmarks.recovery import approaches, tables
from benchmarks.recovery.cases import CLEAR_INSIDE, CLEAR_LOSS, CLEAR_QUALITY, Case, Half, MissingDataError, Setting
from benchmarks.recovery.methods import Method, NotApplicableError, methods
from benchmarks.recovery.tables import Record
from wsiscale.criteria import DEFAULT_CRITERION
from wsiscale.errors import OptionError
from wsiscale.plugins import load_object

# Where each family is; a module that is not there is a family that is skipped.
FAMILIES = {
    "thesis": "benchmarks.recovery.thesis:cases",
    "nuclei32": "benchmarks.recovery.real:nuclei32",
    "embedded": "benchmarks.recovery.real:embedded",
    "tissue": "benchmarks.recovery.tissue:cases",
    "crc": "benchmarks.recovery.real:crc",
    "photos": "benchmarks.recovery.photos:photos",
}
# Tables of their own, from functions (setting, halves) -> markdown: no oracle, or no case of its own.
SECTIONS = {
    "profiles": ("With a profile", "benchmarks.recovery.profiles:section"),
    "published": ("The thesis's own experiment", "benchmarks.recovery.published:section"),
    "stress": ("Stressors", "benchmarks.recovery.stress:section"),
    "stability": ("Stability where there is no right answer", "benchmarks.recovery.photos:section"),
}
HALVES: tuple[Half, ...] = ("develop", "report")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parsed(argv)
    setting = Setting(cache=arguments.cache, data=arguments.data, quick=arguments.quick, cached=arguments.cached)
    halves = HALVES if arguments.half is None else (arguments.half,)
    records: list[Record] = []
    tried: list[Record] = []
    cases: list[Case] = []
    absent = {name: "left out of this run (--families)" for name in (*FAMILIES, *SECTIONS) if name not in arguments.families}
    not_asked: Counter[tuple[str, str, str]] = Counter()
    for name in [name for name in FAMILIES if name in arguments.families]:
        try:
            for case in load_object(FAMILIES[name])(setting):
                if case.half in halves:
                    started = time.perf_counter()
                    records += evaluated(case, methods(), not_asked)
                    if case.half == "develop":
                        rows = methods(approaches.APPROACHES)
                        tried += evaluated(case, {name: rows[name] for name in approaches.APPROACHES}, Counter())
                    cases.append(_without_response(case))
                    setting.log(f"  {case.name}: judged in {time.perf_counter() - started:.1f} s")
        except (MissingDataError, OptionError) as error:
            absent[name] = str(error)
            setting.log(f"{name} is skipped or cut short: {error}")
    sections: dict[str, str] = {}
    if tried:
        sections["What else was tried"] = _TRIED + approaches.table(tried)
    for name in [name for name in SECTIONS if name in arguments.families]:
        title, function = SECTIONS[name]
        try:
            sections[title] = load_object(function)(setting, halves)
        except (MissingDataError, OptionError) as error:
            absent[name] = str(error)
            setting.log(f"{name} is skipped: {error}")
    if not records and not sections:
        setting.log("nothing was measured")
        return 1
    out = arguments.docs or (arguments.cache / "quick" if arguments.quick else ROOT / "docs")
    write_report(out, records, cases, absent=absent, not_asked=not_asked, sections=sections, quick=arguments.quick)
    if records:
        tables.write_csv(arguments.cache / "answers.csv", [({}, record) for record in records])
    setting.log(f"written: {out / 'benchmark.md'}; every answer: {arguments.cache / 'answers.csv'}")
    return 0


def evaluated(case: Case, rows: Mapping[str, Method], not_asked: Counter[tuple[str, str, str]]) -> list[Record]:
    """Every method's answer to the case, judged; who could not be asked goes to `not_asked`, (family, method, reason)."""
    found = []
    for name, method in rows.items():
        try:
            found.append(tables.judged(case, name, method(case)))
        except NotApplicableError as error:
            not_asked[case.family, name, str(error)] += 1
    return found


# --- the report ----------------------------------------------------------------------------------------------------------

_HEAD = """# Benchmark: is the scale that it finds the right one?

Written by `python -m benchmarks.recovery`; do not edit. benchmarks/README.md says how it works and what it needs.

A *case* is one network on one slide over one range of scales. Labels give the network's quality at each scale, and so the
best scale and what any other loses against it. No method sees them. Scales are level-0 px per px, errors octaves (|log2|),
regret is quality lost (AUC, Dice, accuracy).

Networks and slides are in two halves, disjoint in both, fixed in benchmarks/recovery/split.json: methods may be developed
on one, and are judged on the other. A network on a slide of the other half is in neither.

| row | answers |
|---|---|
| range centre | the middle of the range, in octaves or in level-0 px per px |
| noise answers | where `confidence` peaks for white noise |
| do nothing | the slide as it was scanned (scale 1), or the end of the range nearest to it |
| training µm/px | the network's training scale: needs to be known, and a right tag |
| oracle | the peak of the labels' quality, by a parabola; its regret is what that and the ties of labels cost |
| a criterion | its own rule, which always answers |
| a criterion + abstains | as `wsiscale estimate` would answer, or "no estimate" |

Columns: cases; share of abstentions; mean regret of the answers given, and of the family where it is highest; mean regret
with "do nothing" where it abstains; error to the best scale by label: mean, median, 90th percentile, bias (+ is too
coarse), share within 1/4 octave; the same to the training scale; share of 90 % intervals that hold the one or the other;
tiles through the network. `benchmark.csv` has all of it by family, range and tag too.
"""

_BY_KIND = f"""
`{DEFAULT_CRITERION}`, with abstention, kind by kind: what `wsiscale estimate` answers where the network has no profile and no
training tiles, and what the answers are worth. A case is *clear* where labels show a scale to be found: a slide of several
tissues, quality {CLEAR_QUALITY} or more at the best scale and {CLEAR_LOSS} less elsewhere, the best scale
{CLEAR_INSIDE} octaves inside of the range, or at its fine end where the slide has no finer.
"""

_SAME_CASES = f"""
`{DEFAULT_CRITERION}` against the published methods by their own rules, and against answers that need no network, on the cases
that it answers:
"""

_BY_FAMILY = """
Mean regret family by family, doing nothing where a criterion abstains. A criterion without constants that were tuned on a
family is judged on it as on one left out. *chosen on the others*: on the development half, the criterion of the lowest mean
regret over all other families, among those that answer most cases of each; a dash where this family cannot be asked for it.
"""

_TRIED = """On the development half alone: mean regret of rules that always answer. *Sure* is confidence and hyperplane
distance, each in units of its mean and deviation over scale; *dispersity* is mutual information. The last row was chosen.

"""

_CAVEATS = """
## What to know before believing it
- Quality is measured on few labels, so its highest value is a little too high, and every regret, that of the best method
  too, with it: compare rows.
- Where quality is a plateau the best scale is chance. Then regret says more than error; the plateau in the table above is
  where the bootstrap bands of quality overlap the best one's. That is generous: the bands hold what pixels and images differ
  in at every scale alike.
- The interval is about the best scale by label as the criterion sees it; a criterion that is wrong everywhere alike has
  narrow intervals and covers nothing.
- The slides of nuclei32, but for TCGA-HE-7128 and -7129, are scanned at the network's training scale, so that "do nothing"
  and "training µm/px" are one answer there, and both nearly the best. A method earns its keep where scanner and network
  differ, as for embedded.
- Grids have 4 scales an octave here, `wsiscale estimate` uses 8. `bagamaev2022` smooths over 8 *steps*, so that it is
  coarser here than on its own grid.
- Of DenseNet121's 121 BatchNorm layers (family crc) every eighth one was watched.
- Family photos is five photographs with one object each. A probability counts as quality there: five labels make no accuracy.
- The patches of family crc are as small as one tile at the training scale: coarser tiles see them mirrored.
- The training scale of family tissue is planted, its best scale is not: a small tile gains from more context, and with a tag
  `nuclei` or `regions` come AUC, Dice and accuracy. On its single-class slides accuracy is that of one class.
"""


def write_report(
    out: Path,
    records: Sequence[Record],
    cases: Sequence[Case],
    *,
    absent: Mapping[str, str],
    not_asked: Counter[tuple[str, str, str]],
    sections: Mapping[str, str] | None = None,
    quick: bool = False,
) -> None:
    """benchmark.md, benchmark.csv and figures/benchmark_*.png in the folder `out`; `sections` are tables by their title."""
    (out / "figures").mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(case.family for case in cases))
    text = [_HEAD]
    if quick:
        text.append("**A quick run: a small part of each family.**\n")
    text += [f"**Not in here, or not to its end**: {name}: {reason}\n" for name, reason in absent.items()]
    text += ["## What the labels say\n", tables.oracle_table(cases)]
    rows = []
    for half in HALVES:
        of_half = [r for r in records if r.half == half]
        if not of_half:
            continue
        text.append(f"\n## {'Reported' if half == 'report' else 'Development'} half, all families\n")
        text.append(tables.table(tables.by_method(of_half)))
        text.append(f"\n![Mean regret of each method](figures/benchmark_{half}.png)")
        text += [_BY_KIND, tables.kind_table(of_half), _SAME_CASES, tables.same_cases_table(of_half)]
        if len(names) > 1:
            # Chosen where methods are developed, whichever half is shown.
            developed = [r for r in records if r.half == "develop"]
            chosen = tables.chosen_elsewhere(developed, tables.best_criterion) if developed else None
            text += [_BY_FAMILY, tables.family_table(of_half, chosen=chosen)]
        rows += [({"half": half, "family": "all", "range": "all", "tags": "all"}, s) for s in tables.by_method(of_half)]
        drawn = []
        for family in names:
            of_family = [r for r in of_half if r.family == family]
            if not of_family:
                continue
            summaries = tables.by_method(of_family)
            drawn.append((family, summaries))
            rows += [({"half": half, "family": family, "range": "all", "tags": "all"}, s) for s in summaries]
            text += [f"\n### {family}, {'reported' if half == 'report' else 'development'} half\n", tables.table(summaries)]
            for key in dict.fromkeys((r.range, r.tags) for r in of_family):
                part = [r for r in of_family if (r.range, r.tags) == key]
                own = {"half": half, "family": family, "range": key[0], "tags": key[1]}
                rows += [(own, s) for s in tables.by_method(part)]
        tables.regret_figure(out / "figures" / f"benchmark_{half}.png", drawn)
    for title, section in (sections or {}).items():
        text += [f"\n## {title}\n", section]
    text += ["\n## Why criteria abstained\n", tables.abstention_table(records)]
    if not_asked:
        text.append("\n## What could not be asked\n")
        counted = [(*key, str(count)) for key, count in not_asked.items()]
        text.append(tables.markdown(["family", "method", "because", "cases"], counted))
    text.append(_CAVEATS)
    (out / "benchmark.md").write_text("\n".join(text))
    if rows:
        tables.write_csv(out / "benchmark.csv", rows)


# --- the command line ----------------------------------------------------------------------------------------------------


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recovery", description=__doc__.split("\n\n")[0])
    known = os.environ.get("WSISCALE_DATA", ROOT.parent / "shared" / "data")
    kept = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "wsiscale-benchmark"
    parser.add_argument("--data", type=Path, default=Path(known), help="folder of third-party images and weights")
    parser.add_argument("--cache", type=Path, default=kept, help=f"folder for what networks answered (default {kept})")
    every = [*FAMILIES, *SECTIONS]
    parser.add_argument("--families", type=_families, default=every, help=", ".join(every))
    parser.add_argument("--half", choices=HALVES, help="one half only")
    parser.add_argument("--quick", action="store_true", help="a small part of each family, written to the cache, not to docs")
    parser.add_argument("--cached", action="store_true", help="ask no network: judge what the cache has")
    parser.add_argument("--docs", type=Path, help="folder for benchmark.md and its figures (default docs)")
    return parser.parse_args(argv)


def _families(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in (*FAMILIES, *SECTIONS)]:
        raise argparse.ArgumentTypeError(f"no family {', '.join(unknown)}; there are {', '.join([*FAMILIES, *SECTIONS])}")
    return names


def _without_response(case: Case) -> Case:
    """For the oracle's table; the response would be most of the memory."""
    response = case.response
    return replace(case, response=replace(response, layers={}, views={}, batchnorm={}, features=None))


if __name__ == "__main__":
    sys.exit(main())
