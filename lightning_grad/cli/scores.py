"""``lightning-grad scores``: show, compare and average files of sample scores."""

import argparse
from collections.abc import Sequence
from typing import Any

from lightning_grad.data.comparison import compare_scores
from lightning_grad.data.score_files import SampleScores, average_scores, load_scores, save_scores


def _title(scores: SampleScores) -> str:
    known = {"epoch": scores.epoch, "seed": scores.seed}
    details = [f"{key} {value:g}" for key, value in known.items() if value is not None]
    return f"{scores.name} ({', '.join(details)})" if details else scores.name


def _table(rows: Sequence[tuple[str, str]]) -> None:
    width = max(len(key) for key, _ in rows)
    for key, value in rows:
        print(f"{key:<{width}}  {value}")


def _compare(arguments: argparse.Namespace) -> None:
    a, b = load_scores(arguments.a), load_scores(arguments.b)
    differences = a.fingerprint.differences(b.fingerprint) if a.fingerprint and b.fingerprint else []
    if differences and not arguments.force:
        raise ValueError(
            f"the scores belong to two data sets, which differ in {' and '.join(differences)}; --force compares anyway"
        )
    found = compare_scores(a, b, arguments.at)
    rows = [("a", _title(a)), ("b", _title(b)), ("samples", str(found.n)), ("Spearman", f"{found.spearman:.3f}")]
    rows += [
        (f"overlap of the hardest {share:.4g}", f"{overlap:.3f}  (chance: {share:.3f})")
        for share, overlap in found.overlap.items()
    ]
    _table(rows)


def _average(arguments: argparse.Namespace) -> None:
    mean = average_scores(arguments.files)
    print(f"The mean of {len(arguments.files)} files is in {save_scores(mean, arguments.output)}.")


def _show(arguments: argparse.Namespace) -> None:
    scores = load_scores(arguments.file)
    values = scores.values[scores.values.isfinite()]
    rows = [("score", _title(scores)), ("samples", str(len(scores.values)))]
    for label, count in (("unscored", scores.values.isnan().sum()), ("infinite", scores.values.isinf().sum())):
        rows += [(label, str(int(count)))] if count else []
    if len(values):
        quantiles = values.sort().values[[round(q * (len(values) - 1)) for q in (0, 0.1, 0.5, 0.9, 1)]]
        rows += [("min, 10 %, median, 90 %, max", "  ".join(f"{value:.4g}" for value in quantiles.tolist()))]
    rows += [("classes", str(len(set(scores.labels.tolist()))))] if scores.labels is not None else []
    if scores.fingerprint:
        hashed = scores.fingerprint.items or "items are augmented and not compared"
        rows += [("data set", f"{scores.fingerprint.class_name}, {scores.fingerprint.length} items, {hashed}")]
    _table(rows)


def _share(text: str) -> float:
    value = float(text)
    if not 0.0 < value <= 1.0:
        raise argparse.ArgumentTypeError(f"a share must be above 0 and at most 1; got {text}")
    return value


def add_command(commands: Any) -> None:
    """Add the command to a parser."""
    what = "files of sample scores (.npz files of save_scores, or .csv tables)"
    parser = commands.add_parser("scores", help=f"show, compare and average {what}", description=f"Inspect {what}.")
    actions = parser.add_subparsers(required=True, metavar="ACTION")

    compare = actions.add_parser("compare", help="show how well two scores agree")
    compare.add_argument("a", help="score file")
    compare.add_argument("b", help="score file of the same data set")
    at = "shares of hardest samples to compare (default: 0.1 0.2 0.5)"
    compare.add_argument("--at", type=_share, nargs="+", default=[0.1, 0.2, 0.5], metavar="SHARE", help=at)
    compare.add_argument("--force", action="store_true", help="compare even if the data sets seem to differ")
    compare.set_defaults(run=_compare)

    average = actions.add_parser("average", help="average one score over several runs")
    average.add_argument("files", nargs="+", metavar="FILE", help="score file")
    average.add_argument("--output", required=True, metavar="FILE", help="file to write, .npz")
    average.set_defaults(run=_average)

    show = actions.add_parser("show", help="show the contents of a score file")
    show.add_argument("file", metavar="FILE", help="score file")
    show.set_defaults(run=_show)
