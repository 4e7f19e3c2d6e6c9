"""Model folders: Hugging Face safetensors and GGUF, names and shapes both ways."""
