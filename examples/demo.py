"""What lightning-grad does, in two minutes: sparse weights, and gradients that are clipped (``make demo``)."""

from pathlib import Path

INTRODUCTION = """\
lightning-grad: gradient techniques in a Lightning project that knows nothing of them

1. Sparse weights. A small vision transformer learns handwritten digits, first dense, then
   with one line added, so that of every 8 weights of its encoder only 1 is left:

       Trainer(callbacks=[NMSparsity(pattern="1:8", recipe="mdgf-exponential")])

   Four trainings, about a minute on a laptop's processor.
"""

CLIPPING = """
2. Clipped gradients. A small language model learns sums at six times its usual learning
   rate, where its loss spikes: without clipping, with Lightning's own, and with one line more:

       Trainer(callbacks=[ZClip()])

   Six trainings, half a minute.
"""

PLACES = """
Written to {folder}/
  comparison.png                    the recipes side by side
  results.csv                       the numbers of the table
  <recipe>_seed0/nm_sparsity.png    one training: density, mask changes, accuracy
  <recipe>_seed0/metrics.csv        its scalars
  <recipe>_seed0/last.ckpt          its checkpoint, an ordinary one
  clipping/comparison.png           losses and gradient norms of the second part
  clipping/results.csv              the numbers of its table
  wandb/offline-run-*/              W&B: the first part, with histograms and masks

Show it in W&B:       wandb sync {folder}/wandb/offline-run-*
Try other settings:   .venv/bin/python examples/nm_sparsity.py --help
                      .venv/bin/python examples/clipping.py --help"""


def main(output: Path = Path("runs/demo"), epochs: int = 16, steps: int = 400) -> None:
    """Train, and tell what came of it."""
    print(INTRODUCTION, flush=True)
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
