"""How it learns. So far: settings with presets, GRPO's arithmetic, checkpoints. The loop that uses them is to come."""
