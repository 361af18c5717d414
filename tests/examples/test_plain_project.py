"""The plain project trains, reads its data and runs from the command line."""

import io
import pickle
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import plain_project
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from plain_project import (
    CIFAR10,
    CharTransformer,
    Digits,
    ImageClassifier,
    ResidualConvNet,
    Text,
    VisionTransformer,
)
from plain_project.cifar10 import flip_and_shift, read_cifar10
from plain_project.schedules import warmup_constant, warmup_cosine
from sklearn.datasets import load_digits
from torch import nn

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
]

EXAMPLES = Path(plain_project.__file__).parents[1]
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    """Keep the worker processes of the test run from fighting over the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog, naïvely.\n" * 40, encoding="utf-8")
    return path


def smooth_images(n: int) -> np.ndarray:
    """Return images (n, 32, 32, 3) that survive JPEG."""
    ramp = np.linspace(0, 110, 32)
    base = ramp[:, None, None] + ramp[None, :, None] + np.zeros((32, 32, 3))
    return (base[None] + np.arange(n)[:, None, None, None]).astype(np.uint8)


def write_batches(folder: Path, images: np.ndarray, labels: np.ndarray, names: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    parts = zip(names, np.array_split(images, len(names)), np.array_split(labels, len(names)), strict=True)
    for name, part, targets in parts:
        data = part.transpose(0, 3, 1, 2).reshape(len(part), -1)
        (folder / name).write_bytes(pickle.dumps({b"data": data, b"labels": targets.tolist()}))


def write_archive(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    image_module = pytest.importorskip("PIL.Image")
    encoded = []
    for image in images:
        stream = io.BytesIO()
        image_module.fromarray(image).save(stream, "JPEG", quality=95)
        encoded.append(stream.getvalue())
    np.savez(
        path,
        jpeg=np.frombuffer(b"".join(encoded), dtype=np.uint8),
        offsets=np.cumsum([0] + [len(e) for e in encoded]),
        labels=labels.astype(np.uint8),
        classes=np.array([f"class {i}" for i in range(10)]),
    )


@pytest.fixture
def cifar_batches(tmp_path: Path) -> Path:
    images, labels = smooth_images(20), np.arange(20) % 10
    folder = tmp_path / "batches"
    inner = folder / "cifar-10-batches-py"
    write_batches(inner, images, labels, [f"data_batch_{i}" for i in range(1, 6)])
    write_batches(inner, images[:8], labels[:8], ["test_batch"])
    return folder


@pytest.fixture
def cifar_archives(tmp_path: Path) -> Path:
    images, labels = smooth_images(20), np.arange(20) % 10
    write_archive(tmp_path / "cifar10_train.npz", images, labels)
    write_archive(tmp_path / "cifar10_test.npz", images[:8], labels[:8])
    return tmp_path


def run_once(model: LightningModule, data: LightningDataModule, **kwargs: object) -> Trainer:
    trainer = Trainer(fast_dev_run=True, **QUIET, **kwargs)
    trainer.fit(model, data)
    return trainer


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("cls", [VisionTransformer, ResidualConvNet])
def test_image_models_run_on_digits(cls: type[ImageClassifier], optimizer: str) -> None:
    model, data = cls(optimizer=optimizer, label_smoothing=0.1), Digits()
    trainer = run_once(model, data)
    assert {"train_loss", "val_loss", "val_acc"} <= trainer.callback_metrics.keys()
    assert "test_acc" in trainer.test(model, data, verbose=False)[0]


@pytest.mark.parametrize("model", [VisionTransformer(32, 8, channels=3), ResidualConvNet(3, blocks_per_stage=(1, 2))])
def test_image_models_run_on_cifar10(model: ImageClassifier, cifar_batches: Path) -> None:
    data = CIFAR10(cifar_batches, batch_size=6)
    trainer = run_once(model, data)
    assert "test_acc" in trainer.test(model, data, verbose=False)[0]


def test_char_transformer_runs_on_text(text_file: Path) -> None:
    data = Text(text_file, context=16)
    trainer = run_once(CharTransformer(data.vocabulary_size, context=16), data)
    metrics = trainer.callback_metrics
    assert {"train_loss", "val_loss", "val_perplexity", "val_acc"} <= metrics.keys()
    torch.testing.assert_close(metrics["val_loss"].exp(), metrics["val_perplexity"])


def test_image_classifier_takes_any_network() -> None:
    run_once(ImageClassifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), lr=0.1), Digits())


def test_wrong_patch_size_and_optimizer_raise() -> None:
    with pytest.raises(ValueError, match="patch_size=3"):
        VisionTransformer(patch_size=3)
    with pytest.raises(ValueError, match="optimizer"):
        run_once(ResidualConvNet(optimizer="lbfgs"), Digits())


def test_network_is_causal() -> None:
    model = CharTransformer(vocabulary_size=20, context=12)
    ids = torch.randint(20, (2, 12))
    changed = ids.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 20
    for training in (True, False):
        model.train(training)
        with torch.no_grad():
            before, after = model(ids), model(changed)
        torch.testing.assert_close(before[:, :7], after[:, :7])
        assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_generate_continues_the_prompt_beyond_the_context() -> None:
    prompt = torch.tensor([3, 1, 4])
    ids = CharTransformer(vocabulary_size=20, context=8).generate(prompt, 10)
    assert ids.shape == (13,)
    assert ids[:3].equal(prompt)
    assert ids.max() < 20


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_cosine_schedule_warms_up_and_ends_near_zero(optimizer: str) -> None:
    model = ResidualConvNet(width=2, optimizer=optimizer, lr=0.1)
    trainer = Trainer(max_epochs=2, enable_checkpointing=False, num_sanity_val_steps=0, **QUIET)
    trainer.fit(model, Digits(batch_size=256))
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-6)
    factors = [warmup_cosine(step, total_steps=100, warmup_steps=5) for step in range(101)]
    assert factors[:6] == sorted(factors[:6])
    assert factors[5] == 1
    assert factors[5:] == sorted(factors[5:], reverse=True)


def test_warmup_schedule_stays_at_its_peak() -> None:
    trainer = Trainer(max_steps=10, enable_checkpointing=False, num_sanity_val_steps=0, **QUIET)
    trainer.fit(ResidualConvNet(width=2, lr=0.1, schedule="warmup", warmup=0.2), Digits(batch_size=256))
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.1
    assert [warmup_constant(step, warmup_steps=3) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    with pytest.raises(ValueError, match="'warmup' needs a run of known length"):
        Trainer(max_epochs=-1, enable_checkpointing=False, **QUIET).fit(ResidualConvNet(schedule="warmup"), Digits())


def test_constant_schedule_and_endless_run() -> None:
    assert run_once(ResidualConvNet(schedule="constant", lr=0.1), Digits()).optimizers[0].param_groups[0]["lr"] == 0.1
    trainer = Trainer(max_epochs=-1, enable_checkpointing=False, **QUIET)
    with pytest.raises(ValueError, match="max_epochs"):
        trainer.fit(ResidualConvNet(), Digits())


def test_checkpoint_restores_model_and_hyperparameters(tmp_path: Path) -> None:
    model, data = VisionTransformer(width=16, heads=2, lr=0.02), Digits()
    trainer = Trainer(max_steps=3, limit_val_batches=0, enable_checkpointing=False, **QUIET)
    trainer.fit(model, data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    restored = VisionTransformer.load_from_checkpoint(tmp_path / "last.ckpt")
    assert restored.hparams["width"] == 16
    assert restored.hparams["lr"] == restored.lr == 0.02
    torch.testing.assert_close(restored.state_dict(), model.state_dict())
    resumed = Trainer(max_steps=5, limit_val_batches=0, enable_checkpointing=False, **QUIET)
    resumed.fit(VisionTransformer(width=16, heads=2, lr=0.02), data, ckpt_path=tmp_path / "last.ckpt")
    assert resumed.global_step == 5


def test_digits_split_is_disjoint_stratified_and_stable() -> None:
    labels = load_digits().target
    train, val, test = Digits().split(labels)
    assert [len(train), len(val), len(test)] == [1400, 197, 200]
    assert sorted(np.concatenate([train, val, test])) == list(range(1797))
    assert np.bincount(labels[test]).min() >= 19
    for again, part in zip(Digits().split(labels), (train, val, test), strict=True):
        np.testing.assert_array_equal(again, part)
    assert not np.array_equal(Digits(seed=1).split(labels)[2], test)


def test_digits_are_standardised_and_only_training_images_are_noisy() -> None:
    data, noisy = Digits(), Digits(noise=0.5)
    data.setup("fit")
    noisy.setup("fit")
    images = data.train_set.tensors[0]
    assert images.shape == (1400, 1, 8, 8)
    assert images.mean().item() == pytest.approx(0, abs=1e-5)
    assert images.std().item() == pytest.approx(1, abs=1e-5)
    assert (noisy.train_set.tensors[0] - images).std().item() == pytest.approx(0.5, rel=0.05)
    assert noisy.val_set.tensors[0].equal(data.val_set.tensors[0])


def test_a_share_of_the_training_labels_is_flipped_always_in_the_same_way() -> None:
    data, flipped, again = Digits(), Digits(flip=0.1), Digits(flip=0.1)
    for each in (data, flipped, again):
        each.setup("fit")
    right, wrong = data.train_set.tensors[1], flipped.train_set.tensors[1]
    assert len(flipped.flipped) == 140
    assert (right != wrong).nonzero().flatten().equal(flipped.flipped)
    assert 0 <= wrong.min() < wrong.max() <= 9
    assert len(((wrong - right)[flipped.flipped] % 10).unique()) == 9
    assert wrong.equal(again.train_set.tensors[1])
    assert flipped.val_set.tensors[1].equal(data.val_set.tensors[1])
    assert flipped.test_set.tensors[1].equal(data.test_set.tensors[1])
    assert len(data.flipped) == 0
    drawn = torch.randperm(1400, generator=torch.Generator().manual_seed(0))[:280]
    assert torch.isin(drawn, flipped.flipped).sum() < 56  # 28 by chance; a draw by the same seed is another one


@pytest.mark.parametrize("split", ["train", "test"])
def test_cifar10_formats_give_the_same_images(cifar_batches: Path, cifar_archives: Path, split: str) -> None:
    n = 20 if split == "train" else 8
    inner = cifar_batches / "cifar-10-batches-py"
    for folder, tolerance in ((cifar_batches, 0), (inner, 0), (cifar_archives, 4)):
        images, labels = read_cifar10(folder, split)
        assert images.dtype == torch.uint8
        expected = torch.from_numpy(smooth_images(n)).permute(0, 3, 1, 2)
        assert (images.int() - expected.int()).abs().max() <= tolerance
        assert labels.tolist() == [i % 10 for i in range(n)]
        assert read_cifar10(folder, split, limit=7)[0].equal(images[:7])


def test_cifar10_splits_normalises_and_augments(cifar_batches: Path) -> None:
    data, plain = CIFAR10(cifar_batches), CIFAR10(cifar_batches, limit=10, augment=False)
    data.setup("fit")
    plain.setup("fit")
    assert (len(data.train_set), len(data.val_set)) == (18, 2)
    assert (len(plain.train_set), len(plain.val_set)) == (9, 1)
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (18, 3, 32, 32)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert plain.train_set[0][0].equal(plain.train_set[0][0])
    assert not torch.stack([data.train_set[0][0] for _ in range(4)]).std(dim=0).eq(0).all()


def test_augmentation_only_flips_and_shifts() -> None:
    torch.manual_seed(0)
    image = torch.arange(1, 3 * 6 * 6 + 1, dtype=torch.uint8).view(1, 3, 6, 6)
    padded = nn.functional.pad(torch.cat([image, image.flip(3)]), (2, 2, 2, 2))
    crops = [padded[i, :, t : t + 6, s : s + 6] for i in range(2) for t in range(5) for s in range(5)]
    seen = [
        {i for i, crop in enumerate(crops) if crop.equal(out)} for out in flip_and_shift(image.repeat(200, 1, 1, 1), 2)
    ]
    assert all(seen)
    assert len(set().union(*seen)) > 45


def test_cifar10_missing_files_raise(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data_batch_1.*cifar-10-batches-py.*cifar10_train\.npz"):
        CIFAR10(tmp_path / "nowhere").setup("fit")


def test_missing_pillow_is_named(cifar_archives: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match="Pillow"):
        read_cifar10(cifar_archives, "train")


@pytest.mark.parametrize("default", [True, False])
def test_text_round_trip_and_windows(text_file: Path, default: bool) -> None:
    data = Text(None if default else text_file, context=32)
    sample = data.text[100:400]
    assert data.decode(data.encode(sample)) == sample
    assert data.vocabulary_size == len(set(data.text)) <= 128
    data.setup("fit")
    inputs, targets = data.train_set.tensors
    assert data.decode(inputs.flatten()) == data.text[: inputs.numel()]
    assert targets.flatten()[:-1].equal(inputs.flatten()[1:])
    assert len(data.train_set) / len(data.val_set) == pytest.approx(9, rel=0.2)


def test_text_too_short_raises(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(ValueError, match="context=64"):
        Text(tmp_path / "short.txt").setup("fit")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # LightningCLI's use of jsonargparse
def test_command_line_takes_short_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--model.lr", "0.01", "--trainer.fast_dev_run", "true", "--trainer.accelerator", "cpu"]
    monkeypatch.setattr(sys, "argv", ["train.py", "fit", "--model", "VisionTransformer", "--data", "Digits", *options])
    runpy.run_path(str(EXAMPLES / "train.py"), run_name="__main__")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # LightningCLI's use of jsonargparse
def test_command_line_takes_a_config(tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from train import main

    monkeypatch.setattr(sys, "argv", ["train.py"])
    config = tmp_path / "run.yaml"
    config.write_text(
        f"""
        trainer: {{max_steps: 2, limit_val_batches: 1, accelerator: cpu, enable_progress_bar: false,
                   logger: false, default_root_dir: {tmp_path}}}
        model: {{class_path: plain_project.CharTransformer, init_args: {{width: 16, lr: 0.01}}}}
        data: {{class_path: plain_project.Text, init_args: {{path: {text_file}, batch_size: 2}}}}
        """
    )
    cli = main(["fit", "--config", str(config)])
    assert isinstance(cli.model, CharTransformer)
    assert cli.model.hparams["width"] == 16
    assert cli.trainer.global_step == 2


def test_project_stands_on_its_own() -> None:
    sources = [*EXAMPLES.glob("plain_project/*.py"), EXAMPLES / "train.py"]
    assert len(sources) > 3
    assert not [path for path in sources if "lightning_grad" in path.read_text()]
    assert all(hasattr(plain_project, name) for name in plain_project.__all__)
