"""How it learns: cold start (sft) and GRPO with reverse thinking, on prefix trees, in a loop that resumes exactly."""
