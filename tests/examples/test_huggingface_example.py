from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from examples.huggingface.data import ByteParagraphs, Paragraphs
from examples.huggingface.pretrain import pretrain
from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.models import CausalLM, save_pretrained

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "examples" / "huggingface" / "config.yaml"
PARAGRAPHS = b"\n\n".join(b"To be, or not to be: %d" % index * (1 + index % 3) for index in range(2000))


@pytest.fixture
def text(tmp_path: Path) -> str:
    for name in ("shakespeare", "stdlib"):
        (tmp_path / f"{name}.txt").write_bytes(PARAGRAPHS)
    return str(tmp_path)


def test_paragraphs_are_cut_off_or_padded() -> None:
    paragraphs = Paragraphs(b"\n\nlonger than six\n\n\n\nabc\n\nx\n", length=6)
    assert len(paragraphs) == 2, "nothing can be predicted in a paragraph of one byte"
    whole, short = paragraphs[0], paragraphs[1]
    assert bytes(whole["input_ids"].tolist()) == b"longer" and whole["attention_mask"].all()
    assert bytes(short["input_ids"].tolist()) == b"abc\0\0\0" and short["attention_mask"].tolist() == [1, 1, 1, 0, 0, 0]


def test_batches_are_whole_and_of_both_parts(text: str) -> None:
    data = ByteParagraphs(text, batch_size=4, sequence_length=16, validation_fraction=0.2)
    data.prepare_data()
    data.setup("fit")
    assert len(data.train) > 3 * len(data.val) > 0
    for batches in (data.train_dataloader(), data.val_dataloader()):
        for batch in batches:
            assert {name: value.shape for name, value in batch.items()} == {"input_ids": (4, 16), "attention_mask": (4, 16)}


def test_a_text_of_few_paragraphs(tmp_path: Path) -> None:
    (tmp_path / "shakespeare.txt").write_bytes(b"to be " * 1000)
    data = ByteParagraphs(str(tmp_path), batch_size=4, sequence_length=8)
    with pytest.raises(ConfigurationError, match=r"training part of the text has 1 paragraphs.*batch_size=4"):
        data.setup("fit")


def test_one_byte_leaves_nothing_to_predict() -> None:
    with pytest.raises(ConfigurationError, match="sequence_length=1 leaves nothing to predict"):
        ByteParagraphs(sequence_length=1)


def test_the_config_fits_together() -> None:
    config = yaml.safe_load(CONFIG.read_text())
    strategy = config["trainer"]["strategy"]["init_args"]
    assert strategy["stages"] * strategy["replicas"] == config["trainer"]["devices"]
    assert ByteParagraphs(**config["data"]["init_args"]).batch_size % strategy["micro_batches"] == 0
    assert isinstance(config["model"]["init_args"]["learning_rate"], float)


def test_a_small_llama_is_fine_tuned_by_the_command_and_exported(text: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = str(tmp_path / "llama")
    assert pretrain(folder, text, steps=2, width=16, depth=2) < 6
    options = {
        "--model.init_args.source": folder,
        "--data.init_args.data_dir": text,
        "--data.init_args.batch_size": "4",
        # Half of the processes, each of which imports everything.
        "--trainer.devices": "2",
        "--trainer.strategy.init_args.replicas": "1",
        "--trainer.max_steps": "2",
        "--trainer.val_check_interval": "2",
        "--trainer.limit_val_batches": "1",
        "--trainer.enable_progress_bar": "false",
    }
    done = subprocess.run(
        [sys.executable, "-m", "lightning_sentinel.cli", "fit", "--config", str(CONFIG), *sum(options.items(), ())],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (checkpoint,) = tmp_path.rglob("last.ckpt")
    model = CausalLM.load_from_checkpoint(checkpoint).eval()
    assert not torch.equal(model.net[0].tokens.weight, CausalLM(folder).net[0].tokens.weight)
    save_pretrained(checkpoint, tmp_path / "finetuned")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "finetuned").eval()
    tokens = torch.tensor([list(b"To be, or")])
    assert torch.equal(exported(tokens).logits, model(tokens))
