"""What lightning-grad does, in two minutes: sparse weights, and gradients that are clipped (``make demo``)."""

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
"""

SPARSITY = "1. Sparse weights: four trainings\n"
CLIPPING = "\n2. Clipped gradients: six trainings\n"

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

Show it in W&B:       wandb sync {folder}/wandb/offline-run-*
Try other settings:   .venv/bin/python examples/nm_sparsity.py --help
                      .venv/bin/python examples/clipping.py --help"""


def main(output: Path = Path("runs/demo"), epochs: int = 16, steps: int = 350) -> None:
    """Train, and tell what came of it."""
    print(INTRODUCTION, SPARSITY, sep="\n", flush=True)
    import nm_sparsity  # takes seconds, so after the first words

    sparsity = nm_sparsity.Study(epochs=epochs, output=output, wandb="offline", accelerator="cpu")
    results = nm_sparsity.run_study(sparsity)
    print()
    nm_sparsity.print_table(results, sparsity.pattern)

    print(CLIPPING, flush=True)
    import clipping

    spikes = clipping.Study(steps=steps, output=output / "clipping", accelerator="cpu")
    trained = clipping.run_study(spikes)
    print()
    clipping.print_table(trained, spikes.steps)
    print(PLACES.format(folder=output))


if __name__ == "__main__":
    main()
