"""How it learns: SFT and GRPO on prefix trees, their settings and presets, checkpoints, plans of memory, merging."""
