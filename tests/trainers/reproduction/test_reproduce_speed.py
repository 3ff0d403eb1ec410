"""The table of speeds: made of what the scripts under benchmarks/ write, and the same in the README."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import transformers
from accelerate.state import AcceleratorState
from command_line import hf_wsl
from window_fixtures import write_dataset

from hf_wsl.options import ConfigError
from modeling_wsl import WSLConfig
from trainers.reproduction.speed import HEADER, TFLOP_PER_CROP, speed_table


ROOT = Path(__file__).parents[3]
sys.path.append(str(ROOT / "benchmarks"))
cost = importlib.import_module("representation")
SCRIPTS = (
    "training_step",
    "data_loading",
    "generation_speed",
    "embedding",
    "tokenization_speed",
    "stream_memory",
)
TRAINED = {
    "size": "hf-small",
    "layers_a_side": 8,
    "batch": 64,
    "window": 512,
    "short_windows": 0.0,
    "share_of_matmul_limit": 0.584,
    "own_matmuls_share_of_step": 0.9,
    "plain_over_step": None,
    "tokens_per_s": 102_400.0,
    "crops_per_s": 200.0,
    "peak_gpu_memory_gb": 61.25,
    "paper_runs": [{"epochs": 100, "paper_hours_h100": 54, "projected_hours": 20.3}],
}
TRAINING = {
    "device": "NVIDIA H200",
    "clock": "wall time",
    "threads": 16,
    "torch": "2.14.1",
    "optimizer": "adamw",
    "compiled": True,
    "activation_checkpointing": False,
    "results": [TRAINED],
}
LOADING = {
    "torch": "2.14.1",
    "cpus": 2,
    "load_average": 0.04,
    "window_size": 512,
    "stored": [
        {"workers": 0, "loader_crops_per_s": 12_000, "raw_memmap_crops_per_s": 14_000, "ratio": 0.857},
        {"workers": 1, "loader_crops_per_s": 13_000, "raw_memmap_crops_per_s": 14_000, "ratio": 0.929},
    ],
    "pyarrow_windows_per_s": 100,
    "stream_from_folder": [{"workers": 1, "crops_per_s": 600}],
    "stream_from_hub": [{"workers": 1, "crops_per_s": 500}],
}


@pytest.fixture(autouse=True)
def what_scripts_set_for_a_whole_process_ends_with_the_test():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    transformers.logging.enable_progress_bar()


def write(folder, **reports):
    for name, report in reports.items():
        (folder / f"{name}.json").write_text(json.dumps(report))
    return folder


def cells_of(table):
    """Claim -> its other cells, as text; a file's heading has only empty ones."""
    lines = [line[2:-2].split(" | ") for line in table.splitlines() if line.startswith("| ")][2:]
    return {claim: cells for claim, *cells in lines}


def run_script(monkeypatch, name, *arguments):
    """The script's own `main`, in this process."""
    script = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    script.main()


def run(*arguments):
    return hf_wsl("reproduce", *arguments)


def test_without_results_the_table_has_no_rows_and_every_script_is_named(tmp_path):
    done = run("speed", "--output_dir", tmp_path / "nowhere")
    assert done.exit_code == 0, done.output
    assert not cells_of(done.stdout)
    assert done.stdout.startswith(f"| {' | '.join(HEADER)} |")
    for script in SCRIPTS:
        assert f"`python benchmarks/{script}.py --output {tmp_path / 'nowhere'}/{script}.json`" in done.stdout
        assert (ROOT / "benchmarks" / f"{script}.py").is_file()


def test_a_training_step_stands_beside_the_matmul_rate_and_the_papers_hours(tmp_path):
    cells = cells_of(speed_table(write(tmp_path, training_step=TRAINING)))
    assert "*training_step.json: NVIDIA H200, 16 threads, torch 2.14.1*" in cells
    assert cells["training step, hf-small (8 + 8 layers, 64 x 512 tokens, compiled)"][:2] == [
        "102,400 tokens/s, 61.2 GB of GPU memory",
        "0.58 of the bf16 matmul rate; its matmuls alone take 0.90 of its time",
    ]
    assert cells["the paper's run of hf-small, 100 epochs, at this speed"] == [
        "20 hours",
        "",
        "the paper: 54 hours on an H100",
    ]


def test_the_plain_step_and_its_clock_are_named(tmp_path):
    row = {**TRAINED, "plain_over_step": 6.25, "short_windows": 0.25, "paper_runs": []}
    report = {**TRAINING, "device": "cpu (AVX512)", "threads": 1, "clock": "processor time", "optimizer": "muon"}
    cells = cells_of(speed_table(write(tmp_path, training_step={**report, "compiled": False, "results": [row]})))
    assert "*training_step.json: cpu (AVX512), 1 thread, torch 2.14.1, by processor time*" in cells
    claim = "training step, hf-small (8 + 8 layers, 64 x 512 tokens, 25% of the windows half empty, muon)"
    assert cells[claim][2] == "6.2 times as fast as plain float32"


def test_crops_stand_beside_a_memmap_and_what_an_h200_would_take(tmp_path):
    table = speed_table(write(tmp_path, data_loading=LOADING))
    cells = cells_of(table)
    assert "*data_loading.json: cpu, 2 cores, torch 2.14.1, load average 0.0 before*" in cells
    stored = cells["crops of 512 tokens from the disk, 0 / 1 workers"]
    assert stored[:2] == ["12,000 / 13,000 crops/s", "0.86 / 0.93 of a raw memmap"]
    assert cells["crops of 512 tokens streamed from a folder, 1 worker"] == [
        "600 crops/s",
        "3.2 times what an H200 takes",
        "6.0 times as fast as pyarrow alone on one thread",
    ]
    assert cells["crops of 512 tokens streamed from a Hub on loopback, 1 worker"][1] == "2.7 times what an H200 takes"
    assert "An H200 would take 185 crops a second" in table


def test_what_an_h200_was_measured_to_take_goes_before_what_it_would_take(tmp_path):
    on_cpu = {**TRAINING, "device": "cpu (AVX512)", "results": [{**TRAINED, "crops_per_s": 0.4}]}
    table = speed_table(write(tmp_path, data_loading=LOADING, training_step=on_cpu, training_step_h200=TRAINING))
    assert "An H200 takes 200 crops a second in training hf-small (training_step_h200.json)." in table
    assert "3.0 times what an H200 takes" in table
    assert "would take" not in table
    first, second = (table.index(name) for name in ("*training_step.json: cpu", "*training_step_h200.json: NVIDIA"))
    assert first < second


def test_a_part_that_was_not_measured_has_no_row(tmp_path):
    stored = {key: value for key, value in LOADING.items() if "stream" not in key}
    table = speed_table(write(tmp_path, data_loading=stored))
    assert "raw memmap" in table
    assert "H200" not in table


def test_the_operations_of_a_crop_are_those_of_hf_small():
    config = WSLConfig.from_size("hf-small")
    operations = cost.PASSES * cost.VIEWS * cost.forward_operations(config, config.window_size)
    assert pytest.approx(TFLOP_PER_CROP, abs=0.006) == operations / 1e12


def test_what_the_training_script_writes_is_read(tmp_path, monkeypatch):
    small = ("--sizes", "nano", "--batch-size", 1, "--rounds", 1)
    run_script(monkeypatch, "training_step", *small, "--output", tmp_path / "training_step.json")
    report = json.loads((tmp_path / "training_step.json").read_text())
    cells = cells_of(speed_table(tmp_path))
    figure, ratio, plain = cells["training step, nano (2 + 2 layers, 1 x 256 tokens)"]
    assert figure == f"{report['results'][0]['tokens_per_s']:,.0f} tokens/s"
    assert ratio.startswith(f"{report['results'][0]['share_of_matmul_limit']:.2f} of the bf16 matmul rate")
    assert plain == f"{report['results'][0]['plain_over_step']:.1f} times as fast as plain float32"


def test_what_the_generation_script_writes_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.import_module("generation_speed"), "PRODUCTS", ((256, 256, 256),))
    small = ("--models", "test_convnext", "--heads", 4, "--repeats", 1)
    run_script(monkeypatch, "generation_speed", *small, "--output", tmp_path / "generation_speed.json")
    (row,) = json.loads((tmp_path / "generation_speed.json").read_text())["results"]
    cells = cells_of(speed_table(tmp_path))
    about = "test_convnext (0.3 M weights, 4 + 4 layers 256 wide, 4 heads)"
    figure, ratio, plain = cells[f"generating {about}"]
    assert figure.startswith(f"{row['seconds']['generation']['wall']:.2f} s; each further draw ")
    assert ratio.startswith(f"{row['ratio_to_limit']['generation']['wall']:.2f} times the matmul-limited time")
    assert plain == f"{row['times_faster_than_plain']['wall']:.1f} times as fast as float32, a window a pass"
    assert cells[f"embedding {about}"][0] == f"{row['seconds']['embedding']['wall']:.2f} s"


def test_what_the_loading_script_writes_is_read(tmp_path, monkeypatch):
    dataset = write_dataset(tmp_path / "tokens", {"train": [40] * 70, "validation": [40] * 2})
    script = importlib.import_module("data_loading")
    for name in ("ROUNDS", "BATCHES_A_ROUND", "STREAM_ROUNDS", "STREAM_BATCHES"):
        monkeypatch.setattr(script, name, 1)
    small = (dataset, "--workers", 0, "--parts", "stored", "folder")
    run_script(monkeypatch, "data_loading", *small, "--output", tmp_path / "data_loading.json")
    report = json.loads((tmp_path / "data_loading.json").read_text())
    cells = cells_of(speed_table(tmp_path))
    stored = cells["crops of 512 tokens from the disk, 0 workers"]
    assert stored[1] == f"{report['stored'][0]['ratio']:.2f} of a raw memmap"
    streamed = cells["crops of 512 tokens streamed from a folder, 0 workers"]
    assert streamed[0] == f"{report['stream_from_folder'][0]['crops_per_s']:,} crops/s"


def test_tokens_stand_beside_memcpy_and_a_loop(tmp_path):
    shares = (0.5, 0.6, 0.8, 0.4, 0.9, 0.04)
    names = ("tokens, mask, positions, finite check", "tokens, mask, positions", "tokens alone")
    names += ("streamed from safetensors", "decoded", "plain loop over tokens (tokens alone)")
    row = {"model": "resnet50", "tokenization": "dense", "tokens": 111_173, "padding": 0.0005, "memcpy_gb_per_s": 2.5}
    row["share_of_memcpy"] = dict(zip(names, shares, strict=True))
    cells = cells_of(speed_table(write(tmp_path, tokenization_speed={"threads": 2, "results": [row]})))
    assert "*tokenization_speed.json: cpu, 2 threads*" in cells
    assert cells["tokenizing resnet50, dense (111,173 tokens, 0.05% padding)"] == [
        "1.2 GB/s",
        "0.50 of memcpy; without NaN check 0.60; tokens alone 0.80; streamed 0.40",
        "20 times as fast as a loop over tokens (tokens alone)",
    ]
    assert cells["detokenizing resnet50, dense"][:2] == ["2.2 GB/s", "0.90 of memcpy"]


def test_embedding_stands_beside_reading_and_memory_beside_the_file(tmp_path):
    row = {"model": "resnet50", "parameters": 25_557_032, "seconds": 5.04, "tokens_per_second": 22_276}
    row |= {"times_reading_alone": 123.7, "anonymous_mb_above": 40.8, "peak_rss_mb": 1102.4}
    rows = [{**row, "method": "backbone"}, {**row, "method": "pca"}]
    small = {"models": 2000, "seconds_together": 3.89, "seconds_one_call_each": 12.38, "ratio": 3.18}
    embedding = {"backbone": "nano", "mixed_precision": "no", "models": rows, "small_models": small}
    memory = {"parameters": 1_310_935_040, "file_gb": 2.62, "anonymous_mb_above": 18.7}
    cells = cells_of(speed_table(write(tmp_path, embedding=embedding, stream_memory=memory)))
    assert cells["embedding resnet50 (25.6 M weights) by a backbone (nano, float32)"][:2] == [
        "5.0 s, 22,276 tokens/s; 41 MB above a small model's, 1,102 MB in all",
        "124 times reading the file alone",
    ]
    assert "embedding resnet50 (25.6 M weights) by pca" in cells
    assert cells["embedding 2,000 tiny networks"] == ["3.9 s", "", "3.2 times as fast as a call each"]
    figure, ratio, _ = cells["streaming a model of 1.31 billion parameters (2.6 GB)"]
    assert (figure, ratio) == ("19 MB of memory above the interpreter's own", "0.007 of the file")


@pytest.mark.parametrize("content", ["{", "[]", json.dumps({"results": [{"size": "nano"}]})])
def test_a_file_that_its_script_would_not_write_now_is_refused_by_name(content, tmp_path):
    path = tmp_path / "training_step.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=re.escape(str(path)) + r".*benchmarks/training_step\.py"):
        speed_table(tmp_path)


def test_speed_alone_runs_nothing_and_goes_with_a_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, data_loading=LOADING)
    alone = run("speed", "--output_dir", tmp_path, "--scale", "none of them")
    assert alone.stdout == speed_table(tmp_path) + "\n"
    assert [path.name for path in tmp_path.iterdir()] == ["data_loading.json"]
    both = run("speed", "--output_dir", tmp_path, "--page", tmp_path / "RESULTS.md")
    assert both.exit_code == 0, both.output
    assert both.stdout == alone.stdout + f"{tmp_path / 'RESULTS.md'}\n"
    assert (tmp_path / "RESULTS.md").is_file()


def test_the_plan_of_a_table_follows_the_speeds(tmp_path):
    done = run("speed", "figure6", "--dry-run", "--output_dir", tmp_path, "--work-dir", tmp_path / "work")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(speed_table(tmp_path))
    assert "Figure 6: Weight distributions" in done.stdout
    assert "Table 7" not in done.stdout


def test_the_committed_results_have_the_rows_that_the_readme_shows():
    table = speed_table(ROOT / "results", shown_as="results")
    assert table in (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8"), (
        "run: python benchmarks/fill_docs.py"
    )
    cells = cells_of(table)
    assert any(claim.startswith("tokenizing resnet50, dense") for claim in cells)
    assert any(claim.startswith("streaming a model of 1.31 billion parameters") for claim in cells)
    for script in SCRIPTS:
        assert f"*{script}.json: " in table or f"No {script}.json in results" in table
