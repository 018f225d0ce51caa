"""A small Llama of Hugging Face transformers is fine-tuned from a local folder."""

from __future__ import annotations
