"""Writes the measured figures into README.md and docs/benchmarks.md from the committed JSON under results/.

python benchmarks/fill_docs.py          # rewrite their sections
python benchmarks/fill_docs.py --check  # exit with 1 if one of them differs from what the JSON says
"""

import argparse
import json
import os
import sys
from pathlib import Path

from trainers.reproduction.speed import speed_table


ROOT = Path(__file__).resolve().parent.parent
# File -> the lines around its section.
MEASURED = ("<!-- measured: written by benchmarks/fill_docs.py from results/*.json -->", "<!-- /measured -->")
FIGURES = ("<!-- figures: written by benchmarks/fill_docs.py from results/*.json -->", "<!-- /figures -->")
BUDGET = 128  # numbers for a token, at which codes are compared in detail


def read(name: str) -> dict:
    return json.loads((ROOT / "results" / name).read_text())


def speed_rows() -> list[str]:
    table = speed_table(ROOT / "results", shown_as="results")
    return ["Speed and memory; `hf-wsl reproduce speed` prints this table:", "", table]


def representation_rows() -> list[str]:
    facts = read("tiny_public_models.json")
    backbone = f"`{facts['size']}` backbone ({facts['parameters'] / 1e6:.1f} M parameters)"
    training = f"{facts['train_models']} public models ({facts['train_tokens']:,} tokens)"
    validation = f"{facts['validation_models']} models of {facts['validation_owners']} owners that it has not seen"
    budget = f"{facts['latent_size']} of {facts['token_size']} numbers a token"
    lines = ["random_projection", "pca", "r2_first", "r2_best", "r2_last"]
    return [
        f"{backbone} trained on {training} for {facts['minutes']:.0f} minutes on {facts['device']};",
        f"R2 per standardized token on {validation} ({facts['validation_tokens']:,} tokens), all at {budget}",
        "(the two lines get each token's mean and deviation for nothing; the backbone pays two numbers for them):",
        "",
        "| random projection | PCA of the training models | backbone at step 0 | backbone, best | backbone, last |",
        "|---|---|---|---|---|",
        "| " + " | ".join(f"{facts[line]:.3f}" for line in lines) + " |",
    ]


def number(value: float | None) -> str:
    """Three decimals; none where it is large, as where a backbone gives back nothing like the weights."""
    return "" if value is None else f"{value:.3f}" if abs(value) < 10 else f"{value:,.0f}"


def code_rows() -> list[str]:
    report = read("representation.json")
    held, budgets = report["held_out"], [str(budget) for budget in report["budgets"]]
    rows, parts = [], []
    groups = {"r2_by_kind": held["by_kind"], "r2_by_size": held["by_size"]}
    for name, found in report["codes"].items():
        cells = [number(found[budget]["r2"]) if budget in found else "" for budget in budgets]
        at = found.get(str(BUDGET))
        if at is not None:
            errors, ends = at["relative_error"], at["interval"]
            cells += [f"[{', '.join(number(end) for end in ends)}]", number(at["numbers_per_weight"])]
            cells += [f"{at['share_of_indices']:.1%}", number(at["r2_bfloat16"]), number(at["r2_noise"])]
            cells += [number(errors[kind]) for kind in ("median", "mean", "weighted", "all_together")]
            cells.append(f"{at['seconds']['encode'] / held['weights'] * 1e6:.2f}")
            parts.append([name, *(number(at[key].get(group)) for key, named in groups.items() for group in named)])
        rows.append("| " + " | ".join([name, *cells]) + " |")
    of_parts = [f"{group}, {counts['layers']}" for named in groups.values() for group, counts in named.items()]
    at_budget = ["95 %", "numbers a weight", "of them indices", "bfloat16", "noise"]
    at_budget += ["error: median", "mean", "by weights", "all", "seconds"]
    unseen = f"{held['models']} models ({held['weights'] / 1e6:.1f} M weights) of {held['owners']} owners"
    return [
        f"Codes of {unseen} that none has seen: R2 per standardized token, by the numbers for",
        f"{report['token_size']} weights, everything that is stored counted. At {BUDGET}: its interval (owners "
        "resampled); R2 after all",
        f"numbers but indices are rounded to bfloat16, or moved by noise of {report['noise']:g} of a deviation; "
        "|x - y|² / |x|²",
        "of the layers, and of all weights as if they were one; seconds to encode a million weights:",
        "",
        "| code | " + " | ".join([*budgets, *at_budget]) + " |",
        "|" + "---|" * (1 + len(budgets) + len(at_budget)),
        *rows,
        "",
        "![R2 by budget](results/representation.png)",
        "",
        f"R2 at {BUDGET} by the kind and the size of the layer (and how many):",
        "",
        "| code | " + " | ".join(of_parts) + " |",
        "|" + "---|" * (1 + len(of_parts)),
        *("| " + " | ".join(part) + " |" for part in parts),
        "",
        *training_rows(report),
    ]


def training_rows(report: dict) -> list[str]:
    """What was fitted, and at which cost; a backbone for every budget, PCA once for all."""
    rows = []
    for name, costs in report["training"].items():
        for budget, cost in {"": costs}.items() if "operations" in costs else costs.items():
            at = report["codes"][name][budget or str(BUDGET)]
            size = f"{cost['parameters'] / 1e6:.1f} M" if "parameters" in cost else ""
            cells = [name, budget or "all", size, f"{cost['operations']:.1e}", f"{cost['seconds']:,.1f}"]
            rows.append("| " + " | ".join([*cells, cost.get("device", "cpu"), number(at["r2"])]) + " |")
    return [
        "What was trained: floating-point operations of its matmuls and attention, and seconds:",
        "",
        "| code | numbers | parameters | operations | seconds | on | R2 |",
        "|---|---|---|---|---|---|---|",
        *rows,
        "",
        "![R2 by the cost of training](results/representation_cost.png)",
    ]


def collect_rows() -> list[str]:
    report = read("collect_hub.json")
    mixed, real = report["mixed"]["runs"][0], report["real_sizes"]
    outcomes = ", ".join(f"{number} {outcome.replace('_', ' ')}" for outcome, number in mixed["outcomes"].items())
    held = max(run["peak_weights_on_disk"] for run in real["runs"])
    rows = [
        f"| {run['workers']} | {run.get('held_in', 'disk')} | {run['models_per_second']:.2f} | "
        f"{run['mb_per_second']:.0f} | {run['share_of_plain_download']:.2f} |"
        for run in real["summary"]
    ]
    return [
        f"Collecting {sum(mixed['outcomes'].values())} mixed models from a Hub on loopback took {mixed['requests']} "
        f"requests and {mixed['seconds']:.1f} s: {outcomes}.",
        f"{real['models']} models of real size ({real['weight_bytes'] / 1e6:.0f} MB), listed, examined, fetched,",
        f"checked, tokenized and written, with at most {held / 1e6:.0f} MB of weight files on the disk at once,",
        f"beside the client's plain download of the same files ({real['plain_download_mb_per_second']:.0f} MB/s):",
        "",
        "| workers | weight files in | models/s | MB/s | share of plain download |",
        "|---|---|---|---|---|",
        *rows,
    ]


SEARCHED = {"repository": "same repository", "family": "same family", "task": "same task"}


def search_rows() -> list[str]:
    report = read("search_public_models.json")
    first = next(iter(report["embeddings"].values()))["neighbors"]
    rows = []
    for name, found in report["embeddings"].items():
        near = found["neighbors"]
        cells = [
            f"{near[fact]['rate']:.2f} [{near[fact]['interval'][0]:.2f}, {near[fact]['interval'][1]:.2f}]"
            for fact in SEARCHED
        ]
        cells += [f"{near['family elsewhere']['rate']:.2f}", f"{found['cpu_seconds']:.0f}"]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    chance = " | ".join(f"{first[fact]['chance']:.2f}" for fact in (*SEARCHED, "family elsewhere"))
    kinds = report["copies"]["kinds"]
    told = ", ".join(f"{kind} {found['fingerprints']:.2f}" for kind, found in kinds.items())
    return [
        f"Search among {report['models']} public models by cosine distance: how often the nearest neighbor is of the",
        "same repository, family and task [95 %, repositories resampled], and how often the nearest of another",
        "repository is of the same family:",
        "",
        "| embedding | " + " | ".join([*SEARCHED.values(), "family elsewhere", "CPU seconds"]) + " |",
        "|" + "---|" * (3 + len(SEARCHED)),
        *rows,
        f"| chance | {chance} | |",
        "",
        f"Copies that the fingerprints find, planted of {report['copies']['models']} of these models (noise relative",
        f"to each tensor's deviation): {told}.",
        f"{report['strangers']['rate']:.1%} of the models are taken for copies of a model of another owner (the rule",
        "was chosen on half of these owners).",
    ]


def section() -> str:
    parts = [
        representation_rows(),
        code_rows(),
        speed_rows(),
        search_rows(),
        collect_rows(),
    ]
    return "\n\n".join("\n".join(part) for part in parts).replace("](results/", "](../results/")


def figures() -> str:
    """The README's table: what wins, beside what it beats."""
    donors, search = read("donors_small.json")["public"], read("search_public_models.json")
    near = {name: found["neighbors"] for name, found in search["embeddings"].items()}
    rows = [
        (
            f"CIFAR-10 accuracy of a {row['target']}, untrained, from a public {row['donor']} and {row['images']} "
            "unlabeled images",
            f"**{100 * row['fit']['accuracy']:.1f}** in {row['fit']['cpu_seconds']:.0f} CPU seconds",
            f"weight selection {100 * row['select']['accuracy']:.1f}",
        )
        for row in donors
        if "fit" in row
    ]
    grown = donors[-1]
    rows.append(
        (
            f"outputs of a {grown['target']}, grown from a {grown['donor']}",
            f"equal to {grown['resize']['output_error']:.0e}",
            "",
        )
    )
    for fact in ("repository", "family"):
        rows.append(
            (
                f"the nearest of {search['models']} public models is of the same {fact}",
                f"**{near['profile'][fact]['rate']:.2f}**",
                f"pooled statistics {near['pooled-statistics'][fact]['rate']:.2f}, "
                f"chance {near['profile'][fact]['chance']:.2f}",
            )
        )
    kinds = search["copies"]["kinds"]
    found = ", ".join(f"{kind} {kinds[kind]['fingerprints']:.2f}" for kind in ("noise 1", "permuted"))
    rows.append(("copies found, with noise as large as the weights, and with permuted neurons", f"**{found}**", ""))
    return "\n".join(["| what | hf-wsl | beside it |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    differ = False
    for path, (begin, end), text in (
        (ROOT / "docs" / "benchmarks.md", MEASURED, section()),
        (ROOT / "README.md", FIGURES, figures()),
    ):
        old = path.read_text()
        before, _, rest = old.partition(begin)
        _, _, after = rest.partition(end)
        filled = "\n".join([before + begin, text, end]) + after
        differ |= filled != old
        if not check:
            temporary = path.with_suffix(".tmp")
            temporary.write_text(filled)
            os.replace(temporary, path)
    sys.exit(check and differ)


if __name__ == "__main__":
    main()
