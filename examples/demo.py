"""What lightning-grad does, in a minute: one transformer trained dense and 1:8 sparse, three ways (``make demo``)."""

from pathlib import Path

INTRODUCTION = """\
lightning-grad: N:M sparsity in a Lightning project that knows nothing of it

A small vision transformer learns handwritten digits, first dense, then with one
line added, so that of every 8 weights in its layers only 1 is left:

    Trainer(callbacks=[NMSparsity(pattern="1:8", recipe="mdgf-exponential")])

Four trainings, about a minute on a laptop's CPU.
"""


def main(output: Path = Path("runs/demo"), epochs: int = 15) -> None:
    """Train, and tell what came of it."""
    print(INTRODUCTION, flush=True)
    from nm_sparsity import Study, print_table, run_study, say_where  # takes seconds, so after the first words

    study = Study(epochs=epochs, output=output, wandb="offline", accelerator="cpu")
    results = run_study(study)
    print()
    print_table(results, study.pattern)
    print()
    say_where(study)


if __name__ == "__main__":
    main()
