"""A demo of lightning-grad in a few minutes: sparse, clipped, pruned, attacked, compressed, exported (``make demo``)."""

import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

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
  quantization/comparison.png       exported networks: accuracy and size
  quantization/results.csv          the numbers of the sixth table
  quantization/*_seed0/model.onnx   the exported networks

Show it in W&B:       wandb sync {folder}/wandb/offline-run-*
Full studies:         .venv/bin/python -m studies --list
Their options:        .venv/bin/python -m studies --help"""


def main(
    output: Path = Path("runs/demo"),
    epochs: int = 12,
    steps: int = 220,
    seeds: int = 3,
    attacked_epochs: int = 20,
    compressed_epochs: int = 20,
    exported_epochs: int = 12,
) -> None:
    """Run the six parts, and print their results."""
    print(TITLE, flush=True)
    # The imports take seconds, so the title comes first.
    import torch

    from studies.claims import adversarial, clipping, communication, label_errors, quantization, sparsity

    torch.set_num_threads(1)
    recipes = ("dense", "sr-ste", "mdgf-exponential")
    sparse = sparsity.Sparsity(arms=recipes, epochs=epochs, output=output, wandb="offline", rates=())
    ours = tuple(f"{attack} {adversarial.OURS}" for attack in adversarial.ATTACKS)
    ways = ("dense", "powersgd-4", "dgc-99.9")
    show(1, sparsity.IN_THE_DEMO, sparse, seeds)
    show(2, clipping.IN_THE_DEMO, clipping.BadBatch(steps=steps, output=output / "clipping"), seeds)
    errors = label_errors.LabelErrors(score_epoch=3, output=output / "data_pruning")
    show(3, label_errors.IN_THE_DEMO, errors, seeds)
    attacked = adversarial.AccelAT(arms=ours, rates=(0.1,), epochs=attacked_epochs, output=output / "adversarial")
    show(4, adversarial.IN_THE_DEMO, attacked, seeds)
    compressed = communication.Communication(
        arms=ways, rates=(0.05,), epochs=compressed_epochs, output=output / "communication"
    )
    show(5, communication.IN_THE_DEMO, compressed, seeds)
    exported = quantization.SmallerFiles(rates=(), epochs=exported_epochs, output=output / "quantization")
    show(6, quantization.IN_THE_DEMO, exported, 1)
    print(PLACES.format(folder=output))


def show(number: int, text: str, claim: Any, seeds: int) -> None:
    """Run one part, print its table, and write its figures."""
    from studies.report import write
    from studies.runner import train_all

    print(f"\n{number}. {text}", flush=True)
    write(replace(claim, seeds=seeds), train_all(claim, seeds))


if __name__ == "__main__":
    parser = ArgumentParser(description=TITLE, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder of the results")
    main(parser.parse_args().output)
