"""The section of the results' page about weights from donors of other sizes, from its record alone."""

from statistics import mean, stdev
from typing import Any

from hf_wsl.tables import markdown_table, plus_minus


RECORD = "donors_small.json"
ARMS = ["tuned scratch", "weight selection", "resize", "fit"]
METHODS = ("select", "resize", "fit")
PUBLIC_ABOUT = (
    "Public networks for CIFAR-10 by akamaster (16 wide) give weights to sizes that nobody published; nothing is "
    "trained. Accuracy in percent on 10,000 test images, on one thread; fitted on unlabeled training images. Without "
    "images, growth leaves the donor's function as it is."
)
SMALL_ABOUT = (
    "Small architectures, three donors of each trained on 8,000 images of CIFAR-10 for six epochs; the targets have "
    "two thirds of their width (MobileNets: the next published width) and mostly fewer blocks. Fitted on 512 and then "
    "trained on 3,000 other images for five epochs; scratch with the best of three learning rates. Untrained: "
    "validation accuracy; the last columns: test accuracy, mean and deviation over donors. One seed of the training."
)


def donors_section(report: dict[str, Any]) -> str:
    """Markdown of the record: cost first, then what is there before and after a little training."""
    parts = ["## Starting weights from donors of other sizes", PUBLIC_ABOUT]
    rows = [
        [
            row["target"],
            row["donor"],
            str(row["images"] or "none"),
            f"{row.get('fit', row['resize'])['cpu_seconds']:.1f}",
            *(
                f"{100 * row[method]['accuracy']:.1f}" if method in row else ""
                for method in ("select", "resize", "fit")
            ),
            f"{100 * row['donor accuracy']:.1f}",
        ]
        for row in report.get("public", ())
    ]
    header = ["target", "donor", "images", "CPU seconds", "weight selection", "resize", "fit", "the donor itself"]
    parts.append(markdown_table(header, rows, text_columns=2))
    parts.append(SMALL_ABOUT)
    rows = []
    for name, found in report["small"].items():
        seconds = found["arms"]["fit"]["cpu_seconds"]
        cells = [name, f"{mean(seconds):.1f}", f"{100 * mean(found['donors']):.1f}"]
        cells += [f"{100 * found['arms'][arm]['curve'][0]:.1f}" for arm in ARMS[1:]]
        for arm in ARMS:
            tests = found["arms"][arm]["test"]
            deviation = 100 * stdev(tests) if len(tests) > 1 else None
            cells.append(plus_minus(100 * mean(tests), deviation, digits=1))
        rows.append(cells)
    header = [
        "architecture",
        "CPU seconds",
        "donors",
        *(f"{arm}, untrained" for arm in ("selection", "resize", "fit")),
    ]
    parts.append(markdown_table([*header, *(f"{arm}, 5 epochs" for arm in ARMS)], rows))
    return "\n\n".join(parts) + "\n"
