"""docs/benchmarks.md has a place for each table, its parts say what was measured, and a script that fails loses no other."""

import sys

import measured
import pytest

from benchmarks import __main__ as runner
from benchmarks import (
    adversarial,
    batch_size,
    clipping,
    communication,
    data_pruning,
    diagnostics,
    fine_tuning,
    memory,
    optimizers,
    quantization,
    rows,
    several_machines,
    sharpness,
    small_layers,
    topk_selection,
)
from benchmarks.rows import RESULTS, SCRIPTS, Results, Row, marker_of
from lightning_grad.callbacks import GradCAMLogger, HessianSpectrum, NMSparsity, ZClip

CLIPPING, PRUNING = tuple(clipping.SHAPES), (data_pruning.CONVNET, data_pruning.RESNET, data_pruning.TRANSFORMER)
TITLES = {
    "sparsity": ("masks", "transformer", "convnet", "many layers"),
    "clipping": (*CLIPPING, *(f"{name}, hooks" for name in CLIPPING), *clipping.MODELS),
    "optimizers": (optimizers.STATE, optimizers.STEPS_OF, optimizers.OF_MATRICES, optimizers.MATRIX_STEPS),
    "quantization": (quantization.STEPS_OF, quantization.CHECKPOINTS),
    "sharpness": (sharpness.STEPS_OF, sharpness.WITHOUT, sharpness.MEMORY),
    "batch_size": (batch_size.STEPS_OF, batch_size.ACCUMULATED),
    "fine_tuning": (
        *(fine_tuning.STEPS_OF, fine_tuning.UNLEARNING),
        *(fine_tuning.STATE, fine_tuning.SAVED, fine_tuning.NEEDED),
    ),
    "diagnostics": (*diagnostics.MODELS, diagnostics.LOOKS),
    "data_pruning": (
        *(f"Norms, {name}" for name in PRUNING),
        *(f"Memory, {name}" for name in PRUNING[:2]),
        *(f"One sample at a time, {name}" for name in data_pruning.single_modules(data_pruning.SIZES["cpu"])),
        *(f"Steps traced, {name}" for name in data_pruning.traced_networks()),
        *("A scoring pass", "Epochs", "Steps read", "Steps read, loss by hand"),
    ),
    "adversarial": (
        *(
            f"A step of {name}"
            for name in (adversarial.SMALL, adversarial.CONVNET, adversarial.TRANSFORMER, adversarial.MANY_LAYERS)
        ),
        *("A validation pass", "An epoch"),
    ),
    "communication": (
        *("Bytes of a step", "Planned levels", "A plan of a net of 10.2 M", "A step of two ranks on one machine"),
        *(f"A step over {megabits:g} Mbit/s" for megabits in communication.FULL.links),
    ),
    "several_machines": (*map(several_machines.title_of, several_machines.LINKS), several_machines.ACCURACY),
    "small_layers": (*small_layers.LAYERS, "growth"),
    "topk_selection": tuple(topk_selection.vectors(10, "cpu")),
    "memory": (memory.CALLBACKS, memory.STRATEGIES),
}


def markers() -> list[str]:
    page = (RESULTS.parents[1] / measured.PAGE).read_text(encoding="utf-8")
    return [line.split()[2] for line in page.splitlines() if line.startswith("<!-- begin: ")]


@pytest.mark.parametrize("script", TITLES)
def test_page_has_a_place_for_each_table_and_no_other(script):
    found = {name for name in markers() if name.startswith(f"{script}_")}
    assert found == {marker_of(script, title) for title in TITLES[script]}


@pytest.mark.parametrize("script", SCRIPTS)
def test_committed_results_are_those_of_the_page(script):
    path = RESULTS / f"{script}.json"
    titles = Results.read(path).tables if path.exists() else {}
    assert {marker_of(script, title) for title in titles} <= {*markers()}, (
        f"{path}: run `make bench ONLY={script}` again."
    )


@pytest.fixture
def _folder(monkeypatch, tmp_path):
    """Results of two scripts."""
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    monkeypatch.setattr(runner, "RESULTS", tmp_path)
    table = [Row("plain", 2.0, 1.0), Row("plain, again", 2.1, 1.05), Row("a", 2.0, 1.04, 1.0), Row("b", 3.0, 1.5, 1.0)]
    Results("a machine", 3, {"An epoch": table, "A step": []}).write(tmp_path / "adversarial.json")
    held = Row("ZClip", None, None, columns={rows.HELD: 0.001, rows.MOST: 0.4, rows.PEAK: 0.2})
    Results("a machine", 3, {"callbacks": [held]}).write(tmp_path / "memory.json")


@pytest.mark.usefixtures("_folder")
def test_parts_say_what_was_measured():
    names = ["adversarial_an_epoch", "adversarial_a_step", "clipping_64_m_entries"]
    text = {name: "\n".join(write()) for name, write in measured.parts(names).items()}
    assert text["machine"] == "**Machine.** a machine.\n"
    assert "Of 2 budgets, 0 hold, 1 are missed by no more than the noise, and 1 are missed." in text["budgets"]
    assert "| adversarial | An epoch | a | 1.040 | plain | <= 1.00 | 0.050 | within the noise |" in text["budgets"]
    assert "| b | 3.00 | 1.500 | <= 1.00 | missed |" in text["adversarial_an_epoch"]
    assert "could not measure" in text["adversarial_a_step"]
    assert text["clipping_64_m_entries"] == measured.NOT_YET
    assert "Not measured" in "".join(measured.memory_of(NMSparsity))
    line = " ".join("".join(measured.memory_of(ZClip)).split())
    assert "less than 0.05 times the bytes of the weights between steps, and 0.40 times around a log step" in line
    assert "The peak of the process is 0.20 times these bytes higher" in line


@pytest.mark.usefixtures("_folder")
def test_the_card_of_a_probe_says_what_a_look_costs(tmp_path):
    found = [Row("GradCAMLogger, 8 images", 1.0, 0.814, baseline="a step"), Row("a step", 2.0, 1.0)]
    Results("a machine", 3, {rows.LOOKS: found}).write(tmp_path / "diagnostics.json")
    line = " ".join("".join(measured.memory_of(GradCAMLogger)).split())
    assert "**Time.** A look (8 images) takes 0.814 times as long as a step." in line
    assert "**Time.**" not in "".join(measured.memory_of(HessianSpectrum))


@pytest.mark.usefixtures("_folder")
def test_several_machines_are_told_apart(tmp_path):
    Results("another", 3, {}).write(tmp_path / "clipping.json")
    assert [line.rstrip() for line in measured.machine()] == [
        "**Machine (`clipping.py`).** another.",
        "**Machine (`adversarial.py`, `memory.py`).** a machine.",
    ]


@pytest.mark.usefixtures("_folder")
def test_a_script_that_fails_loses_only_its_own_results(monkeypatch, tmp_path, capfd):
    def command_of(script, options):
        path = tmp_path / f"{script}.json"
        return [sys.executable, "-c", f"open({str(path)!r}, 'w') if {script!r} != 'memory' else 1 / 0"]

    written = []
    monkeypatch.setattr(runner, "command_of", command_of)
    monkeypatch.setattr(runner, "write_tables", lambda: written.append(True) or True)
    assert runner.main(["memory", "clipping"]) == 1
    assert {path.stem for path in tmp_path.iterdir()} == {"adversarial", "clipping"}
    assert written == [True]
    printed = capfd.readouterr().out
    assert "[1/2] memory.py, after 0 minutes; then clipping" in printed
    assert "Failed: memory." in printed
    assert runner.main(["clipping"]) == 0


def test_a_script_that_does_not_exist_is_refused(capsys):
    with pytest.raises(SystemExit):
        runner.main(["cliping"])
    assert "no such script: cliping" in capsys.readouterr().err
