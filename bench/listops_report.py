"""The table and the plot of `python -m bench listops`."""

from __future__ import annotations

from pathlib import Path

from .listops_model import KINDS
from .report import COLOURS, Row, drawing, markdown

COLOUR_OF = {"none": "#999999", "absolute": COLOURS[5], "sine": COLOURS[0], "conv": COLOURS[3]}


def accuracy_text(found: Row) -> str:
    return f"{100 * found['accuracy']:.1f} % ({100 * found['low']:.1f} to {100 * found['high']:.1f})"


def data_text(data: Row) -> str:
    rows = []
    for name in ("train", "validation", "test"):
        found = data[name]
        tokens, shares = found["tokens"], found["share_of_each_value"]
        lengths = f"{tokens['fewest']} to {tokens['most']}, mean {tokens['mean']:.0f}"
        rows.append([name, str(found["expressions"]), lengths, *(f"{100 * share:.1f}" for share in shares)])
    table = markdown(["split", "expressions", "tokens", *(f"% = {value}" for value in range(10))], rows)
    example = data["example"]
    return f"{table}\nThe shortest to be tested: {example['text']} = {example['value']}"


def gather(parts: list[Row]) -> Row:
    """Per kind: accuracy of each seed and of all tests together (their intervals treat seeds as one sample)."""
    from .listops import score

    found: Row = {}
    for kind in KINDS:
        runs = sorted((part for part in parts if part["kind"] == kind), key=lambda part: part["seed"])
        if runs:
            right, total = (sum(run["test"][what] for run in runs) for what in ("right", "total"))
            found[kind] = {
                "parameters": runs[0]["parameters"],
                "seeds": [run["seed"] for run in runs],
                "training_seconds": sum(run["training"]["seconds"] for run in runs) / len(runs),
                "test": [run["test"] for run in runs],
                "all_seeds": score(right, total),
            }
    return found


def text(parts: list[Row], data: Row) -> str:
    rows = []
    for kind, found in gather(parts).items():
        each = ", ".join(f"{100 * test['accuracy']:.1f}" for test in found["test"])
        seconds = f"{found['training_seconds']:.0f} s"
        rows.append([KINDS[kind], f"{found['parameters']:,}", seconds, each, accuracy_text(found["all_seeds"])])
    majority = data["majority"]
    rows.append([f"always {majority['value']}", "0", "", "", accuracy_text(majority)])
    return "\n".join(
        [
            "Accuracy on the test expressions; in brackets the binomial 95 % interval, which knows nothing of what"
            " another seed would give.",
            markdown(["positions", "parameters", "training", "each seed, %", "accuracy"], rows),
        ]
    )


def plot(parts: list[Row], data: Row, machine: Row, path: Path) -> None:
    """The course of training, and accuracy on the test expressions beside the most frequent value's."""
    pyplot = drawing()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10.4, 4.4), layout="constrained")
    for part in parts:
        course, colour = part["training"], COLOUR_OF[part["kind"]]
        steps = [(i + 1) * course["steps_a_mean"] for i in range(len(course["accuracy"]))]
        label = KINDS[part["kind"]] if part["seed"] == 0 else None
        left.plot(steps, [100 * share for share in course["accuracy"]], color=colour, linewidth=1.2, label=label)
    left.set(xlabel="step", ylabel="accuracy in training, %")
    ordered = sorted(parts, key=lambda part: (list(KINDS).index(part["kind"]), part["seed"]))
    for place, part in enumerate(ordered):
        test = part["test"]
        share = 100 * test["accuracy"]
        span = [[share - 100 * test["low"]], [100 * test["high"] - share]]
        right.errorbar(place, share, span, fmt="o", capsize=3, color=COLOUR_OF[part["kind"]])
    right.set_xticks(range(len(ordered)), [f"{KINDS[p['kind']]}\nseed {p['seed']}" for p in ordered], fontsize="small")
    right.set(ylabel="accuracy on the test expressions, %")
    for ax in (left, right):
        ax.axhline(100 * data["majority"]["accuracy"], color="grey", linewidth=0.8, linestyle=":")
        ax.grid(alpha=0.3)
    left.legend(fontsize="small")
    tokens = data["test"]["tokens"]
    figure.suptitle(
        f"ListOps with brackets, {tokens['fewest']} to {tokens['most']} tokens; dotted: the most frequent value;"
        f" {machine['device_name']}, torch {machine['torch']}",
        fontsize="small",
    )
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
