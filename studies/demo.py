"""A demo of lightning-grad in three minutes: sparse, clipped, pruned, attacked and compressed (``make demo``)."""

import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "examples"))

TITLE = "lightning-grad: gradient techniques for unmodified Lightning projects"

PLACES = """
Written to {folder}/
  comparison.png                    sparse weights: accuracy, density, mask changes
  results.csv                       the numbers of the first table
  <recipe>_seed0/nm_sparsity.png    one training: density, mask changes, accuracy
  <recipe>_seed0/metrics.csv        its scalars
  <recipe>_seed0/last.ckpt          its checkpoint, with plain keys
  wandb/offline-run-*/              W&B: the same, histograms and masks
  clipping/comparison.png           one bad batch: which rules save the run
  clipping/results.csv              the numbers of the second table
  clipping/*_seed0/steps.csv        loss and gradient norms of every step
  data_pruning/label_errors.png     wrong labels found, and the hardest samples
  data_pruning/label_errors.csv     the numbers of the third table
  data_pruning/scores/*/*.png       the hardest and easiest samples, the scores
  adversarial/robustness.png        attacked inputs: accuracy by strength, and cost
  adversarial/digits.png            the digits, the changes and the predictions
  adversarial/rates.png             the accuracy, and the cuts of the learning rate
  adversarial/results.csv           the numbers of the fourth table
  communication/comparison.png      compressed gradients: accuracy, megabytes sent
  communication/results.csv         the numbers of the fifth table
  communication/dgc*_seed0/*.png    one training: bytes a step, by layer, unsent

Show it in W&B:       wandb sync {folder}/wandb/offline-run-*
Try other settings:   .venv/bin/python studies/sparsity.py --help
                      .venv/bin/python studies/clipping.py --help
                      .venv/bin/python studies/data_pruning.py --help
                      .venv/bin/python studies/adversarial.py --help
                      .venv/bin/python studies/communication.py --help"""


def main(
    output: Path = Path("runs/demo"),
    epochs: int = 12,
    steps: int = 220,
    seeds: int = 3,
    attacked_epochs: int = 20,
    compressed_epochs: int = 20,
) -> None:
    """Run the five parts, and print their results."""
    print(TITLE, flush=True)
    make_sparse(output, epochs, seeds)
    clip_gradients(output / "clipping", steps, seeds)
    find_label_errors(output / "data_pruning", seeds)
    attack_inputs(output / "adversarial", attacked_epochs)
    compress_gradients(output / "communication", compressed_epochs)
    print(PLACES.format(folder=output))


def make_sparse(output: Path, epochs: int, seeds: int) -> None:
    """Run the first part."""
    from studies import sparsity  # the import takes seconds, so print the title first

    print(f"\n1. {sparsity.IN_THE_DEMO}", flush=True)
    recipes = ("sr-ste", "mdgf-exponential")
    study = sparsity.Study(
        "1:8", recipes, seeds=seeds, epochs=epochs, output=output, wandb="offline", accelerator="cpu"
    )
    results = sparsity.run_study(study)
    print()
    sparsity.print_table(results, study)


def clip_gradients(output: Path, steps: int, seeds: int) -> None:
    """Run the second part."""
    from studies import clipping

    print(f"\n2. {clipping.IN_THE_DEMO}", flush=True)
    study = clipping.Study(steps=steps, seeds=seeds, output=output, accelerator="cpu")
    results = clipping.run_study(study)
    print()
    clipping.print_table(results, study)


def find_label_errors(output: Path, seeds: int) -> None:
    """Run the third part."""
    from studies import data_pruning

    print(f"\n3. {data_pruning.IN_THE_DEMO}", flush=True)
    study = data_pruning.Study((), (), (0.1,), seeds, score_epoch=3, output=output, accelerator="cpu")
    data_pruning.print_findings(data_pruning.find_label_errors(study))


def attack_inputs(output: Path, epochs: int) -> None:
    """Run the fourth part."""
    from studies import adversarial
    from studies.adversarial_trainings import Study

    print(f"\n4. {adversarial.IN_THE_DEMO}", flush=True)
    schedule, rate = "accuracy-gradient", 0.1
    study = Study(schedules=(schedule,), rates=(rate,), seeds=3, epochs=epochs, output=output, accelerator="cpu")
    adversarial.print_tables(adversarial.run_study(study), study)


def compress_gradients(output: Path, epochs: int) -> None:
    """Run the fifth part."""
    from studies import communication

    print(f"\n5. {communication.IN_THE_DEMO}", flush=True)
    study = communication.Study(("dense", "powersgd-4", "dgc-99.9"), seeds=3, epochs=epochs, output=output)
    communication.print_table(communication.run_study(study), study)


if __name__ == "__main__":
    parser = ArgumentParser(description=TITLE, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder of the results")
    main(parser.parse_args().output)
