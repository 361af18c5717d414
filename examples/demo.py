"""What lightning-grad does, in a minute: one transformer trained dense and 1:8 sparse, three ways (``make demo``)."""

from pathlib import Path

INTRODUCTION = """\
lightning-grad: N:M sparsity in a Lightning project that knows nothing of it

A small vision transformer learns handwritten digits, first dense, then with one
line added, so that of every 8 weights of its encoder only 1 is left:

    Trainer(callbacks=[NMSparsity(pattern="1:8", recipe="mdgf-exponential")])

Four trainings, about a minute on a laptop's processor.
"""

PLACES = """
Written to {folder}/
  comparison.png                    the recipes side by side
  results.csv                       the numbers of the table
  <recipe>_seed0/nm_sparsity.png    one training: density, mask changes, accuracy
  <recipe>_seed0/metrics.csv        its scalars
  <recipe>_seed0/last.ckpt          its checkpoint, an ordinary one
  wandb/offline-run-*/              W&B: the same, histograms and masks

Show it in W&B:       wandb sync {folder}/wandb/offline-run-*
Try other settings:   .venv/bin/python examples/nm_sparsity.py --help"""


def main(output: Path = Path("runs/demo"), epochs: int = 16) -> None:
    """Train, and tell what came of it."""
    print(INTRODUCTION, flush=True)
    from nm_sparsity import Study, print_table, run_study  # takes seconds, so after the first words

    study = Study(epochs=epochs, output=output, wandb="offline", accelerator="cpu")
    results = run_study(study)
    print()
    print_table(results, study.pattern)
    print(PLACES.format(folder=output))


if __name__ == "__main__":
    main()
