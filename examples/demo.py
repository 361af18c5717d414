"""What lightning-grad does, in three minutes: sparse, clipped, pruned, attacked and compressed (``make demo``)."""

from dataclasses import replace
from pathlib import Path

INTRODUCTION = """\
lightning-grad: gradient techniques in Lightning projects that know nothing of it

1. Sparse weights (about a minute). A small vision transformer learns handwritten
   digits, first dense, then with one line added, so that of every 8 weights of
   its encoder only 1 is left:

       Trainer(callbacks=[NMSparsity(pattern="1:8", recipe="mdgf-exponential")])

2. Clipped gradients (half a minute). A small language model learns sums, so fast
   that its loss spikes, first without clipping, then with one line added:

       Trainer(callbacks=[ZClip()])

3. Pruned data (half a minute). A small residual network learns handwritten digits
   from all samples, then from half of them, with one line added:

       Trainer(callbacks=[DataPruning(prune=0.5, epoch=3)])

   The same line with prune=0 leaves none out, and finds wrong labels.

4. Attacked inputs (a quarter of a minute). A small network learns handwritten
   digits as they are, then as an attack changes them in each step, so that it
   errs. Its learning rate is cut when the accuracy under attack stops rising:

       Trainer(callbacks=[AdversarialTraining(0.15), AdversarialEvaluation(0.15),
                          AccuracyGradientLR("adversarial/val_acc")])

5. Compressed gradients (half a minute). Two processes train one network, each on
   its half of every batch. They send each other all of their gradients, then an
   approximation, then only the largest entries, with one line changed:

       Trainer(devices=2, strategy=DGCStrategy(ratio=0.001))
"""

SPARSITY = "1. Sparse weights: four trainings\n"
CLIPPING = "\n2. Clipped gradients: seven trainings\n"
PRUNING = "\n3. Pruned data: four trainings, and a short one that looks for wrong labels\n"
ATTACKS = "\n4. Attacked inputs: three trainings\n"
COMPRESSION = "\n5. Compressed gradients: three trainings, each on two processes\n"

PLACES = """
Written to {folder}/
  comparison.png                    sparse weights: the recipes side by side
  results.csv                       the numbers of the first table
  <recipe>_seed0/nm_sparsity.png    one training: density, mask changes, accuracy
  <recipe>_seed0/metrics.csv        its scalars
  <recipe>_seed0/last.ckpt          its checkpoint, an ordinary one
  wandb/offline-run-*/              W&B: the same, histograms and masks
  clipping/comparison.png           clipping: losses and gradient norms
  clipping/results.csv              the numbers of the second table
  clipping/*_seed0/steps.csv        loss and gradient norms of every step
  data_pruning/comparison.png       pruned data: accuracy against samples seen
  data_pruning/results.csv          the numbers of the third table
  data_pruning/label_errors.png     the wrong labels among the hardest samples
  data_pruning/scores/*/*.html      the hardest and easiest samples, as a page
  adversarial/digits.png            attacked inputs: the digits, and the answers
  adversarial/comparison.png        accuracy over epochs, attacked and not
  adversarial/rates.png             the learning rate and its cuts
  adversarial/results.csv           the numbers of the fourth table
  strategies/comparison.png         compressed gradients: accuracy by megabytes
  strategies/results.csv            the numbers of the fifth table
  strategies/dgc*_seed0/dgc_strategy.png  one training: bytes a step, by layer, unsent

Show it in W&B:       wandb sync {folder}/wandb/offline-run-*
Try other settings:   .venv/bin/python examples/sparsity.py --help
                      .venv/bin/python examples/clipping.py --help
                      .venv/bin/python examples/data_pruning.py --help
                      .venv/bin/python examples/adversarial.py --help
                      .venv/bin/python examples/communication.py --help"""


def main(
    output: Path = Path("runs/demo"),
    epochs: int = 16,
    steps: int = 350,
    pruned_epochs: int = 20,
    attacked_epochs: int = 24,
    compressed_epochs: int = 24,
) -> None:
    """Train, and tell what came of it."""
    print(INTRODUCTION, SPARSITY, sep="\n", flush=True)
    import sparsity  # takes seconds, so after the first words

    progressive = sparsity.Study(epochs=epochs, output=output, wandb="offline", accelerator="cpu")
    results = sparsity.run_study(progressive)
    print()
    sparsity.print_table(results, progressive.pattern)

    print(CLIPPING, flush=True)
    import clipping

    spikes = clipping.Study(steps=steps, output=output / "clipping", accelerator="cpu")
    trained = clipping.run_study(spikes)
    print()
    clipping.print_table(trained, spikes.steps)

    print(PRUNING, flush=True)
    prune_data(output / "data_pruning", pruned_epochs)

    print(ATTACKS, flush=True)
    attack_inputs(output / "adversarial", attacked_epochs)

    print(COMPRESSION, flush=True)
    compress_gradients(output / "communication", compressed_epochs)
    print(PLACES.format(folder=output))


def prune_data(output: Path, epochs: int) -> None:
    """Run the third part."""
    import data_pruning

    variants = ("full", "random", "hard", "infobatch")
    study = data_pruning.Study(variants, (0.5,), (0.0,), epochs=epochs, score_epoch=3, output=output, accelerator="cpu")
    results = data_pruning.run_study(study)
    data_pruning.print_table(results, study)
    data_pruning.print_findings(data_pruning.find_label_errors(replace(study, flips=(0.1,))))


def attack_inputs(output: Path, epochs: int) -> None:
    """Run the fourth part."""
    import adversarial

    schedule, rate = "accuracy-gradient", 0.1
    study = adversarial.Study(schedules=(schedule,), rates=(rate,), epochs=epochs, output=output, accelerator="cpu")
    adversarial.print_tables(adversarial.run_study(study), study)


def compress_gradients(output: Path, epochs: int) -> None:
    """Run the fifth part."""
    import communication

    study = communication.Study(("dense", "powersgd-4", "dgc-99.9"), epochs=epochs, output=output)
    communication.print_table(communication.run_study(study), study)


if __name__ == "__main__":
    main()
