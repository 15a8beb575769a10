"""Checkpoints: Hugging Face safetensors <-> Orbax, leaf by leaf and without torch."""
