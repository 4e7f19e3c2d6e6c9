"""One transformer, two families: MLA with DeepSeekMoE, and the Llama-style dense form."""
