"""Answers -> tables and figures: what each method loses, how far off it is, and whether it knows."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from benchmarks.recovery.cases import Case
from benchmarks.recovery.methods import ABSTAINS, Answer
from wsiscale.criteria import DEFAULT_CRITERION

NEAR = 0.25  # octaves: what counts as found

PUBLISHED = ("confidence", "penkin2022", "penkin2023", "bagamaev2022")
KNOWING = ("training µm/px", "do nothing", "range centre (log)")


@dataclass(frozen=True)
class Record:
    """One method's answer to one case, judged."""

    case: str
    family: str
    half: str
    network: str
    slide: str
    range: str
    upsampled: bool
    tags: str
    clear: bool  # whether labels show a scale to be found
    method: str
    scale: float | None  # level-0 px per px; None where it abstains
    abstained: str | None
    regret: float | None
    error: float | None  # octaves to the best scale by label, above 0 too coarse
    error_train: float | None  # octaves to the training scale; None where that is unknown
    covered: bool | None  # whether the 90 % interval holds the best scale by label; None without an interval
    covered_train: bool | None
    fallback_regret: float  # of the answer, or of doing nothing where it abstains
    forwards: int


@dataclass(frozen=True)
class Summary:
    """One method over many cases. Errors and regrets are of the answers given, abstentions left out."""

    method: str
    cases: int
    abstained: float | None  # share
    regret: float | None  # mean
    regret_worst_family: float | None  # mean of the worst family
    regret_fallback: float | None  # mean, doing nothing where it abstains
    error_mean: float | None  # |octaves| to the best scale by label
    error_median: float | None
    error_90: float | None
    bias: float | None  # octaves, above 0 too coarse
    near: float | None  # share within 1/4 octave
    train_mean: float | None  # |octaves| to the training scale
    train_median: float | None
    train_90: float | None
    train_near: float | None
    covered: float | None  # share of 90 % intervals that hold the best scale by label
    covered_train: float | None
    forwards: float | None  # mean a case


def judged(case: Case, method: str, answer: Answer) -> Record:
    """The answer against the labels of its case."""

    def octaves(to: float | None) -> float | None:
        return None if answer.scale is None or to is None else float(np.log2(answer.scale / to))

    def holds(scale: float | None) -> bool | None:
        return None if answer.ci90 is None or scale is None else bool(answer.ci90[0] <= scale <= answer.ci90[1])

    native = float(np.clip(1.0, case.response.scales[0], case.response.scales[-1]))
    return Record(
        case=case.name,
        family=case.family,
        half=case.half,
        network=case.network,
        slide=case.slide,
        range=case.range,
        upsampled=case.upsampled,
        tags=" ".join(sorted(case.tags)),
        clear=case.clear,
        method=method,
        scale=answer.scale,
        abstained=answer.abstained,
        regret=None if answer.scale is None else case.oracle.regret(answer.scale),
        error=octaves(case.oracle.best),
        error_train=octaves(case.train_scale),
        covered=holds(case.oracle.best),
        covered_train=holds(case.train_scale),
        fallback_regret=case.oracle.regret(native if answer.scale is None else answer.scale),
        forwards=answer.forwards,
    )


def summarised(records: Sequence[Record]) -> Summary:
    """One method's records."""
    answered = [r for r in records if r.scale is not None]
    families = sorted({r.family for r in answered})
    by_family = [_mean(r.regret for r in answered if r.family == family) for family in families]
    errors = _known(r.error for r in answered)
    to_train = _known(r.error_train for r in answered)
    return Summary(
        method=records[0].method,
        cases=len(records),
        abstained=1 - len(answered) / len(records),
        regret=_mean(r.regret for r in answered),
        regret_worst_family=max(_known(by_family), default=None),
        regret_fallback=_mean(r.fallback_regret for r in records),
        error_mean=_mean(map(abs, errors)),
        error_median=_quantile(errors, 50),
        error_90=_quantile(errors, 90),
        bias=_mean(errors),
        near=_mean(abs(e) <= NEAR for e in errors),
        train_mean=_mean(map(abs, to_train)),
        train_median=_quantile(to_train, 50),
        train_90=_quantile(to_train, 90),
        train_near=_mean(abs(e) <= NEAR for e in to_train),
        covered=_mean(r.covered for r in answered),
        covered_train=_mean(r.covered_train for r in answered),
        forwards=_mean(r.forwards for r in records),
    )


def by_method(records: Iterable[Record]) -> list[Summary]:
    """A summary of each method, in the order in which they came."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record.method, []).append(record)
    return [summarised(group) for group in found.values()]


# --- markdown ------------------------------------------------------------------------------------------------------------

_COLUMNS = (
    ("method", "method", "{}"),
    ("cases", "cases", "{}"),
    ("abstains", "abstained", "{:.0%}"),
    ("regret", "regret", "{:.3f}"),
    ("worst family", "regret_worst_family", "{:.3f}"),
    ("regret, else native", "regret_fallback", "{:.3f}"),
    ("error", "error_mean", "{:.2f}"),
    ("median", "error_median", "{:.2f}"),
    ("90 %", "error_90", "{:.2f}"),
    ("bias", "bias", "{:+.2f}"),
    ("≤ 1/4", "near", "{:.0%}"),
    ("to training", "train_mean", "{:.2f}"),
    ("median", "train_median", "{:.2f}"),
    ("90 %", "train_90", "{:.2f}"),
    ("≤ 1/4", "train_near", "{:.0%}"),
    ("covers best", "covered", "{:.0%}"),
    ("covers training", "covered_train", "{:.0%}"),
    ("forwards", "forwards", "{:.0f}"),
)


def table(summaries: Sequence[Summary]) -> str:
    """Markdown, a row a method; a dash where there is nothing to say."""
    return markdown(
        [title for title, _, _ in _COLUMNS], [[_shown(getattr(s, n), f) for _, n, f in _COLUMNS] for s in summaries]
    )


def markdown(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def oracle_table(cases: Sequence[Case]) -> str:
    """What the labels say: a row a family and range, means over its cases."""
    titles = ("family", "range", "cases", "quality", "at best", "best scale, median (all)", "plateau, median", "training scale")
    rows = []
    for key in dict.fromkeys((case.family, case.range) for case in cases):
        group = [case for case in cases if (case.family, case.range) == key]
        best = np.array([case.oracle.best for case in group])
        plateau = np.median([case.oracle.plateau for case in group], axis=0)
        scales = group[0].response.scales
        known = [case.train_scale for case in group if case.train_scale is not None]
        rows.append(
            (
                key[0],
                f"{key[1]}: {scales[0]:.2f}-{scales[-1]:.2f}",
                str(len(group)),
                group[0].oracle.measure,
                f"{np.mean([case.oracle.highest for case in group]):.3f}",
                f"{np.median(best):.2f} ({best.min():.2f}-{best.max():.2f})",
                f"{plateau[0]:.2f}-{plateau[1]:.2f}",
                "unknown" if not known else f"{min(known):g}" if min(known) == max(known) else f"{min(known):g}-{max(known):g}",
            )
        )
    return markdown(titles, rows)


Choose = Callable[[Sequence[Record]], str]


def chosen_elsewhere(records: Sequence[Record], choose: Choose) -> dict[str, str]:
    """For each family the method that `choose` takes when it is shown the records of all other families."""
    families = dict.fromkeys(r.family for r in records)
    return {family: choose([r for r in records if r.family != family]) for family in families if len(families) > 1}


def best_criterion(records: Sequence[Record]) -> str:
    """The criterion of the lowest mean regret, families weighing alike.

    Of those alone whose own rule answers most cases of every family: who says nothing is not chosen for doing nothing.
    """
    families = {r.family for r in records}
    asked = [s.removesuffix(ABSTAINS) for s in dict.fromkeys(r.method for r in records) if s.endswith(ABSTAINS)]
    regrets = {}
    for name in asked:
        answered = [(r.family, r.scale is not None) for r in records if r.method == name]
        shares = [[said for family, said in answered if family == f] for f in families]
        if all(of_family and np.mean(of_family) > 0.5 for of_family in shares):
            regrets[name] = float(np.mean([_family_regret(records, family, name) for family in families]))
    return min(regrets, key=lambda name: regrets[name]) if regrets else DEFAULT_CRITERION


def family_table(records: Sequence[Record], *, chosen: Mapping[str, str] | None = None) -> str:
    """A row a family, a column a method, mean regret: who has no constants is judged on each family as on one left out.

    `chosen` says of each family which criterion the others would have chosen for it (`chosen_elsewhere`).
    """
    columns = dict.fromkeys((DEFAULT_CRITERION, DEFAULT_CRITERION + ABSTAINS, *PUBLISHED, *KNOWING, "oracle"))
    titles = ["family", "cases", *columns, *([] if chosen is None else ["chosen on the others", "which is"])]
    rows = []
    for family in dict.fromkeys(r.family for r in records):
        shown = [_shown(_family_regret(records, family, name), "{:.3f}") for name in columns]
        if chosen is not None:
            which = chosen.get(family)
            shown += [_shown(None if which is None else _family_regret(records, family, which), "{:.3f}"), which or "-"]
        rows.append([family, str(len({r.case for r in records if r.family == family})), *shown])
    return markdown(titles, rows)


def kind_table(records: Sequence[Record]) -> str:
    """The default, with abstention, a row a kind of case: what it answers, and what its answers are worth."""
    mine = [r for r in records if r.method == DEFAULT_CRITERION + ABSTAINS]
    titles = (
        "kind",
        "cases",
        "abstains",
        "clear cases",
        "abstains",
        "regret",
        "error, mean",
        "median",
        "≤ 1/4",
        "to training",
        "≤ 1/4",
        "covers best",
    )
    rows = []
    kinds: list[tuple[str, str] | None] = [*dict.fromkeys((r.family, r.tags) for r in mine), *([None] if mine else [])]
    for kind in kinds:  # None: all of them
        of_kind = [r for r in mine if kind is None or (r.family, r.tags) == kind]
        s, clear = summarised(of_kind), [r.scale is None for r in of_kind if r.clear]
        shown: list[tuple[object, str]] = [(s.abstained, "{:.0%}"), (len(clear), "{}"), (_mean(clear), "{:.0%}")]
        shown += [(s.regret, "{:.3f}"), (s.error_mean, "{:.2f}"), (s.error_median, "{:.2f}")]
        shown += [(s.near, "{:.0%}"), (s.train_mean, "{:.2f}"), (s.train_near, "{:.0%}"), (s.covered, "{:.0%}")]
        rows.append(
            [" ".join(part for part in kind or ("all",) if part), str(s.cases), *(_shown(value, form) for value, form in shown)]
        )
    return markdown(titles, rows)


def same_cases_table(records: Sequence[Record]) -> str:
    """The default against each published method's own rule, on the cases that it answers and the method can be asked."""
    answered = {r.case: r for r in records if r.method == DEFAULT_CRITERION + ABSTAINS and r.scale is not None}
    rows = []
    for method in (*PUBLISHED, *KNOWING):
        theirs = [r for r in records if r.method == method and r.scale is not None and r.case in answered]
        if not theirs:
            continue
        ours = [answered[r.case] for r in theirs]
        cells = [_mean(r.regret for r in ours), _mean(r.regret for r in theirs)]
        errors = [_mean(abs(r.error) for r in part if r.error is not None) for part in (ours, theirs)]
        to_train = [_mean(abs(r.error_train) for r in part if r.error_train is not None) for part in (ours, theirs)]
        numbers = [*(_shown(c, "{:.3f}") for c in cells), *(_shown(e, "{:.2f}") for e in (*errors, *to_train))]
        rows.append([method, str(len(theirs)), *numbers])
    titles = ["method", "cases", "regret, ours", "theirs", "error, ours", "theirs", "to training, ours", "theirs"]
    return markdown(titles, rows)


def _family_regret(records: Sequence[Record], family: str, method: str) -> float | None:
    return _mean(r.fallback_regret for r in records if (r.family, r.method) == (family, method))


def abstention_table(records: Sequence[Record]) -> str:
    """Why criteria abstained: a row a criterion, a column a reason, counts."""
    asked = [r for r in records if r.method.endswith(ABSTAINS)]
    reasons = sorted({r.abstained for r in asked if r.abstained is not None})
    rows = []
    for method in dict.fromkeys(r.method for r in asked):
        group = [r for r in asked if r.method == method]
        counts = [sum(r.abstained == reason for r in group) for reason in reasons]
        rows.append([method.removesuffix(ABSTAINS), str(len(group)), str(len(group) - sum(counts)), *map(str, counts)])
    return markdown(["criterion", "cases", "answers", *reasons], rows)


def _shown(value: object, form: str) -> str:
    return "-" if value is None else form.format(value)


# --- files ---------------------------------------------------------------------------------------------------------------


def write_csv(path: Path, rows: Sequence[tuple[dict[str, str], Record | Summary]]) -> None:
    """Each row's own columns, then the fields of the value."""
    names = [*rows[0][0], *(f.name for f in fields(rows[0][1]))]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        for own, value in rows:
            writer.writerow({**own, **{k: f"{v:.6g}" if isinstance(v, float) else v for k, v in asdict(value).items()}})


def regret_figure(path: Path, summaries: Sequence[tuple[str, Sequence[Summary]]]) -> None:
    """Mean regret of each method's own rule, a dot a family, a bar for the mean over families; the default's first."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    regrets = {family: {s.method: s.regret for s in group} for family, group in summaries}
    shown = [name for name in dict.fromkeys(s.method for _, group in summaries for s in group) if not name.endswith(ABSTAINS)]
    means = {name: _mean(of_family.get(name) for of_family in regrets.values()) for name in shown}
    # What cannot be asked of most families would be compared on others than the rest.
    asked = {name: len(_known(of_family.get(name) for of_family in regrets.values())) for name in shown}
    ordered = [(m, name) for name in shown if (m := means[name]) is not None and asked[name] > len(regrets) / 2]
    names = [name for _, name in sorted(ordered)]
    figure, axes = plt.subplots(figsize=(8, 0.9 + 0.26 * len(names)), layout="constrained")
    ours = [name == DEFAULT_CRITERION for name in names]
    colours = ["0.45" if default else "0.85" for default in ours]
    axes.barh(range(len(names)), [means[name] or 0.0 for name in names], height=0.7, color=colours, label="mean over families")
    for family, of_family in regrets.items():
        there = [(y, r) for y, name in enumerate(names) if (r := of_family.get(name)) is not None]
        axes.plot([r for _, r in there], [y for y, _ in there], "o", markersize=5, alpha=0.8, label=family)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel("mean regret of rules that always answer")
    axes.legend(frameon=False, loc="lower right")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


# --- small things --------------------------------------------------------------------------------------------------------


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _mean(values: Iterable[float | None]) -> float | None:
    known = _known(values)
    return float(np.mean(known)) if known else None


def _quantile(errors: list[float], percent: float) -> float | None:
    return float(np.percentile(np.abs(errors), percent)) if errors else None
