"""What answers: video, prompts, answers and models."""
