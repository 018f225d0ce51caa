"""Makes a folder to fine-tune from: a small byte-level Llama that transformers trained on Python's standard library.

    python examples/huggingface/pretrain.py data/huggingface/llama

Whoever has a folder with a model already (``hf download NAME --local-dir FOLDER``) does not need this.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from examples.huggingface.data import PADDING  # noqa: E402
from examples.shakespeare.data import ShakespeareText  # noqa: E402

__all__ = ["pretrain"]


def pretrain(folder: str, data_dir: str = "data/shakespeare", steps: int = 100, width: int = 128, depth: int = 4) -> float:
    """Train a small Llama and write it with ``save_pretrained``.

    Args:
        folder: what to write.
        data_dir: where the text is cached.
        steps: of 16 windows of 64 bytes.
        width: channels of the hidden states.
        depth: decoder blocks.

    Returns:
        the loss of the last step.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=depth,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=PADDING,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    text = ShakespeareText(data_dir, batch_size=16, sequence_length=64, source="stdlib")
    text.prepare_data()
    text.setup("fit")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loss = torch.tensor(torch.nan)
    for _, (tokens, _) in zip(range(steps), DataLoader(text.train_windows, batch_size=16, shuffle=True, drop_last=True)):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--data-dir", default="data/shakespeare")
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()
    loss = pretrain(arguments.folder, arguments.data_dir, arguments.steps)
    print(f"{arguments.folder}: loss {loss:.2f} after {arguments.steps} steps")


if __name__ == "__main__":
    main()
